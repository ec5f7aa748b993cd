"""Run a command and measure the peak memory of its processes and the time of each stage."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.machine import peak_bytes

_POLL_SECONDS = 0.03

Stages = dict[str, Callable[[str, list[list[str]]], bool]]
"""Stages of a command, by name.

Each is a function that returns True once the stage is reached. Its arguments are the text that the command has printed
so far, and the command lines of its processes.
"""


@dataclass(frozen=True)
class Finished:
    """Measurements of a command that ended without an error."""

    began: float
    """Start of the command, in seconds since 1970."""
    seconds: float
    peak_bytes: int
    """Sum of the peak resident memory of its processes."""
    seen: dict[str, float]
    """Seconds from the start to each stage, by name."""


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, stages: Stages | None = None
) -> Finished:
    """Run `command` in `folder` and write its output to the file `log`.

    Raises:
        RuntimeError: If the command fails or ends before it has reached all stages.
    """
    peaks, seen = dict[int, int](), dict[str, float]()
    began, clock = time.time(), time.monotonic()
    with log.open("wb") as file:
        process = psutil.Popen(list(command), cwd=folder, env=dict(environment), stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None:
        command_lines = []
        with suppress(psutil.Error):
            for running in [process, *process.children(recursive=True)]:
                with suppress(psutil.Error, OSError, StopIteration):
                    peaks[running.pid] = peak_bytes(running.pid)
                    command_lines.append(running.cmdline())
        text = log.read_text(errors="replace") if stages else ""
        for name, is_reached in (stages or {}).items():
            if name not in seen and is_reached(text, command_lines):
                seen[name] = time.monotonic() - clock
        time.sleep(_POLL_SECONDS)
    seconds = time.monotonic() - clock
    missed = set(stages or {}) - set(seen)
    if process.returncode or missed:
        raise RuntimeError(
            f"{' '.join(command)}: exit {process.returncode}, stages not reached: {', '.join(sorted(missed)) or 'none'}"
            f"\n{log.read_text()}"
        )
    return Finished(began, seconds, sum(peaks.values()), seen)
