"""A run in SwanLab: which mode, one id, everything logged arrives, no secret does, and no network is waited for."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import swanlab
from swanlab.proto.swanlab.record.v1.record_pb2 import Record
from swanlab.sdk.internal.core_python.store import DataStoreReader
from tracked_run import begin, end, fill

from job.errors import UserError
from job.tracking import swanlab as tracking
from job.tracking.swanlab import choose_mode, new_run_id, start_tracker

KEY = "key0123456789abcdef"
SECRETS = {
    "SWANLAB_API_KEY": KEY,
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret",
    "HF_TOKEN": "planted-hub-token",
}


def records(folder: Path) -> list[Record]:
    """All that a run's folder holds, by SwanLab's own reader."""
    (path,) = folder.glob("run-*.swanlab")
    reader = DataStoreReader()
    reader.open(path)
    found = []
    for content in reader:
        record = Record()
        record.ParseFromString(content)
        found.append(record)
    reader.close()
    return found


def folders(place: Path) -> list[Path]:
    return sorted((place / "swanlog").glob("run-*"))


# ---- The id ----


def test_every_id_is_new_and_taken_by_swanlab() -> None:
    ids = {new_run_id() for _ in range(1000)}
    assert len(ids) == 1000
    for one in ids:
        assert swanlab.Settings.Run(id=one).id == one
        assert re.fullmatch("[a-z0-9]{21}", one)


# ---- The mode ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working folder, and nothing of SwanLab's in the environment."""
    for name in [name for name in os.environ if name.startswith("SWANLAB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    return tmp_path


def install_dashboard(installed: bool, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        (home / "packages" / "swanboard").mkdir(parents=True)
        (home / "packages" / "swanboard" / "__init__.py").touch()
        monkeypatch.syspath_prepend(home / "packages")
    else:
        monkeypatch.setitem(sys.modules, "swanboard", None)


@pytest.mark.parametrize(
    ("setting", "key", "dashboard", "own_mode", "mode"),
    [
        ("auto", "variable", False, None, "cloud"),
        ("auto", "variable", True, None, "cloud"),
        ("auto", "saved", False, None, "cloud"),
        ("auto", "saved elsewhere", False, None, "cloud"),
        ("auto", "in .env", False, None, "cloud"),
        ("auto", "empty", False, None, "offline"),
        ("auto", None, True, None, "local"),
        ("auto", None, False, None, "offline"),
        ("auto", "variable", True, "offline", "offline"),
        ("auto", "variable", True, "local", "local"),
        ("auto", "variable", True, "disabled", "disabled"),
        ("auto", "variable", True, "cloud", "cloud"),
        ("auto", "variable", True, "online", "cloud"),
        ("cloud", "variable", False, "offline", "cloud"),
        ("local", "variable", True, None, "local"),
        ("offline", "variable", True, None, "offline"),
        ("disabled", "variable", True, "cloud", "disabled"),
    ],
)
def test_the_mode_follows_the_setting_then_swanlab_then_what_there_is(
    setting: Any,
    key: str | None,
    dashboard: bool,
    own_mode: str | None,
    mode: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = f"machine https://api.swanlab.cn login https://swanlab.cn password {KEY}\n"
    if key in ("variable", "empty"):
        monkeypatch.setenv("SWANLAB_API_KEY", KEY if key == "variable" else "")
    elif key == "saved":
        (home / ".swanlab").mkdir()
        (home / ".swanlab" / ".netrc").write_text(saved)
    elif key == "saved elsewhere":
        monkeypatch.setenv("SWANLAB_SAVE_DIR", str(home / "elsewhere"))
        (home / "elsewhere").mkdir()
        (home / "elsewhere" / ".netrc").write_text(saved)
    elif key == "in .env":
        (home / ".env").write_text(f"SWANLAB_API_KEY={KEY}\n")
    if own_mode is not None:
        monkeypatch.setenv("SWANLAB_MODE", own_mode)
    install_dashboard(dashboard, home, monkeypatch)
    chosen, reason = choose_mode(setting)
    assert chosen == mode
    assert reason
    assert KEY not in reason


@pytest.mark.parametrize(
    ("setting", "environment", "said"),
    [
        ("cloud", {}, ["tracking.mode: 'cloud'", "SWANLAB_API_KEY", "swanlab login"]),
        ("auto", {"SWANLAB_MODE": "cloud"}, ["SWANLAB_MODE: 'cloud'", "SWANLAB_API_KEY", "swanlab login"]),
        ("local", {"SWANLAB_API_KEY": KEY}, ["tracking.mode: 'local'", "swanlab[dashboard]"]),
        ("auto", {"SWANLAB_API_KEY": KEY, "SWANLAB_MODE": "nowhere"}, ["SWANLAB_MODE", "nowhere"]),
    ],
)
def test_a_mode_that_cannot_be_is_refused_in_one_line_without_the_key(
    setting: Any, environment: dict[str, str], said: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_dashboard(False, home, monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        choose_mode(setting)
    line = str(refused.value)
    assert all(part in line for part in said)
    assert "\n" not in line
    assert KEY not in line


# ---- Starting ----

NAMES = {
    "project": "WikiLLM",
    "workspace": None,
    "name": "a run",
    "run_id": "id",
    "log_dir": Path("swanlog"),
    "config": {},
}


@pytest.mark.parametrize(
    ("wrong", "setting"),
    [
        ({"project": "维基"}, "tracking.project"),
        ({"workspace": "two words"}, "tracking.workspace"),
        ({"name": ""}, "run.name"),
        ({"log_dir": Path("/dev/null/swanlog")}, "tracking.log_dir"),
    ],
)
@pytest.mark.parametrize("mode", ["offline", "cloud"])
def test_a_name_or_folder_that_swanlab_cannot_take_is_named_at_once(
    wrong: dict[str, str], setting: str, mode: Any, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator: Any = SimpleNamespace(is_main_process=True, trackers=[])
    with pytest.raises(UserError) as refused:
        start_tracker(accelerator, mode=mode, **(NAMES | wrong))
    assert refused.value.setting == setting
    assert not caplog.records, "a try without the cloud"


@pytest.mark.parametrize(("mode", "main"), [("disabled", True), ("offline", False)])
def test_only_the_main_process_tracks_and_none_where_it_is_disabled(mode: Any, main: bool, home: Path) -> None:
    accelerator: Any = SimpleNamespace(is_main_process=main)
    tracker = start_tracker(accelerator, mode=mode, **NAMES)
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.log_texts("samples", {"一": "二"}, step=1)
    tracker.finish(success=True)
    assert list(home.iterdir()) == []


# ---- A run that is stopped and started again, where secrets are all around ----


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory, begun: dict[str, SimpleNamespace]) -> SimpleNamespace:
    """The two starts of one run; the runs that wait for a cloud do so meanwhile."""
    place = tmp_path_factory.mktemp("restarted")
    subprocess.run(["git", "init", "-q", place], check=True)
    remote = "https://me:planted-remote-password@example.org/private.git"
    subprocess.run(["git", "-C", place, "remote", "add", "origin", remote], check=True)
    (place / ".swanlab").mkdir()
    (place / ".swanlab" / ".netrc").write_text("machine https://api.swanlab.cn login x password planted-saved-key\n")
    run_id = new_run_id()
    environment = SECRETS | {"SWANLAB_DEBUG": "true"}
    argument = {"command_line": "s3://me:planted-argument@example.org"}
    stopped = end(begin(place, environment, mode="offline", run_id=run_id, success=False, **argument))
    del environment["SWANLAB_API_KEY"]
    finished = end(begin(place, environment, mode="offline", run_id=run_id, first_step=8, **argument))
    return SimpleNamespace(place=place, run_id=run_id, starts=[stopped, finished])


def test_every_start_has_the_same_id(restarted: SimpleNamespace) -> None:
    found = folders(restarted.place)
    assert len(found) == 2
    for folder in found:
        start = next(record.start for record in records(folder) if record.HasField("start"))
        assert (start.id, start.project, start.name) == (restarted.run_id, "WikiLLM", "a run")


def test_numbers_arrive_with_their_steps(restarted: SimpleNamespace) -> None:
    for folder, first_step in zip(folders(restarted.place), (0, 8), strict=True):
        scalars = [record.scalar for record in records(folder) if record.HasField("scalar")]
        loss = {one.step: one.value.number for one in scalars if one.key == "train/loss"}
        assert loss == pytest.approx({step: 5 - step / 10 for step in range(first_step, first_step + 10)})
        assert sum(one.key == "train/learning_rate" for one in scalars) == 10


def test_texts_arrive_under_their_prompts(restarted: SimpleNamespace) -> None:
    folder = folders(restarted.place)[1]
    (media,) = [record.media for record in records(folder) if record.HasField("media")]
    assert (media.key, media.step) == ("samples", 8)
    texts = {item.caption: (folder / "media" / "text" / item.filename).read_text() for item in media.value.items}
    assert texts == {"北京市": "是中华人民共和国的首都。", "牛顿": "是物理学家。\n第二行"}


def test_the_settings_arrive(restarted: SimpleNamespace) -> None:
    for folder in folders(restarted.place):
        assert "learning_rate: 0.0005" in (folder / "files" / "config.yaml").read_text()


def test_a_run_that_was_stopped_is_not_called_finished(restarted: SimpleNamespace) -> None:
    ends = [record.finish.state for folder in folders(restarted.place) for record in records(folder)
            if record.HasField("finish")]  # fmt: skip
    names = [Record.DESCRIPTOR.fields_by_name["finish"].message_type.fields_by_name["state"].enum_type
             .values_by_number[end].name for end in ends]  # fmt: skip
    assert names == ["RUN_STATE_ABORTED", "RUN_STATE_FINISHED"]


def test_no_secret_lies_in_the_folder_or_on_the_console(restarted: SimpleNamespace) -> None:
    hidden = [*SECRETS.values(), "planted"]
    for path in (path for path in (restarted.place / "swanlog").rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [one for one in hidden if one.encode() in content], path
    assert not [one for start in restarted.starts for one in hidden if one in start.output]


def test_signals_and_the_excepthook_stay_with_whoever_trains(restarted: SimpleNamespace) -> None:
    assert all(start.hooks_kept for start in restarted.starts)


def test_the_way_to_watch_an_offline_run_is_a_sync_under_its_id(restarted: SimpleNamespace) -> None:
    for folder, start in zip(folders(restarted.place), restarted.starts, strict=True):
        assert start.how_to_watch.endswith(f"bin/swanlab sync --id {restarted.run_id} {shlex.quote(str(folder))}")


# ---- The cloud, well and ill ----


class StandIn(ThreadingHTTPServer):
    """As much of SwanLab's service as a start needs; answers `status` to everything else, or to everything."""

    def __init__(self, status: int, starts: bool) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.status, self.starts = status, starts
        self.experiments: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    server: StandIn

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        project = {"cuid": "p", "name": "WikiLLM", "path": "/me/WikiLLM", "group": {"username": "me"},
                   "_count": {"experiments": 0}, "version": 1}  # fmt: skip
        login = {"sid": "s", "expiredAt": "2999-01-01T00:00:00.000Z", "userInfo": {"username": "me"}}
        status, answer = self.server.status, {}
        if self.server.starts:
            match self.command, self.path:
                case "POST", "/api/login/api_key":
                    status, answer = 200, login
                case "GET", "/api/project/me/WikiLLM":
                    status, answer = 200, project
                case "POST", "/api/project/me/WikiLLM/experiment":
                    self.server.experiments.append(body)
                    status, answer = 201, {"cuid": body["cuid"], "name": body["name"]}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Silent."""


REFUSES, BROKEN, CLOSED, SILENT = "refuses the key", "is out of order", "cannot be reached", "never answers"
FAILS, FORGOTTEN = "fails after the start", "fails after the start of a run that nobody ends"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SimpleNamespace]]:
    """One run begun in each kind of cloud; they wait side by side."""
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    servers: dict[str, Any] = {
        REFUSES: StandIn(401, starts=False),
        BROKEN: StandIn(503, starts=False),
        CLOSED: closed,
        SILENT: socket.create_server(("127.0.0.1", 0)),
        FAILS: StandIn(503, starts=True),
        FORGOTTEN: StandIn(503, starts=True),
    }
    special: dict[str, dict[str, Any]] = {
        SILENT: {"deadlines": {"START_SECONDS": 1.0}},
        FAILS: {"deadlines": {"FINISH_SECONDS": 2.0}},
        FORGOTTEN: {"deadlines": {"FINISH_SECONDS": 2.0}, "success": None},
    }
    runs = {}
    for kind, server in servers.items():
        address = server.server_address if isinstance(server, StandIn) else server.getsockname()
        place, run_id, host = tmp_path_factory.mktemp("cloud"), new_run_id(), f"http://127.0.0.1:{address[1]}"
        environment = {"SWANLAB_API_KEY": KEY, "SWANLAB_API_HOST": host}
        process = begin(place, environment, mode="cloud", run_id=run_id, **special.get(kind, {}))
        runs[kind] = SimpleNamespace(place=place, run_id=run_id, host=host, process=process, server=server)
    yield runs
    for run in runs.values():
        run.process.kill()
        run.process.wait()
    for server in servers.values():
        if isinstance(server, StandIn):
            server.shutdown()
            server.server_close()
        else:
            server.close()


@pytest.fixture(scope="module")
def clouds(begun: dict[str, SimpleNamespace]) -> dict[str, SimpleNamespace]:
    """The same runs, ended."""
    return {kind: SimpleNamespace(**vars(run), seen=end(run.process)) for kind, run in begun.items()}


@pytest.mark.parametrize("kind", [REFUSES, BROKEN, CLOSED])
def test_a_run_goes_on_offline_where_the_cloud(kind: str, clouds: dict[str, SimpleNamespace]) -> None:
    run = clouds[kind]
    (folder,) = folders(run.place)
    assert run.seen.how_to_watch.endswith(f"bin/swanlab sync --id {run.run_id} {shlex.quote(str(folder))}")
    assert sum(record.HasField("scalar") for record in records(folder)) >= 20
    assert run.seen.hooks_kept
    (warning,) = run.seen.warnings
    assert "offline" in warning
    assert KEY not in run.seen.output


def test_a_start_does_not_wait_for_a_cloud_that_never_answers(clouds: dict[str, SimpleNamespace]) -> None:
    run = clouds[SILENT]
    (warning,) = run.seen.warnings
    assert "does not answer" in warning, "the login's own deadlines would have ended in an offline run"
    assert KEY not in run.seen.output


def test_the_cloud_is_told_the_runs_own_id(clouds: dict[str, SimpleNamespace]) -> None:
    run = clouds[FAILS]
    (experiment,) = run.server.experiments
    assert (experiment["cuid"], experiment["name"]) == (run.run_id, "a run")
    assert run.seen.how_to_watch == f"{run.host}/@me/WikiLLM/runs/{run.run_id}"


@pytest.mark.parametrize("kind", [FAILS, FORGOTTEN])
def test_an_end_does_not_wait_for_a_cloud_that(kind: str, clouds: dict[str, SimpleNamespace]) -> None:
    run = clouds[kind]
    (folder,) = folders(run.place)
    assert f"bin/swanlab sync --id {run.run_id} {shlex.quote(str(folder))}" in run.seen.output
    assert any(record.HasField("finish") for record in records(folder))


# ---- What goes wrong costs one warning ----


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small disk."""
    if os.geteuid() != 0:
        pytest.skip("a disk of its own takes root to mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.recovery
@pytest.mark.parametrize("mode", ["offline", "local"])
@pytest.mark.parametrize(
    ("disk", "when"),
    [("4m", "before the start"), ("200k", "after it"), ("4m", "after it")],  # 200 KiB are full in the middle of a start
    indirect=["disk"],
)
def test_a_full_disk_is_one_warning(disk: Path, tmp_path: Path, mode: str, when: str) -> None:
    if when == "before the start":
        fill(disk)
    log_dir = str(disk / "swanlog")
    seen = end(begin(tmp_path, {}, mode=mode, run_id=new_run_id(), log_dir=log_dir, fills=when == "after it"))
    assert len(seen.warnings) == 1, seen.output
    (warning,) = seen.warnings
    assert "No space left on device" in warning or "is not writable" in warning


class Stuck:
    """An accelerator with a tracker whose calls fail, or never end."""

    is_main_process = True

    def __init__(self, error: Exception | None) -> None:
        self.error, self.trackers, self.may_end = error, [self], threading.Event()
        self.mode, self.id, self.dir = "offline", "an-id", Path("swanlog")

    def log(self, values: dict[str, Any], step: int) -> None:
        self.call()

    def get_tracker(self, name: str, unwrap: bool) -> "Stuck":
        return self

    def finish(self, **_: Any) -> None:
        self.call()

    def _handle_atexit(self) -> None:
        """SwanLab's own."""

    def call(self) -> None:
        if self.error is not None:
            raise self.error
        self.may_end.wait()


@pytest.mark.parametrize("error", [None, OSError("broken"), RuntimeError("broken")])
def test_a_tracker_that_fails_or_hangs_holds_up_nothing(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.5)
    accelerator: Any = Stuck(error)
    tracker = tracking.Tracker("a command", accelerator, tracking._Thread())
    for step in range(100):
        tracker.log({"train/loss": 1.0}, step)
    tracker.log_texts("samples", {"prompt": "text"}, 100)
    tracker.finish(success=True)
    (record,) = caplog.records
    assert ("broken" if error else "has not taken the whole run in time") in record.getMessage()
    assert accelerator.trackers == []
    accelerator.may_end.set()


def test_a_broken_swanlab_is_no_reason_not_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("a library is missing")

    monkeypatch.setattr(tracking, "_swanlab", broken)
    mode, why = choose_mode("auto")
    assert mode == "disabled"
    assert "a library is missing" in why
