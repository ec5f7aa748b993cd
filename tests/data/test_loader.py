"""Batches: whole, the same however they are divided, and never in the way of an end."""

import itertools
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from toy_data import LENGTH, DataSet, loader_of, order_of, rows, write_data_set

from job import storage
from job.data.loader import IGNORED_LABEL, EvaluationLoader
from job.data.order import EvaluationOrder
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


# ---- Ends ----


def our_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("cut-batches", "fetch-shards"))]


class Endless:
    """A file that gives a byte now and then, as a stalled network does, and counts that it was read."""

    def __init__(self) -> None:
        self.was_read = threading.Event()
        self._pause = threading.Event()

    def __enter__(self) -> "Endless":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, _: int) -> bytes:
        self.was_read.set()
        self._pause.wait(0.01)
        return b"x"


@pytest.fixture
def stalled(monkeypatch: pytest.MonkeyPatch) -> Endless:
    endless = Endless()
    monkeypatch.setattr(storage, "open_read", lambda url: endless)
    return endless


def test_a_request_to_stop_ends_the_wait_for_a_shard(tmp_path: Path, stalled: Endless) -> None:
    data = write_data_set(f"{tmp_path}/data", [50])
    asked = threading.Event()
    timer = threading.Timer(0.5, asked.set)
    timer.start()
    began = time.monotonic()
    with loader_of(data, tmp_path, should_stop=asked.is_set) as loader:
        assert list(loader) == []
        assert loader.stopped
        waited_seconds = time.monotonic() - began
        assert 0.4 < loader.wait_seconds <= waited_seconds < 2
    timer.join()


def test_closing_ends_all_threads_at_once_even_while_they_wait(tmp_path: Path, stalled: Endless) -> None:
    data = write_data_set(f"{tmp_path}/data", [50, 50, 50])
    loader = loader_of(data, tmp_path, workers=3, should_stop=stalled.was_read.is_set)
    assert list(loader) == []
    assert any("cut" in name for name in our_threads()) and any("fetch" in name for name in our_threads())
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 2
    assert our_threads() == []


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
                assert [one.windows for one in loader] == [one.windows for one in made]
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
