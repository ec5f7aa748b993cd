"""Test SwanLab as a tracker: its mode, its run id, what arrives there, secrets, and a cloud that fails or hangs."""

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
from job.runs.run import new_run_id
from job.tracking import start_trackers
from job.tracking import swanlab as swanlab_tracker
from job.tracking.swanlab import SwanLab, choose_mode
from job.tracking.tracker import Ending, TrackedRun

KEY = "key0123456789abcdef"
SECRETS = {
    "SWANLAB_API_KEY": KEY,
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret",
    "HF_TOKEN": "planted-hub-token",
}


def records(folder: Path) -> list[Record]:
    """Return all records of a run's folder, read with SwanLab's own reader."""
    (path,) = folder.glob("run-*.swanlab")
    reader = DataStoreReader()
    reader.open(path)
    result = []
    for content in reader:
        record = Record()
        record.ParseFromString(content)
        result.append(record)
    reader.close()
    return result


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of all attempts that were logged below `folder`, oldest first."""
    return sorted((folder / "swanlog").glob("run-*"))


# ---- The run id ----


def test_run_ids_are_unique_and_valid_in_swanlab() -> None:
    ids = {new_run_id() for _ in range(1000)}
    assert len(ids) == 1000
    for run_id in ids:
        assert swanlab.Settings.Run(id=run_id).id == run_id
        assert re.fullmatch("[a-z0-9]{21}", run_id)


# ---- The mode ----


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working directory, with no SWANLAB_ variable in the environment."""
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
def test_mode_follows_setting_then_swanlab_then_key_and_dashboard(
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
    ("setting", "environment", "parts"),
    [
        ("cloud", {}, ["tracking.mode: 'cloud'", "SWANLAB_API_KEY", "swanlab login"]),
        ("auto", {"SWANLAB_MODE": "cloud"}, ["SWANLAB_MODE: 'cloud'", "SWANLAB_API_KEY", "swanlab login"]),
        ("local", {"SWANLAB_API_KEY": KEY}, ["tracking.mode: 'local'", "swanlab[dashboard]"]),
        ("auto", {"SWANLAB_API_KEY": KEY, "SWANLAB_MODE": "nowhere"}, ["SWANLAB_MODE", "nowhere"]),
    ],
)
def test_impossible_mode_is_refused_in_one_line_without_the_key(
    setting: Any, environment: dict[str, str], parts: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_dashboard(False, home, monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        choose_mode(setting)
    line = str(refused.value)
    assert all(part in line for part in parts)
    assert "\n" not in line
    assert KEY not in line


# ---- Starting ----

NAMES = {
    "project": "WikiLLM",
    "workspace": None,
    "name": "a run",
    "run_id": "id",
    "log_dir": Path("swanlog"),
}


def start(mode: Any, names: dict[str, Any]) -> Any:
    """Start a run in SwanLab as training does on rank 0."""
    tracker = SwanLab(mode, "the test's reason", names["project"], names["workspace"], names["log_dir"])
    return start_trackers({"swanlab": tracker}, TrackedRun(names["run_id"], names["name"], 0, {}), lambda line: None)


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
def test_name_or_folder_that_swanlab_cannot_use_is_refused(
    wrong: dict[str, str], setting: str, mode: Any, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError) as refused:
        start(mode, NAMES | wrong)
    assert refused.value.setting == setting
    assert not caplog.records, "it fell back to offline first"


@pytest.mark.parametrize("mode", ["disabled", "offline on another rank"])
def test_nothing_is_written_on_other_ranks_or_when_disabled(mode: str, home: Path) -> None:
    if mode == "disabled":
        group = start(mode, NAMES)
    else:
        group = start_trackers({}, TrackedRun("id", "a run", 0, {}), lambda line: None)
    group.log_metrics({"train/loss": 1.0}, step=1)
    group.log_texts("samples", {"一": "二"}, step=1)
    group.finish(Ending.DONE)
    assert list(home.iterdir()) == []


# ---- A run that is stopped and started again, with secrets in its environment ----


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory, begun: dict[str, SimpleNamespace]) -> SimpleNamespace:
    """Two attempts of one run. The runs of `begun` wait for their clouds meanwhile."""
    folder = tmp_path_factory.mktemp("restarted")
    subprocess.run(["git", "init", "-q", folder], check=True)
    remote = "https://me:planted-remote-password@example.org/private.git"
    subprocess.run(["git", "-C", folder, "remote", "add", "origin", remote], check=True)
    (folder / ".swanlab").mkdir()
    (folder / ".swanlab" / ".netrc").write_text("machine https://api.swanlab.cn login x password planted-saved-key\n")
    run_id = new_run_id()
    environment = SECRETS | {"SWANLAB_DEBUG": "true"}
    argument = {"command_line": "s3://me:planted-argument@example.org"}
    stopped = end(begin(folder, environment, mode="offline", run_id=run_id, ending="STOPPED", **argument))
    del environment["SWANLAB_API_KEY"]
    finished = end(begin(folder, environment, mode="offline", run_id=run_id, first_step=8, **argument))
    return SimpleNamespace(folder=folder, run_id=run_id, attempts=[stopped, finished])


def test_every_attempt_has_the_same_run_id(restarted: SimpleNamespace) -> None:
    attempts = run_folders(restarted.folder)
    assert len(attempts) == 2
    for folder in attempts:
        start = next(record.start for record in records(folder) if record.HasField("start"))
        assert (start.id, start.project, start.name) == (restarted.run_id, "WikiLLM", "a run")


def test_numbers_arrive_with_their_steps(restarted: SimpleNamespace) -> None:
    for folder, first_step in zip(run_folders(restarted.folder), (0, 8), strict=True):
        scalars = [record.scalar for record in records(folder) if record.HasField("scalar")]
        loss = {scalar.step: scalar.value.number for scalar in scalars if scalar.key == "train/loss"}
        assert loss == pytest.approx({step: 5 - step / 10 for step in range(first_step, first_step + 10)})
        assert sum(scalar.key == "train/learning_rate" for scalar in scalars) == 10


def test_texts_arrive_with_their_prompts_as_captions(restarted: SimpleNamespace) -> None:
    folder = run_folders(restarted.folder)[1]
    (media,) = [record.media for record in records(folder) if record.HasField("media")]
    assert (media.key, media.step) == ("validation/samples", 8)
    texts = {item.caption: (folder / "media" / "text" / item.filename).read_text() for item in media.value.items}
    assert texts == {"北京市": "是中华人民共和国的首都。", "牛顿": "是物理学家。\n第二行"}


def test_settings_arrive(restarted: SimpleNamespace) -> None:
    for folder in run_folders(restarted.folder):
        assert "train.learning_rate:" in (folder / "files" / "config.yaml").read_text()


def test_stopped_attempt_is_marked_aborted_not_finished(restarted: SimpleNamespace) -> None:
    ends = [record.finish.state for folder in run_folders(restarted.folder) for record in records(folder)
            if record.HasField("finish")]  # fmt: skip
    names = [Record.DESCRIPTOR.fields_by_name["finish"].message_type.fields_by_name["state"].enum_type
             .values_by_number[end].name for end in ends]  # fmt: skip
    assert names == ["RUN_STATE_ABORTED", "RUN_STATE_FINISHED"]


def test_no_secret_is_in_the_log_folder_or_on_the_console(restarted: SimpleNamespace) -> None:
    secrets = [*SECRETS.values(), "planted"]
    for path in (path for path in (restarted.folder / "swanlog").rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
    assert not [secret for attempt in restarted.attempts for secret in secrets if secret in attempt.output]


def test_signal_handlers_and_excepthook_are_not_replaced(restarted: SimpleNamespace) -> None:
    assert all(attempt.hooks_kept for attempt in restarted.attempts)


def test_offline_run_is_watched_with_a_sync_under_its_id(restarted: SimpleNamespace) -> None:
    for folder, attempt in zip(run_folders(restarted.folder), restarted.attempts, strict=True):
        assert attempt.how_to_watch.endswith(f"bin/swanlab sync --id {restarted.run_id} {shlex.quote(str(folder))}")


# ---- Clouds that work, fail and hang ----


class FakeCloud(ThreadingHTTPServer):
    """A stand-in for SwanLab's cloud.

    Args:
        status: HTTP status of every answer.
        starts: answer correctly to the requests that start a run, and with `status` to all others.
    """

    def __init__(self, status: int, starts: bool) -> None:
        super().__init__(("127.0.0.1", 0), FakeCloudHandler)
        self.status, self.starts = status, starts
        self.experiments: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class FakeCloudHandler(BaseHTTPRequestHandler):
    server: FakeCloud

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
        """Print nothing."""


REFUSES, BROKEN, CLOSED, SILENT = "refuses the key", "is out of order", "cannot be reached", "never answers"
FAILS, FORGOTTEN = "fails after the start", "fails after the start of a run that nobody ends"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SimpleNamespace]]:
    """One running attempt in each kind of cloud; they wait for their clouds at the same time."""
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))
    servers: dict[str, Any] = {
        REFUSES: FakeCloud(401, starts=False),
        BROKEN: FakeCloud(503, starts=False),
        CLOSED: closed,
        SILENT: socket.create_server(("127.0.0.1", 0)),
        FAILS: FakeCloud(503, starts=True),
        FORGOTTEN: FakeCloud(503, starts=True),
    }
    special: dict[str, dict[str, Any]] = {
        SILENT: {"deadlines": {"START_SECONDS": 1.0}},
        FAILS: {"deadlines": {"FINISH_SECONDS": 2.0}},
        FORGOTTEN: {"deadlines": {"FINISH_SECONDS": 2.0}, "ending": None},
    }
    runs = {}
    for kind, server in servers.items():
        address = server.server_address if isinstance(server, FakeCloud) else server.getsockname()
        folder, run_id, host = tmp_path_factory.mktemp("cloud"), new_run_id(), f"http://127.0.0.1:{address[1]}"
        environment = {"SWANLAB_API_KEY": KEY, "SWANLAB_API_HOST": host}
        process = begin(folder, environment, mode="cloud", run_id=run_id, **special.get(kind, {}))
        runs[kind] = SimpleNamespace(folder=folder, run_id=run_id, host=host, process=process, server=server)
    yield runs
    for run in runs.values():
        run.process.kill()
        run.process.wait()
    for server in servers.values():
        if isinstance(server, FakeCloud):
            server.shutdown()
            server.server_close()
        else:
            server.close()


