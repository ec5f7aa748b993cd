"""The order of training as a pure function of the seed and a position.

A position is the number of sequences used since the start of training, over all ranks and epochs. It is the whole state
of the data order: a run continues from this one number.

A sequence is `context_length` (T) predictions in a row in one shard: sequence i reads the tokens from i·T on and
predicts the tokens i·T+1 … i·T+T. Every token but the first of a shard is therefore a target exactly once an epoch. The
last sequence of a shard may be shorter.

1. Each epoch permutes the shards.
2. Consecutive shards form a *buffer* of at most `buffer_bytes`. A node keeps these shards on its disk at the same time.
3. All sequences of a buffer are permuted, by a function that finds the sequence of any position in constant time.

This module knows nothing of ranks: a batch is a range of positions, and each rank takes its part of that range.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from job.errors import UserError

Integers: TypeAlias = NDArray[np.int64]

PADDING = -1
"""Shard and sequence at a position after the end of training; such positions only fill up the last batch."""


def count_sequences(tokens: Integers, context_length: int) -> Integers:
    """Return the number of sequences of each shard, given the number of its `tokens` (both `[shards]`).

    Every token of a shard but the first is a target, and a sequence has up to `context_length` targets.
    """
    return -(-np.maximum(tokens - 1, 0) // context_length)


def largest_buffer_bytes(shard_bytes: Sequence[int], buffer_bytes: int) -> int:
    """Return the most bytes that the shards of one buffer can take on disk, in any epoch.

    Args:
        shard_bytes: size of each shard's file.
        buffer_bytes: most bytes of shards that are shuffled together; a larger shard is a buffer of its own.
    """
    return max([*shard_bytes, min(buffer_bytes, sum(shard_bytes))])


def rank_slice(global_batch_size: int, rank: int, world_size: int) -> slice:
    """Return the part of a global batch that `rank` trains on.

    The parts are contiguous and of equal size: `world_size` must divide `global_batch_size`.
    """
    share = global_batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def rank_groups(node_groups: int, rank: int, world_size: int) -> range:
    """Return the node groups whose sequences `rank_slice` gives to `rank`.

    This is one group, or several if there are fewer ranks than node groups.
    """
    return range(rank * node_groups // world_size, ((rank + 1) * node_groups - 1) // world_size + 1)


@dataclass(frozen=True)
class Buffer:
    """Shards that are on disk together; their sequences are used at the positions `start` ≤ p < `stop`."""

    number: int
    """Index of the buffer in its epoch."""
    epoch: int
    start: int
    stop: int
    shards: Integers
    """Indices of its shards, in the order of the epoch."""
    offsets: Integers
    """Sequences of the epoch before each shard, and after the last shard (`[shards + 1]`)."""


class SequenceOrder:
    """The sequence that is used at each position, for any number of epochs; each epoch uses every sequence once.

    Args:
        shard_tokens: tokens of each shard, in the manifest's order.
        shard_bytes: size of each shard's file.
        context_length: most predictions of a sequence, T.
        seed: another seed gives another order.
        buffer_bytes: most bytes of shards that are shuffled together; a larger shard is a buffer of its own.
        node_groups: number of parts that each buffer is divided into, so that a group of nodes reads only its own part
            of the shards. The sequence at position p is taken from part p modulo `node_groups`.

    Raises:
        UserError: no shard has a token to predict.
    """

    def __init__(
        self,
        shard_tokens: Sequence[int],
        shard_bytes: Sequence[int],
        context_length: int,
        seed: int,
        buffer_bytes: int,
        node_groups: int = 1,
    ) -> None:
        self.tokens: Integers = np.asarray(shard_tokens, np.int64)
        self.sequence_counts = count_sequences(self.tokens, context_length)
        """Sequences of each shard (`[shards]`)."""
        self.sequences_per_epoch = int(self.sequence_counts.sum())
        if not self.sequences_per_epoch:
            raise UserError("data.shards", None, "no shard holds a token to predict", "prepare a corpus that has text")
        self.context_length, self.seed, self.node_groups = context_length, seed, node_groups
        self._shard_bytes, self._buffer_bytes = np.asarray(shard_bytes, np.int64), buffer_bytes
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def position_limit(self, epochs: int) -> int:
        """Return the position at which `epochs` epochs are complete."""
        return epochs * self.sequences_per_epoch

    @property
    def largest_buffer_bytes(self) -> int:
        """Most bytes that the shards of one buffer can take on disk, in any epoch."""
        return largest_buffer_bytes(self._shard_bytes.tolist(), self._buffer_bytes)

    def buffer_at(self, position: int) -> Buffer:
        """Return the buffer whose sequences are used at `position`; the next buffer begins at its `stop`."""
        epoch, offset = divmod(position, self.sequences_per_epoch)
        shards, offsets, first_shards = self._epoch(epoch)
        number = int(np.searchsorted(offsets[first_shards], offset, side="right")) - 1
        first, last = first_shards[number : number + 2]
        epoch_start = epoch * self.sequences_per_epoch
        return Buffer(
            number=number,
            epoch=epoch,
            start=epoch_start + int(offsets[first]),
            stop=epoch_start + int(offsets[last]),
            shards=shards[first:last],
            offsets=offsets[first : last + 1],
        )

    def sequence_ids(self, position: int, count: int, limit: int | None = None) -> tuple[Integers, Integers]:
        """Return the shard, and the sequence's index in it, at `count` positions from `position` on (`[count]` each).

        Both are PADDING at positions from `limit` on.
        """
        shards = np.full(count, PADDING, np.int64)
        sequences = np.full(count, PADDING, np.int64)
        stop = position + count if limit is None else min(position + count, limit)
        start = position
        while start < stop:
            buffer = self.buffer_at(start)
            part = slice(start - position, min(buffer.stop, stop) - position)
            shards[part], sequences[part] = self._in_buffer(buffer, np.arange(start, min(buffer.stop, stop)))
            start = buffer.stop
        return shards, sequences

    def batch_positions(self, position: int, size: int) -> Integers:
        """Return the positions of the batch that starts at `position` (`[size]`), sorted by node group.

        `rank_slice` of them gives each rank the positions of its own node groups.
        """
        positions = np.arange(position, position + size)
        return positions[np.argsort(positions % self.node_groups, kind="stable")]

    def targets(self, shards: Integers, sequences: Integers) -> Integers:
        """Return how many tokens each of these sequences predicts; 0 for PADDING."""
        left = self.tokens[shards] - 1 - sequences * self.context_length
        return np.where(shards == PADDING, 0, np.minimum(left, self.context_length))

    def shards_needed(self, position: int, groups: range | None = None) -> list[int]:
        """Return the shards that hold these node groups' sequences of the buffer at `position`.

        Without `groups`: the shards of all node groups.
        """
        buffer = self.buffer_at(position)
        _, sizes = self._groups(buffer)
        ends = buffer.offsets[0] + np.cumsum(sizes)
        groups = range(self.node_groups) if groups is None else groups
        first = np.searchsorted(buffer.offsets, (ends - sizes)[groups[0]], side="right") - 1
        last = np.searchsorted(buffer.offsets, ends[groups[-1]], side="left")
        needed: list[int] = buffer.shards[first:last].tolist()
        return needed

    def _plan_epoch(self, epoch: int) -> tuple[Integers, Integers, list[int]]:
        """Return the shards of an epoch in order, and how they are divided into buffers.

        Returns:
            The shards; the sequences before each of them and after the last (`[shards + 1]`); for each buffer the index
            of its first shard, and the number of shards at the end (`[buffers + 1]`).
        """
        shards = np.flatnonzero(self.sequence_counts)
        shards = shards[np.argsort(_mix(shards.astype(np.uint64) * _GOLDEN + _key(self.seed, epoch)), kind="stable")]
        offsets = np.concatenate([[0], np.cumsum(self.sequence_counts[shards])])
        bytes_before = np.concatenate([[0], np.cumsum(self._shard_bytes[shards])])
        first_shards = [0]
        while first_shards[-1] < len(shards):
            most_bytes = bytes_before[first_shards[-1]] + self._buffer_bytes
            full = np.searchsorted(bytes_before, most_bytes, side="right") - 1
            first_shards.append(max(first_shards[-1] + 1, int(full)))
        return shards, offsets, first_shards

    def _groups(self, buffer: Buffer) -> tuple[Integers, Integers]:
        """Return the first position and the number of positions of each node group in a buffer (`[node_groups]`)."""
        groups = np.arange(self.node_groups)
        first = buffer.start + (groups - buffer.start) % self.node_groups
        return first, -(-np.maximum(buffer.stop - first, 0) // self.node_groups)

    def _in_buffer(self, buffer: Buffer, positions: Integers) -> tuple[Integers, Integers]:
        """Return the shard and the sequence at each of these positions of a buffer."""
        first, sizes = self._groups(buffer)
        group_offsets = buffer.offsets[0] + np.cumsum(sizes) - sizes
        groups, group_of = np.unique(positions % self.node_groups, return_inverse=True)
        keys = np.array([_key(self.seed, buffer.epoch, buffer.number, group) for group in groups.tolist()])
        index = (positions - first[groups][group_of]) // self.node_groups
        chosen = group_offsets[groups][group_of] + permute_groups(index, sizes[groups], keys, group_of)
        slots, sequences = _locate(buffer.offsets, chosen)
        return buffer.shards[slots], sequences


class EvaluationOrder:
    """The order in which validation sequences are evaluated: all of them by shard, or an even sample.

    The sample is `max_sequences` sequences: one at random from each of `max_sequences` equal parts of the split. It
    depends on the seed alone.
    """

    def __init__(
        self, shard_tokens: Sequence[int], context_length: int, seed: int, max_sequences: int | None = None
    ) -> None:
        self._offsets = np.concatenate(
            [[0], np.cumsum(count_sequences(np.asarray(shard_tokens, np.int64), context_length))]
        )
        self._population = int(self._offsets[-1])
        self._key = _key(seed)
        self.context_length = context_length
        self.sequence_count = self._population if max_sequences is None else min(max_sequences, self._population)
        """Number of sequences that are evaluated."""

    def sequence_ids(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """Return the shard, and the sequence's index in it, of the evaluated sequences `start` ≤ i < `stop`."""
        index = np.arange(start, stop)
        low = index * self._population // self.sequence_count
        high = (index + 1) * self._population // self.sequence_count
        random = _mix(index.astype(np.uint64) * _GOLDEN + self._key)
        return _locate(self._offsets, low + (random % (high - low).astype(np.uint64)).astype(np.int64))


