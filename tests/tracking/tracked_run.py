"""A run that is tracked, in a process of its own that has nothing of SwanLab's but what a test gives it."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator

from job.log_setup import silence_libraries
from job.tracking import swanlab as tracking

EXIT_SECONDS = 150


def begin(place: Path, environment: dict[str, str], **arguments: Any) -> subprocess.Popen[str]:
    """Starts a run in the folder `place`; `arguments` are those of `main`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
    clean |= {"HOME": str(place), "PYTHONPATH": str(Path(__file__).parents[2]), **environment}
    arguments = {"log_dir": str(place / "swanlog"), **arguments}
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(arguments)],
        cwd=place,
        env=clean,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> SimpleNamespace:
    """What a run saw, and what stands on its standard error; it must end by itself, and in time."""
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
    mode: str,
    run_id: str,
    log_dir: str,
    first_step: int = 0,
    success: bool | None = True,
    deadlines: Any = None,
    fills: bool = False,
    **_: Any,
) -> None:
    for name, seconds in (deadlines or {}).items():
        setattr(tracking, name, seconds)
    silence_libraries()
    accelerator = Accelerator(cpu=True, log_with="swanlab")
    signal.signal(signal.SIGINT, on_interrupt)
    hook = sys.excepthook
    tracker = tracking.start_tracker(
        accelerator,
        mode=mode,
        project="WikiLLM",
        workspace=None,
        name="a run",
        run_id=run_id,
        log_dir=Path(log_dir),
        config={"train": {"learning_rate": 5e-4}},
    )
    kept = signal.getsignal(signal.SIGINT) is on_interrupt and sys.excepthook is hook
    if fills:
        fill(Path(log_dir))
    for step in range(first_step, first_step + 10):
        tracker.log({"train/loss": 5 - step / 10, "train/learning_rate": 1e-3}, step=step)
    tracker.log_texts(
        "samples", {"北京市": "是中华人民共和国的首都。", "牛顿": "是物理学家。\n第二行"}, step=first_step
    )
    if success is not None:
        tracker.finish(success)
        accelerator.end_training()
    kept = kept and signal.getsignal(signal.SIGINT) is on_interrupt and sys.excepthook is hook
    print(json.dumps({"how_to_watch": tracker.how_to_watch, "hooks_kept": kept}))


def fill(folder: Path) -> None:
    """Leaves no room on the disk of a folder."""
    with suppress(OSError), (folder / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def on_interrupt(*_: Any) -> None:
    """Stands for the handler of whoever trains."""


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
