"""Batches for training and evaluation, read from the shards by threads ahead of the step that uses them."""

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from job.data.cache_quota import check_cache_bytes
from job.data.manifest import Manifest
from job.data.order import EvaluationOrder, SequenceOrder, rank_groups, rank_slice
from job.data.prefetching import Prefetcher
from job.data.sequence_reader import SequenceReader
from job.data.shard_cache import ShardCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    position: int
    """Sequences used before this batch, by all ranks: the position from which it can be made again."""
    next_position: int
    """Sequences used after this batch, by all ranks: the position to store in a checkpoint."""
    micro_batches: list[tuple[Tensor, Tensor]]
    """Input ids and labels, each int64 `[micro_batch_size, context_length]`; labels are already shifted."""
    global_targets: int
    """Labels in the whole global batch that are not IGNORE_INDEX: the divisor of its mean loss."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Validation sequences that one rank evaluates together; no sequences if the round has no batch for the rank."""

    sequences: range
    """Which of the order's sequences these are."""
    input_ids: Tensor
    """int64 `[sequences, context_length]`"""
    labels: Tensor
    """int64 `[sequences, context_length]`, already shifted; IGNORE_INDEX where nothing is predicted."""


class BatchLoader(Prefetcher[Batch]):
    """An iterator over this rank's part of every global batch from `start_position` on.

    `order` and `global_batch_size` alone decide which sequences make a global batch; ranks, threads and micro-batches
    only divide it. All ranks get the same number of batches. The last batch is filled up with ignored labels. Threads
    begin to fetch and to read at once.

    Args:
        shards_url: folder or URL of the data set.
        manifest: the manifest of the data set.
        order: the order of the manifest's training shards.
        global_batch_size: sequences of one step; `world_size` divides it, and `micro_batch_size` each rank's part.
        micro_batch_size: sequences of each micro-batch.
        rank: this process's rank.
        world_size: number of processes.
        start_position: sequences used before, over all ranks and epochs.
        end_position: where training ends (`order.position_limit(epochs)`); None for a loader without an end.
        cache_dir: folder on the node's disk that its processes share; see `ShardCache`.
        cache_bytes: most bytes of shards in it.
        prefetch_steps: batches that are ready, or in work, ahead of the one in use; at least 1.
        workers: threads that read batches.
        say: shown the progress of the verification of shards, if training waits for it for some seconds.
        pin_memory: page-lock each batch, so that a GPU can copy it while it computes; needs CUDA.

    Raises:
        UserError: (also while iterating) a shard is missing or damaged, or a buffer does not fit into `cache_bytes`.
        StoreError: (while iterating) the store failed until its deadline while the next batch waited for it.
    """

    def __init__(
        self,
        shards_url: str,
        manifest: Manifest,
        order: SequenceOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        start_position: int,
        end_position: int | None,
        cache_dir: str | Path,
        cache_bytes: int,
        prefetch_steps: int,
        workers: int,
        say: Callable[[str], None] = logger.info,
        pin_memory: bool = False,
    ) -> None:
        check_cache_bytes(shards_url, order.largest_buffer_bytes, order.node_groups, cache_bytes)
        self._order = order
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._rank_slice = rank_slice(global_batch_size, rank, world_size)
        self._groups = rank_groups(order.node_groups, rank, world_size)
        self._start_position, self._end_position = start_position, end_position
        self._lock = threading.Lock()
        # Position of each batch in work → the first position that it still has to read.
        self._unread: dict[int, int] = {}
        self._buffer_start = -1
        cache = ShardCache(shards_url, manifest.train, cache_dir, cache_bytes)
        self._reader = SequenceReader(shards_url, manifest.train, manifest, order.context_length, cache, pin_memory)
        super().__init__(self._batches(), prefetch_steps, workers, cache, say)

    def _batches(self) -> Iterator[Callable[[], Batch]]:
        position = self._start_position
        while self._end_position is None or position < self._end_position:
            with self._lock:
                self._unread[position] = position
            yield partial(self._batch, position)
            position += self._global_batch_size

    def _batch(self, position: int) -> Batch:
        size, end = self._global_batch_size, self._end_position
        stop = position + size if end is None else min(position + size, end)
        shards, sequences = self._order.sequence_ids(position, size, end)
        global_targets = int(self._order.targets(shards, sequences).sum())
        positions = self._order.batch_positions(position, size)[self._rank_slice]
        shards, sequences = shards[positions - position], sequences[positions - position]
        pair = self._reader.empty(len(positions))
        try:
            start = position
            while start < stop:
                self._read_from(position, start)
                buffer_stop = self._order.buffer_at(start).stop
                is_in_buffer = (start <= positions) & (positions < min(buffer_stop, stop))
                wanted = np.unique(shards[is_in_buffer]).tolist()
                self._cache.demand(wanted)
                for shard in wanted:
                    rows = np.flatnonzero(is_in_buffer & (shards == shard))
                    self._reader.read(shard, sequences[rows], rows, pair)
                start = buffer_stop
        finally:
            with self._lock:
                del self._unread[position]
        micro_batches = list(zip(*(side.split(self._micro_batch_size) for side in pair), strict=True))
        return Batch(position=position, next_position=stop, micro_batches=micro_batches, global_targets=global_targets)

    def _read_from(self, position: int, start: int) -> None:
        """Record that the batch at `position` now reads from `start` on; give the cache the oldest buffer in use."""
        with self._lock:
            self._unread[position] = start
            buffer = self._order.buffer_at(min(self._unread.values()))
            if buffer.start == self._buffer_start:
                return
            is_last = self._end_position is not None and buffer.stop >= self._end_position
            ahead = [] if is_last else self._order.shards_needed(buffer.stop, self._groups)
            self._cache.use(self._order.shards_needed(buffer.start, self._groups), ahead)
            self._buffer_start = buffer.start


