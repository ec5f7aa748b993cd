"""Batches: whole, the same however they are divided, and never in the way of an end."""

import functools
import itertools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from toy_data import LENGTH, DataSet, loader_of, order_of, rows, write_data_set

from job import storage
from job.data.loader import IGNORED_LABEL, BatchLoader, EvaluationLoader
from job.data.order import EvaluationOrder
from job.data.shard_files import ShardFiles
from job.errors import UserError

FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SHARDS = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda tokens: max(tokens) >= 2)


@contextmanager
def data_set(*sizes: Any, **kinds: Any) -> Iterator[tuple[DataSet, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_data_set(f"{folder}/data", *sizes, **kinds), Path(folder, "cache")


@FEW
@given(
    sizes=SHARDS,
    dtype=st.sampled_from(["uint16", "uint32"]),
    context_length=st.integers(1, 9),
    global_batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**63 - 1),
    buffer_bytes=st.integers(1, 600),
    node_groups=st.integers(1, 3),
    epochs=st.integers(1, 2),
)
def test_every_token_but_the_first_of_each_shard_is_a_target_once_an_epoch(
    sizes: list[int], dtype: str, epochs: int, global_batch_size: int, **order: int
) -> None:
    with data_set(sizes, dtype=dtype) as (data, cache_dir):
        used = order_of(data, **order)
        with loader_of(
            data, cache_dir, used, global_batch_size=global_batch_size, end_position=used.position_limit(epochs)
        ) as loader:
            targets: Counter[int] = Counter()
            after = {before: token for tokens in data.train for before, token in itertools.pairwise(tokens)}
            for batch in loader:
                count = 0
                for inputs, labels in batch.micro_batches:
                    assert inputs.dtype == labels.dtype == torch.int64
                    is_target = labels != IGNORED_LABEL
                    count += int(is_target.sum())
                    targets.update(labels[is_target].tolist())
                    pairs = zip(inputs[is_target].tolist(), labels[is_target].tolist(), strict=True)
                    assert all(after[before] == token for before, token in pairs)
                assert count == batch.global_targets
            assert batch.next_position == used.position_limit(epochs)
        assert targets == {token: epochs for tokens in data.train for token in tokens[1:]}


@FEW
@given(
    sizes=SHARDS,
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    micro_batch_size=st.sampled_from([1, 2, 3, 12]),
    workers=st.integers(1, 4),
    prefetch_steps=st.integers(1, 5),
    node_groups=st.sampled_from([1, 2, 3]),
    buffer_bytes=st.integers(1, 600),
)
def test_ranks_threads_and_micro_batches_only_divide_the_global_batch(
    sizes: list[int],
    world_size: int,
    micro_batch_size: int,
    node_groups: int,
    buffer_bytes: int,
    **threads: int,
) -> None:
    assume((12 // world_size) % micro_batch_size == 0)
    with data_set(sizes) as (data, cache_dir):
        order = order_of(data, node_groups=node_groups, buffer_bytes=buffer_bytes)
        with loader_of(data, cache_dir, order, global_batch_size=12, micro_batch_size=12) as loader:
            alone = list(loader)
        ranks = []
        for rank in range(world_size):
            division: dict[str, Any] = {"rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size}
            with loader_of(data, cache_dir, order, global_batch_size=12, **division, **threads) as loader:
                ranks.append(list(loader))
        assert {len(batches) for batches in ranks} == {len(alone)}
        for number, whole in enumerate(alone):
            parts = [batches[number] for batches in ranks]
            for part in parts:
                assert [inputs.shape for inputs, _ in part.micro_batches] == (
                    [(micro_batch_size, LENGTH)] * (12 // world_size // micro_batch_size)
                )
                assert (part.position, part.next_position, part.global_targets) == (
                    (whole.position, whole.next_position, whole.global_targets)
                )
            for side in (0, 1):
                together = torch.cat([pair[side] for part in parts for pair in part.micro_batches])
                assert torch.equal(together, whole.micro_batches[0][side])


def test_a_loader_started_at_any_cursor_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50, 31, 7, 20])
    with loader_of(data, tmp_path) as loader:
        whole = list(loader)
    for number, batch in enumerate(whole):
        with loader_of(data, tmp_path, start_position=batch.position, workers=3) as loader:
            assert rows(list(loader)) == rows(whole[number:])


def test_without_an_end_the_epochs_follow_each_other(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [11])
    with loader_of(data, tmp_path, end_position=None, global_batch_size=2, micro_batch_size=2) as loader:
        for batch in itertools.islice(loader, 10):
            assert sorted(label for _, labels in rows([batch]) for row in labels for label in row) == list(range(2, 12))


# ---- Waiting ----

HeldBack = Callable[[str], threading.Event]


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> HeldBack:
    """A shard is verified only once its event is set."""
    come, find_wrong = functools.cache(lambda name: threading.Event()), ShardFiles.find_wrong

    def wait_and_verify(files: ShardFiles, index: int, on_bytes: Callable[[int], None]) -> str:
        come(files.paths[index].name).wait(30)
        return find_wrong(files, index, on_bytes)

    monkeypatch.setattr(ShardFiles, "find_wrong", wait_and_verify)
    return come


def held_out_loader(data: DataSet, cache_dir: Path) -> EvaluationLoader:
    order = EvaluationOrder([shard.tokens for shard in data.manifest.validation], LENGTH, seed=3)
    place: dict[str, Any] = {"cache_dir": cache_dir, "cache_bytes": 10**6}
    return EvaluationLoader(data.url, data.manifest, order, batch_size=2, rank=0, world_size=1, **place)


LOADERS: dict[str, Callable[[DataSet, Path], BatchLoader | EvaluationLoader]] = {
    "train": loader_of,
    "validation": held_out_loader,
}


@pytest.mark.parametrize("split", LOADERS)
def test_polling_ends_with_its_time_or_with_the_batch_and_both_count_as_waiting(
    split: str, tmp_path: Path, held_back: HeldBack
) -> None:
    data = write_data_set(f"{tmp_path}/data", [50], [50])
    with LOADERS[split](data, tmp_path) as loader:
        began = time.monotonic()
        assert not any(loader.poll(0) for _ in range(10))
        assert time.monotonic() - began < 0.2
        assert not loader.poll(0.3)
        assert 0.3 <= loader.wait_seconds <= time.monotonic() - began < 1
        timer = threading.Timer(0.3, held_back(f"{split}-00000.bin").set)
        timer.start()
        assert loader.poll(30)
        assert 0.5 <= loader.wait_seconds <= time.monotonic() - began < 5
        timer.join()


@pytest.mark.parametrize("split", LOADERS)
def test_polling_takes_nothing_away(split: str, tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50], [50])
    with LOADERS[split](data, tmp_path) as loader:
        plain = list(loader)
    polled = []
    with LOADERS[split](data, tmp_path) as loader:
        while loader.poll(30) and loader.poll(0) and (batch := next(loader, None)):
            polled.append(batch)
        assert loader.poll(30), "there is no further one to wait for"
    assert len(plain) > 3 and str(polled) == str(plain)


def test_batches_are_made_before_anybody_asks_for_them(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50])
    made = threading.Semaphore(0)
    with loader_of(data, tmp_path, prefetch_steps=3) as loader:
        for future, _ in loader._begun:
            future.add_done_callback(lambda _: made.release())
        assert all(made.acquire(timeout=10) for _ in range(3))
        assert loader.poll(0) and loader.wait_seconds < 0.1


@pytest.mark.parametrize("pin_memory", [False, True])
def test_a_batch_is_one_piece_of_memory_page_locked_where_asked_and_made_by_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pin_memory: bool
) -> None:
    made: dict[int, str] = {}
    empty = torch.empty

    def without_a_gpu(shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        page_locked.append(pin_memory)
        tensor = empty(shape, dtype=dtype)
        made[tensor.untyped_storage().data_ptr()] = threading.current_thread().name
        return tensor

    page_locked: list[bool] = []
    monkeypatch.setattr(torch, "empty", without_a_gpu)
    data = write_data_set(f"{tmp_path}/data", [50, 31])
    with loader_of(data, tmp_path, micro_batch_size=2, pin_memory=pin_memory) as loader:
        batches = list(loader)
    assert page_locked == [pin_memory] * len(batches)
    for batch in batches:
        (memory,) = {tensor.untyped_storage().data_ptr() for pair in batch.micro_batches for tensor in pair}
        assert made[memory].startswith("cut-batches")


def test_a_batch_that_cannot_be_made_is_ready_and_raises_whenever_it_is_taken(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50])
    Path(data.url, data.manifest.train[0].name).unlink()
    with loader_of(data, tmp_path, end_position=4) as loader:
        for _ in range(2):
            assert loader.poll(10)
            with pytest.raises(UserError, match=r"^data\.shards: "):
                next(loader)


