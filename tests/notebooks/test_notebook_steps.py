"""The steps of the notebooks one by one: packages, limits of time and disk, copies, errors in one line."""

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_run import REPOSITORY

from job import config as settings
from job.config import Config
from job.model.architecture import tensor_shapes
from job.model.flops import parameter_counts
from job.model.optimizer_state import optimizer_state
from job.model.spec import ModelSpec
from job.runs.choices import Hardware, choose
from launch import notebook as steps
from launch.notebook import KEEP, Session, Stop, set_secrets
from launch.notebook_files import SESSION, copy_folder, find_markers, find_session, write_session
from launch.notebook_packages import choose_packages
from launch.swanlab.secret_scan import find_secret

NOTEBOOKS = [REPOSITORY / "launch/kaggle/wikillm.ipynb", REPOSITORY / "launch/colab.ipynb"]
T4 = Hardware("cuda", "Tesla T4", (7, 5), 15 * 2**30, 15 * 2**30)
KAGGLE_BYTES, DRIVE_BYTES = 20e9, 15e9
PRESETS = {"wiki-54m": (16_384, 329e6), "wiki-110m": (16_384, 329e6), "wiki-123m": (151_646, 360e6)}
"""Entries of the vocabulary and training tokens of an epoch, from the first lines of each file."""
T4_HOURS = 7.0
"""Hours of wiki-54m on one T4, from the first lines of the file."""


class Commands:
    """Records the commands of a session in place of running them."""

    def __init__(self, codes: Sequence[int] = (), lines: Sequence[str] = ()) -> None:
        self.codes, self.lines = list(codes), list(lines)
        self.ran: list[list[str]] = []

    def __call__(self, command: Sequence[str], shown: bool = True) -> tuple[int, list[str]]:
        self.ran.append(list(command))
        return (self.codes.pop(0) if self.codes else 0), self.lines


def make_session(folder: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands, device: str = "cpu") -> Session:
    monkeypatch.setattr(Session, "_run", lambda self, *words, **options: commands(*words, **options))
    monkeypatch.setattr(steps.time, "time", lambda: 3600.0)
    keep, scratch = str(folder / "keep"), str(folder / "scratch")
    (folder / "keep").mkdir(exist_ok=True)
    return Session(began_at=0, hours=12, keep=keep, scratch=scratch, device=device)


# ---- Packages ----


def test_recent_torch_of_the_platform_is_kept() -> None:
    packages = choose_packages(REPOSITORY, "2.11.0+cu128")
    assert [line for line in packages.constraints if line.startswith("torch==")] == ["torch==2.11.0+cu128"]
    assert not packages.replaces_torch and "2.11.0+cu128 of this platform is kept" in packages.reason


@pytest.mark.parametrize("torch", ["2.10.0+cu128", None])
def test_old_or_missing_torch_is_replaced_by_the_locked_one(torch: str | None) -> None:
    packages = choose_packages(REPOSITORY, torch)
    lock = (REPOSITORY / "requirements.lock").read_text().splitlines()
    assert [line for line in packages.constraints if line.startswith("torch==")] == [
        line for line in lock if line.startswith("torch==")
    ]
    assert packages.replaces_torch and ("too old" in packages.reason) == (torch is not None)


@pytest.mark.parametrize(("torch", "removed"), [("2.10.0", True), ("2.12.1+cu128", False)])
def test_companions_of_a_replaced_torch_are_removed(
    torch: str, removed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "installed_torch", lambda: torch)
    commands = Commands()
    make_session(tmp_path, monkeypatch, commands).install()
    [install] = [words for words in commands.ran if "install" in words]
    assert any(word.startswith("transformers>=") for word in install)
    assert f"torch=={torch}" in Path(install[install.index("--constraint") + 1]).read_text() or removed
    assert ["torchvision" in words and "uninstall" in words for words in commands.ran] == (
        [True, False] if removed else [False]
    )


