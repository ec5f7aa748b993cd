"""Batches for training and evaluation, cut from the shards by threads ahead of the step that uses them."""

import concurrent.futures
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from job import storage
from job.data.manifest import Manifest, Shard
from job.data.order import EvaluationOrder, Integers, WindowOrder, rank_groups, rank_slice
from job.data.shard_cache import ShardCache
from job.errors import UserError

IGNORED_LABEL = -100
"""The label of a place where nothing is predicted: PyTorch's own default."""
_LOOK_SECONDS = 1.0
_LONG_WAIT_SECONDS = 30.0
"""What the consumer waits for one batch before it is told why; it is told again every `_SAY_AGAIN_SECONDS`."""
_SAY_AGAIN_SECONDS = 300.0
_VERIFYING_SECONDS = 5.0
"""Seconds of verification after which its progress is shown, and between two such lines."""
_MOST_READS = 3
"""Attempts to read windows from a file that another program writes to at the same time."""

Made = TypeVar("Made")

logger = logging.getLogger(__name__)


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


class _Loader(Iterator[Made]):
    """One pass over what jobs make, in threads, out of the shards of one split; it comes in the jobs' order.

    `ahead` jobs are begun before what they make is asked for, the first ones as soon as there is a loader.
    """

    def __init__(
        self,
        shards_url: str,
        shards: Sequence[Shard],
        manifest: Manifest,
        context_length: int,
        cache_dir: str | Path,
        cache_bytes: int,
        workers: int,
        jobs: Iterator[Callable[[], Made]],
        ahead: int,
        say: Callable[[str], None],
        pin_memory: bool = False,
    ) -> None:
        self._say, self._shown_at = say, 0.0
        self.wait_seconds = 0.0
        """Time that the consumer has waited for batches, in all."""
        self._waited_seconds, self._said_seconds = 0.0, 0.0  # for the next batch; when that was last said
        self._store_seconds = 0.0  # of those that the consumer has waited, for shards
        self._shards_url, self._shards = shards_url, shards
        self._context_length, self._eod_id = context_length, manifest.eod_id
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._pin_memory = pin_memory
        self._cache = ShardCache(shards_url, shards, cache_dir, cache_bytes)
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="cut-batches")
        self._left = jobs
        self._begun: deque[tuple[concurrent.futures.Future[Made], threading.Event]] = deque()
        self._begin(ahead)

    @property
    def downloads(self) -> int:
        """Shards that this process has copied from the store."""
        return self._cache.downloads

    def poll(self, seconds: float) -> bool:
        """Waits until `next` would not wait, but no longer than `seconds`; 0 only looks.

        Returns:
            Whether the next batch, or the error in place of it, is here; true as well when there is no further one.
        """
        if not self._begun:
            return True
        future, asked_for = self._begun[0]
        asked_for.set()
        is_for_shards = bool(self._cache.awaited)
        began = time.monotonic()
        is_ready = bool(concurrent.futures.wait([future], seconds).done)
        waited_seconds = time.monotonic() - began
        self.wait_seconds += waited_seconds
        self._store_seconds += waited_seconds * (is_for_shards or bool(self._cache.awaited))
        self._waited_seconds += waited_seconds
        pause_seconds = _SAY_AGAIN_SECONDS if self._said_seconds else _LONG_WAIT_SECONDS
        if not is_ready and self._waited_seconds - self._said_seconds >= pause_seconds:
            self._said_seconds = self._waited_seconds
            logger.warning("waiting for a batch for %.0f s: %s", self._waited_seconds, self._reason())
        if not is_ready:
            self._show_verification()
        return is_ready

    def advice(self) -> str:
        """What to change, if the consumer has waited too long."""
        if self._store_seconds > self.wait_seconds / 2:
            return "for shards to come; a larger data.cache_bytes holds more of them, or take a store that is nearer"
        return "for windows to be cut; try a larger data.loader_workers or data.prefetch_steps"

    def __next__(self) -> Made:
        while not self.poll(_LOOK_SECONDS):
            pass
        if not self._begun:
            raise StopIteration
        made = self._begun[0][0].result()
        self._begun.popleft()
        self._begin(1)
        self._waited_seconds = self._said_seconds = 0.0
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the iteration and all threads; a job that waits for a shard is given up."""
        self._left = iter(())
        self._begun.clear()
        self._cache.close()
        self._threads.shutdown(cancel_futures=True)

    def _begin(self, jobs: int) -> None:
        for job in islice(self._left, jobs):
            asked_for = threading.Event()
            self._begun.append((self._threads.submit(self._do, job, asked_for), asked_for))

    def _show_verification(self) -> None:
        verifying, now = self._cache.verifying, time.monotonic()
        if verifying is not None and min(verifying.seconds, now - self._shown_at) >= _VERIFYING_SECONDS:
            self._shown_at = now
            self._say(str(verifying))

    def _reason(self) -> str:
        awaited = self._cache.awaited
        if not awaited:
            return "its shards are here, its windows are being cut"
        others = f" and {len(awaited) - 1} other shards are" if awaited[1:] else " is"
        if (verifying := self._cache.verifying) is not None:
            return f"{awaited[0]}{others} not verified yet ({verifying})"
        return f"{awaited[0]}{others} not on this machine yet"

    # ---- The threads ----

    @staticmethod
    def _do(job: Callable[[], Made], asked_for: threading.Event) -> Made:
        """What a job makes. A store that failed before anybody asked for it is tried once more: it may be back."""
        while True:
            was_asked_for = asked_for.is_set()
            try:
                return job()
            except storage.StoreError:
                if was_asked_for:
                    raise

    def _empty(self, rows: int) -> Tensor:
        """Input ids and labels `[2, rows, context_length]` with nothing to predict, in one piece of memory."""
        pair = torch.empty((2, rows, self._context_length), dtype=torch.int64, pin_memory=self._pin_memory)
        inputs, labels = pair.numpy()  # filled by numpy: torch would start threads of its own for each of ours
        inputs.fill(self._eod_id)
        labels.fill(IGNORED_LABEL)
        return pair

    def _cut(self, shard: int, windows: Integers, rows: Integers, pair: Tensor) -> None:
        """Writes these `windows` of a shard into these `rows` of a pair; waits until the shard is here."""
        for _ in range(_MOST_READS):
            with self._cache.open(shard) as file:
                is_whole = self._read(file, shard, windows, rows, pair)
                if is_whole and self._cache.is_unchanged(shard, file):
                    return
        url = storage.join(self._shards_url, self._shards[shard].name)
        wrong = "another program writes to this shard while it is used"
        raise UserError("data.shards", url, wrong, "prepare each data set in a folder of its own")

    def _read(self, file: BinaryIO, shard: int, windows: Integers, rows: Integers, pair: Tensor) -> bool:
        """Read windows of an open shard into rows of a pair; return False if the file has become shorter."""
        length, token_bytes = self._context_length, self._dtype.itemsize
        inputs, labels = pair.numpy()
        for window, row in zip(windows.tolist(), rows.tolist(), strict=True):
            first = window * length
            count = min(length + 1, self._shards[shard].tokens - first)
            content = os.pread(file.fileno(), count * token_bytes, first * token_bytes)
            if len(content) < count * token_bytes:
                return False
            tokens = np.frombuffer(content, self._dtype)
            inputs[row, : count - 1] = tokens[:-1]
            labels[row, : count - 1] = tokens[1:]
        return True


class BatchLoader(_Loader[Batch]):
    """This rank's part of every global batch from `start_position` on, in order.

    Which windows make a global batch depends on `order` and `global_batch_size` alone; ranks, threads and micro-batches
    only divide it. All ranks get the same number of batches, and the last one is completed with ignored labels.
    It is an iterator, and begins to fetch and to cut at once.

    Args:
        shards_url: folder of the manifest.
        order: made of the manifest's training shards.
        global_batch_size: windows of one step; `world_size` divides it, and `micro_batch_size` each rank's part.
        start_position: windows consumed before, over all ranks and epochs.
        end_position: where training ends (`order.position_limit(epochs)`); None for never.
        cache_dir: folder on the node's disk that its processes share; see `ShardCache`.
        prefetch_steps: batches that are ready, or in work, ahead of the one in use; at least 1.
        workers: threads that cut batches.
        say: shown how far the verification of shards is, if training waits for it longer than some seconds.
        pin_memory: page-lock each batch, so that a GPU can take it while it computes; needs CUDA.

    Raises:
        UserError: (while iterating as well) a shard is missing or damaged, or a buffer does not fit `cache_bytes`.
        StoreError: (while iterating) the store failed until its deadline while the next batch waited for it.
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
        say: Callable[[str], None] = logger.info,
        pin_memory: bool = False,
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
        self._lock = threading.Lock()
        self._reading: dict[int, int] = {}  # position of each batch in work → the first position it still has to read
        self._buffer_start = -1
        super().__init__(
            shards_url,
            manifest.train,
            manifest,
            order.context_length,
            cache_dir,
            cache_bytes,
            workers,
            self._jobs(),
            prefetch_steps,
            say,
            pin_memory,
        )

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
        pair = self._empty(len(mine))
        try:
            at = position
            while at < stop:
                self._enter(position, at)
                buffer_stop = self._order.buffer_at(at).stop
                from_buffer = (at <= mine) & (mine < min(buffer_stop, stop))
                wanted = np.unique(shards[from_buffer]).tolist()
                self._cache.demand(wanted)
                for shard in wanted:
                    rows = np.flatnonzero(from_buffer & (shards == shard))
                    self._cut(shard, windows[rows], rows, pair)
                at = buffer_stop
        finally:
            with self._lock:
                del self._reading[position]
        micro_batches = list(zip(*(side.split(self._micro_batch_size) for side in pair), strict=True))
        return Batch(position=position, next_position=stop, micro_batches=micro_batches, global_targets=targets)

    def _enter(self, position: int, at: int) -> None:
        """Notes that the batch at `position` reads on from `at`, and moves the cache on when no batch is behind."""
        with self._lock:
            self._reading[position] = at
            buffer = self._order.buffer_at(min(self._reading.values()))
            if buffer.start == self._buffer_start:
                return
            is_last = self._end is not None and buffer.stop >= self._end
            ahead = [] if is_last else self._order.shards_needed(buffer.stop, self._groups)
            self._cache.use(self._order.shards_needed(buffer.start, self._groups), ahead)
            self._buffer_start = buffer.start


