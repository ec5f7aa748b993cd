"""Test TensorBoard as a tracker: its event files, read back with TensorBoard's own reader, and a real run."""

import errno
import importlib.util
import sys
import time
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import ALONE, REPOSITORY, STEPS, WriteSettings, run, train_until

from job.config import Tracking
from job.errors import EXIT_REFUSED, EXIT_STOPPED, UserError
from job.runs.metrics_file import read_metrics
from job.tracking import make_trackers, start_trackers
from job.tracking.shown_names import shown_name
from job.tracking.tensorboard import REQUIREMENT, TensorBoard
from job.tracking.tracker import Ending, TrackedRun

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason=f"tensorboard is not installed: pip install '{REQUIREMENT}'"
)


def begin(folder: Path, step: int = 0) -> Any:
    """Start a run, or continue it after `step` steps, as training does."""
    run = TrackedRun("run0id", "名字", step, {"train": {"seed": 1}})
    return start_trackers({"tensorboard": TensorBoard(folder)}, run, lambda line: None)


def read(folder: Path) -> Any:
    """Return everything in the event files of a run, as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    return events


def scalars(folder: Path, name: str) -> dict[int, float]:
    events = read(folder).Scalars(name)
    assert len({event.step for event in events}) == len(events), "a step is there twice"
    return {event.step: event.value for event in events}


def texts(folder: Path, name: str) -> list[str]:
    events = read(folder).Tensors(f"{name}/text_summary")
    return [event.tensor_proto.string_val[0].decode() for event in events]


@needs_tensorboard
def test_numbers_texts_images_and_settings_are_read_back(tmp_path: Path) -> None:
    group = begin(tmp_path)
    for step in range(1, 4):
        group.log_metrics({"train/loss": 5 - step / 10, "train/tokens_seen": step * 4096}, step)
    group.log_texts("samples", {"北京市": "是中华人民共和国的首都。\n第二行"}, 3)
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    group.log_images("plots", {"loss": image}, 3)
    group.finish(Ending.DONE)

    folder = tmp_path / "run0id"
    assert scalars(folder, "train/loss") == pytest.approx({1: 4.9, 2: 4.8, 3: 4.7})
    assert scalars(folder, "data/tokens_seen") == {1: 4096, 2: 8192, 3: 12288}
    assert texts(folder, "validation/samples/北京市") == ["是中华人民共和国的首都。\n第二行"]
    assert texts(folder, "settings") == ["    name: 名字\n    train.seed: 1\n"]
    (shown,) = read(folder).Images("plots/loss")
    assert (shown.width, shown.height, shown.step) == (4, 2, 3)


@needs_tensorboard
def test_events_are_on_disk_before_the_run_finishes(tmp_path: Path) -> None:
    group = begin(tmp_path)
    group.log_metrics({"train/loss": 1.5}, 1)
    deadline = time.monotonic() + 60
    while "train/loss" not in read(tmp_path / "run0id").Tags()["scalars"]:
        assert time.monotonic() < deadline
    assert scalars(tmp_path / "run0id", "train/loss") == {1: 1.5}
    group.finish(Ending.DONE)


@needs_tensorboard
def test_later_attempt_replaces_steps_after_its_checkpoint(tmp_path: Path) -> None:
    first = begin(tmp_path)
    for step in range(1, 9):
        first.log_metrics({"train/loss": float(step)}, step)
    first.finish(Ending.STOPPED)
    second = begin(tmp_path, step=5)
    for step in range(6, 12, 2):
        second.log_metrics({"train/loss": 100.0 + step}, step)
    second.finish(Ending.DONE)
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 106.0, 8: 108.0, 10: 110.0}
    assert scalars(tmp_path / "run0id", "train/loss") == expected


@needs_tensorboard
def test_failed_write_is_one_warning_and_a_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, is_full = RecordWriter.write, [False]

    def write_half(self: Any, data: bytes) -> None:
        if not is_full[0]:
            return write(self, data)
        self._writer.write(b"half a record")
        self._writer.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", write_half)
    group = begin(tmp_path)
    for step in range(1, 7):
        group.log_metrics({"train/loss": float(step)}, step)
        group._running[0].submit(partial(is_full.__setitem__, 0, step in (2, 3))).result()
    group.finish(Ending.DONE)
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    assert scalars(tmp_path / "run0id", "train/loss") == {1: 1, 2: 2, 5: 5, 6: 6}


@needs_tensorboard
def test_log_dir_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        begin(Path("/dev/null/logs"))
    assert refused.value.setting == "tracking.log_dir"


# ---- The package ----


def test_missing_package_is_refused_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError) as refused:
        make_trackers(Tracking(to=["tensorboard"]))
    line = str(refused.value)
    assert line.startswith("tracking.to: 'tensorboard': needs the package tensorboard, which is not installed; ")
    assert f"-m pip install '{REQUIREMENT}'" in line
    assert "\n" not in line


def test_pip_command_installs_the_extra_of_pyproject() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["tensorboard"] == [REQUIREMENT]


@pytest.fixture
def no_tensorboard(tmp_path: Path) -> dict[str, str]:
    """Environment of an interpreter that cannot find tensorboard."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['tensorboard'] = None\n")
    return {"PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.parametrize("command", ["train", "check"])
def test_missing_package_ends_train_and_check_with_exit_78(
    command: str, settings: WriteSettings, no_tensorboard: dict[str, str]
) -> None:
    path = settings(tracking={"to": ["tensorboard"]}, train=ALONE)
    code, out, err = run(command, path, **no_tensorboard)
    assert code == EXIT_REFUSED, out + err
    assert "needs the package tensorboard, which is not installed" in out + err
    assert "Traceback" not in out + err
    assert "step 1/" not in out


def test_unknown_tracker_ends_train_with_one_line(settings: WriteSettings) -> None:
    code, out, err = run("train", settings(tracking={"to": "tensorbord"}, train=ALONE))
    assert code == EXIT_REFUSED, out + err
    expected = "tracking.to: 'tensorbord': expected one of swanlab, tensorboard; did you mean tensorboard?"
    assert err.splitlines() == [expected]


# ---- A real run ----


@needs_tensorboard
def test_real_run_logs_the_same_numbers_to_both_trackers(settings: WriteSettings, output: str, tmp_path: Path) -> None:
    log_dir = tmp_path / "swanlog"
    tracked = {"to": ["swanlab", "tensorboard"], "mode": "offline", "log_dir": str(log_dir)}
    path = settings(tracking=tracked, evaluate={"every": 30}, checkpoint={"every": 20}, train=ALONE)
    code, out, err = train_until(50, path)
    assert (code, err) == (EXIT_STOPPED, ""), out + err
    code, out, err = run("train", path)
    assert (code, err) == (0, ""), out + err
    assert f"tensorboard --logdir {log_dir / 'tensorboard'}" in out
    assert "swanlab sync --id " in out

    (folder,) = (log_dir / "tensorboard").iterdir()
    assert len(list(folder.iterdir())) == 2, "one event file for each attempt"
    rows = read_metrics(output)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = sorted({name for row in rows for name in row if "/" in name})
    assert {"train/loss", "validation/loss"} <= set(names)
    for name in names:
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert scalars(folder, shown_name(name)) == pytest.approx(expected, rel=1e-6), name
    assert len(texts(folder, "validation/samples/人工智能")) == 3
    assert len(list(log_dir.glob("run-*"))) == 2, "one folder of SwanLab for each attempt"
