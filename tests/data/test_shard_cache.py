"""Shards in a node's cache, from a real S3 server: fetched once per node, verified, and tried again after an outage."""

import hashlib
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from cached_shards import ROOMY, Fetches, bytes_on_disk, content, stored
from toy_data import DataSet, loader_of, order_of, write_data_set

from job import storage
from job.data.cache_quota import locked
from job.data.shard_cache import ShardCache
from job.errors import UserError

# ---- Once per node ----

READER = """
import sys
from job.data.shard_cache import ShardCache
from job.data.manifest import load_manifest
url, cache_dir = sys.argv[1:]
manifest = load_manifest(url)
cache = ShardCache(url, manifest.train, cache_dir, 10**9)
print("ready", flush=True)
sys.stdin.readline()
cache.use(range(len(manifest.train)))
for index, shard in enumerate(manifest.train):
    with cache.open(index) as file:
        assert len(file.read()) == shard.size
cache.close()
print(cache.downloads, flush=True)
"""

HANGING_READER = """
import threading
from job import storage
open_read = storage.open_read

class Hanging:
    def __init__(self, source): self.source = source
    def __enter__(self): return self
    def __exit__(self, *error): self.source.close()
    def read(self, count):
        if begun := self.source.tell():
            print("in the middle", flush=True)
            threading.Event().wait()
        return self.source.read(10)

def hanging(url):
    return Hanging(open_read(url)) if url.endswith("train-00000.bin") else open_read(url)
"""


def start(script: str, data: DataSet, cache_dir: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", script, data.url, str(cache_dir)], stdin=pipe, stdout=pipe, text=True
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_processes_of_a_node_fetch_each_shard_once(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [2000] * 12)
    processes = [start(READER, data, tmp_path) for _ in range(2)]
    assert [said(process) for process in processes] == ["ready", "ready"]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    downloads = [int(said(process)) for process in processes]
    assert [process.wait(30) for process in processes] == [0, 0]
    assert sum(downloads) == 12
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".partial", ".plan")]


def test_another_process_takes_over_from_a_killed_one(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [2000, 2000])
    hanging = HANGING_READER + READER.replace("cache.use", "storage.open_read = hanging; cache.use")
    process = start(hanging, data, tmp_path)
    assert said(process) == "ready"
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    assert said(process) == "in the middle"
    cache = ShardCache(data.url, data.manifest.train, tmp_path, ROOMY)
    cache.use([0, 1])
    got: list[bytes] = []
    waiting = threading.Thread(target=lambda: got.append(content(cache, 0)))
    waiting.start()
    assert content(cache, 1) == stored(data, 1)
    assert not got and list(tmp_path.glob("*.partial"))
    process.kill()
    process.wait()
    waiting.join(10)
    assert got == [stored(data, 0)]
    cache.close()
    assert not list(tmp_path.glob("*.partial"))


