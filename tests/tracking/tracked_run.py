"""Start a run that is tracked in SwanLab, in a process of its own that sees only the SwanLab settings of the test."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from job.log_setup import silence_libraries
from job.tracking import start_trackers, tracker_group
from job.tracking.swanlab import SwanLab
from job.tracking.tracker import Ending, TrackedRun

EXIT_SECONDS = 150


def begin(folder: Path, environment: dict[str, str], **arguments: Any) -> subprocess.Popen[str]:
    """Start a run in `folder`; `arguments` are those of `main`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
    clean |= {"HOME": str(folder), "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    arguments = {"log_dir": str(folder / "swanlog"), **arguments}
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(arguments)],
        cwd=folder,
        env=clean,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> SimpleNamespace:
    """Wait until a run ends by itself, and return what it saw and the lines of its standard error."""
    try:
        out, err = process.communicate(timeout=EXIT_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == 1, f"SwanLab's words among ours: {lines}"
    return SimpleNamespace(**json.loads(lines[0]), warnings=err.splitlines(), output=out + err)


# ---- In that process ----


def main(
    mode: Any,
    run_id: str,
    log_dir: str,
    first_step: int = 0,
    ending: str | None = "DONE",
    attempt: int = 1,
    deadlines: Any = None,
    fills: bool = False,
    waits: bool = False,
    **_: Any,
) -> None:
    """Track ten steps, and print what was seen as one line of JSON.

    Args:
        mode: mode of SwanLab.
        run_id: id of the run.
        log_dir: folder for SwanLab's files.
        first_step: first step to log.
        ending: name of the `Ending` to finish the run with; None leaves that to the end of the process.
        attempt: number of the attempt.
        deadlines: constants of `job.tracking.tracker_group` to change.
        fills: fill the disk after the start.
        waits: wait to be killed when the steps are logged.
    """
    for name, seconds in (deadlines or {}).items():
        setattr(tracker_group, name, seconds)
    silence_libraries()
    signal.signal(signal.SIGINT, on_interrupt)
    hook = sys.excepthook
    swanlab = SwanLab(mode, "the test's reason", "WikiLLM", None, Path(log_dir))
    tracked_run = TrackedRun(run_id, "a run", first_step, {"train": {"learning_rate": 5e-4}}, attempt)
    said: list[str] = []
    group = start_trackers({"swanlab": swanlab}, tracked_run, said.append)
    kept = signal.getsignal(signal.SIGINT) is on_interrupt and sys.excepthook is hook
    if fills:
        fill(Path(log_dir))
    for step in range(first_step, first_step + 10):
        values = {"train/loss": 5 - step / 10, "train/learning_rate": 1e-3, "train/tokens_seen": 4096 * step}
        group.log_metrics(values, step)
    group.log_texts("samples", {"北京市": "是中华人民共和国的首都。", "牛顿": "是物理学家。\n第二行"}, first_step)
    if waits:
        signal.pause()
    if ending is not None:
        group.finish(Ending[ending])
    kept = kept and signal.getsignal(signal.SIGINT) is on_interrupt and sys.excepthook is hook
    print(json.dumps({"how_to_watch": swanlab.how_to_watch, "hooks_kept": kept, "said": said}))


def fill(folder: Path) -> None:
    """Fill the disk of a folder."""
    with suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def on_interrupt(*_: Any) -> None:
    """Stand for the signal handler of the training process."""


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