def _locate(offsets: Integers, chosen: Integers) -> tuple[Integers, Integers]:
    """Return the slot of each of the `chosen` sequences, and its index in that slot.

    Args:
        offsets: sequences before each slot, and after the last one (`[slots + 1]`).
        chosen: sequences, counted over all slots.
    """
    slots = np.searchsorted(offsets, chosen, side="right") - 1
    return slots, chosen - offsets[slots]


# ---- Permutations made of integer arithmetic alone: the same on every machine and with every version of numpy ----

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: consecutive numbers land far apart


def permute(index: Integers, size: int, key: np.uint64) -> Integers:
    """Return where the permutation `key` of 0 … `size` - 1 puts each `index`; constant time and memory for each.

    The permutation is a Feistel network on pairs (left, right) of a grid with at least `size` cells, whose sides may
    differ. A result outside the range is permuted again until it is inside. These are "Method 3" and "cycle-walking" of
    Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002. The grid has fewer than √`size` cells too
    many, so a second pass is rare.
    """
    return permute_groups(index, np.array([size]), np.array([key]), np.zeros(len(index), np.intp))


def permute_groups(index: Integers, sizes: Integers, keys: NDArray[np.uint64], group_of: NDArray[np.intp]) -> Integers:
    """Apply `permute` in several ranges at once: `index[i]` is in the range of `sizes[group_of[i]]` and its key.

    `sizes` and `keys` are `[groups]`; `index` and `group_of` have the same length.
    """
    sides = [isqrt(size - 1) + 1 for size in sizes.tolist()]
    columns_of = np.array(sides, np.uint64)
    rows_of = (-(-sizes // np.array(sides))).astype(np.uint64)
    round_keys = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * _GOLDEN + keys)

    def walk(cells: NDArray[np.uint64], group_of: NDArray[np.intp]) -> NDArray[np.uint64]:
        columns, rows = columns_of[group_of], rows_of[group_of]
        left, right = np.divmod(cells, columns)
        for even, odd in round_keys.reshape(-1, 2, len(keys)):
            left = (left + _mix(right * _GOLDEN + even[group_of]) % rows) % rows
            right = (right + _mix(left * _GOLDEN + odd[group_of]) % columns) % columns
        return left * columns + right

    cells = walk(index.astype(np.uint64), group_of)
    while (outside := cells >= sizes.astype(np.uint64)[group_of]).any():
        cells[outside] = walk(cells[outside], group_of[outside])
    return cells.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's finalizer: Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, 2014."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: int) -> np.uint64:
    """Return one number made from several; a change of any of them changes all its bits."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix((key ^ np.uint64(part)) * _GOLDEN + _GOLDEN)
    return key[0]
