"""Both notebooks, executed on the CPU with a tiny model: two sessions in a row, the second one goes on from the first.

The platform's Python is that of `.venv-notebooks`, which sees the packages of `.venv`; nothing is downloaded.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import REPOSITORY, saved_steps

from job.model.optimizer_state import optimizer_state
from job.runs.checkpoint import open_checkpoint
from job.runs.checkpoint_list import list_checkpoints
from launch.notebook import KEEP
from launch.notebook_files import folder_bytes

pytestmark = [pytest.mark.notebooks, pytest.mark.timeout(3600)]

KAGGLE, COLAB = REPOSITORY / "launch/kaggle/wikillm.ipynb", REPOSITORY / "launch/colab.ipynb"
PYTHON = Path(os.environ.get("NOTEBOOKS", REPOSITORY / ".venv-notebooks" / "bin" / "python"))
STEPS = 60
TINY = (
    f"--train.strategy auto --train.processes 1 --train.max_steps {STEPS} --train.log_every 5 --train.context_length 32"
    " --train.micro_batch_size 2 --train.global_batch_size 4 --train.warmup_steps 2 --model.hidden_size 32"
    " --model.num_hidden_layers 2 --model.intermediate_size 48 --model.num_attention_heads 4"
    " --model.num_key_value_heads 2 --evaluate.every 1000 --evaluate.max_windows 8 --generate.max_new_tokens 4"
    " --tracking.mode disabled"
)
OUTPUT_BYTES = 20e9
"""What Kaggle keeps of a session's output."""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Address of a repository with the files of this one, as they are now."""
    folder = tmp_path_factory.mktemp("code")
    names = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard"], cwd=REPOSITORY, text=True)
    files = [name for name in names.splitlines() if (REPOSITORY / name).is_file()]
    subprocess.run(["cp", "--parents", *files, str(folder)], cwd=REPOSITORY, check=True)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-C", str(folder)]
    for words in (["init", "--quiet", "--initial-branch", "main"], ["add", "."], ["commit", "--quiet", "-m", "copy"]):
        subprocess.run([*git, *words], check=True)
    return f"file://{folder}"


def session(notebook: Path, folder: Path, interrupt_at: str = "", **settings: str) -> tuple[int, str]:
    """Execute a notebook in a new folder; return its exit code and what it printed."""
    folder.mkdir()
    tiny = {"DEVICE": "cpu", "CONFIG": "configs/demo.yaml", "CORPUS": "job/demo/sample.jsonl"}
    tiny |= {"DATA_SETTINGS": "--tokenizer.vocab_size 400", "TRAIN_SETTINGS": TINY}
    tiny |= {"SCRATCH_FOLDER": str(folder / "scratch")}
    variables = {f"WIKILLM_{name}": value for name, value in (tiny | settings).items()}
    ended = subprocess.run(
        [PYTHON, Path(__file__).with_name("execute.py"), notebook, folder, *([interrupt_at] if interrupt_at else [])],
        env=os.environ | {"PIP_NO_INDEX": "1", "FORCE_COLOR": "1"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ended.returncode, ended.stdout


def attempt(run: Path, number: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "attempts" / f"{number:08d}.json").read_text())
    return record


def logged_steps(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "train/loss" in line or "loss" in line]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


@pytest.fixture
def inputs(tmp_path: Path) -> Iterator[Path]:
    """A folder that is mounted read-only over what the test has put into ``outputs`` beside it."""
    source, target = tmp_path / "outputs", tmp_path / "inputs"
    source.mkdir()
    target.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "--bind", source, target], capture_output=True).returncode != 0:
        pytest.skip("only root can mount a folder")
    subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
    yield target
    subprocess.run(["umount", "--lazy", target], check=True)


def check_sessions(run: Path, stopped_at: int, first: str, second: str) -> None:
    """Check that the second session has gone on at the step where the first one stopped, as the same run."""
    assert "torch: 2." in first and "is kept" in first
    assert f"stopped after step {stopped_at}, checkpointed" in first and "not done: the next session" in first
    assert "preparing \u2501" not in first and "\x1b[" not in first, "a log of lines has no progress bars"
    assert f"/checkpoints/step-{stopped_at:08d}-a1" in second and "attempt 2" in second
    assert "made by an earlier session" in second and "done: the model is in" in second
    assert (run / "final" / "model.safetensors").exists()
    one, two = attempt(run, 1), attempt(run, 2)
    assert one["run_id"] == two["run_id"] and two["from_step"] == stopped_at
    for record in (one, two):  # Training stops half an hour before the platform ends the session after 12 hours.
        seconds = float(record["config"]["train"]["max_time"].removesuffix("s"))
        assert 10 * 3600 < seconds < 11.5 * 3600
    steps = logged_steps(run)
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == STEPS, "one log over both sessions"


