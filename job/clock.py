"""A clock that stops while this process is paused.

SIGSTOP, ``docker pause`` and a suspended job stop all threads of a process, but not the system's clock. When the
process wakes, every deadline seems to have passed. A thread of this clock therefore measures its own short sleeps: if
one took much longer than asked for, the process was paused, and the extra time is not counted.
"""

import os
import threading
import time
from typing import NamedTuple

_TICK_SECONDS = 0.2
_LONGEST_TICK_SECONDS = 1.0
"""Longest time that is counted for one tick. A busy machine may delay a thread this long; a longer delay is a pause."""


class _Mark(NamedTuple):
    """The state of the clock at a tick."""

    counted_seconds: float
    """Seconds counted until this tick."""
    at: float
    """Time of the tick on the system's clock."""
    pauses: int
    """Pauses noticed until this tick."""


class _Clock:
    def __init__(self, counted_seconds: float = 0.0, pauses: int = 0) -> None:
        self.mark = _Mark(counted_seconds, time.monotonic(), pauses)
        threading.Thread(target=self._tick, name="awake", daemon=True).start()

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            counted_seconds, at, pauses = self.mark
            now = time.monotonic()
            was_paused = now - at > _LONGEST_TICK_SECONDS
            self.mark = _Mark(counted_seconds + min(now - at, _LONGEST_TICK_SECONDS), now, pauses + was_paused)


_clock: _Clock | None = None
_lock = threading.Lock()


def seconds() -> float:
    """Return how many seconds this process has been awake. Only the difference between two calls has a meaning."""
    counted_seconds, at, _ = _started().mark
    return counted_seconds + min(time.monotonic() - at, _LONGEST_TICK_SECONDS)


def pauses() -> int:
    """Return the number of pauses that the clock has noticed."""
    return _started().mark.pauses


def _started() -> _Clock:
    global _clock  # noqa: PLW0603  # All callers share one clock and its thread.
    with _lock:
        if _clock is None:
            _clock = _Clock()
        return _clock


def _restart_in_child() -> None:
    """Start the thread again in a forked process, which has only the thread that called fork."""
    global _clock, _lock  # noqa: PLW0603
    _lock = threading.Lock()  # Another thread may have held the old lock during the fork.
    if _clock is not None:
        _clock = _Clock(_clock.mark.counted_seconds, _clock.mark.pauses)


os.register_at_fork(after_in_child=_restart_in_child)