@pytest.mark.parametrize("lines", [['{"gpus": [], "error": "", "build": "torch"}'], ["Killed"]])
def test_session_without_a_usable_gpu_ends_in_one_line(
    lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(tmp_path, monkeypatch, Commands(lines=lines), "cuda")
    with pytest.raises(Stop, match=r"^DEVICE: 'cuda': torch can use no GPU: .*; switch the GPU on") as error:
        session.install()
    assert error.value._render_traceback_() == [str(error.value)]


# ---- Limits ----


def test_training_stops_half_an_hour_before_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands([75])
    session = make_session(tmp_path, monkeypatch, commands)
    session.train("configs/demo.yaml")
    [words] = commands.ran
    assert words[words.index("--train.max_time") + 1] == f"{(12 - 1 - 0.5) * 3600:.0f}s"
    monkeypatch.setattr(steps.time, "time", lambda: 11.5 * 3600 - 59)
    with pytest.raises(Stop, match="no time left"):
        session.train("configs/demo.yaml")


def test_words_of_the_user_come_last_and_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    session = make_session(tmp_path, monkeypatch, commands)
    session.train("configs/demo.yaml", settings="--checkpoint.keep 7 --run.name 'my run'")
    assert commands.ran[0][-4:] == ["--checkpoint.keep", "7", "--run.name", "my run"]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("--run.name 'my run", "has an open quote; close it"),
        ('--run.name "my run', "has an open quote; close it"),
        ("--run.name one \\", "ends with a backslash; remove it"),
    ],
    ids=["single quote", "double quote", "backslash"],
)
def test_words_that_cannot_be_split_end_in_one_line_before_any_work(
    value: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    session = make_session(tmp_path, monkeypatch, commands)
    with pytest.raises(Stop) as of_data:
        session.prepare("configs/demo.yaml", "corpus", settings=value)
    with pytest.raises(Stop) as of_training:
        session.train("configs/demo.yaml", settings=value)
    for name, error in (("DATA_SETTINGS", of_data), ("TRAIN_SETTINGS", of_training)):
        [line] = error.value._render_traceback_()
        assert line.startswith(f"{name}: ") and "--run.name" in line and line.endswith(f": {problem}")
    assert commands.ran == []


@pytest.mark.parametrize(("output", "promised"), [("", True), ("s3://bucket/runs/one", False)])
def test_single_writer_is_promised_for_drive_alone(
    output: str, promised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands()
    make_session(tmp_path, monkeypatch, commands)
    drive, local, scratch = (str(tmp_path / name) for name in ("drive", "local", "scratch"))
    session = Session(began_at=0, hours=12, keep=drive, local=local, scratch=scratch, device="cpu")
    session.train("configs/demo.yaml", output=output)
    assert ("--store.single_writer" in commands.ran[0]) == promised


@pytest.mark.parametrize(
    ("codes", "starts", "error"),
    [
        ([0], 1, None),
        ([1, 137, 75], 3, None),
        ([1, 1, 1], 3, "exit code 1; run the notebook again"),
        ([78], 1, "exit code 78; correct"),
        ([1, 70], 2, "exit code 70; correct"),
    ],
)
def test_only_a_crash_is_started_again(
    codes: list[int], starts: int, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = Commands(codes)
    session = make_session(tmp_path, monkeypatch, commands)
    if error is None:
        session.train("configs/demo.yaml")
    else:
        with pytest.raises(Stop, match=error):
            session.train("configs/demo.yaml")
    assert len(commands.ran) == starts


def preset(name: str) -> Config:
    return settings.load(str(REPOSITORY / f"configs/{name}.yaml"), [])


def test_t4_trains_in_fp16_with_ddp() -> None:
    choices = choose(preset("wiki-54m").train, 16_384, 2, T4, lambda strategy, precision: 16, None)
    assert (choices.precision.value, choices.strategy.value) == ("fp16", "ddp")


def checkpoint_bytes(config: Config, vocab_size: int) -> int:
    shapes = tensor_shapes(ModelSpec(**config.model.model_dump()), vocab_size)
    return optimizer_state(config.train.optimizer).checkpoint_bytes(shapes)


@pytest.mark.parametrize("name", PRESETS)
def test_output_of_a_preset_is_within_20_gb(name: str) -> None:
    config, (vocab_size, tokens) = preset(name), PRESETS[name]
    # A checkpoint is deleted after a newer one is whole, and a tenth of the documents is for validation.
    run = (KEEP + 1) * checkpoint_bytes(config, vocab_size)
    shards = tokens / (1 - config.data.validation_fraction) * (2 if vocab_size <= 2**16 else 4)
    final = 4 * parameter_counts(ModelSpec(**config.model.model_dump()), vocab_size).total
    assert run + shards + final < KAGGLE_BYTES / 2
    if name == "wiki-54m":
        assert run + shards + final < 5e9, "as the first cell of the notebook says"


def test_checkpoints_of_a_whole_run_fit_into_drive() -> None:
    config, (vocab_size, tokens) = preset("wiki-54m"), PRESETS["wiki-54m"]
    steps_of_run = config.train.epochs * tokens / (config.train.global_batch_size * config.train.context_length)
    # One each 1,000 steps, one each hour, and the last one: deleted ones stay in Drive's trash.
    written = (steps_of_run / 1000 + T4_HOURS + 1) * checkpoint_bytes(config, vocab_size)
    assert written < 10e9 < DRIVE_BYTES


# ---- The session before ----


def make_output(folder: Path, number: int) -> Path:
    for name in ("run/checkpoints/step-00000001-a1", "shards", "other"):
        (folder / name).mkdir(parents=True)
    (folder / "run" / "run.json").write_text("{}")
    (folder / "run" / ".run.json.1234.partial").write_text("half")
    (folder / "shards" / "manifest.json").write_text("{}")
    write_session(folder, number)
    return folder


@pytest.mark.parametrize("mounted", ["wikillm", "notebooks/somebody/wikillm"])
def test_newest_output_is_found_and_copied_without_its_modes(
    mounted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tmp_path / "input"
    make_output(inputs / "older", 1)
    newest = make_output(inputs / mounted, 2)
    (newest / "run" / "run.json").write_text('{"id": "two"}')
    for path in [*newest.rglob("*"), newest]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    session = make_session(tmp_path, monkeypatch, Commands())
    session.take_over(str(inputs))
    keep = tmp_path / "keep"
    assert json.loads((keep / "run" / "run.json").read_text()) == {"id": "two"}
    assert {path.name for path in keep.iterdir()} == {"run", "shards", SESSION}
    assert not list(keep.rglob("*.partial"))
    assert all(path.stat().st_mode & 0o200 for path in keep.rglob("*"))
    assert json.loads((keep / SESSION).read_text()) == {"session": 3}


def test_notebook_run_twice_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_output(tmp_path / "input" / "wikillm", 1)
    session = make_session(tmp_path, monkeypatch, Commands())
    session.take_over(str(tmp_path / "input"))
    (tmp_path / "keep" / "run" / "run.json").write_text('{"id": "newer"}')
    session.take_over(str(tmp_path / "input"))
    assert json.loads((tmp_path / "keep" / "run" / "run.json").read_text()) == {"id": "newer"}
    assert json.loads((tmp_path / "keep" / SESSION).read_text()) == {"session": 2}


def test_first_session_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "wiki.json").write_text("[]")
    markers = find_markers(tmp_path)
    assert markers == ({}, {}) and find_session(markers.numbers, tmp_path / "keep") is None


DAMAGED = {
    "empty": b"",
    "half": b'{"sess',
    "no text": b"\xff\xfe\x00",
    "null": b'{"session": null}',
    "no number": b'{"session": "two"}',
    "zero": b'{"session": 0}',
    "true": b'{"session": true}',
    "other name": b'{"number": 2}',
    "list": b"[2]",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_marker_is_named_and_the_other_outputs_count(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "input"
    make_output(inputs / "whole", 2)
    damaged = make_output(inputs / "notebooks" / "somebody" / "damaged", 3) / SESSION
    damaged.write_bytes(content)
    make_session(tmp_path, monkeypatch, Commands()).take_over(str(inputs))
    ignored, *copied = capsys.readouterr().out.splitlines()
    assert ignored.startswith(f"{damaged} is ignored, with the folders beside it, because it is damaged: expected ")
    assert copied and all(line.startswith(f"{inputs / 'whole'}/") for line in copied)
    assert json.loads((tmp_path / "keep" / SESSION).read_text()) == {"session": 3}


def test_session_that_finds_only_a_damaged_marker_is_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "input"
    (inputs / "wikillm" / SESSION).mkdir(parents=True)
    make_session(tmp_path, monkeypatch, Commands()).take_over(str(inputs))
    ignored, first = capsys.readouterr().out.splitlines()
    assert ignored.endswith("because it cannot be read: Is a directory")
    assert first == f"{inputs} has no output of an earlier session that can be used: this is the first one"
    assert {path.name for path in (tmp_path / "keep").iterdir()} == {SESSION}
    assert json.loads((tmp_path / "keep" / SESSION).read_text()) == {"session": 1}


def test_interrupted_copy_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_output(tmp_path / "output", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        copy_folder(tmp_path / "output" / "run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Trainings(Commands):
    """Leaves tracker files in place of training: one of each training, and one in which all are counted."""

    def __call__(self, command: Sequence[str], shown: bool = True) -> tuple[int, list[str]]:
        folder = Path(command[command.index("--tracking.log_dir") + 1])
        number = len(self.ran) + 1
        own = folder / f"run-{number}" / "files" / "metrics"
        own.parent.mkdir(parents=True)
        own.write_text(f"of training {number}")
        with (folder / "all").open("a") as common:
            common.write(f"{number} ")
        return super().__call__(command, shown)


def tracker_files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def files_of_trainings(count: int) -> dict[str, str]:
    numbers = range(1, count + 1)
    own = {f"run-{number}/files/metrics": f"of training {number}" for number in numbers}
    return {"all": "".join(f"{number} " for number in numbers), **own}


def train_on_colab(machine: Path, drive: Path) -> None:
    local = str(machine / "local")
    session = Session(began_at=0, hours=12, keep=str(drive), local=local, scratch=str(machine), device="cpu")
    session.train("configs/demo.yaml")


def test_drive_has_the_tracker_files_of_every_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_session(tmp_path, monkeypatch, Trainings([75, 75, 1, 0]))
    drive = tmp_path / "drive"
    train_on_colab(tmp_path / "first machine", drive)
    assert tracker_files(drive / "swanlog") == files_of_trainings(1)
    train_on_colab(tmp_path / "second machine", drive)
    assert tracker_files(drive / "swanlog") == files_of_trainings(2)
    train_on_colab(tmp_path / "second machine", drive)
    assert tracker_files(drive / "swanlog") == files_of_trainings(4), "with those of a training that crashed"


def test_drive_loses_no_tracker_files_to_those_of_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_session(tmp_path, monkeypatch, Trainings([75, 75, 75]))
    train_on_colab(tmp_path / "first machine", tmp_path / "drive")
    train_on_colab(tmp_path / "second machine", tmp_path / "other drive")
    train_on_colab(tmp_path / "second machine", tmp_path / "drive")
    assert {path.name for path in (tmp_path / "drive" / "swanlog").iterdir()} >= {"run-1", "run-3"}


def test_output_of_kaggle_has_the_tracker_files_of_every_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_session(tmp_path, monkeypatch, Trainings([75, 75, 0]))
    for number in (1, 2, 3):
        inputs, working = tmp_path / f"input-{number}", tmp_path / f"input-{number + 1}" / "wikillm"
        session = Session(began_at=0, hours=12, keep=str(working), scratch=str(tmp_path / "scratch"), device="cpu")
        session.take_over(str(inputs))
        session.train("configs/demo.yaml")
        assert tracker_files(working / "swanlog") == files_of_trainings(number)
        for path in [*working.rglob("*"), working]:
            path.chmod(0o555 if path.is_dir() else 0o444)


def test_finished_shards_are_used_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    session = make_session(tmp_path, monkeypatch, commands)
    session.prepare("configs/demo.yaml", "corpus", shards="/kaggle/input/shards")
    session.train("configs/demo.yaml")
    [words] = commands.ran
    assert words[words.index("--data.shards") + 1] == "/kaggle/input/shards"


# ---- Commands, secrets and the files themselves ----


def test_commands_get_no_colours_and_no_backend_of_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "MPLBACKEND"):
        monkeypatch.setenv(name, "1")
    session = Session(began_at=0, hours=12, keep=str(tmp_path), scratch=str(tmp_path / "scratch"), device="cpu")
    program = "import os; print(sorted({'FORCE_COLOR', 'CLICOLOR_FORCE', 'MPLBACKEND', 'NO_COLOR'} & set(os.environ)))"
    assert session._run([sys.executable, "-c", program]) == (0, ["['NO_COLOR']"])


def test_failed_command_is_one_line_with_its_last_words(tmp_path: Path) -> None:
    session = Session(began_at=0, hours=12, keep=str(tmp_path), scratch=str(tmp_path), device="cpu")
    program = "import sys; print('one'); print('no such package'); sys.exit(3)"
    with pytest.raises(Stop, match=r"^setup: not installed \(exit code 3\): one / no such package$"):
        session._must([sys.executable, "-c", program], "not installed")


def test_secrets_become_variables_and_never_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_secret(name: str) -> str:
        if name == "MISSING":
            raise RuntimeError("token 0123456789abcdef is not allowed")
        return f"value of {name}"

    module = SimpleNamespace(UserSecretsClient=lambda: SimpleNamespace(get_secret=get_secret))
    monkeypatch.setitem(sys.modules, "kaggle_secrets", module)
    monkeypatch.setenv("SWANLAB_API_KEY", "")
    set_secrets(["SWANLAB_API_KEY"])
    assert steps.os.environ["SWANLAB_API_KEY"] == "value of SWANLAB_API_KEY"
    with pytest.raises(Stop, match=r"^SECRETS: 'MISSING': cannot be read: RuntimeError; add it") as error:
        set_secrets(["MISSING"])
    assert "0123456789abcdef" not in str(error.value)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=["kaggle", "colab"])
def test_notebook_has_no_outputs_no_secrets_and_its_header(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert find_secret(text, {}) is None
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    header = "".join(cells[0]["source"])
    assert all(f"| {label} |" in header for label in ("Apply", "Watch", "Go on", "Clean")) and "Not tried on" in header
    chinese = header.partition("## 中文说明")[2]
    assert all(word in chinese for word in ("`REPOSITORY`", "准备", "开始", "继续", "清理", "尚未在", "12 小时"))
    for cell in code:
        compile("".join(cell["source"]), path.name, "exec")


@pytest.fixture(scope="module")
def refusing_server() -> Iterator[str]:
    """Host and port of a server that wants a user name and a password for everything, and accepts none."""

    class Refusal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="code"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def fetch_code(notebook: Path, address: str, folder: Path) -> str:
    """Execute the cell that fetches the code, at a terminal where nobody types, and return what the user sees."""
    cell = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][3]["source"])
    program = f"import os\nREPOSITORY, REVISION, SCRATCH = {address!r}, 'main', {str(folder)!r}\n{cell}"
    terminal, of_program = pty.openpty()
    try:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdin=of_program,
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "GIT_CONFIG_NOSYSTEM": "1"},
            preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
        )
    finally:
        os.close(terminal)
        os.close(of_program)
    assert ended.returncode == 1
    return ended.stdout + ended.stderr.splitlines()[-1].removeprefix("__main__.Stop: ").removeprefix("Stop: ")


@pytest.mark.parametrize(
    "user", ["", "ghp_0123456789abcdef@", "somebody:0123456789abcdef@", "somebody:0123456789@abcdef@"]
)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=["kaggle", "colab"])
def test_refused_clone_shows_no_token_and_asks_nothing(
    path: Path, user: str, refusing_server: str, tmp_path: Path
) -> None:
    line = fetch_code(path, f"http://{user}{refusing_server}/somebody/WikiLLM", tmp_path)
    assert line.startswith("REPOSITORY: git cannot clone its branch main: fatal: ") and line.endswith(
        "check the address"
    )
    assert not any(part in line for part in ("0123456789", "abcdef", "@"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=["kaggle", "colab"])
def test_address_without_its_owner_shows_no_token(path: Path, tmp_path: Path) -> None:
    line = fetch_code(path, "https://ghp_0123456789abcdef@github.com/OWNER/WikiLLM", tmp_path)
    assert line == (
        "REPOSITORY: 'https://github.com/OWNER/WikiLLM': expected the address of this code; "
        "set it in the first code cell"
    )


def test_both_notebooks_fetch_the_code_in_the_same_way() -> None:
    first, second = ("".join(json.loads(path.read_text(encoding="utf-8"))["cells"][3]["source"]) for path in NOTEBOOKS)
    assert first.replace("switch Internet on in the notebook's settings, and ", "") == second
