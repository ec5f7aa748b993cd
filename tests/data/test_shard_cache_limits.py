"""The limit of the shard cache: it is never exceeded, and shards in use are kept as long as possible."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from cached_shards import Fetches, bytes_on_disk, content, stored
from toy_data import LENGTH, loader_of, order_of, rows, write_data_set

from job.data.cache_quota import locked
from job.data.loader import EvaluationLoader
from job.data.order import EvaluationOrder
from job.data.shard_cache import ShardCache
from job.errors import UserError


def test_buffer_that_does_not_fit_is_refused_with_the_needed_size(bucket: str, tmp_path: Path) -> None:
    data = write_data_set(bucket, [500, 400, 300])
    order = order_of(data, buffer_bytes=10**9)
    needed = sum(shard.size for shard in data.manifest.train)
    with pytest.raises(
        UserError, match=rf"^data\.cache_bytes: {needed - 1}: .* set data.cache_bytes to {needed} or more"
    ):
        loader_of(data, tmp_path, order, cache_bytes=needed - 1)
    with loader_of(data, tmp_path, order, cache_bytes=needed) as loader:
        assert len(list(loader)) == -(-order.position_limit(2) // 4)


@pytest.mark.parametrize("buffers_that_fit", [1, 1.5, 2])
def test_cache_keeps_its_limit_and_the_buffer_in_use(
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
    assert downloads <= 18  # Each of 9 shards at most once an epoch: no shard is deleted before its buffer is used up.
    fetches.before = lambda name, number: None
    with loader_of(data, tmp_path / "roomy", order) as loader:
        assert rows(list(loader)) == rows(batches)
        assert loader.downloads == 9


def test_two_processes_continue_in_a_cache_too_small_for_both(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
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


def test_evaluation_does_not_delete_the_buffer_of_training(bucket: str, tmp_path: Path, fetches: Fetches) -> None:
    data = write_data_set(bucket, [100] * 4, [100] * 6)
    shard_bytes = data.manifest.train[0].size
    cache: dict[str, Any] = {"cache_dir": tmp_path, "cache_bytes": 3 * shard_bytes}
    training_order = order_of(data, buffer_bytes=2 * shard_bytes)
    evaluation_order = EvaluationOrder([100] * 6, LENGTH, seed=1)
    fetched = Counter[str]()
    with loader_of(data, order=training_order, end_position=training_order.position_limit(1), **cache) as loader:
        batches = iter(loader)
        next(batches)
        ranks: dict[str, int] = {"rank": 0, "world_size": 1}
        for _ in range(2):
            with EvaluationLoader(
                data.url, data.manifest, evaluation_order, batch_size=8, **ranks, **cache
            ) as evaluation:
                labels = [label for batch in evaluation for label in batch.labels.flatten().tolist() if label > 0]
                assert labels == [token for tokens in data.validation for token in tokens[1:]]
        for _ in batches:
            pass
        fetched.update(name for name in fetches.names if name.startswith("train"))
    first_buffer = [data.manifest.train[index].name for index in training_order.shards_needed(0)]
    assert [fetched[name] for name in first_buffer] == [1, 1]


def test_fetch_ahead_spares_shards_in_use_and_urgent_fetch_does_not(bucket: str, tmp_path: Path) -> None:
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


def test_shards_in_use_are_kept_while_a_shard_for_next_is_fetched(
    bucket: str, tmp_path: Path, fetches: Fetches, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data_set(bucket, [100] * 4)
    limit = 3 * data.manifest.train[0].size
    is_coming, may_come, tries = threading.Event(), threading.Event(), threading.Semaphore(0)
    next_name = data.manifest.train[2].name.rpartition("/")[2]

    def hold_up(name: str, number: int) -> None:
        if (name, number) == (next_name, 1):
            is_coming.set()
            assert may_come.wait(30)

    @contextmanager
    def watched(path: Path, wait: bool = True) -> Iterator[bool]:
        if path.name == "room.lock" and threading.current_thread() in other._threads:
            tries.release()
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
        for _ in range(2):  # When the second try begins, the first one is over.
            assert tries.acquire(timeout=30)
        may_come.set()
        assert content(other, 3) == stored(data, 3)
        assert bytes_on_disk(tmp_path) == limit
        assert [content(one, 0), content(one, 1)] == held
        assert [Counter(fetches.names)[Path(shard.name).name] for shard in data.manifest.train] == [1, 1, 1, 1]
    finally:
        may_come.set()
        one.close()
        other.close()


def test_shard_demanded_while_it_is_fetched_ahead_arrives(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data_set(bucket, [100] * 2)
    room_bytes = data.manifest.train[0].size
    tries, may_try = threading.Event(), threading.Event()

    @contextmanager
    def watched(path: Path, wait: bool = True) -> Iterator[bool]:
        if path.name == "room.lock" and threading.current_thread() in one._threads:
            tries.set()
            may_try.wait()
        with locked(path, wait) as is_ours:
            yield is_ours

    one, other = (ShardCache(data.url, data.manifest.train, tmp_path, room_bytes) for _ in range(2))
    try:
        other.use([0])
        content(other, 0)
        monkeypatch.setattr("job.data.cache_quota.locked", watched)
        one.use([], [1])  # There is no room for it as long as nobody waits for it.
        assert tries.wait(30)
        one.demand([1])
        may_try.set()
        assert content(one, 1) == stored(data, 1)
    finally:
        may_try.set()
        one.close()
        other.close()
