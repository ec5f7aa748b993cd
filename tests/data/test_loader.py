"""The loaders: batches are complete, the same for any division of the work, and close without delay."""

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
from job.data.loader import BatchLoader, EvaluationLoader
from job.data.order import EvaluationOrder
from job.data.sequence_reader import SequenceReader
from job.data.shard_files import ShardFiles
from job.errors import UserError
from job.model.spec import IGNORE_INDEX

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
def test_every_token_but_each_shards_first_is_a_target_once_an_epoch(
    sizes: list[int], dtype: str, epochs: int, global_batch_size: int, **order: int
) -> None:
    with data_set(sizes, dtype=dtype) as (data, cache_dir):
        chosen = order_of(data, **order)
        with loader_of(
            data, cache_dir, chosen, global_batch_size=global_batch_size, end_position=chosen.position_limit(epochs)
        ) as loader:
            targets: Counter[int] = Counter()
            after = {before: token for tokens in data.train for before, token in itertools.pairwise(tokens)}
            for batch in loader:
                count = 0
                for inputs, labels in batch.micro_batches:
                    assert inputs.dtype == labels.dtype == torch.int64
                    is_target = labels != IGNORE_INDEX
                    count += int(is_target.sum())
                    targets.update(labels[is_target].tolist())
                    pairs = zip(inputs[is_target].tolist(), labels[is_target].tolist(), strict=True)
                    assert all(after[before] == token for before, token in pairs)
                assert count == batch.global_targets
            assert batch.next_position == chosen.position_limit(epochs)
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
def test_ranks_threads_and_micro_batches_only_divide_the_batch(
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


def test_loader_started_at_any_position_continues_the_same_batches(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50, 31, 7, 20])
    with loader_of(data, tmp_path) as loader:
        whole = list(loader)
    for number, batch in enumerate(whole):
        with loader_of(data, tmp_path, start_position=batch.position, workers=3) as loader:
            assert rows(list(loader)) == rows(whole[number:])


def test_loader_without_an_end_repeats_epochs(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [11])
    with loader_of(data, tmp_path, end_position=None, global_batch_size=2, micro_batch_size=2) as loader:
        for batch in itertools.islice(loader, 10):
            assert sorted(label for _, labels in rows([batch]) for row in labels for label in row) == list(range(2, 12))


# ---- Waiting ----

DelayVerification = Callable[[str], threading.Event]


@pytest.fixture
def delay_verification(monkeypatch: pytest.MonkeyPatch) -> DelayVerification:
    """Delay the verification of each shard until its event is set; return the function that gives the event."""
    release, verify = functools.cache(lambda name: threading.Event()), ShardFiles.verify

    def wait_and_verify(files: ShardFiles, index: int, on_bytes: Callable[[int], None]) -> str:
        release(files.paths[index].name).wait(30)
        return verify(files, index, on_bytes)

    monkeypatch.setattr(ShardFiles, "verify", wait_and_verify)
    return release


def validation_loader(data: DataSet, cache_dir: Path) -> EvaluationLoader:
    order = EvaluationOrder([shard.tokens for shard in data.manifest.validation], LENGTH, seed=3)
    cache: dict[str, Any] = {"cache_dir": cache_dir, "cache_bytes": 10**6}
    return EvaluationLoader(data.url, data.manifest, order, batch_size=2, rank=0, world_size=1, **cache)


LOADERS: dict[str, Callable[[DataSet, Path], BatchLoader | EvaluationLoader]] = {
    "train": loader_of,
    "validation": validation_loader,
}


@pytest.mark.parametrize("split", LOADERS)
def test_poll_ends_with_the_timeout_or_the_batch_and_counts_waiting(
    split: str, tmp_path: Path, delay_verification: DelayVerification
) -> None:
    data = write_data_set(f"{tmp_path}/data", [50], [50])
    with LOADERS[split](data, tmp_path) as loader:
        began = time.monotonic()
        assert not any(loader.poll(0) for _ in range(10))
        assert time.monotonic() - began < 0.2
        assert not loader.poll(0.3)
        assert 0.3 <= loader.wait_seconds <= time.monotonic() - began < 1
        timer = threading.Timer(0.3, delay_verification(f"{split}-00000.bin").set)
        timer.start()
        assert loader.poll(30)
        assert 0.5 <= loader.wait_seconds <= time.monotonic() - began < 5
        timer.join()