class EvaluationLoader(_Loader[EvaluationBatch]):
    """The held-out windows of `order` in batches whose content does not depend on the number of ranks.

    Batch b holds the windows from b · `batch_size` on and goes to rank b modulo `world_size`. Every rank gets `rounds`
    batches, of which the last may be empty, so ranks may meet in each round. It is an iterator: for one pass.

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
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self._order, self._batch_size, self._rank, self._world_size = order, batch_size, rank, world_size
        self.rounds = -(-order.windows // (batch_size * world_size))
        super().__init__(
            shards_url,
            manifest.validation,
            manifest,
            order.context_length,
            cache_dir,
            cache_bytes,
            workers=1,  # the cache follows the batch that is being read
            jobs=(partial(self._batch, number) for number in range(self.rounds)),
            ahead=1,
            say=say,
        )

    def _windows(self, number: int) -> range:
        first = min((number * self._world_size + self._rank) * self._batch_size, self._order.windows)
        return range(first, min(first + self._batch_size, self._order.windows))

    def _batch(self, number: int) -> EvaluationBatch:
        chosen, following = self._windows(number), self._windows(number + 1)
        shards, windows = self._order.window_ids(chosen.start, chosen.stop)
        later, _ = self._order.window_ids(following.start, following.stop)
        upcoming = np.unique([*shards, *later]).tolist()
        pair = self._empty(len(chosen))
        for shard in np.unique(shards).tolist():
            self._cache.use([shard], [other for other in upcoming if other > shard])
            rows = np.flatnonzero(shards == shard)
            self._cut(shard, windows[rows], rows, pair)
        return EvaluationBatch(chosen, *pair)
