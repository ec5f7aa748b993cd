"""The order of training as a function: a position, counted in windows since the start, is all the state there is.

A window is `context_length` (T) predictions in a row in one shard: window i reads the tokens from i·T on and predicts
the tokens i·T+1 … i·T+T, so every token but a shard's first is a target exactly once. The last window is short.

1. Each epoch permutes the shards.
2. Consecutive shards make a *buffer*, as many as `buffer_bytes` hold: what a node keeps on its disk at one time.
3. Inside a buffer the windows are permuted, all of them, by a function that reaches any place in constant time.

Nothing here knows of ranks: a batch is a range of positions, and each rank takes its part of it.
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
"""Shard and window of a place behind the end of training, which only completes the last batch."""


def count_windows(tokens: Integers, context_length: int) -> Integers:
    """Windows of shards with so many `tokens`: one target for every token but the first, `context_length` at a time."""
    return -(-np.maximum(tokens - 1, 0) // context_length)


def rank_slice(global_batch_size: int, rank: int, world_size: int) -> slice:
    """The equal, contiguous part of a global batch that `rank` trains on; `world_size` divides the batch."""
    share = global_batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def rank_groups(node_groups: int, rank: int, world_size: int) -> range:
    """The node groups whose windows `rank_slice` gives to `rank`: one of them, or several where ranks are fewer."""
    return range(rank * node_groups // world_size, ((rank + 1) * node_groups - 1) // world_size + 1)


@dataclass(frozen=True)
class Buffer:
    """Shards that are on disk together, and the positions `start` ≤ p < `stop` at which their windows are used."""

    number: int
    """Which buffer of its epoch."""
    epoch: int
    start: int
    stop: int
    shards: Integers
    """Indices of its shards, in the epoch's order."""
    edges: Integers
    """`[shards + 1]` windows of the epoch before each shard, and after the last."""