@pytest.fixture(scope="module")
def clouds(begun: dict[str, SimpleNamespace]) -> dict[str, SimpleNamespace]:
    """The runs of `begun` after they have ended."""
    return {kind: SimpleNamespace(**vars(run), seen=end(run.process)) for kind, run in begun.items()}


@pytest.mark.parametrize("kind", [REFUSES, BROKEN, CLOSED])
def test_run_continues_offline_when_the_cloud(kind: str, clouds: dict[str, SimpleNamespace]) -> None:
    run = clouds[kind]
    (folder,) = run_folders(run.folder)
    assert run.seen.how_to_watch.endswith(f"bin/swanlab sync --id {run.run_id} {shlex.quote(str(folder))}")
    assert sum(record.HasField("scalar") for record in records(folder)) >= 20
    assert run.seen.hooks_kept
    (warning,) = run.seen.warnings
    assert "offline" in warning
    assert KEY not in run.seen.output


def test_start_does_not_wait_for_a_cloud_that_never_answers(clouds: dict[str, SimpleNamespace]) -> None:
    run = clouds[SILENT]
    (warning,) = run.seen.warnings
    assert "does not answer" in warning, "the run is offline, so the login's own deadline ended before ours"
    assert KEY not in run.seen.output


def test_cloud_experiment_has_the_run_id(clouds: dict[str, SimpleNamespace]) -> None:
    run = clouds[FAILS]
    (experiment,) = run.server.experiments
    assert (experiment["cuid"], experiment["name"]) == (run.run_id, "a run")
    assert run.seen.how_to_watch == f"{run.host}/@me/WikiLLM/runs/{run.run_id}"


