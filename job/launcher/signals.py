"""Requests to stop: which signals mean one, and who hears them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from job.errors import EXIT_STOPPED

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_DEMANDS = (signal.SIGTERM, signal.SIGINT)
"""A warning (SIGUSR1 from Slurm before its time limit) may be followed by one of these; two of these are in earnest."""
_SAME_REQUEST_SECONDS = 1.0
"""Launchers signal several processes, and some of them twice: what comes so close together is one request."""


def requests() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to stop.

    A closed terminal sends SIGHUP. Under ``nohup`` that is ignored from the start on, in all processes of a run, and
    stays so.
    """
    is_deaf = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in _SIGNALS if not (is_deaf and number == signal.SIGHUP))


def hold() -> None:
    """Keeps the signals of this process, and of the processes it starts, for whoever listens first.

    A held signal is not lost while a program is still being loaded, which takes a worker seconds.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, requests())


def listen(heard: Callable[[int, int], None]) -> None:
    """Has a thread call `heard` with each signal's number and its sender's process id.

    A thread, because the main one may wait in a collective for long and would hear nothing there. To be called from the
    main thread before others are started.
    """
    hold()
    numbers = requests()

    def serve() -> None:
        while True:
            received = signal.sigwaitinfo(numbers)
            heard(received.si_signo, received.si_pid)

    threading.Thread(target=serve, name="stop-signals", daemon=True).start()


class Requests:
    """Hears requests to stop from now on, and tells the first from the second, by which a person wants it at once.

    Until `pass_on` says who is to hear of them, nothing has begun, and the first ends this process.
    """

    def __init__(self) -> None:
        self._stop: Callable[[], None] = lambda: os._exit(EXIT_STOPPED)
        self._at_once: Callable[[int], None] = lambda number: None
        self._demanded_at: float | None = None
        listen(self._heard)

    def pass_on(self, stop: Callable[[], None], at_once: Callable[[int], None]) -> None:
        """Has `stop` called at every request, and `at_once`, with its number, at a second SIGTERM or SIGINT."""
        self._stop, self._at_once = stop, at_once

    def _heard(self, number: int, sender: int) -> None:
        self._stop()
        if number in _DEMANDS:
            if self._demanded_at is None:
                self._demanded_at = time.monotonic()
            elif time.monotonic() - self._demanded_at > _SAME_REQUEST_SECONDS:
                self._at_once(number)


class Stopped(BaseException):
    """A request to stop, raised in the main thread wherever that is."""


@contextmanager
def raised() -> Iterator[None]:
    """Within it, a request to stop raises `Stopped`: for work that keeps what is done, and can be left off anywhere."""

    def leave_off(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = {number: signal.signal(number, leave_off) for number in requests()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code_of(number: int) -> int:
    """The code by which shells know that a signal ended a program."""
    return 128 + number
