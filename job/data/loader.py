"""Batches for training and evaluation, cut from the shards by threads ahead of the step that uses them."""

import concurrent.futures
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from job import storage
from job.data.cache import ShardCache
from job.data.manifest import Manifest, Shard
from job.data.order import EvaluationOrder, Integers, WindowOrder, rank_groups, rank_slice
from job.errors import UserError

IGNORED_LABEL = -100
"""The label of a place where nothing is predicted: PyTorch's own default."""
_POLL_SECONDS = 0.2
"""How often a request to stop is looked for while a batch is waited for."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch."""

    position: int
    """Windows consumed before it: the cursor from which it can be made again."""
    next_position: int
    """Windows consumed after it, by all ranks: the cursor to store in a checkpoint."""
    micro_batches: list[tuple[Tensor, Tensor]]
    """Input ids and labels, each int64 `[micro_batch_size, context_length]`; labels are already shifted."""
    global_targets: int
    """Labels that are not IGNORED_LABEL in the whole global batch: the divisor of its mean loss."""


@dataclass(frozen=True)
class EvaluationBatch:
    """Held-out windows that one rank evaluates together; none, if a round has no batch left for the rank."""

    windows: range
    """Which of the order's windows these are."""
    input_ids: Tensor
    """int64 `[windows, context_length]`"""
    labels: Tensor
    """int64 `[windows, context_length]`, shifted; IGNORED_LABEL where nothing is predicted."""


