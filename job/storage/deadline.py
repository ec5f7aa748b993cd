"""Deadlines and cancellation: how long operations on files may take, and how they are stopped."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from job import clock as awake
from job.errors import one_line

_NOTICE_SECONDS = 0.1
"""Seconds between two looks of a waiting operation whether it was cancelled."""


class StoreError(OSError):
    """The store failed until the deadline; starting again later may help."""


class IntegrityError(StoreError):
    """What was read is not what was written: another size or checksum, or replaced while it was read."""


class Cancelled(Exception):
    """The operation was given up because the event given to `limits` was set."""


@dataclass(frozen=True)
class Limits:
    """When the operations of a thread have to end."""

    end: float = math.inf
    """On the clock of `awake.seconds`: the time in which this process is paused does not count."""
    events: tuple[threading.Event, ...] = ()

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.end - awake.seconds()

    @property
    def are_cancelled(self) -> bool:
        """Whether one of the events is set."""
        return any(event.is_set() for event in self.events)

    def check(self, operation: str, url: str, seconds: float = 0, reason: str = "there is no time left for it") -> None:
        """Raise Cancelled if an event is set, and StoreError with `reason` if fewer than `seconds` are left."""
        if self.are_cancelled:
            raise Cancelled(one_line(f"{operation} {url}: given up, as asked"))
        if self.seconds_left <= seconds:
            raise StoreError(one_line(f"{operation} {url}: {reason}"))

    def wait(self, seconds: float, task: Future[Any]) -> None:
        """Return after `seconds`, or earlier if the task is done or an event is set."""
        end = awake.seconds() + seconds
        while not task.done() and not self.are_cancelled and (left := end - awake.seconds()) > 0:
            wait([task], min(left, _NOTICE_SECONDS))


_UNLIMITED = Limits()
current = ContextVar("limits", default=_UNLIMITED)
"""The limits of this thread."""


@contextmanager
def limits(deadline_seconds: float | None = None, cancelled: threading.Event | None = None) -> Iterator[None]:
    """Bound everything that this thread does with files inside the block, all operations together.

    Blocks may be nested; the narrowest limit holds. An operation that is stopped in the middle has either happened
    completely or not at all: no file is left in parts.

    Args:
        deadline_seconds: from now on; an operation that is not done by then raises StoreError.
        cancelled: once it is set, the running operation ends within a second, also in the middle of a request.

    Raises:
        StoreError: (by an operation inside) the time is over.
        Cancelled: (by an operation inside) the event is set.
    """
    outer = current.get()
    end = math.inf if deadline_seconds is None else awake.seconds() + deadline_seconds
    events = outer.events if cancelled is None else (*outer.events, cancelled)
    token = current.set(Limits(min(outer.end, end), events))
    try:
        yield
    finally:
        current.reset(token)
