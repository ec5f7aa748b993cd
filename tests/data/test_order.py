"""The order of training: complete, the same on every machine, available at any position, and well mixed."""

import hashlib
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from job.data import order as order_module
from job.data.order import PADDING, EvaluationOrder, SequenceOrder, count_sequences, permute, rank_groups, rank_slice
from job.errors import UserError

UNHURRIED = settings(deadline=None)
SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def orders(draw: st.DrawFn) -> SequenceOrder:
    tokens = draw(st.lists(st.integers(0, 60), min_size=1, max_size=12))
    assume(max(tokens) >= 2)
    return SequenceOrder(
        shard_tokens=tokens,
        shard_bytes=[2 * count for count in tokens],
        context_length=draw(st.integers(1, 9)),
        seed=draw(SEEDS),
        buffer_bytes=draw(st.integers(1, 400)),
        node_groups=draw(st.integers(1, 4)),
    )


def order_of_a_billion_sequences() -> SequenceOrder:
    return SequenceOrder([512_000_000] * 1000, [1_024_000_000] * 1000, 512, seed=1, buffer_bytes=10**15)


def ids(order: SequenceOrder, position: int, count: int, limit: int | None = None) -> list[tuple[int, int]]:
    shards, sequences = order.sequence_ids(position, count, limit)
    return list(zip(shards.tolist(), sequences.tolist(), strict=True))


# ---- Completeness ----


@UNHURRIED
@given(orders())
def test_every_sequence_appears_exactly_once_in_an_epoch(order: SequenceOrder) -> None:
    counts = order.sequence_counts.tolist()
    every = {(shard, sequence) for shard, count in enumerate(counts) for sequence in range(count)}
    for epoch in range(3):
        seen = ids(order, epoch * order.sequences_per_epoch, order.sequences_per_epoch)
        assert len(seen) == len(every) and set(seen) == every


@UNHURRIED
@given(orders())
def test_targets_of_an_epoch_are_all_tokens_but_each_shards_first(order: SequenceOrder) -> None:
    targets = order.targets(*order.sequence_ids(0, order.sequences_per_epoch))
    assert targets.sum() == sum(max(count - 1, 0) for count in order.tokens.tolist())
    assert targets.min() >= 1 and targets.max() <= order.context_length


@pytest.mark.parametrize(("tokens", "sequences"), [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2), (9, 2), (10, 3)])
def test_shard_has_as_many_sequences_as_its_targets_fill(tokens: int, sequences: int) -> None:
    assert count_sequences(np.array([tokens]), context_length=4) == [sequences]


@UNHURRIED
@given(orders(), st.integers(1, 3), st.integers(0, 20))
def test_positions_after_the_last_epoch_are_padding(order: SequenceOrder, epochs: int, extra: int) -> None:
    limit = order.position_limit(epochs)
    shards, sequences = order.sequence_ids(0, limit + extra, limit)
    assert (shards[limit:] == PADDING).all() and (sequences[limit:] == PADDING).all()
    assert order.targets(shards, sequences)[limit:].sum() == 0
    assert set(Counter(zip(shards[:limit].tolist(), sequences[:limit].tolist(), strict=True)).values()) == {epochs}


def test_data_set_with_nothing_to_predict_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.shards"):
        SequenceOrder([1, 0], [2, 0], 4, seed=0, buffer_bytes=10)


# ---- One number is the whole state ----


@UNHURRIED
@given(orders(), st.data())
def test_any_position_gives_the_same_as_reading_from_the_start(order: SequenceOrder, data: st.DataObject) -> None:
    total = 2 * order.sequences_per_epoch
    position = data.draw(st.integers(0, total - 1))
    count = data.draw(st.integers(1, total - position))
    assert ids(order, position, count) == ids(order, 0, total)[position : position + count]
    assert ids(order, position, 1) == ids(order, position, count)[:1]