@pytest.mark.parametrize("split", LOADERS)
def test_poll_does_not_consume_batches(split: str, tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50], [50])
    with LOADERS[split](data, tmp_path) as loader:
        plain = list(loader)
    polled = []
    with LOADERS[split](data, tmp_path) as loader:
        while loader.poll(30) and loader.poll(0) and (batch := next(loader, None)):
            polled.append(batch)
        assert loader.poll(30), "there is no further one to wait for"
    assert len(plain) > 3 and str(polled) == str(plain)


def test_batches_are_made_before_they_are_asked_for(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50])
    made = threading.Semaphore(0)
    with loader_of(data, tmp_path, prefetch_steps=3) as loader:
        for future, _ in loader._started:
            future.add_done_callback(lambda _: made.release())
        assert all(made.acquire(timeout=10) for _ in range(3))
        assert loader.poll(0) and loader.wait_seconds < 0.1


@pytest.mark.parametrize("pin_memory", [False, True])
def test_batch_is_one_piece_of_memory_made_and_pinned_by_a_thread(
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


def test_failed_batch_is_ready_and_raises_each_time_it_is_taken(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [50])
    Path(data.url, data.manifest.train[0].name).unlink()
    with loader_of(data, tmp_path, end_position=4) as loader:
        for _ in range(2):
            assert loader.poll(10)
            with pytest.raises(UserError, match=r"^data\.shards: "):
                next(loader)


def test_long_wait_is_logged_with_its_shard_and_again_after_a_while(
    tmp_path: Path,
    delay_verification: DelayVerification,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("job.data.prefetching._LONG_WAIT_SECONDS", 0.3)
    monkeypatch.setattr("job.data.prefetching._SAY_AGAIN_SECONDS", 1.0)
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
        delay_verification(first).set()
        next(loader)
        time.sleep(0.4)  # The consumer's own work is not waiting.
        assert [lines_after(seconds) for seconds in (0.1, 0.4)] == [2, 3], "the wait for the next batch is a new one"
        assert second in caplog.messages[-1]
        delay_verification(second).set()


def test_advice_depends_on_the_reason_for_waiting(
    tmp_path: Path, delay_verification: DelayVerification, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, may_read = write_data_set(f"{tmp_path}/data", [20]), threading.Event()
    read = SequenceReader.read
    with loader_of(data, tmp_path / "a", order_of(data)) as loader:
        loader.poll(0.2)
        assert loader.advice().startswith("shards were missing")
        delay_verification("train-00000.bin").set()
        next(loader)
    monkeypatch.setattr(SequenceReader, "read", lambda *arguments: (may_read.wait(), read(*arguments)))
    with loader_of(data, tmp_path / "a", order_of(data)) as loader:
        while not loader._cache.awaited and not loader.poll(0.1) and loader.wait_seconds < 0.5:
            pass
        assert loader.advice().startswith("batches were not ready")
        may_read.set()


# ---- Closing ----


def our_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("cut-batches", "fetch-shards"))]


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Simulate a disk that gives a byte now and then; return the event that is set when a shard is read."""
    was_read, pause = threading.Event(), threading.Event()

    def hash_slowly(descriptor: int, on_bytes: Callable[[int], None]) -> None:
        while not pause.wait(0.01):
            on_bytes(1)
            was_read.set()

    monkeypatch.setattr("job.data.shard_files.hash_file", hash_slowly)
    return was_read


def test_close_ends_all_threads_at_once_even_while_they_wait(tmp_path: Path, stalled: threading.Event) -> None:
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


def test_leaving_a_loader_early_ends_all_threads(tmp_path: Path) -> None:
    data = write_data_set(f"{tmp_path}/data", [500, 500])
    with loader_of(data, tmp_path, workers=2) as loader:
        next(iter(loader))
    assert our_threads() == []


def test_error_in_a_thread_is_raised_where_the_batch_is_used(tmp_path: Path) -> None:
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
    max_sequences=st.none() | st.integers(1, 20),
)
def test_evaluation_batches_are_the_same_for_any_world_size(
    sizes: list[int], world_size: int, batch_size: int, max_sequences: int | None
) -> None:
    with data_set([10], sizes) as (data, cache_dir):
        order = EvaluationOrder(sizes, LENGTH, seed=3, max_sequences=max_sequences)

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
        shared = [one for together in by_round for one in together if one.sequences]
        assert [one.sequences for one in shared] == [one.sequences for one in alone]
        for one, other in zip(shared, alone, strict=True):
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.labels, other.labels)
            assert one.input_ids.shape == (len(one.sequences), LENGTH)
        targets = [label for one in alone for row in one.labels.tolist() for label in row if label != IGNORE_INDEX]
        if max_sequences is None:
            assert targets == [token for tokens in data.validation for token in tokens[1:]]
        else:
            assert len(set(targets)) == len(targets)