class EvaluationLoader(Prefetcher[EvaluationBatch]):
    """An iterator over the validation sequences of `order`, for one pass.

    The content of a batch does not depend on the number of ranks: batch b holds the sequences from b · `batch_size` on,
    and goes to rank b modulo `world_size`. Every rank gets `rounds` batches, so that all ranks can meet in each round;
    the batches of the last round may be empty.

    The arguments and errors are those of `BatchLoader`.
    """

    def __init__(
        self,
        shards_url: str,
        manifest: Manifest,
        order: EvaluationOrder,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        cache_dir: str | Path,
        cache_bytes: int,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self._order, self._batch_size, self._rank, self._world_size = order, batch_size, rank, world_size
        self.rounds = -(-order.sequence_count // (batch_size * world_size))
        """Number of batches of each rank."""
        cache = ShardCache(shards_url, manifest.validation, cache_dir, cache_bytes)
        self._reader = SequenceReader(shards_url, manifest.validation, manifest, order.context_length, cache, False)
        jobs = (partial(self._batch, number) for number in range(self.rounds))
        # One thread, because the cache holds the shards of the batch that is being read.
        super().__init__(jobs, ahead=1, workers=1, cache=cache, say=say)

    def _sequences(self, number: int) -> range:
        count = self._order.sequence_count
        first = min((number * self._world_size + self._rank) * self._batch_size, count)
        return range(first, min(first + self._batch_size, count))

    def _batch(self, number: int) -> EvaluationBatch:
        chosen, following = self._sequences(number), self._sequences(number + 1)
        shards, sequences = self._order.sequence_ids(chosen.start, chosen.stop)
        later_shards, _ = self._order.sequence_ids(following.start, following.stop)
        upcoming = np.unique([*shards, *later_shards]).tolist()
        pair = self._reader.empty(len(chosen))
        for shard in np.unique(shards).tolist():
            self._cache.use([shard], [other for other in upcoming if other > shard])
            rows = np.flatnonzero(shards == shard)
            self._reader.read(shard, sequences[rows], rows, pair)
        return EvaluationBatch(chosen, *pair)