def test_any_of_a_billion_sequences_takes_constant_memory_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed: list[int] = []
    mix = order_module._mix

    def counting_mix(x: Any) -> Any:
        mixed.append(x.size)
        return mix(x)

    monkeypatch.setattr(order_module, "_mix", counting_mix)
    work = []
    tracemalloc.start()
    for position in (0, 999_999_000, 7_654_321_000):
        mixed.clear()
        order = order_of_a_billion_sequences()
        assert order.sequences_per_epoch == 10**9
        shards, sequences = order.sequence_ids(position, 64)
        assert shards.max() < 1000 and sequences.max() < 10**6
        work.append(sum(mixed))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**20
    assert max(work) < 5000  # 64 sequences × 8 rounds, the shards, the keys, and rarely a second pass


@UNHURRIED
@given(orders())
def test_buffers_follow_each_other_and_keep_their_byte_limit(order: SequenceOrder) -> None:
    position = 0
    while position < 2 * order.sequences_per_epoch:
        buffer = order.buffer_at(position)
        assert buffer.start == position < buffer.stop
        assert order.buffer_at(buffer.stop - 1).start == buffer.start
        buffer_bytes = 2 * order.tokens[buffer.shards].sum()
        assert buffer_bytes <= order._buffer_bytes or len(buffer.shards) == 1
        assert buffer_bytes <= order.largest_buffer_bytes
        used = {shard for shard, _ in ids(order, buffer.start, buffer.stop - buffer.start)}
        assert used == set(buffer.shards.tolist()) == set(order.shards_needed(position))
        position = buffer.stop


# ---- Ranks and node groups only divide the batch ----


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_rank_slices_are_equal_and_make_the_whole_batch(world_size: int) -> None:
    batch = list(range(12))
    parts = [batch[rank_slice(12, rank, world_size)] for rank in range(world_size)]
    assert [position for part in parts for position in part] == batch
    assert {len(part) for part in parts} == {12 // world_size}


@UNHURRIED
@given(orders(), st.integers(0, 100), st.integers(1, 4))
def test_node_group_reads_only_its_own_part_of_the_shards(order: SequenceOrder, position: int, share: int) -> None:
    groups, size = order.node_groups, order.node_groups * share
    positions = order.batch_positions(position, size)
    assert sorted(positions.tolist()) == list(range(position, position + size))
    for world_size in (number for number in range(1, size + 1) if size % number == 0):
        for rank in range(world_size):
            own_groups = rank_groups(groups, rank, world_size)
            for own in positions[rank_slice(size, rank, world_size)].tolist():
                assert ids(order, own, 1)[0][0] in order.shards_needed(own, own_groups)


def test_more_node_groups_mean_fewer_shards_for_each() -> None:
    order = SequenceOrder([1000] * 64, [2000] * 64, 10, seed=3, buffer_bytes=10**6, node_groups=8)
    parts = [set(order.shards_needed(0, range(group, group + 1))) for group in range(8)]
    assert set().union(*parts) == set(range(64))
    assert max(map(len, parts)) <= 9


# ---- The same on every machine, and different for each seed, epoch and buffer ----

# The order that a seed gives is part of the format: a checkpoint's position means nothing in another order.
GOLDEN_EPOCH = [
    (4, 0), (4, 10), (4, 8), (4, 5), (4, 6), (4, 3), (4, 1), (4, 9), (4, 4), (4, 2), (4, 11), (4, 7),
    (6, 0), (1, 0), (0, 1), (3, 1), (0, 3), (3, 2), (6, 1), (0, 4), (3, 0), (0, 0), (0, 2),
]  # fmt: skip
GOLDEN_PERMUTATION = [456556016852, 355725319342, 325344755242, 243926362997, 921354862005]
GOLDEN_GROUPED = [(1, 6), (1, 5), (1, 8), (1, 4), (1, 10), (1, 2), (1, 7), (1, 3)]
GOLDEN_SAMPLE = [2, 0, 2, 6, 11]


def test_order_is_the_same_on_every_machine_and_version() -> None:
    order = SequenceOrder([40, 7, 0, 23, 90, 1, 16], [80, 14, 0, 46, 180, 2, 32], 8, seed=2333, buffer_bytes=200)
    assert ids(order, 0, order.sequences_per_epoch) == GOLDEN_EPOCH
    assert permute(np.array([0, 1, 2, 10**11, 10**12 - 1]), 10**12, np.uint64(42)).tolist() == GOLDEN_PERMUTATION
    grouped = SequenceOrder([40, 90, 16], [80, 180, 32], 8, seed=2333, buffer_bytes=200, node_groups=2)
    assert ids(grouped, 5, 8) == GOLDEN_GROUPED
    assert EvaluationOrder([40, 90, 16], 8, seed=7, max_sequences=5).sequence_ids(0, 5)[1].tolist() == GOLDEN_SAMPLE


def test_mixing_function_is_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 0, as published with it.
    states = np.arange(1, 4, dtype=np.uint64) * order_module._GOLDEN
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert order_module._mix(states).tolist() == expected


def test_epochs_seeds_and_buffers_are_shuffled_differently() -> None:
    def epochs(seed: int) -> list[list[tuple[int, int]]]:
        order = SequenceOrder([401] * 4, [802] * 4, 4, seed=seed, buffer_bytes=10**6)
        return [ids(order, epoch * 400, 400) for epoch in range(2)]

    shuffles = [*epochs(1), *epochs(2)]
    for number, one in enumerate(shuffles):
        for other in shuffles[:number]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # 1 expected by chance
    order = SequenceOrder([401] * 2, [802] * 2, 4, seed=1, buffer_bytes=802)
    first, second = (order.sequence_ids(start, 100)[1] for start in (0, 100))
    assert (first == second).sum() < 10
    order = SequenceOrder([9] * 20, [18] * 20, 4, seed=1, buffer_bytes=1)
    assert order.sequence_ids(0, 40)[0].tolist() != order.sequence_ids(40, 40)[0].tolist()


def digest(*numbers: Any) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(one, "<i8").tobytes() for one in numbers)).hexdigest()[:16]


