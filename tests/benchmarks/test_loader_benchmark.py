"""The measurement of the data path: its line is as slow as it says, its sums are right, and it comes to its tables."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks import loader

pytestmark = pytest.mark.benchmarks

CONTENT = bytes(range(256)) * 4096
SMALL = "--shards 2 --shard-mib 1 --buffer-shards 1 --step-tokens 65536 --epochs 1 --step-seconds 0.02 --latency 0.01"


@pytest.fixture
def store() -> Iterator[str]:
    """Answers everything with `CONTENT`."""
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
    found = b""
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"please")
        while piece := connection.recv(2**16):
            found += piece
    return found


def test_a_long_line_changes_nothing_and_is_no_faster_than_it_says(store: str) -> None:
    with loader.LongLine(store, latency_seconds=0.1, bytes_per_second=8e6) as line:
        answers: list[bytes] = []
        askers = [threading.Thread(target=lambda: answers.append(ask(line.endpoint_url))) for _ in range(2)]
        began = time.monotonic()
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(30)
        taken_seconds = time.monotonic() - began
        assert answers == [CONTENT, CONTENT]
        assert line.carried_bytes == 2 * len(CONTENT)
    # Connecting and answering are late each, and both answers share the line.
    assert taken_seconds >= 2 * 0.1 + 2 * len(CONTENT) / 8e6


def test_a_step_waits_for_its_slowest_rank_and_the_first_batch_is_apart() -> None:
    assert loader.slowest([[9.0, 1.0, 2.0], [8.0, 3.0, 1.0]]) == [3.0, 2.0]
    ready, late = [True, True, True], [False, False, True]
    seen = [
        loader.Seen([9.0, 0.1, 0.2], [9.0, 0.1, 0.2], [0.0] * 3, ready, 10.0, 1.0, 0, 1),
        loader.Seen([8.0, 0.3, 0.1], [8.0, 0.3, 0.1], [0.0] * 3, late, 8.0, 1.0, 0, 1),
    ]
    scene = loader.Scene("", "", 1, 1, 1, 1, 0.0)
    assert loader.Watched(scene, seen, 0, 0).share("waited") == "5.00%, at most 0.300 s"


def test_both_ways_to_cut_a_batch_are_measured(tmp_path) -> None:
    loader.write_data_set(f"{tmp_path}/data", 2, 40_000)
    for way in (("ours", 1), ("torch", 0)):
        measured = loader.cut(*way, f"{tmp_path}/data", f"{tmp_path}/cache", 8, 3)
        assert all(0 < seconds < 60 for seconds in measured.values())


def test_it_comes_to_its_table() -> None:
    command = [sys.executable, "-m", "benchmarks.loader", "waiting", *SMALL.split(), "--cache-buffers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    cells = dict(line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.count(" | ") == 1)
    assert cells["steps"] == "4"
    assert cells["shards fetched, of both ranks"] == "2"
    assert cells["most disk taken"] == cells["`data.cache_bytes`"] == "2 MiB"
