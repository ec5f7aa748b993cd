"""Signals that ask this process to stop: which ones they are, and who is told."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from job.errors import EXIT_STOPPED
from job.stop_signals import STOP_SIGNALS

_DEMANDS = (signal.SIGTERM, signal.SIGINT)
"""Signals of which a second one stops the run at once. A warning, such as the SIGUSR1 that Slurm sends before its time
limit, does not count: one of these usually follows it."""
_SAME_REQUEST_SECONDS = 1.0
"""Signals within this time count as one: launchers signal several processes, and some of them twice."""


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask this process to stop.

    A closed terminal sends SIGHUP. Under ``nohup``, SIGHUP is ignored in all processes of a run from their start, and
    stays ignored.
    """
    ignores_sighup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if not (ignores_sighup and number == signal.SIGHUP))


def hold() -> None:
    """Block the stop signals in this process and in those that it starts, until `listen` handles them.

    A blocked signal is not lost while a program is still being imported, which takes a worker seconds.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())


def listen(on_signal: Callable[[int, int], None]) -> None:
    """Start a thread that calls `on_signal` with each stop signal's number and its sender's process id, 0 on macOS.

    The main thread cannot handle signals while it waits in a collective operation, which may take long. Call this in
    the main thread, before other threads are started.
    """
    hold()
    numbers = stop_signals()

    def serve() -> None:
        while True:
            on_signal(*_wait_for(numbers))

    threading.Thread(target=serve, name="stop-signals", daemon=True).start()


def _wait_for(numbers: tuple[signal.Signals, ...]) -> tuple[int, int]:
    """Wait for one of these signals, and return its number and its sender's process id; 0 where the system has none."""
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who has sent a signal.
        return signal.sigwait(numbers), 0
    received = signal.sigwaitinfo(numbers)
    return received.si_signo, received.si_pid


class StopRequests:
    """Listener for requests to stop. It passes each one on, and tells a first SIGTERM or SIGINT from a second one.

    Until `pass_on` is called, no work has begun, and the first request ends this process.
    """

    def __init__(self) -> None:
        self._stop: Callable[[], None] = lambda: os._exit(EXIT_STOPPED)
        self._stop_at_once: Callable[[int], None] = lambda number: None
        self._first_demand_at: float | None = None
        listen(self._on_signal)

    def pass_on(self, stop: Callable[[], None], stop_at_once: Callable[[int], None]) -> None:
        """Pass requests on from now on.

        Args:
            stop: called at every request.
            stop_at_once: called, with the signal's number, at a second SIGTERM or SIGINT.
        """
        self._stop, self._stop_at_once = stop, stop_at_once

    def _on_signal(self, number: int, sender: int) -> None:
        self._stop()
        if number in _DEMANDS:
            if self._first_demand_at is None:
                self._first_demand_at = time.monotonic()
            elif time.monotonic() - self._first_demand_at > _SAME_REQUEST_SECONDS:
                self._stop_at_once(number)


class Stopped(BaseException):
    """A request to stop, raised in the main thread at any point of the program."""


@contextmanager
def raise_on_stop() -> Iterator[None]:
    """Raise `Stopped` at a request to stop inside the `with` block.

    It is meant for work that stores what it has done, so that it can be interrupted at any point.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Stopped

    previous_handlers = {number: signal.signal(number, interrupt) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def exit_code_of(number: int) -> int:
    """Return the exit code by which shells report that a signal ended a program."""
    return 128 + number
