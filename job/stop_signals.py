"""The signals that ask for a stop, and how to start a process that they do not reach.

A terminal and a scheduler send them to all processes, but only the first one should act on them and end the others.
"""

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def start_process(process: BaseProcess) -> None:
    """Start a process that never gets the stop signals.

    A process inherits the blocked signals of the thread that starts it, so a thread of its own does it. The calling
    thread blocks nothing: a signal that comes while the main thread blocks it goes to another thread, and that does not
    wake the main thread, which may then sleep on for good.
    """
    with ThreadPoolExecutor(1) as thread:
        thread.submit(_start_blocked, process).result()


def _start_blocked(process: BaseProcess) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    resource_tracker.ensure_running()  # The start would do it, and this unblocks signals at its end.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    process.start()


@contextmanager
def stop_signals_held() -> Iterator[None]:
    """Delay the handlers of stop signals that come during the block until its end.

    So a request to stop cannot come between the start of a process and the note that it has to be ended.
    """
    came: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS if is_main}
    replaced = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in replaced:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
    for arrived in came:
        signal.raise_signal(arrived)
