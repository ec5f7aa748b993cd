"""Python reads this first where a test names this folder in PYTHONPATH: cutting a batch takes longer than a step."""

import os
import time

if "RANK" in os.environ:
    from job.data.loader import BatchLoader

    cut = BatchLoader._cut

    def cut_slowly(*arguments: object) -> None:
        time.sleep(0.1)
        cut(*arguments)  # type: ignore[arg-type]

    BatchLoader._cut = cut_slowly  # type: ignore[method-assign,assignment]