def test_kaggle_goes_on_from_its_read_only_output(code: str, tmp_path: Path, inputs: Path) -> None:
    working = [tmp_path / f"working-{number}" for number in (1, 2)]
    settings = {"REPOSITORY": code, "INPUT": str(inputs)}
    ended, first = session(KAGGLE, tmp_path / "first", f"step 5/{STEPS}", WORKING=str(working[0]), **settings)
    assert ended == 0, first
    assert "this is the first one" in first
    [stopped_at] = saved_steps(str(working[0] / "run"))
    assert 5 <= stopped_at < STEPS

    place = tmp_path / "outputs" / "notebooks" / "somebody" / "wikillm"  # As Kaggle mounts the output of a notebook.
    place.parent.mkdir(parents=True)
    working[0].rename(place)
    before = listing(inputs)
    ended, second = session(KAGGLE, tmp_path / "second", WORKING=str(working[1]), **settings)
    assert ended == 0, second
    check_sessions(working[1] / "run", stopped_at, first, second)
    assert listing(inputs) == before, "an input is never written"

    # The output is whole, so that a third session needs only this one, and it is within the limit.
    assert (working[1] / "shards" / "manifest.json").exists() and (working[1] / "tokenizer").is_dir()
    assert json.loads((working[1] / "wikillm-session.json").read_text()) == {"session": 2}
    assert folder_bytes(working[1]) < OUTPUT_BYTES
    kept = list_checkpoints(str(working[1] / "run"))
    assert len(kept) <= KEEP
    files = open_checkpoint(kept[-1].url(str(working[1] / "run"))).files
    tensors = {name: entry.size for name, entry in files.items() if name.endswith(".safetensors")}
    parameters = 12_800 + 15_648  # embedding and layers, as `train` prints for this model
    assert sum(tensors.values()) == pytest.approx(12 * parameters, rel=0.05), "12 bytes a parameter, as in the estimate"
    assert optimizer_state("adamw").checkpoint_bytes({"all": (parameters,)}) == 12 * parameters


def test_colab_goes_on_from_drive(code: str, tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    settings = {"REPOSITORY": code, "DRIVE": str(drive)}
    ended, first = session(COLAB, tmp_path / "first", f"step 5/{STEPS}", **settings)
    assert ended == 0, first
    [stopped_at] = saved_steps(str(drive / "run"))
    assert 5 <= stopped_at < STEPS
    ended, second = session(COLAB, tmp_path / "second", **settings)
    assert ended == 0, second
    check_sessions(drive / "run", stopped_at, first, second)
    assert {path.name for path in drive.iterdir()} >= {"run", "shards", "tokenizer"}
    assert (tmp_path / "second" / "scratch" / "local" / "shards" / "manifest.json").exists(), "shards are read locally"
    assert attempt(drive / "run", 1)["config"]["store"]["single_writer"] is True, "Drive has no conditional creation"


ONE_LINE = {
    "https://github.com/OWNER/WikiLLM": (
        r"REPOSITORY: 'https://github.com/OWNER/WikiLLM': expected the address of this code; "
        r"set it in the first code cell"
    ),
    "https://0123456789abcdef@127.0.0.1:9/code": (
        r"REPOSITORY: git cannot clone its branch main: fatal: unable to access [^\n]*; check the address"
    ),
}
"""What is shown for an address that nobody has set, and for one that is wrong and holds a token."""


@pytest.mark.parametrize("address", ONE_LINE, ids=["not set", "wrong"])
def test_wrong_repository_gives_one_line(address: str, tmp_path: Path) -> None:
    ended, printed = session(COLAB, tmp_path / "first", REPOSITORY=address, DRIVE=str(tmp_path))
    assert ended == 1
    [line] = [line for line in printed.splitlines() if line and "WARNING" not in line]
    assert re.fullmatch(ONE_LINE[address], line) and "0123456789abcdef" not in line
