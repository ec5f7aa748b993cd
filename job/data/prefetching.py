"""An iterator whose items are made by threads ahead of their use, and that reports why its consumer has to wait."""

import concurrent.futures
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from types import TracebackType
from typing import Self, TypeVar

from job import storage
from job.data.shard_cache import ShardCache

_POLL_SECONDS = 1.0
_LONG_WAIT_SECONDS = 30.0
"""Seconds of waiting for one batch after which the reason is logged."""
_SAY_AGAIN_SECONDS = 300.0
"""Seconds after which the reason is logged again for the same batch."""
_VERIFYING_SECONDS = 5.0
"""Seconds of verification after which its progress is shown, and between two such lines."""

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


class Prefetcher(Iterator[Item]):
    """The results of jobs, in the order of the jobs, made by threads from the shards of one split.

    `ahead` jobs are started before their results are asked for, the first ones in the constructor. Use it in a `with`
    block, which ends the threads.

    Args:
        jobs: functions that each make one item.
        ahead: jobs that are done or in work ahead of the item in use; at least 1.
        workers: number of threads.
        cache: the cache from which the jobs read shards; it is closed with this object.
        say: shown the progress of the verification of shards, if the consumer waits for it for some seconds.
    """

    def __init__(
        self,
        jobs: Iterator[Callable[[], Item]],
        ahead: int,
        workers: int,
        cache: ShardCache,
        say: Callable[[str], None],
    ) -> None:
        self.wait_seconds = 0.0
        """Seconds that the consumer has waited for items so far."""
        self._shard_wait_seconds = 0.0  # Seconds of `wait_seconds` in which a shard was missing.
        self._item_wait_seconds, self._logged_at_seconds = 0.0, 0.0  # The wait for the next item; when it was logged.
        self._say, self._shown_at = say, 0.0
        self._cache = cache
        self._threads = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="cut-batches")
        self._jobs = jobs
        self._started: deque[tuple[concurrent.futures.Future[Item], threading.Event]] = deque()
        self._start(ahead)

    @property
    def downloads(self) -> int:
        """Number of shards that this process has copied from the store, repeated copies included."""
        return self._cache.downloads

    def poll(self, seconds: float) -> bool:
        """Wait until `next` would return at once, but at most `seconds`; 0 does not wait.

        Returns:
            True if the next item, or the error in its place, is ready, or if there is no further item.
        """
        if not self._started:
            return True
        future, is_asked_for = self._started[0]
        is_asked_for.set()
        is_shard_missing = bool(self._cache.awaited)
        began = time.monotonic()
        is_ready = bool(concurrent.futures.wait([future], seconds).done)
        waited_seconds = time.monotonic() - began
        self.wait_seconds += waited_seconds
        self._item_wait_seconds += waited_seconds
        if is_shard_missing or self._cache.awaited:
            self._shard_wait_seconds += waited_seconds
        if not is_ready:
            self._log_long_wait()
            self._show_verification()
        return is_ready

    def advice(self) -> str:
        """Return what the consumer mostly waited for, and which settings would shorten that."""
        if self._shard_wait_seconds > self.wait_seconds / 2:
            return "shards were missing; raise data.cache_bytes to keep more of them, or use a store that is nearer"
        return "batches were not ready; raise data.loader_workers or data.prefetch_steps"

    def __next__(self) -> Item:
        while not self.poll(_POLL_SECONDS):
            pass
        if not self._started:
            raise StopIteration
        item = self._started[0][0].result()
        self._started.popleft()
        self._start(1)
        self._item_wait_seconds = self._logged_at_seconds = 0.0
        return item

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the iteration and all threads; a job that waits for a shard is cancelled."""
        self._jobs = iter(())
        self._started.clear()
        self._cache.close()
        self._threads.shutdown(cancel_futures=True)

    def _start(self, count: int) -> None:
        for job in islice(self._jobs, count):
            is_asked_for = threading.Event()
            self._started.append((self._threads.submit(self._do, job, is_asked_for), is_asked_for))

    def _log_long_wait(self) -> None:
        pause_seconds = _SAY_AGAIN_SECONDS if self._logged_at_seconds else _LONG_WAIT_SECONDS
        if self._item_wait_seconds - self._logged_at_seconds >= pause_seconds:
            self._logged_at_seconds = self._item_wait_seconds
            logger.warning("waiting for a batch for %.0f s: %s", self._item_wait_seconds, self._wait_reason())

    def _show_verification(self) -> None:
        progress, now = self._cache.verification_progress, time.monotonic()
        if progress is not None and min(progress.seconds, now - self._shown_at) >= _VERIFYING_SECONDS:
            self._shown_at = now
            self._say(str(progress))

    def _wait_reason(self) -> str:
        awaited = self._cache.awaited
        if not awaited:
            return "its shards are here, its sequences are being read"
        others = f" and {len(awaited) - 1} other shards are" if awaited[1:] else " is"
        if (progress := self._cache.verification_progress) is not None:
            return f"{awaited[0]}{others} not verified yet ({progress})"
        return f"{awaited[0]}{others} not on this machine yet"

    @staticmethod
    def _do(job: Callable[[], Item], is_asked_for: threading.Event) -> Item:
        """Run a job in a thread.

        A job that fails because of the store before its result was asked for is tried again: the store may be back.
        """
        while True:
            was_asked_for = is_asked_for.is_set()
            try:
                return job()
            except storage.StoreError:
                if was_asked_for:
                    raise
