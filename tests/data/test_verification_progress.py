"""Long verifications: shared by processes and threads, shown to the user, and interrupted by a stop."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cached_shards import ROOMY, Verifications, content, use_all
from toy_data import loader_of, write_data_set

from job.data.shard_cache import ShardCache
from job.data.verification_notes import hash_file
from job.runs.world import World
from job.training.distributed import StepSync
from job.training.hang_detector import HangDetector

ALONE = World(rank=0, world_size=1, local_rank=0, local_world_size=1)

PROCESS = """
import os, sys
from job.data import shard_files
from job.data.shard_cache import ShardCache
from job.data.manifest import load_manifest
from job.data.verification_notes import hash_file
read = []
def counted(descriptor, on_bytes):
    read.append(descriptor)
    return hash_file(descriptor, on_bytes)
shard_files.hash_file = counted
url, cache_dir = sys.argv[1:]
manifest = load_manifest(url)
cache = ShardCache(url, manifest.train, cache_dir, 10**9)
print("ready", flush=True)
sys.stdin.readline()
cache.use(range(len(manifest.train)))
for index in range(len(manifest.train)):
    cache.open(index).close()
cache.close()
print(len(read), cache.downloads, flush=True)
"""


def test_processes_of_a_node_verify_each_file_once(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [20_000] * 12)
    use_all(data, tmp_path)
    for note in tmp_path.glob("*.verified"):
        note.unlink()
    command, pipe = [sys.executable, "-c", PROCESS, data.url, str(tmp_path)], subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:  # Start both before waiting for either.
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sum(int(read) for read, _ in found) == 12
    assert [downloads for _, downloads in found] == ["0", "0"]


def test_files_are_verified_on_several_threads(tmp_path: Path, verifications: Verifications) -> None:
    data = write_data_set(str(tmp_path / "data"), [100] * 8)
    meeting = threading.Barrier(4)
    verifications.before = lambda: meeting.wait(60)
    use_all(data, tmp_path / "cache")
    assert len(verifications.names) == 8


@pytest.fixture
def held(verifications: Verifications) -> Iterator[threading.Event]:
    """Hold up every verification until the test sets this event."""
    event = threading.Event()
    verifications.before = lambda: event.wait(120)
    yield event
    event.set()


def test_long_verification_is_shown_and_is_not_a_hang(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.data.prefetching._VERIFYING_SECONDS", 0.5)
    data = write_data_set(str(tmp_path / "data"), [50])
    said: list[str] = []
    hangs: list[str] = []
    hang_detector = HangDetector(ALONE, 2.0, hangs.append)
    rounds = 0

    def beat() -> None:
        nonlocal rounds
        rounds += 1
        hang_detector.beat()
        if rounds == 25:  # Rounds of 0.2 s each.
            held.set()

    with loader_of(data, tmp_path / "cache", say=said.append) as loader:
        assert StepSync(ALONE, lambda: False, beat).go_on(loader.poll)
        next(loader)
    hang_detector.close()
    assert hangs == [] and rounds >= 25
    assert set(said) == {"verifying shards 0.0/0.0 GB"} and 2 <= len(said) <= rounds


def test_run_can_be_stopped_during_a_verification(tmp_path: Path, held: threading.Event) -> None:
    data = write_data_set(str(tmp_path / "data"), [50])
    asked = iter([False, False])
    with loader_of(data, tmp_path / "cache") as loader:
        step_sync = StepSync(ALONE, lambda: next(asked, True), lambda: None)
        assert not step_sync.go_on(loader.poll)
        held.set()


def test_progress_counts_the_bytes_of_all_files_to_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data_set(str(tmp_path / "data"), [1000, 1000])
    sizes = [shard.size for shard in data.manifest.train]
    halfway, go_on = threading.Semaphore(0), threading.Event()

    def read_half(descriptor: int, on_bytes: Callable[[int], None]) -> Any:
        on_bytes(sizes[0] // 2)
        halfway.release()
        go_on.wait(60)
        return hash_file(descriptor, lambda count: None)

    monkeypatch.setattr("job.data.shard_files.hash_file", read_half)
    cache = ShardCache(data.url, data.manifest.train, tmp_path / "cache", ROOMY)
    cache.use([0, 1])
    assert halfway.acquire(timeout=60) and halfway.acquire(timeout=60)
    progress = cache.verification_progress
    assert progress is not None
    assert (progress.done_bytes, progress.total_bytes) == (2 * (sizes[0] // 2), sum(sizes))
    assert str(progress._replace(done_bytes=3_210_000_000, total_bytes=16 * 10**9)) == "verifying shards 3.2/16.0 GB"
    go_on.set()
    content(cache, 0)
    content(cache, 1)
    assert cache.verification_progress is None
    cache.close()
