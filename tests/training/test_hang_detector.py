"""Tests of the hang detector and of its clock, which does not count the time in which the process is paused."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from small_run import REPOSITORY, free_port

from job import clock
from job.runs.world import World
from job.training.hang_detector import HangDetector

ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1)


@pytest.fixture
def hung() -> Iterator[tuple[HangDetector, threading.Event, list[str]]]:
    """A hang detector without heartbeats, an event that is set when it reports, and the lines that it reports."""
    said: list[str] = []
    noticed = threading.Event()
    hang_detector = HangDetector(ALONE, 2.0, lambda line: (said.append(line), noticed.set())[1])
    yield hang_detector, noticed, said
    hang_detector.close()


def test_process_without_heartbeat_is_reported(hung: tuple[HangDetector, threading.Event, list[str]]) -> None:
    _, noticed, said = hung
    began = time.monotonic()
    assert noticed.wait(60)
    assert time.monotonic() - began > 2
    assert said[0].startswith("no rank has made progress for 2 s (train.hang_timeout); rank 0 is at\n")


def test_heartbeats_prevent_a_report(hung: tuple[HangDetector, threading.Event, list[str]]) -> None:
    hang_detector, noticed, _ = hung
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        hang_detector.beat()
        assert not noticed.wait(0.1)


def test_pause_does_not_count() -> None:
    program = (
        "import sys, time\nfrom job import clock\nclock.seconds()\nprint('begun', flush=True)\n"
        "while clock.pauses() == 0: time.sleep(0.01)\n"
        "began = clock.seconds(), clock.pauses()\nprint(*began, flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        began = time.monotonic()
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)  # This is the pause.
        process.send_signal(signal.SIGCONT)
        seconds, pauses = process.stdout.readline().split()
    assert int(pauses) >= 1
    assert float(seconds) < time.monotonic() - began - 3


@pytest.mark.recovery
def test_timeout_begins_anew_after_a_pause() -> None:
    program = (
        "import sys\nfrom job.training.hang_detector import HangDetector\nfrom job.runs.world import World\n"
        "hang_detector = HangDetector(World(0, 0, 1, 1), 6.0, lambda line: print('hung', flush=True))\n"
        "print('begun', flush=True)\nsys.stdin.readline()\nhang_detector.beat()\nhang_detector.close()\nprint('done')"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(9)  # This is the pause.
        process.send_signal(signal.SIGCONT)
        time.sleep(2)  # This stands for a slow step after the pause.
        assert process.communicate("go on\n", timeout=240)[0] == "done\n"


def test_time_awake_is_counted() -> None:
    began, awake_began = time.monotonic(), clock.seconds()
    time.sleep(1.5)
    assert 1 < clock.seconds() - awake_began < time.monotonic() - began + 0.5


def test_clock_goes_on_in_a_forked_process() -> None:
    program = (
        "import os, time\nfrom job import clock\nbegan = clock.seconds()\n"
        "if child := os.fork():\n    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "while clock.seconds() - began < 2: time.sleep(0.01)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, timeout=240).returncode == 0


@pytest.mark.recovery
def test_hang_detector_removes_timeouts_of_collectives() -> None:
    program = """
import sys, threading, time
from datetime import timedelta
import torch
import torch.distributed as dist
from job.training.distributed import StepSync
from job.training.hang_detector import HangDetector
from job.runs.world import World

rank = int(sys.argv[1])
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, rank == 0)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
second = dist.new_group(backend="gloo", timeout=timedelta(seconds=1))
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
hang_detector = HangDetector(World(rank, rank, 2, 2), 100.0, print)
for group in (None, second):
    if rank == 1:
        time.sleep(3)
    dist.all_reduce(torch.ones(1), group=group)
dist.barrier()
print("done", flush=True)
"""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(port)],
            cwd=REPOSITORY,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for one in ranks:
        out, err = one.communicate(timeout=120)
        assert (one.returncode, out) == (0, "done\n"), err