def test_a_long_wait_is_said_once_with_the_shard_and_again_after_a_while(
    tmp_path: Path, held_back: HeldBack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("job.data.loader._LONG_WAIT_SECONDS", 0.3)
    monkeypatch.setattr("job.data.loader._SAY_AGAIN_SECONDS", 1.0)
    data = write_data_set(f"{tmp_path}/data", [20, 20])  # each makes one batch
    order = order_of(data, buffer_bytes=1)
    first, second = (data.manifest.train[order.shards_needed(position)[0]].name for position in (0, 4))

    def lines_after(seconds: float) -> int:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            loader.poll(0.02)
        return len(caplog.messages)

    with loader_of(data, tmp_path, order, prefetch_steps=1) as loader:
        assert [lines_after(seconds) for seconds in (0.1, 0.4, 0.4, 0.6)] == [0, 1, 1, 2]
        assert all(message.startswith("waiting for a batch for ") for message in caplog.messages)
        reason = f"{data.url}/{first} is not verified yet (verifying shards 0.0/0.0 GB)"
        assert all(reason in message for message in caplog.messages)
        held_back(first).set()
        next(loader)
        time.sleep(0.4)  # the consumer's own work is no waiting
        assert [lines_after(seconds) for seconds in (0.1, 0.4)] == [2, 3], "the next batch's wait is a new one"
        assert second in caplog.messages[-1]
        held_back(second).set()


def test_what_to_change_after_long_waits_depends_on_what_they_were_for(
    tmp_path: Path, held_back: HeldBack, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, cutting = write_data_set(f"{tmp_path}/data", [20]), threading.Event()
    cut = BatchLoader._cut
    with loader_of(data, tmp_path / "a", order_of(data)) as loader:
        loader.poll(0.2)
        assert loader.advice().startswith("for shards to come")
        held_back("train-00000.bin").set()
        next(loader)
    monkeypatch.setattr(BatchLoader, "_cut", lambda *arguments: (cutting.wait(), cut(*arguments)))
    with loader_of(data, tmp_path / "a", order_of(data)) as loader:
        while not loader._cache.awaited and not loader.poll(0.1) and loader.wait_seconds < 0.5:
            pass
        assert loader.advice().startswith("for windows to be cut")
        cutting.set()


# ---- Ends ----


def our_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("cut-batches", "fetch-shards"))]


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a shard is read; a disk that stalls gives a byte of it now and then."""
    was_read, pause = threading.Event(), threading.Event()

    def hash_slowly(descriptor: int, on_bytes: Callable[[int], None]) -> None:
        while not pause.wait(0.01):
            on_bytes(1)
            was_read.set()

    monkeypatch.setattr("job.data.shard_files.hash_file", hash_slowly)
    return was_read


def test_closing_ends_all_threads_at_once_even_while_they_wait(tmp_path: Path, stalled: threading.Event) -> None:
    data = write_data_set(f"{tmp_path}/data", [50, 50, 50])
    loader = loader_of(data, tmp_path, workers=3)
    assert stalled.wait(10)
    assert not loader.poll(0.1)
    assert any("cut" in name for name in our_threads()) and any("fetch" in name for name in our_threads())
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2
    assert our_threads() == []
    assert loader.poll(10) and list(loader) == []


def test_leaving_a_loader_in_the_middle_ends_all_threads(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [500, 500])
    with loader_of(data, tmp_path, workers=2) as loader:
        next(iter(loader))
    assert our_threads() == []


def test_what_fails_in_a_thread_is_raised_where_the_batch_is_used(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50, 50, 50])
    victim = Path(data.url, data.manifest.train[1].name)
    content = bytearray(victim.read_bytes())
    content[0] ^= 1
    victim.write_bytes(content)
    found = storage.sha256_file(victim)
    with loader_of(data, tmp_path) as loader, pytest.raises(UserError) as caught:
        list(loader)
    message = str(caught.value)
    assert message.startswith("data.shards")
    assert victim.name in message and found in message and data.manifest.train[1].sha256 in message


# ---- Evaluation ----


@FEW
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    world_size=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    max_windows=st.none() | st.integers(1, 20),
)
def test_evaluation_batches_are_the_same_for_any_number_of_ranks(
    sizes: list[int], world_size: int, batch_size: int, max_windows: int | None
) -> None:
    with data_set([10], sizes) as (data, cache_dir):
        order = EvaluationOrder(sizes, LENGTH, seed=3, max_windows=max_windows)

        def batches(rank: int, world_size: int) -> list[Any]:
            division: dict[str, Any] = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
            with EvaluationLoader(
                data.url, data.manifest, order, **division, cache_dir=cache_dir, cache_bytes=10**6
            ) as loader:
                made = list(loader)
                assert len(made) == loader.rounds
                return made

        alone = batches(0, 1)
        by_round = list(zip(*(batches(rank, world_size) for rank in range(world_size)), strict=True))
        shared = [one for together in by_round for one in together if one.windows]
        assert [one.windows for one in shared] == [one.windows for one in alone]
        for one, other in zip(shared, alone, strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
            assert one.input_ids.shape == (len(one.windows), LENGTH)
        targets = [label for one in alone for row in one.labels.tolist() for label in row if label != IGNORED_LABEL]
        if max_windows is None:
            assert targets == [token for tokens in data.validation for token in tokens[1:]]
        else:
            assert len(set(targets)) == len(targets)
