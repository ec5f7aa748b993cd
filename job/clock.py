"""A clock that stands still while this process is paused.

SIGSTOP, ``docker pause`` and a suspended job stop all threads of a process, but not the system's clock: when it wakes,
every deadline seems to be over. A thread of this clock measures its own sleep. Where that took much longer than it
asked for, the process was paused, and the time is not counted.
"""

import os
import threading
import time
from typing import NamedTuple

_TICK_SECONDS = 0.2
_LONGEST_TICK_SECONDS = 1.0
"""A busy machine may delay a thread so long; of a pause no more than this is counted."""


class _Mark(NamedTuple):
    """A reading of the clock at a tick."""

    counted_seconds: float
    at: float
    """Time of the reading on the system's clock."""
    pauses: int


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
    """Return the seconds for which this process was awake. Only differences between two calls mean something."""
    counted_seconds, at, _ = _started().mark
    return counted_seconds + min(time.monotonic() - at, _LONGEST_TICK_SECONDS)


def pauses() -> int:
    """Return the number of pauses that the clock has noticed."""
    return _started().mark.pauses


def _started() -> _Clock:
    global _clock  # noqa: PLW0603  # one thread for all that ask
    with _lock:
        if _clock is None:
            _clock = _Clock()
        return _clock


def _go_on_in_child() -> None:
    """Start the thread again after a fork, which takes only the forking thread along: the clock would stand still."""
    global _clock, _lock  # noqa: PLW0603
    _lock = threading.Lock()  # another thread may have held the old one
    if _clock is not None:
        _clock = _Clock(_clock.mark.counted_seconds, _clock.mark.pauses)


os.register_at_fork(after_in_child=_go_on_in_child)
