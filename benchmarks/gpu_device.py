"""Device of the GPU benchmark: its time, its memory, and what is not available on it."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import peak_bytes as resident_peak_bytes

WARM_UP_STEPS, LEAST_STEPS, MOST_STEPS = 3, 4, 30
MEASURED_SECONDS = 3.0
"""Seconds of steps to measure, but at least `LEAST_STEPS` and at most `MOST_STEPS` steps."""


class NotHere(Exception):
    """Something that a case needs is not available on this machine."""


def needs_cuda(tensor: Tensor) -> None:
    """Raise `NotHere` if the tensor is not on a GPU."""
    if not tensor.is_cuda:
        raise NotHere("CUDA only")


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors if `device` is a GPU, else of this whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident_peak_bytes()


def the_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """Clock for the time of each phase on the device; each mark ends the phase that began with the mark before.

    On a GPU the marks are CUDA events, so that the host does not wait for the device until the times are read.

    Args:
        measured_seconds: Seconds of steps to measure, but at least `LEAST_STEPS` and at most `MOST_STEPS` steps.
    """

    def __init__(self, device: torch.device, measured_seconds: float = MEASURED_SECONDS) -> None:
        self._on_gpu, self._measured_seconds = device.type == "cuda", measured_seconds
        self._is_running = False
        self._marks: list[tuple[str, Any]] = []
        self._step_ends: list[int] = []
        self._began = time.perf_counter()
        self._measuring_since = 0.0
        self.first_step_seconds = 0.0
        """Seconds from the creation of this clock to the end of the first step, with building and compiling."""

    @property
    def last(self) -> str:
        """Name of the phase that ended last."""
        return self._marks[-1][0] if self._marks else ""

    def mark(self, phase: str) -> None:
        """Record the end of a phase; does nothing before `start`."""
        if not self._is_running:
            return
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def start(self) -> None:
        """Record the beginning of the first step."""
        self._is_running = True
        self.mark("start")

    def end_step(self) -> bool:
        """Record the end of a step and return True if enough steps were measured."""
        self.mark("optimizer")
        self._step_ends.append(len(self._marks))
        if len(self._step_ends) <= WARM_UP_STEPS:
            self._synchronize()
            now = time.perf_counter()
            self.first_step_seconds = self.first_step_seconds or now - self._began
            self._measuring_since = now
        measured = len(self._step_ends) - WARM_UP_STEPS
        seconds = time.perf_counter() - self._measuring_since
        return measured >= MOST_STEPS or (measured >= LEAST_STEPS and seconds >= self._measured_seconds)

    def steps(self) -> list[dict[str, float]]:
        """Return the seconds of each step after the warm-up, by phase."""
        self._synchronize()
        steps = []
        for start, end in zip(self._step_ends[WARM_UP_STEPS - 1 :], self._step_ends[WARM_UP_STEPS:], strict=False):
            phases: dict[str, float] = defaultdict(float)
            for (_, before), (phase, after) in zip(self._marks[start - 1 : end], self._marks[start:end], strict=False):
                phases[phase] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
            steps.append(dict(phases))
        return steps

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def median_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Return the median seconds of ten calls of `work`, after three calls to warm up."""
    seconds = []
    for _ in range(13):
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work()
            after.record()
            torch.cuda.synchronize()
            seconds.append(before.elapsed_time(after) / 1e3)
        else:
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])