class WindowOrder:
    """Which window is used at which position, for ever: epoch after epoch, each window once in each.

    Args:
        shard_tokens: tokens of each shard, in the manifest's order.
        shard_bytes: size of each shard's file.
        context_length: most predictions of a window, T.
        seed: another seed gives another order.
        buffer_bytes: most bytes of shards that are shuffled together; a larger shard is a buffer of its own.
        node_groups: parts that each buffer is cut into, so that a group of nodes reads its own part of the shards and
            not all of them. Position p takes its window from part p modulo `node_groups`.

    Raises:
        UserError: there is nothing to predict in any shard.
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
        self.windows = count_windows(self.tokens, context_length)
        self.windows_per_epoch = int(self.windows.sum())
        if not self.windows_per_epoch:
            raise UserError("data.shards", None, "no shard holds a token to predict", "prepare a corpus that has text")
        self.context_length, self.seed, self.node_groups = context_length, seed, node_groups
        self._shard_bytes, self._buffer_bytes = np.asarray(shard_bytes, np.int64), buffer_bytes
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def position_limit(self, epochs: int) -> int:
        """The position at which `epochs` epochs are complete."""
        return epochs * self.windows_per_epoch

    @property
    def largest_buffer_bytes(self) -> int:
        """What the shards of a buffer may take on disk, in any epoch."""
        return max(int(self._shard_bytes.max()), min(self._buffer_bytes, int(self._shard_bytes.sum())))

    def buffer_at(self, position: int) -> Buffer:
        """The buffer whose windows are used at `position`; the next one begins at its `stop`."""
        epoch, offset = divmod(position, self.windows_per_epoch)
        shards, edges, cuts = self._epoch(epoch)
        number = int(np.searchsorted(edges[cuts], offset, side="right")) - 1
        first, last = cuts[number : number + 2]
        start = epoch * self.windows_per_epoch
        return Buffer(
            number=number,
            epoch=epoch,
            start=start + int(edges[first]),
            stop=start + int(edges[last]),
            shards=shards[first:last],
            edges=edges[first : last + 1],
        )

    def window_ids(self, position: int, count: int, limit: int | None = None) -> tuple[Integers, Integers]:
        """Shard and window (`[count]` each) at the positions from `position` on; PADDING from position `limit` on."""
        shards = np.full(count, PADDING, np.int64)
        windows = np.full(count, PADDING, np.int64)
        stop = position + count if limit is None else min(position + count, limit)
        at = position
        while at < stop:
            buffer = self.buffer_at(at)
            part = slice(at - position, min(buffer.stop, stop) - position)
            shards[part], windows[part] = self._in_buffer(buffer, np.arange(at, min(buffer.stop, stop)))
            at = buffer.stop
        return shards, windows

    def batch_positions(self, position: int, size: int) -> Integers:
        """The positions (`[size]`) of the batch at `position`, such that each `rank_slice` has those of its groups."""
        positions = np.arange(position, position + size)
        return positions[np.argsort(positions % self.node_groups, kind="stable")]

    def targets(self, shards: Integers, windows: Integers) -> Integers:
        """Tokens that each of these windows predicts; none where it is PADDING."""
        left = self.tokens[shards] - 1 - windows * self.context_length
        return np.where(shards == PADDING, 0, np.minimum(left, self.context_length))

    def shards_needed(self, position: int, groups: range | None = None) -> list[int]:
        """Shards from which the buffer at `position` takes the windows of these node groups (all, by default)."""
        buffer = self.buffer_at(position)
        _, sizes = self._groups(buffer)
        ends = buffer.edges[0] + np.cumsum(sizes)
        groups = range(self.node_groups) if groups is None else groups
        first = np.searchsorted(buffer.edges, (ends - sizes)[groups[0]], side="right") - 1
        last = np.searchsorted(buffer.edges, ends[groups[-1]], side="left")
        needed: list[int] = buffer.shards[first:last].tolist()
        return needed

    def _plan_epoch(self, epoch: int) -> tuple[Integers, Integers, list[int]]:
        """The epoch's shards in order, the windows before each (`[shards + 1]`), and where each buffer is cut off."""
        shards = np.flatnonzero(self.windows)
        shards = shards[np.argsort(_mix(shards.astype(np.uint64) * _GOLDEN + _key(self.seed, epoch)), kind="stable")]
        edges = np.concatenate([[0], np.cumsum(self.windows[shards])])
        bytes_before = np.concatenate([[0], np.cumsum(self._shard_bytes[shards])])
        cuts = [0]
        while cuts[-1] < len(shards):
            full = np.searchsorted(bytes_before, bytes_before[cuts[-1]] + self._buffer_bytes, side="right") - 1
            cuts.append(max(cuts[-1] + 1, int(full)))
        return shards, edges, cuts

    def _groups(self, buffer: Buffer) -> tuple[Integers, Integers]:
        """First position and number of positions (`[node_groups]` each) that each node group has in a buffer."""
        groups = np.arange(self.node_groups)
        first = buffer.start + (groups - buffer.start) % self.node_groups
        return first, -(-np.maximum(buffer.stop - first, 0) // self.node_groups)

    def _in_buffer(self, buffer: Buffer, positions: Integers) -> tuple[Integers, Integers]:
        first, sizes = self._groups(buffer)
        offsets = buffer.edges[0] + np.cumsum(sizes) - sizes
        groups, which = np.unique(positions % self.node_groups, return_inverse=True)
        keys = np.array([_key(self.seed, buffer.epoch, buffer.number, group) for group in groups.tolist()])
        index = (positions - first[groups][which]) // self.node_groups
        chosen = offsets[groups][which] + permute_groups(index, sizes[groups], keys, which)
        slots, windows = _locate(buffer.edges, chosen)
        return buffer.shards[slots], windows


class EvaluationOrder:
    """The held-out windows in the order of shards and places, or a sample of `max_windows` spread evenly over them.

    The sample takes one window at random from each of `max_windows` equal parts, and depends on the seed alone.
    """

    def __init__(
        self, shard_tokens: Sequence[int], context_length: int, seed: int, max_windows: int | None = None
    ) -> None:
        self._edges = np.concatenate(
            [[0], np.cumsum(count_windows(np.asarray(shard_tokens, np.int64), context_length))]
        )
        self._population = int(self._edges[-1])
        self._key = _key(seed)
        self.context_length = context_length
        self.windows = self._population if max_windows is None else min(max_windows, self._population)

    def window_ids(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """Shard and window (`[stop - start]` each) of the windows `start` ≤ i < `stop` of all `windows`."""
        index = np.arange(start, stop)
        low, high = index * self._population // self.windows, (index + 1) * self._population // self.windows
        random = _mix(index.astype(np.uint64) * _GOLDEN + self._key)
        return _locate(self._edges, low + (random % (high - low).astype(np.uint64)).astype(np.int64))


def _locate(edges: Integers, chosen: Integers) -> tuple[Integers, Integers]:
    """Slot and window of each of `chosen`, windows counted over all slots; `edges` (`[slots + 1]`) are their starts."""
    slots = np.searchsorted(edges, chosen, side="right") - 1
    return slots, chosen - edges[slots]


# ---- Permutations of integers alone, so that every machine and every version of numpy gives the same ----

_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 divided by the golden ratio: consecutive numbers land far apart


def permute(index: Integers, size: int, key: np.uint64) -> Integers:
    """Where the permutation `key` of 0 … `size` - 1 puts each `index`, in constant time and memory for each.

    A Feistel network on pairs (left, right) of a grid with at least `size` cells, whose two sides need not be equal,
    walked on from cells outside the range until it comes back inside: "Method 3" and "cycle-walking" of Black and
    Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002. The grid has fewer than √`size` cells too many, so a
    second walk is rare.
    """
    return permute_groups(index, np.array([size]), np.array([key]), np.zeros(len(index), np.intp))


def permute_groups(index: Integers, sizes: Integers, keys: NDArray[np.uint64], which: NDArray[np.intp]) -> Integers:
    """`permute` in several ranges at once: `index[i]` is in range `which[i]` of `sizes` and `keys` (`[groups]`)."""
    sides = [isqrt(size - 1) + 1 for size in sizes.tolist()]
    columns_of = np.array(sides, np.uint64)
    rows_of = (-(-sizes // np.array(sides))).astype(np.uint64)
    keys_of = _mix(np.arange(1, _ROUNDS + 1, dtype=np.uint64)[:, None] * _GOLDEN + keys)

    def walk(cells: NDArray[np.uint64], which: NDArray[np.intp]) -> NDArray[np.uint64]:
        columns, rows = columns_of[which], rows_of[which]
        left, right = np.divmod(cells, columns)
        for even, odd in keys_of.reshape(-1, 2, len(keys)):
            left = (left + _mix(right * _GOLDEN + even[which]) % rows) % rows
            right = (right + _mix(left * _GOLDEN + odd[which]) % columns) % columns
        return left * columns + right

    cells = walk(index.astype(np.uint64), which)
    while (outside := cells >= sizes.astype(np.uint64)[which]).any():
        cells[outside] = walk(cells[outside], which[outside])
    return cells.astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, 2014."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(*parts: int) -> np.uint64:
    """One number from several, each of which changes it wholly."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix((key ^ np.uint64(part)) * _GOLDEN + _GOLDEN)
    return key[0]
