"""Tests of starting a process that stop signals do not reach."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest
from small_run import REPOSITORY

from job.data import prepare_processes
from job.stop_signals import start_process, stop_signals_held

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


class Stopped(BaseException):
    pass


@pytest.fixture(params=NUMBERS)
def number(request: pytest.FixtureRequest):
    """A stop signal whose handler raises `Stopped`."""

    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(request.param, stop)
    yield request.param
    signal.signal(request.param, before)


@pytest.mark.parametrize("arrives_in", ["this thread", "another thread"])
def test_signal_is_handled_at_the_end_of_the_block(number: signal.Signals, arrives_in: str) -> None:
    done: list[str] = []
    arrivals, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno())
    leave = threading.Event()
    other = threading.Thread(target=leave.wait)
    other.start()
    try:
        with pytest.raises(Stopped), stop_signals_held():
            if arrives_in == "this thread":
                signal.raise_signal(number)
            else:
                assert other.ident is not None
                signal.pthread_kill(other.ident, number)
                assert arrivals.recv(1) == bytes([number])
            done.append("all of the block")
    finally:
        signal.set_wakeup_fd(-1)
        leave.set()
        other.join()
        arrivals.close()
        told.close()
    assert done == ["all of the block"]
    with pytest.raises(Stopped):
        signal.raise_signal(number)


def tell_blocked(ours: Connection) -> None:
    ours.send(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_started_process_never_gets_stop_signals() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=tell_blocked, args=(theirs,))
    with stop_signals_held():
        start_process(process)
    assert ours.recv() >= set(NUMBERS)
    process.join()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(NUMBERS)


def test_main_thread_blocks_no_signal_while_a_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else the kernel gives the signal to another thread, and the main thread, which handles it, is not woken.
    process = multiprocessing.get_context("spawn").Process()
    masks: list[int] = []

    def note_mask() -> None:
        status = Path(f"/proc/self/task/{threading.main_thread().native_id}/status").read_text()
        masks.append(int(status.split("SigBlk:")[1].split()[0], 16))

    monkeypatch.setattr(process, "start", note_mask)
    with stop_signals_held():
        start_process(process)
    assert masks == [0]


def wait_for_end(*arguments: Any) -> None:
    *_, reports = arguments
    with suppress(OSError):
        while True:
            reports.send((0, 0))


def test_signal_while_a_process_starts_leaves_no_process(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = SpawnProcess.start

    def start_and_be_told(process: SpawnProcess) -> None:
        start(process)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(SpawnProcess, "start", start_and_be_told)
    monkeypatch.setattr(prepare_processes, "_prepare_share", wait_for_end)
    nothing: Any = None
    with pytest.raises(Stopped) as stopped:
        prepare_processes._in_processes((nothing, nothing, "auto"), [(0, 2), (1, 2)], nothing, nothing, nothing)
    assert stopped.value is not None  # It holds the frames, and so the pipes, of the call.
    assert multiprocessing.active_children() == []


WITHOUT_SIGWAITINFO = """
import os, signal, threading
del signal.sigwaitinfo
from job.launcher import signals
signals.listen(lambda number, sender: (print(number, sender, flush=True), os._exit(0)))
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait(60)
"""


def test_stop_signal_is_heard_where_its_sender_is_not_told() -> None:
    program = [sys.executable, "-c", WITHOUT_SIGWAITINFO]
    ended = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, f"{int(signal.SIGTERM)} 0\n"), ended.stderr
