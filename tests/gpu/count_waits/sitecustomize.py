"""Count how often the host waits for the GPU; Python imports this file if its folder is in PYTHONPATH.

The file named by COUNTED_WAITS gets a line at the beginning of each step: the number of waits so far.
"""

import ctypes
import os
import warnings
from pathlib import Path

_SYNCHRONISATIONS = 4
"""Number of the count in `fake/runtime.c`."""

if "COUNTED_WAITS" in os.environ and "RANK" in os.environ:
    import torch

    from job.training.engine import Engine

    libraries, file = ctypes.CDLL(None), Path(os.environ["COUNTED_WAITS"])
    warned: list[object] = []
    step = Engine.step

    def waits_so_far() -> int:
        if hasattr(libraries, "fake_count"):
            return int(libraries.fake_count(_SYNCHRONISATIONS))
        if torch.cuda.get_sync_debug_mode() == 0:
            # On a real GPU, torch warns whenever it waits by itself, in any thread.
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = lambda *words, **others: warned.append(words)
        return len(warned)

    def counted(engine: Engine, *arguments: object) -> object:
        with file.open("a") as lines:
            lines.write(f"{waits_so_far()}\n")
        return step(engine, *arguments)  # type: ignore[arg-type]

    Engine.step = counted  # type: ignore[assignment,method-assign]