@pytest.mark.parametrize(
    ("node_groups", "expected"),
    [
        (1, ("6b0020ef1d8cefd1", "ea3d57e45fcbe34b", "fad2e40cdc7404b2", "6e4d4bed8baa2950")),
        (3, ("74d28662fe2ad93b", "91904e79b342abe9", "6d54c2b3f497b411", None)),
        (16, ("687c1e489e67f3df", "6b456972926ccdca", "c869ebdd8a3a07e3", "ae9310d3e8804b12")),
    ],
)
def test_order_is_the_one_of_earlier_versions(node_groups: int, expected: tuple[str, ...]) -> None:
    """A run that continues with a newer version must find each sequence at the position where it was before."""
    tokens = [1 + 7919 * i % 5000 for i in range(300)]
    order = SequenceOrder(tokens, [2 * count for count in tokens], 7, 2333, 40_000, node_groups)
    epoch = order.sequences_per_epoch
    two_epochs, around_the_end, batch, far = expected
    assert digest(*order.sequence_ids(0, 2 * epoch)) == two_epochs
    assert digest(*order.sequence_ids(epoch - 100, 513)) == around_the_end
    assert digest(order.batch_positions(12345, 96)) == batch
    if far:
        large = SequenceOrder([512_000_000] * 1000, [1_024_000_000] * 1000, 512, 1, 10**15, node_groups)
        assert digest(*large.sequence_ids(7 * 10**9 + 123_456_789, 4096)) == far


def test_evaluation_sample_is_the_one_of_earlier_versions() -> None:
    order = EvaluationOrder([1 + 7919 * i % 5000 for i in range(300)], 7, 5, 1000)
    assert digest(*order.sequence_ids(0, 1000)) == "b4bb66c2b3769e1a"