@pytest.mark.parametrize("kind", [FAILS, FORGOTTEN])
def test_finish_does_not_wait_for_a_cloud_that(kind: str, clouds: dict[str, SimpleNamespace]) -> None:
    run = clouds[kind]
    (folder,) = run_folders(run.folder)
    assert f"bin/swanlab sync --id {run.run_id} {shlex.quote(str(folder))}" in run.seen.output
    assert any(record.HasField("finish") for record in records(folder))


# ---- Failures cost one warning ----


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.recovery
@pytest.mark.parametrize("mode", ["offline", "local"])
@pytest.mark.parametrize(
    ("disk", "when"),
    [("4m", "before the start"), ("200k", "after it"), ("4m", "after it")],  # a start alone fills 200 KiB
    indirect=["disk"],
)
def test_full_disk_is_one_warning(disk: Path, tmp_path: Path, mode: str, when: str) -> None:
    if when == "before the start":
        fill(disk)
    log_dir = str(disk / "swanlog")
    seen = end(begin(tmp_path, {}, mode=mode, run_id=new_run_id(), log_dir=log_dir, fills=when == "after it"))
    assert len(seen.warnings) == 1, seen.output
    (warning,) = seen.warnings
    assert "No space left on device" in warning or "is not writable" in warning


def test_broken_installation_of_swanlab_disables_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ImportError("a library is missing")

    monkeypatch.setattr(swanlab_tracker, "_swanlab", broken)
    mode, reason = choose_mode("auto")
    assert mode == "disabled"
    assert "a library is missing" in reason
