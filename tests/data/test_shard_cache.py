"""Shards on a node's disk, from a real S3 server: once per node, verified, within their room, whoever dies."""

import hashlib
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from toy_data import LENGTH, DataSet, loader_of, order_of, rows, write_data_set

from job import storage
from job.data.cache_quota import locked
from job.data.loader import EvaluationLoader
from job.data.order import EvaluationOrder
from job.data.shard_cache import ShardCache
from job.errors import UserError

ROOMY = 10**9


def content(cache: ShardCache, index: int) -> bytes:
    with cache.open(index) as file:
        return file.read()


def stored(data: DataSet, index: int) -> bytes:
    return storage.read_bytes(storage.join(data.url, data.manifest.train[index].name))


def bytes_on_disk(cache_dir: Path) -> int:
    """What shards and room reserved for shards take."""
    with locked(cache_dir / "room.lock"):
        held = sum(path.stat().st_size for path in cache_dir.glob("*.shard"))
        return held + sum(int(path.name.split(".")[-2]) for path in cache_dir.glob("*.partial"))


class Fetches:
    """Every fetch from the store, by shard name, and what the test wants done at its beginning."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.before: Callable[[str, int], None] = lambda name, number: None
        self._open = storage.open_read
        monkeypatch.setattr(storage, "open_read", self._counted)

    def _counted(self, url: str) -> BinaryIO:
        name = url.rpartition("/")[2]
        self.names.append(name)
        self.before(name, self.names.count(name))
        return self._open(url)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Fetches:
    return Fetches(monkeypatch)


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


def test_two_processes_of_a_node_fetch_each_shard_once_between_them(bucket: str, tmp_path: Path) -> None:
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


def test_another_process_takes_over_when_the_one_that_fetches_is_killed(bucket: str, tmp_path: Path) -> None:
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


def test_waiting_for_another_process_takes_no_processor_time(
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


def test_what_a_killed_process_reserved_is_room_again(bucket: str, tmp_path: Path) -> None:
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


# ---- Verified ----


def test_a_shard_that_stays_damaged_is_refused_by_name(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
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


def test_a_shard_that_was_damaged_once_is_fetched_again_and_used(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
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


def test_a_missing_shard_is_named(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [500, 500])
    storage.delete([storage.join(data.url, "train-00001.bin")])
    with loader_of(data, tmp_path) as loader, pytest.raises(UserError, match=r"^data\.shards: .*train-00001\.bin"):
        list(loader)


def test_another_data_sets_shard_is_not_taken_for_ours(bucket: str, tmp_path: Path) -> None:
    for url, tokens in ((f"{bucket}/one", 500), (f"{bucket}/two", 501)):
        data = write_data_set(url, [tokens])
        cache = ShardCache(data.url, data.manifest.train, tmp_path, ROOMY)
        cache.use([0])
        assert content(cache, 0) == stored(data, 0)
        assert cache.downloads == 1
        cache.close()


# ---- Room ----


def test_a_buffer_that_does_not_fit_is_refused_with_the_number_that_does(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [500, 400, 300])
    order = order_of(data, buffer_bytes=10**9)
    needed = sum(shard.size for shard in data.manifest.train)
    with pytest.raises(UserError, match=rf"^data\.cache_bytes: {needed - 1}: .* set it to {needed} or more"):
        loader_of(data, tmp_path, order, cache_bytes=needed - 1)
    with loader_of(data, tmp_path, order, cache_bytes=needed) as loader:
        assert len(list(loader)) == -(-order.position_limit(2) // 4)


@pytest.mark.parametrize("buffers_that_fit", [1, 1.5, 2])
def test_the_cache_keeps_its_limit_and_the_buffer_in_use_over_many_buffers(
    bucket: str, tmp_path: Path, fetches: Fetches, buffers_that_fit: float
) -> None:
    data = write_data_set(bucket, [100] * 9)
    shard_bytes = data.manifest.train[0].size
    order = order_of(data, buffer_bytes=3 * shard_bytes)
    limit = int(3 * shard_bytes * buffers_that_fit)
    disk: list[int] = []
    fetches.before = lambda name, number: disk.append(bytes_on_disk(tmp_path / "tight"))
    with loader_of(data, tmp_path / "tight", order, cache_bytes=limit, workers=2) as loader:
        batches = []
        for batch in loader:
            disk.append(bytes_on_disk(tmp_path / "tight"))
            batches.append(batch)
        downloads = loader.downloads
    assert shard_bytes <= max(disk) <= limit
    assert downloads <= 18  # each of 9 shards at most once an epoch: none is dropped before its buffer is done
    fetches.before = lambda name, number: None
    with loader_of(data, tmp_path / "roomy", order) as loader:
        assert rows(list(loader)) == rows(batches)
        assert loader.downloads == 9


def test_two_processes_at_different_places_go_on_in_a_cache_too_small_for_both(
    bucket: str, tmp_path: Path, fetches: Fetches
) -> None:
    data = write_data_set(bucket, [60] * 6)
    shard_bytes = data.manifest.train[0].size
    order = order_of(data, buffer_bytes=2 * shard_bytes)
    with loader_of(data, tmp_path / "roomy", order) as loader:
        expected = rows(list(loader))
    disk: list[int] = []
    fetches.before = lambda name, number: disk.append(bytes_on_disk(tmp_path / "tight"))
    tight: dict[str, Any] = {"cache_bytes": 2 * shard_bytes}
    with (
        loader_of(data, tmp_path / "tight", order, **tight) as one,
        loader_of(data, tmp_path / "tight", order, **tight) as other,
    ):
        ahead = [next(iter(one)) for _ in range(len(expected) // 2)]
        both = [(a, b) for a, b in zip([*ahead, *one], other, strict=True)]
    assert rows([a for a, _ in both]) == rows([b for _, b in both]) == expected
    assert max(disk) <= 2 * shard_bytes


def test_evaluation_does_not_drop_the_buffer_that_training_uses(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
    data = write_data_set(bucket, [100] * 4, [100] * 6)
    shard_bytes = data.manifest.train[0].size
    room: dict[str, Any] = {"cache_dir": tmp_path, "cache_bytes": 3 * shard_bytes}
    training_order = order_of(data, buffer_bytes=2 * shard_bytes)
    held_out = EvaluationOrder([100] * 6, LENGTH, seed=1)
    fetched = Counter[str]()
    with loader_of(data, order=training_order, end_position=training_order.position_limit(1), **room) as loader:
        batches = iter(loader)
        next(batches)
        ranks: dict[str, int] = {"rank": 0, "world_size": 1}
        for _ in range(2):
            with EvaluationLoader(data.url, data.manifest, held_out, batch_size=8, **ranks, **room) as evaluation:
                labels = [label for batch in evaluation for label in batch.labels.flatten().tolist() if label > 0]
                assert labels == [token for tokens in data.validation for token in tokens[1:]]
        for _ in batches:
            pass
        fetched.update(name for name in fetches.names if name.startswith("train"))
    first_buffer = [data.manifest.train[index].name for index in training_order.shards_needed(0)]
    assert [fetched[name] for name in first_buffer] == [1, 1]


def test_fetching_ahead_spares_what_another_process_uses_and_an_urgent_fetch_does_not_wait_for_it(
    bucket: str, tmp_path: Path
) -> None:
    data = write_data_set(bucket, [100] * 3)
    limit = 2 * data.manifest.train[0].size
    one, other = (ShardCache(data.url, data.manifest.train, tmp_path, limit) for _ in range(2))
    one.use([0, 1])
    held = [content(one, 0), content(one, 1)]
    other.use([], ahead=[2])
    with other._changed:
        assert other._changed.wait_for(lambda: not other._missing, timeout=10)
    assert (other.downloads, bytes_on_disk(tmp_path)) == (0, limit)
    other.use([2])
    assert content(other, 2) == stored(data, 2)
    assert bytes_on_disk(tmp_path) == limit
    assert [content(one, 0), content(one, 1)] == held
    one.close()
    other.close()


def test_what_another_process_uses_is_spared_while_what_it_needs_next_is_on_its_way(
    bucket: str, tmp_path: Path, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data_set(bucket, [100] * 4)
    limit = 3 * data.manifest.train[0].size
    is_coming, may_come, looks = threading.Event(), threading.Event(), threading.Semaphore(0)
    next_name = data.manifest.train[2].name.rpartition("/")[2]

    def hold_up(name: str, number: int) -> None:
        if (name, number) == (next_name, 1):
            is_coming.set()
            assert may_come.wait(30)

    @contextmanager
    def watched(path: Path, wait: bool = True) -> Iterator[bool]:
        if path.name == "room.lock" and threading.current_thread() in other._threads:
            looks.release()
        with locked(path, wait) as is_ours:
            yield is_ours

    one, other = (ShardCache(data.url, data.manifest.train, tmp_path, limit) for _ in range(2))
    try:
        one.use([0, 1])
        held = [content(one, 0), content(one, 1)]
        fetches.before = hold_up
        monkeypatch.setattr("job.data.cache_quota.locked", watched)
        one.use([0, 1], ahead=[2])
        assert is_coming.wait(30)
        other.use([3])
        for _ in range(2):  # at the second look the first one is over
            assert looks.acquire(timeout=30)
        may_come.set()
        assert content(other, 3) == stored(data, 3)
        assert bytes_on_disk(tmp_path) == limit
        assert [content(one, 0), content(one, 1)] == held
        assert [Counter(fetches.names)[Path(shard.name).name] for shard in data.manifest.train] == [1, 1, 1, 1]
    finally:
        may_come.set()
        one.close()
        other.close()


def test_a_shard_asked_for_while_room_is_looked_for_ahead_of_use_comes(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data_set(bucket, [100] * 2)
    room_bytes = data.manifest.train[0].size
    looks, may_look = threading.Event(), threading.Event()

    @contextmanager
    def watched(path: Path, wait: bool = True) -> Iterator[bool]:
        if path.name == "room.lock" and threading.current_thread() in one._threads:
            looks.set()
            may_look.wait()
        with locked(path, wait) as is_ours:
            yield is_ours

    one, other = (ShardCache(data.url, data.manifest.train, tmp_path, room_bytes) for _ in range(2))
    try:
        other.use([0])
        content(other, 0)
        monkeypatch.setattr("job.data.cache_quota.locked", watched)
        one.use([], [1])  # for which there is no room, as long as nobody waits for it
        assert looks.wait(30)
        one.demand([1])
        may_look.set()
        assert content(one, 1) == stored(data, 1)
    finally:
        may_look.set()
        one.close()
        other.close()


def test_a_store_that_fails_ahead_of_use_does_not_stop_the_training(
    bucket: str, tmp_path: Path, fetches: Fetches
) -> None:
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


def test_an_outage_is_outlived_by_batches_that_nobody_has_asked_for_yet(
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


def test_a_shard_asked_for_during_an_outage_is_tried_anew_from_then_on(
    bucket: str, tmp_path: Path, fetches: Fetches
) -> None:
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


def test_an_outage_is_said_once_a_minute(
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


def test_a_store_that_fails_when_the_shard_is_needed_is_an_error(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
    data = write_data_set(bucket, [100])

    def fail(name: str, number: int) -> None:
        raise storage.StoreError("the network is away")

    fetches.before = fail
    with loader_of(data, tmp_path) as loader, pytest.raises(storage.StoreError, match="the network is away"):
        list(loader)


def test_a_cache_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    data = write_data_set(str(tmp_path / "data"), [100])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^data\.cache_dir: "):
        ShardCache(data.url, data.manifest.train, tmp_path / "file", 1)