# ---- The permutation ----


@UNHURRIED
@given(st.integers(1, 3000), SEEDS)
def test_permute_is_a_permutation_of_any_size(size: int, seed: int) -> None:
    assert sorted(permute(np.arange(size), size, np.uint64(seed)).tolist()) == list(range(size))


def chi_squared(counts: Any) -> float:
    """Return (χ² - degrees of freedom) / standard deviation, which is about normal for random counts."""
    counts = np.asarray(counts, float).ravel()
    expected = counts.mean()
    freedom = counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [5, 7, 12])
def test_neighbours_land_on_every_pair_of_places_equally_often(size: int) -> None:
    counts = np.zeros((size, size))
    for seed in range(3000):
        first, second = permute(np.array([0, 1]), size, order_module._key(seed))
        counts[first, second] += 1
    assert (np.diag(counts) == 0).all()
    assert abs(chi_squared(counts[~np.eye(size, dtype=bool)])) < 4


def test_large_permutation_looks_random() -> None:
    size = 100_000
    places = permute(np.arange(size), size, order_module._key(7))
    assert abs(np.abs(places - np.arange(size)).mean() / size - 1 / 3) < 0.005
    assert abs(np.corrcoef(places, np.arange(size))[0, 1]) < 0.02
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.02
    # Counts of the sequences that move from each hundredth of the range to each other hundredth.
    counts = np.histogram2d(np.arange(size), places, bins=100)[0]
    assert abs(chi_squared(counts)) < 4
    assert abs(chi_squared(np.bincount((places[1:] - places[:-1]) % 97))) < 4


# ---- Evaluation ----

EVALUATION = st.lists(st.integers(0, 60), min_size=1, max_size=12)


@UNHURRIED
@given(EVALUATION, st.integers(1, 9), st.data())
def test_evaluation_reads_every_sequence_in_shard_order(
    tokens: list[int], context_length: int, data: st.DataObject
) -> None:
    order = EvaluationOrder(tokens, context_length, seed=1)
    counts = count_sequences(np.array(tokens), context_length).tolist()
    every = [(shard, sequence) for shard, count in enumerate(counts) for sequence in range(count)]
    assert order.sequence_count == len(every)
    start = data.draw(st.integers(0, len(every)))
    stop = data.draw(st.integers(start, len(every)))
    shards, sequences = order.sequence_ids(start, stop)
    assert list(zip(shards.tolist(), sequences.tolist(), strict=True)) == every[start:stop]


@UNHURRIED
@given(EVALUATION, st.integers(1, 100), SEEDS)
def test_evaluation_sample_has_no_duplicates_and_is_repeatable(
    tokens: list[int], max_sequences: int, seed: int
) -> None:
    assume(max(tokens) >= 2)
    order = EvaluationOrder(tokens, 4, seed, max_sequences)
    sample = list(zip(*(part.tolist() for part in order.sequence_ids(0, order.sequence_count)), strict=True))
    assert len(set(sample)) == len(sample) == min(max_sequences, int(count_sequences(np.array(tokens), 4).sum()))
    assert sample == sorted(sample)
    again = EvaluationOrder(tokens, 4, seed, max_sequences).sequence_ids(0, order.sequence_count)
    assert list(zip(*(part.tolist() for part in again), strict=True)) == sample


def test_evaluation_sample_is_spread_over_all_shards() -> None:
    order = EvaluationOrder([4001] * 10, 4, seed=5, max_sequences=100)
    shards, _ = order.sequence_ids(0, 100)
    assert Counter(shards.tolist()) == dict.fromkeys(range(10), 10)
    other, _ = EvaluationOrder([4001] * 10, 4, seed=6, max_sequences=100).sequence_ids(0, 100)
    assert (other == shards).all()
