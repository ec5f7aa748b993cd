"""Deadlines and cancellation of operations on files."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from job import clock
from job.errors import one_line

_NOTICE_SECONDS = 0.1
"""Interval at which a waiting operation checks if it was cancelled."""


class StoreError(OSError):
    """The store failed until the deadline. Trying again later may help."""


class IntegrityError(StoreError):
    """The bytes read are not the bytes written: the size or checksum differs, or the file was replaced meanwhile."""


class Cancelled(Exception):
    """The operation was cancelled, because the event given to `limits` was set."""


@dataclass(frozen=True)
class Limits:
    """When the operations of a thread must end."""

    end: float = math.inf
    """Deadline on the clock `clock.seconds`, which does not count the time in which this process is paused."""
    events: tuple[threading.Event, ...] = ()
    """Events; each of them cancels the operations when it is set."""

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.end - clock.seconds()

    @property
    def are_cancelled(self) -> bool:
        """True if one of the events is set."""
        return any(event.is_set() for event in self.events)

    def check(self, operation: str, url: str, seconds: float = 0, reason: str = "there is no time left for it") -> None:
        """Raise Cancelled if an event is set, and StoreError with `reason` if fewer than `seconds` are left."""
        if self.are_cancelled:
            raise Cancelled(one_line(f"{operation} {url}: cancelled"))
        if self.seconds_left <= seconds:
            raise StoreError(one_line(f"{operation} {url}: {reason}"))

    def wait(self, seconds: float, task: Future[Any]) -> None:
        """Wait for `seconds`, or until the task is done or an event is set."""
        end = clock.seconds() + seconds
        while not task.done() and not self.are_cancelled and (left := end - clock.seconds()) > 0:
            wait([task], min(left, _NOTICE_SECONDS))


_UNLIMITED = Limits()
current = ContextVar("limits", default=_UNLIMITED)
"""Limits of the current thread."""


@contextmanager
def limits(deadline_seconds: float | None = None, cancelled: threading.Event | None = None) -> Iterator[None]:
    """Limit the time of all file operations of this thread inside the block, taken together.

    Blocks may be nested; the narrowest limit applies. An operation that is stopped has happened completely or not at
    all: a cancelled write leaves no partial file.

    Args:
        deadline_seconds: seconds from now; an operation that is not done by then raises StoreError.
        cancelled: once this event is set, the running operation ends within a second, also in the middle of a request.

    Raises:
        StoreError: the time is over (raised by an operation inside the block).
        Cancelled: the event is set (raised by an operation inside the block).
    """
    outer = current.get()
    end = math.inf if deadline_seconds is None else clock.seconds() + deadline_seconds
    events = outer.events if cancelled is None else (*outer.events, cancelled)
    token = current.set(Limits(min(outer.end, end), events))
    try:
        yield
    finally:
        current.reset(token)