class BatchLoader:
    """This rank's part of every global batch from `start_position` on, in order.

    Which windows make a global batch depends on `order` and `global_batch_size` alone; ranks, threads and micro-batches
    only divide it. All ranks get the same number of batches, and the last one is completed with ignored labels.

    Args:
        shards_url: folder of the manifest.
        order: made of the manifest's training shards.
        global_batch_size: windows of one step; `world_size` divides it, and `micro_batch_size` each rank's part.
        start_position: windows consumed before, over all ranks and epochs.
        end_position: where training ends (`order.position_limit(epochs)`); None for never.
        cache_dir: folder on the node's disk that its processes share; see `ShardCache`.
        prefetch_steps: batches that are ready, or in work, ahead of the one in use.
        workers: threads that cut batches.
        should_stop: asked while a batch is waited for; true ends the iteration, and sets `stopped`.

    Raises:
        UserError: (while iterating as well) a shard is missing or damaged, or a buffer does not fit `cache_bytes`.
        StoreError: (while iterating) the store failed and the next batch needs it.
    """

    def __init__(
        self,
        shards_url: str,
        manifest: Manifest,
        order: WindowOrder,
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
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        most = order.largest_buffer_bytes
        if storage.is_remote(shards_url) and order.node_groups == 1 and most > cache_bytes:
            wrong = f"the shards that are shuffled together take up to {most} bytes"
            raise UserError("data.cache_bytes", cache_bytes, wrong, f"set it to {most} or more")
        self._order = order
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self._slice = rank_slice(global_batch_size, rank, world_size)
        self._groups = rank_groups(order.node_groups, rank, world_size)
        self._start, self._end = start_position, end_position
        self._cutter = _Cutter(
            shards_url, manifest.train, manifest, order.context_length, cache_dir, cache_bytes, workers, should_stop
        )
        self._lock = threading.Lock()
        self._reading: dict[int, int] = {}  # position of each batch in work → the first position it still has to read
        self._buffer_start = -1
        self._batches = self._cutter.in_order(self._jobs(), prefetch_steps)

    @property
    def stopped(self) -> bool:
        """Whether the iteration was ended by `should_stop`."""
        return self._cutter.stopped

    @property
    def wait_seconds(self) -> float:
        """Time that the consumer has waited for batches, in all."""
        return self._cutter.wait_seconds

    @property
    def downloads(self) -> int:
        """Shards that this process has copied from the store."""
        return self._cutter.cache.downloads

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all threads."""
        self._cutter.close()

    def _jobs(self) -> Iterator[Callable[[], Batch]]:
        position = self._start
        while self._end is None or position < self._end:
            with self._lock:
                self._reading[position] = position
            yield partial(self._batch, position)
            position += self._global_batch_size

    def _batch(self, position: int) -> Batch:
        size, end = self._global_batch_size, self._end
        stop = position + size if end is None else min(position + size, end)
        shards, windows = self._order.window_ids(position, size, end)
        targets = int(self._order.targets(shards, windows).sum())
        mine = self._order.batch_positions(position, size)[self._slice]
        shards, windows = shards[mine - position], windows[mine - position]
        inputs, labels = self._cutter.empty(len(mine))
        try:
            at = position
            while at < stop:
                self._enter(position, at)
                buffer_stop = self._order.buffer_at(at).stop
                from_buffer = (at <= mine) & (mine < min(buffer_stop, stop))
                wanted = np.unique(shards[from_buffer]).tolist()
                self._cutter.cache.demand(wanted)
                for shard in wanted:
                    rows = np.flatnonzero(from_buffer & (shards == shard))
                    self._cutter.cut(shard, windows[rows], rows, inputs, labels)
                at = buffer_stop
        finally:
            with self._lock:
                del self._reading[position]
        micro = [slice(row, row + self._micro_batch_size) for row in range(0, len(mine), self._micro_batch_size)]
        pairs = [(torch.from_numpy(inputs[rows]), torch.from_numpy(labels[rows])) for rows in micro]
        return Batch(position=position, next_position=stop, micro_batches=pairs, global_targets=targets)

    def _enter(self, position: int, at: int) -> None:
        """Notes that the batch at `position` reads on from `at`, and moves the cache on when no batch is behind."""
        with self._lock:
            self._reading[position] = at
            buffer = self._order.buffer_at(min(self._reading.values()))
            if buffer.start == self._buffer_start:
                return
            is_last = self._end is not None and buffer.stop >= self._end
            ahead = [] if is_last else self._order.shards_needed(buffer.stop, self._groups)
            self._cutter.cache.use(self._order.shards_needed(buffer.start, self._groups), ahead)
            self._buffer_start = buffer.start


class EvaluationLoader:
    """The held-out windows of `order` in batches whose content does not depend on the number of ranks.

    Batch b holds the windows from b · `batch_size` on and goes to rank b modulo `world_size`. An iteration has `rounds`
    batches on every rank, of which the last may be empty, so ranks may meet in each round. It can be repeated.

    Args and raises as for `BatchLoader`.
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
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._order, self._batch_size, self._rank, self._world_size = order, batch_size, rank, world_size
        self.rounds = -(-order.windows // (batch_size * world_size))
        # One thread: the cache follows the batch that is being read.
        self._cutter = _Cutter(
            shards_url, manifest.validation, manifest, order.context_length, cache_dir, cache_bytes, 1, should_stop
        )

    @property
    def stopped(self) -> bool:
        """Whether the iteration was ended by `should_stop`."""
        return self._cutter.stopped

    def __iter__(self) -> Iterator[EvaluationBatch]:
        return self._cutter.in_order((partial(self._batch, number) for number in range(self.rounds)), ahead=1)

    def __enter__(self) -> "EvaluationLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all threads."""
        self._cutter.close()

    def _windows(self, number: int) -> range:
        first = min((number * self._world_size + self._rank) * self._batch_size, self._order.windows)
        return range(first, min(first + self._batch_size, self._order.windows))

    def _batch(self, number: int) -> EvaluationBatch:
        chosen, following = self._windows(number), self._windows(number + 1)
        shards, windows = self._order.window_ids(chosen.start, chosen.stop)
        later, _ = self._order.window_ids(following.start, following.stop)
        upcoming = np.unique([*shards, *later]).tolist()
        inputs, labels = self._cutter.empty(len(chosen))
        for shard in np.unique(shards).tolist():
            self._cutter.cache.use([shard], [other for other in upcoming if other > shard])
            rows = np.flatnonzero(shards == shard)
            self._cutter.cut(shard, windows[rows], rows, inputs, labels)
        return EvaluationBatch(chosen, torch.from_numpy(inputs), torch.from_numpy(labels))


class _Cutter:
    """Cuts windows out of the shards of one split, in threads, and hands on what they make in order."""

    def __init__(
        self,
        shards_url: str,
        shards: Sequence[Shard],
        manifest: Manifest,
        context_length: int,
        cache_dir: str | Path,
        cache_bytes: int,
        workers: int,
        should_stop: Callable[[], bool],
    ) -> None:
        self.cache = ShardCache(shards_url, shards, cache_dir, cache_bytes)
        self.stopped = False
        self.wait_seconds = 0.0
        self._shards, self._context_length, self._eod_id = shards, context_length, manifest.eod_id
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._should_stop = should_stop
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="cut-batches")

    def empty(self, rows: int) -> tuple[Integers, Integers]:
        """Input ids and labels `[rows, context_length]` with nothing to predict."""
        shape = (rows, self._context_length)
        return np.full(shape, self._eod_id, np.int64), np.full(shape, IGNORED_LABEL, np.int64)

    def cut(self, shard: int, windows: Integers, rows: Integers, inputs: Integers, labels: Integers) -> None:
        """Writes these `windows` of a shard into these `rows`; waits until the shard is here."""
        length, token_bytes = self._context_length, self._dtype.itemsize
        with self.cache.open(shard) as file:
            for window, row in zip(windows.tolist(), rows.tolist(), strict=True):
                first = window * length
                count = min(length + 1, self._shards[shard].tokens - first)
                tokens = np.frombuffer(os.pread(file.fileno(), count * token_bytes, first * token_bytes), self._dtype)
                inputs[row, : count - 1] = tokens[:-1]
                labels[row, : count - 1] = tokens[1:]

    def in_order(self, jobs: Iterable[Callable[[], Made]], ahead: int) -> Iterator[Made]:
        """What the jobs make, in their order, with `ahead` of them begun beyond the one that is waited for."""
        begun: deque[concurrent.futures.Future[Made]] = deque()
        self.stopped = False
        try:
            for job in jobs:
                begun.append(self._threads.submit(job))
                if len(begun) > ahead:
                    if not self._wait(begun[0]):
                        return
                    yield begun.popleft().result()
            while begun:
                if not self._wait(begun[0]):
                    return
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    def _wait(self, future: "concurrent.futures.Future[Made]") -> bool:
        """Waits until the job is done; False if a stop was asked for before."""
        began = time.monotonic()
        try:
            while not concurrent.futures.wait([future], _POLL_SECONDS).done:
                if self._should_stop():
                    self.stopped = True
                    return False
            return True
        finally:
            self.wait_seconds += time.monotonic() - began

    def close(self) -> None:
        """Ends all threads; a job that waits for a shard is given up."""
        self.cache.close()
        self._threads.shutdown(cancel_futures=True)
