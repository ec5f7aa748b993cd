"""Tests of `benchmarks.loader`: its simulated link has the given speed, its sums are right, it prints its tables."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks import loader
from benchmarks.slow_link import LongLine

pytestmark = pytest.mark.benchmarks

CONTENT = bytes(range(256)) * 4096
SMALL = "--shards 2 --shard-mib 1 --buffer-shards 1 --step-tokens 65536 --epochs 1 --step-seconds 0.02 --latency 0.01"


@pytest.fixture
def store() -> Iterator[str]:
    """URL of a server that answers every connection with `CONTENT`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100)
                    connection.sendall(CONTENT)

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def ask(url: str) -> bytes:
    host, port = url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"please")
        while piece := connection.recv(2**16):
            answer += piece
    return answer


def test_simulated_link_keeps_content_and_has_its_speed(store: str) -> None:
    with LongLine(store, latency_seconds=0.1, bytes_per_second=8e6) as link:
        answers: list[bytes] = []
        askers = [threading.Thread(target=lambda: answers.append(ask(link.endpoint_url))) for _ in range(2)]
        began = time.monotonic()
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(30)
        taken_seconds = time.monotonic() - began
        assert answers == [CONTENT, CONTENT]
        assert link.carried_bytes == 2 * len(CONTENT)
    # The connection and the answer are delayed by the latency each, and both answers share the link.
    assert taken_seconds >= 2 * 0.1 + 2 * len(CONTENT) / 8e6


def test_step_waits_for_its_slowest_rank() -> None:
    assert loader.slowest([[9.0, 1.0, 2.0], [8.0, 3.0, 1.0]]) == [3.0, 2.0]
    ready, late = [True, True, True], [False, False, True]
    seen = [
        loader.Seen([9.0, 0.1, 0.2], [9.0, 0.1, 0.2], [0.0] * 3, ready, 10.0, 1.0, 0, 1),
        loader.Seen([8.0, 0.3, 0.1], [8.0, 0.3, 0.1], [0.0] * 3, late, 8.0, 1.0, 0, 1),
    ]
    scene = loader.Scene("", "", 1, 1, 1, 1, 0.0)
    assert loader.Watched(scene, seen, 0, 0).share("waited") == "5.00%, at most 0.300 s"


def test_both_ways_of_cutting_a_batch_are_measured(tmp_path) -> None:
    loader.write_data_set(f"{tmp_path}/data", 2, 40_000)
    for way in (("ours", 1), ("torch", 0)):
        measured = loader.cut(*way, f"{tmp_path}/data", f"{tmp_path}/cache", 8, 3)
        assert all(0 < seconds < 60 for seconds in measured.values())


def test_benchmark_prints_its_table() -> None:
    command = [sys.executable, "-m", "benchmarks.loader", "waiting", *SMALL.split(), "--cache-buffers", "2"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert finished.returncode == 0, finished.stderr
    cells = dict(line.strip("| ").split(" | ") for line in finished.stdout.splitlines() if line.count(" | ") == 1)
    assert cells["steps"] == "4"
    assert cells["shards downloaded by both ranks"] == "2"
    assert cells["peak size of the cache on disk"] == cells["`data.cache_bytes`"] == "2 MiB"