def test_waiting_for_another_process_takes_no_cpu_time(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data_set(bucket, [100])
    tries: list[int] = []
    fetch = ShardCache._fetch

    def counted(cache: ShardCache, index: int) -> bool:
        tries.append(index)
        return fetch(cache, index)

    monkeypatch.setattr(ShardCache, "_fetch", counted)
    cache = ShardCache(data.url, data.manifest.train, tmp_path, ROOMY)
    with locked(tmp_path / f"{data.manifest.train[0].sha256[:16]}-train-00000.bin.lock"):
        cache.use([0])
        cache.demand([0])
        with cache._changed:
            cache._changed.wait_for(lambda: not cache._missing, timeout=0.5)
    assert 1 <= len(tries) < 20
    assert content(cache, 0) == stored(data, 0)
    cache.close()


def test_room_reserved_by_a_killed_process_is_freed(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [2000])
    shard_bytes = data.manifest.train[0].size
    (tmp_path / "0123456789abcdef-other.bin.5000.partial").touch()
    (tmp_path / "0123456789abcdef.plan").write_text("1 0123456789abcdef-older.bin\n")
    (tmp_path / "0123456789abcdef-older.bin.shard").write_bytes(bytes(5000))
    cache = ShardCache(data.url, data.manifest.train, tmp_path, shard_bytes)
    cache.use([0])
    assert content(cache, 0) == stored(data, 0)
    assert bytes_on_disk(tmp_path) == shard_bytes
    assert not list(tmp_path.glob("0123456789abcdef*.p*"))
    cache.close()


# ---- Damaged and missing shards ----


def test_shard_damaged_in_the_store_is_refused_by_name(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
    data = write_data_set(bucket, [500, 500])
    damaged = bytearray(stored(data, 1))
    damaged[100] ^= 1
    storage.write_bytes(storage.join(data.url, data.manifest.train[1].name), bytes(damaged))
    fetches.names.clear()
    with loader_of(data, tmp_path) as loader, pytest.raises(UserError) as caught:
        list(loader)
    assert fetches.names.count("train-00001.bin") == 2
    message = str(caught.value)
    assert message.startswith("data.shards") and data.manifest.train[1].name in message
    assert hashlib.sha256(damaged).hexdigest() in message and data.manifest.train[1].sha256 in message
    assert not list(tmp_path.glob("*train-00001.bin.shard"))


def test_shard_that_was_damaged_once_is_fetched_again(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
    data = write_data_set(bucket, [500])
    whole = stored(data, 0)
    url = storage.join(data.url, data.manifest.train[0].name)
    storage.write_bytes(url, whole[:-8])
    fetches.names.clear()

    def repair(name: str, number: int) -> None:
        if number == 2:
            storage.write_bytes(url, whole)

    fetches.before = repair
    cache = ShardCache(data.url, data.manifest.train, tmp_path, ROOMY)
    cache.use([0])
    assert content(cache, 0) == whole
    assert cache.downloads == 2
    cache.close()


def test_missing_shard_is_refused_by_name(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [500, 500])
    storage.delete([storage.join(data.url, "train-00001.bin")])
    with loader_of(data, tmp_path) as loader, pytest.raises(UserError, match=r"^data\.shards: .*train-00001\.bin"):
        list(loader)


def test_shard_of_another_data_set_is_not_mistaken(bucket: str, tmp_path: Path) -> None:
    for url, tokens in ((f"{bucket}/one", 500), (f"{bucket}/two", 501)):
        data = write_data_set(url, [tokens])
        cache = ShardCache(data.url, data.manifest.train, tmp_path, ROOMY)
        cache.use([0])
        assert content(cache, 0) == stored(data, 0)
        assert cache.downloads == 1
        cache.close()


def test_cache_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    data = write_data_set(str(tmp_path / "data"), [100])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^data\.cache_dir: "):
        ShardCache(data.url, data.manifest.train, tmp_path / "file", 1)


# ---- Outages of the store ----


def test_store_failure_ahead_of_use_does_not_stop_training(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
    data = write_data_set(bucket, [100] * 4)
    order = order_of(data, buffer_bytes=2 * data.manifest.train[0].size)
    later = {data.manifest.train[index].name for index in order.shards_needed(order.buffer_at(0).stop)}
    refused = threading.Event()

    def fail_first(name: str, number: int) -> None:
        if name in later and number == 1:
            refused.set()
            raise storage.StoreError("the network is away")

    fetches.before = fail_first
    with loader_of(data, tmp_path, order) as loader:
        first = next(iter(loader))
        assert refused.wait(10)
        assert len([first, *loader]) == -(-order.position_limit(2) // 4)
    assert Counter(fetches.names) == {name: 2 if name in later else 1 for name in set(fetches.names)}


def test_batches_made_ahead_of_use_outlive_an_outage(
    bucket: str, tmp_path: Path, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("job.data.shard_cache._RETRY_SECONDS", 0.01)
    data = write_data_set(bucket, [20] * 4)
    order = order_of(data, buffer_bytes=data.manifest.train[0].size)
    failures, away = threading.Semaphore(0), threading.Event()

    def fail_while_away(name: str, number: int) -> None:
        if away.is_set():
            failures.release()
            raise storage.StoreError("the network is away")

    fetches.before = fail_while_away
    away.set()
    with loader_of(data, tmp_path, order) as loader:
        assert all(failures.acquire(timeout=10) for _ in range(20))
        away.clear()
        assert len(list(loader)) == -(-order.position_limit(2) // 4)


def test_shard_demanded_during_an_outage_is_tried_again(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
    data = write_data_set(bucket, [100])
    began, asked = threading.Event(), threading.Event()

    def fail_first(name: str, number: int) -> None:
        if number == 1:
            began.set()
            asked.wait(10)
            raise storage.StoreError("the network is away")

    fetches.before = fail_first
    cache = ShardCache(data.url, data.manifest.train, tmp_path, ROOMY)
    cache.use([0])
    assert began.wait(10)
    cache.demand([0])
    asked.set()
    assert content(cache, 0) == stored(data, 0)
    cache.close()


def test_outage_is_logged_once_a_minute(
    bucket: str,
    tmp_path: Path,
    fetches: Fetches,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("job.data.shard_cache._RETRY_SECONDS", 0.01)
    data = write_data_set(bucket, [100] * 4)
    failures = threading.Semaphore(0)

    def fail(name: str, number: int) -> None:
        failures.release()
        raise storage.StoreError("the network\nis away")

    fetches.before = fail
    cache = ShardCache(data.url, data.manifest.train, tmp_path, ROOMY)
    cache.use([0], ahead=[1, 2, 3])
    assert all(failures.acquire(timeout=10) for _ in range(30))
    assert caplog.messages == ["shards cannot be fetched now: the network is away"]
    cache._quiet_until -= 60
    assert all(failures.acquire(timeout=10) for _ in range(30))
    assert len(caplog.messages) == 2
    cache.close()


def test_store_failure_when_the_shard_is_needed_is_an_error(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
    data = write_data_set(bucket, [100])

    def fail(name: str, number: int) -> None:
        raise storage.StoreError("the network is away")

    fetches.before = fail
    with loader_of(data, tmp_path) as loader, pytest.raises(storage.StoreError, match="the network is away"):
        list(loader)
