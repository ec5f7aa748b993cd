"""Runs a command in fresh processes, and sees how much memory they take and when they come to what."""

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
"""By name: whether something has happened, from what a command has printed and the command lines of its processes."""


@dataclass(frozen=True)
class Finished:
    """A command that has ended well."""

    began: float
    """In seconds since 1970."""
    seconds: float
    peak_bytes: int
    """The sum over its processes of the most that each ever had resident."""
    seen: dict[str, float]
    """Seconds until each of the stages was seen."""


def run(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path, stages: Stages | None = None
) -> Finished:
    """Runs `command` in `folder`; what it prints goes to `log`.

    Raises:
        RuntimeError: it failed, or ended without having come to all stages.
    """
    peaks, seen = dict[int, int](), dict[str, float]()
    began, clock = time.time(), time.monotonic()
    with log.open("wb") as file:
        process = psutil.Popen(list(command), cwd=folder, env=dict(environment), stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None:
        words = []
        with suppress(psutil.Error):
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.Error, OSError, StopIteration):
                    peaks[one.pid] = peak_bytes(one.pid)
                    words.append(one.cmdline())
        text = log.read_text(errors="replace") if stages else ""
        for name, has_happened in (stages or {}).items():
            if name not in seen and has_happened(text, words):
                seen[name] = time.monotonic() - clock
        time.sleep(_POLL_SECONDS)
    seconds = time.monotonic() - clock
    missed = set(stages or {}) - set(seen)
    if process.returncode or missed:
        raise RuntimeError(
            f"{' '.join(command)}: exit {process.returncode}, {missed or 'nothing'} not seen\n{log.read_text()}"
        )
    return Finished(began, seconds, sum(peaks.values()), seen)
