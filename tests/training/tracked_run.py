"""A run that is tracked, in a process of its own: `python tracked_run.py ARGUMENTS`, a JSON object; tells what it saw."""

import json
import signal
import sys
import time
from typing import Any

from accelerate import Accelerator

from job.training import tracking


def main(
    mode: str, run_id: str, log_dir: str, first_step: int = 0, success: bool = True, deadlines: Any = None, **_: Any
) -> None:
    for name, seconds in (deadlines or {}).items():
        setattr(tracking, name, seconds)
    accelerator = Accelerator(cpu=True, log_with="swanlab")
    signal.signal(signal.SIGINT, on_interrupt)
    hook = sys.excepthook
    began = time.monotonic()
    tracker = tracking.start_tracker(
        accelerator,
        mode=mode,
        project="WikiLLM",
        workspace=None,
        name="a run",
        run_id=run_id,
        log_dir=log_dir,
        config={"train": {"learning_rate": 5e-4}},
    )
    start_seconds = time.monotonic() - began
    kept = signal.getsignal(signal.SIGINT) is on_interrupt and sys.excepthook is hook
    for step in range(first_step, first_step + 10):
        tracker.log({"train/loss": 5 - step / 10, "train/learning_rate": 1e-3}, step=step)
    tracker.log_texts("samples", {"北京市": "是中华人民共和国的首都。", "牛顿": "是物理学家。\n第二行"}, step=first_step)
    began = time.monotonic()
    tracker.finish(success)
    finish_seconds = time.monotonic() - began
    kept = kept and signal.getsignal(signal.SIGINT) is on_interrupt and sys.excepthook is hook
    accelerator.end_training()
    seen = {
        "how_to_watch": tracker.how_to_watch,
        "start_seconds": start_seconds,
        "finish_seconds": finish_seconds,
        "hooks_kept": kept,
    }
    print(json.dumps(seen))


def on_interrupt(*_: Any) -> None:
    """Stands for the handler of whoever trains."""


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
