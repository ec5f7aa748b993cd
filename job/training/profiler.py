"""A profile of a few steps (`train.profile_steps`): what host and device did, operator by operator."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.profiler import profile

from job import storage
from job.model import gpu

_OPERATORS_SHOWN = 12


class StepProfile:
    """Profiles this process between two steps.

    Args:
        steps: numbers of steps done at which the profile begins and ends; None: no profile.
        output: the run's prefix; the trace goes below its logs/, for Perfetto or chrome://tracing.
        folder: local folder for the trace until it is uploaded.
        say: prints a line of the log.
    """

    def __init__(self, steps: tuple[int, int] | None, output: str, folder: Path, say: Callable[[str], None]) -> None:
        self._first, self._last = steps or (0, 0)
        self._output, self._folder, self._say = output, folder, say
        self._running: profile | None = None

    def at(self, step: int) -> None:
        """Begin or end the profile if it is time; called before each step, when `step` steps are done."""
        if self._running is None and self._first <= step < self._last:
            self._first = step
            self._running = profile(activities=torch.profiler.supported_activities())
            self._running.start()
        elif self._running is not None and step >= self._last:
            self._end(self._running, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._running is not None:
            self._running.stop()

    def _end(self, running: profile, step: int) -> None:
        self._running, steps, self._first = None, f"{self._first:06d}-{step:06d}", step
        gpu.synchronize()
        running.stop()
        name, url = (
            self._folder / f"profile-{steps}.json.gz",
            storage.join(self._output, "logs", f"profile-{steps}.json.gz"),
        )
        running.export_chrome_trace(str(name))
        by_time = "self_device_time_total" if gpu.is_available() else "self_cpu_time_total"
        table = running.key_averages().table(sort_by=by_time, row_limit=_OPERATORS_SHOWN, max_name_column_width=40)
        for line in table.splitlines():
            self._say(line)
        try:
            storage.upload_file(name, url)
        except storage.StoreError as error:
            self._say(f"the profile could not be stored: {error}")
        else:
            self._say(f"profile of steps {steps}: {url}")
        name.unlink()
