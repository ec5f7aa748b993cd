"""The cache of shards on a node's disk: shards are fetched ahead of use, verified once per node, and deleted for room.

All processes of a node share one folder and nothing else. The folder holds

    <shard>.shard             a complete shard; its name begins with its sha256
    <shard>.<bytes>.partial   a shard that is being fetched, and the room that is reserved for it
    <shard>.verified          the note that this file was verified (see `job.data.verification_notes`)
    <shard>.<path>.verified   the same for a shard that is used in its own folder; <path> is a hash of its path
    <shard>.lock              locked by the process that fetches or verifies the shard
    room.lock, room.count     locked by the process that counts and makes room; the bytes in use (see
                              `job.data.cache_quota`)
    <owner>.plan              the shards that a process uses now (1) or next (2), and that the others do not delete;
                              locked by that process

The locks are `flock`s. The kernel releases them when a process dies, so nothing has to be cleaned up after it.
"""

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from job import storage
from job.data.cache_quota import NEXT, NOW, CacheQuota, cache_too_small, locked
from job.data.manifest import Shard
from job.data.shard_files import ShardFiles
from job.errors import UserError, one_line
from job.invocation import command

_PARALLEL_FETCHES = 4
"""Threads that fetch and verify; reading and hashing release Python's global lock."""
_LOOK_AGAIN_SECONDS = 0.05
"""Seconds until a lock of another process is tried again; nothing reports that it was released."""
_RETRY_SECONDS = 1.0
_WARN_AGAIN_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_MOST_VERIFICATIONS = 4
"""Verifications of a shard in one `open`, if the file that is opened is never the file that was verified."""

logger = logging.getLogger(__name__)


class CacheClosed(Exception):
    """The cache was closed while a thread waited for a shard."""


class VerificationProgress(NamedTuple):
    """Progress of verifying the files that were found on this machine."""

    done_bytes: int
    total_bytes: int
    seconds: float
    """Seconds since the verification began."""

    def __str__(self) -> str:
        return f"verifying shards {self.done_bytes / 1e9:.1f}/{self.total_bytes / 1e9:.1f} GB"


class ShardCache:
    """The shards of one split, as files on this node.

    Methods name a shard by its index in `shards`.

    Args:
        shards_url: folder or URL of the data set. Shards in a folder of this machine are used there, without a copy.
        shards: the shards of the split.
        cache_dir: folder of the cache, the same for all processes of a node.
        cache_bytes: most bytes of shards to keep in it.
    """

    def __init__(self, shards_url: str, shards: Sequence[Shard], cache_dir: str | Path, cache_bytes: int) -> None:
        self._shards, self._cache_bytes = shards, cache_bytes
        self._folder = Path(cache_dir).expanduser()
        self.downloads = 0
        """Number of shards that this process has copied from the store, repeated copies included."""

        # The threads share all of these; the condition guards them.
        self._changed = threading.Condition()
        self._closed = False
        self._plan: dict[int, int] = {}  # Shards to hold, each NOW or NEXT.
        self._missing: dict[int, None] = {}  # Shards of the plan to fetch or verify, in this order.
        self._demanded: dict[int, None] = {}  # Shards that a thread waits for.
        self._fetching: dict[int, bool] = {}  # Shards in work; True if a thread already waited when that began.
        self._not_before: dict[int, float] = {}  # When to try again a shard that is locked elsewhere, or that failed.
        self._failed: dict[int, Exception] = {}  # Errors to raise in the threads that wait for these shards.
        self._quiet_until = 0.0
        self._unverified: dict[int, int] = {}  # Bytes read of each file that is here and has to be verified.
        self._verified_bytes, self._verifying_since = 0, 0.0  # Since the last time that no file had to be verified.

        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._quota = CacheQuota(self._folder, cache_bytes, holds_shards=storage.is_remote(shards_url))
        except OSError as error:
            expected = f"cannot be written: {error.strerror}"
            raise UserError("data.cache_dir", str(cache_dir), expected, "set it to a folder on a local disk") from None
        self._files = ShardFiles(shards_url, shards, self._folder, self._quota)
        self._threads = [
            threading.Thread(target=self._fetch_ahead, name=f"fetch-shards-{number}", daemon=True)
            for number in range(_PARALLEL_FETCHES)
        ]
        for thread in self._threads:
            thread.start()

    def use(self, current: Iterable[int], ahead: Iterable[int] = ()) -> None:
        """Fetch and keep all `current` shards, and after them as many of the shards `ahead` as there is room for.

        The work is done by threads; this call does not wait for it.

        Raises:
            UserError: the `current` shards alone take more than `cache_bytes`.
        """
        current = list(dict.fromkeys(current))
        free_bytes = self._cache_bytes - sum(self._shards[index].size for index in current)
        if free_bytes < 0 and self._files.are_copies:
            raise cache_too_small(self._cache_bytes - free_bytes, self._cache_bytes)
        plan = dict.fromkeys(current, NOW)
        for index in ahead:
            if index not in plan:
                free_bytes -= self._shards[index].size
                if free_bytes < 0 and self._files.are_copies:
                    break
                plan[index] = NEXT
        self._quota.plan({self._files.names[index]: when for index, when in plan.items()})
        absent = {index for index in plan if not self._files.is_verified(index)}
        unverified = [index for index in absent if self._files.exists(index)]
        with self._changed:
            self._plan = plan
            missing = [index for index in plan if index in self._demanded or index in absent]
            self._missing = {index: None for index in missing if not self._has_failed_for_good(index)}
            kept = self._missing.keys() | self._fetching.keys()
            self._unverified = {index: count for index, count in self._unverified.items() if index in kept}
            self._expect(unverified)
            self._changed.notify_all()

    def demand(self, shards: Iterable[int]) -> None:
        """Fetch these shards of the plan before all others; a shard that the store failed to give is tried again."""
        absent = [index for index in shards if not self._files.is_verified(index)]
        unverified = [index for index in absent if self._files.exists(index)]
        with self._changed:
            wanted = [index for index in absent if not self._has_failed_for_good(index)]
            for index in wanted:
                self._failed.pop(index, None)
            self._demanded |= dict.fromkeys(wanted)
            self._missing |= dict.fromkeys(index for index in wanted if index in self._plan)
            self._expect(unverified)
            self._changed.notify_all()

    def open(self, index: int) -> BinaryIO:
        """Wait until a shard is here and verified; open its file, unbuffered.

        The open file stays readable if the shard is deleted from the cache meanwhile.

        Raises:
            UserError: the shard is missing or damaged in the store.
            StoreError: the store failed until the deadline of an operation that began while the shard was waited for.
            CacheClosed: `close` was called.
        """
        verifications = 0
        while verifications < _MOST_VERIFICATIONS:
            with suppress(OSError):  # The file does not exist or cannot be read: the threads find out why.
                if (file := self._files.open_verified(index)) is not None:
                    return file
                verifications += 1
            self.demand([index])
            with self._changed:
                self._changed.wait_for(lambda: self._closed or index in self._failed or index not in self._demanded)
                if self._closed:
                    raise CacheClosed
                if index in self._failed:
                    raise self._failed[index]
        expected = f"this file was verified {verifications - 1} times, and had changed each time that it was opened"
        remedy = "copy it to a disk where no program changes it"
        raise UserError("data.shards", str(self._files.paths[index]), expected, remedy)

    def is_unchanged(self, index: int, file: BinaryIO) -> bool:
        """Return True if nobody has written to an open shard since it was verified; call it after reading."""
        return self._files.is_unchanged(index, file)

    @property
    def awaited(self) -> list[str]:
        """URLs of the shards that a thread waits for now."""
        with self._changed:
            return [self._files.urls[index] for index in self._demanded]

    @property
    def verification_progress(self) -> VerificationProgress | None:
        """Progress of verifying files on this machine; None if no file has to be verified."""
        with self._changed:
            if not self._unverified:
                return None
            total_bytes = self._verified_bytes + sum(self._shards[index].size for index in self._unverified)
            done_bytes = self._verified_bytes + sum(self._unverified.values())
            return VerificationProgress(done_bytes, total_bytes, time.monotonic() - self._verifying_since)

    def close(self) -> None:
        """End the threads, and raise `CacheClosed` in all that wait; the files stay for the next process."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        with suppress(OSError):  # The folder was deleted.
            self._quota.close()

    def _has_failed_for_good(self, index: int) -> bool:
        """Return True if the shard cannot be used until a person has solved a problem."""
        return isinstance(self._failed.get(index), UserError)

    def _expect(self, unverified: Iterable[int]) -> None:
        """Add files to those that have to be verified. The caller holds the lock."""
        new = [index for index in unverified if index in self._missing and index not in self._unverified]
        if new and not self._unverified:
            self._verified_bytes, self._verifying_since = 0, time.monotonic()
        self._unverified |= dict.fromkeys(new, 0)

    # ---- The threads ----

    def _fetch_ahead(self) -> None:
        while (index := self._next_missing()) is not None:
            error: Exception | None = None
            is_here = False
            try:
                is_here = self._fetch(index)
            except CacheClosed:
                return
            except storage.StoreError as raised:
                error = raised
            except OSError as raised:
                error = self._files.folder_error(raised)
            except Exception as raised:  # It is raised in the thread that waits for the shard.
                error = raised
            with self._changed:
                was_demanded = self._fetching.pop(index)
                if index in self._unverified and (is_here or error is not None):
                    del self._unverified[index]
                    self._verified_bytes += self._shards[index].size
                if is_here:
                    self._missing.pop(index, None)
                    self._demanded.pop(index, None)
                elif error is None:
                    self._not_before[index] = time.monotonic() + _LOOK_AGAIN_SECONDS
                else:
                    self._not_before[index] = time.monotonic() + _RETRY_SECONDS
                    if was_demanded or isinstance(error, UserError):
                        self._missing.pop(index, None)
                        self._demanded.pop(index, None)
                        self._failed[index] = error
                    if not isinstance(error, UserError):
                        self._warn(error)
                self._changed.notify_all()

    def _warn(self, error: Exception) -> None:
        """Log, at most once a minute, that the store fails: the run continues while it has shards on this machine."""
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _WARN_AGAIN_SECONDS
            logger.warning("shards cannot be fetched now: %s", one_line(str(error)))

    def _next_missing(self) -> int | None:
        """Wait for a shard to fetch and return it; return None when the cache is closed."""
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                self._not_before = {index: then for index, then in self._not_before.items() if then > now}
                taken = self._fetching.keys() | self._not_before.keys()
                for index in chain(self._demanded, self._missing):
                    if index in self._missing and index not in taken:
                        self._fetching[index] = index in self._demanded
                        return index
                self._changed.wait(_LOOK_AGAIN_SECONDS if self._not_before else None)
        return None

    def _fetch(self, index: int) -> bool:
        """Verify the shard's file, or fetch the shard; return False if it has to be tried again later.

        That is so if another process holds the shard's lock, or if there is no room for the shard.
        """
        with locked(self._folder / f"{self._files.names[index]}.lock", wait=False) as is_ours:
            if not is_ours:
                return False
            return self._files.is_verified(index) or self._verify(index) or self._download(index)

    def _verify(self, index: int) -> bool:
        """Verify the shard's file; return False if there is no good file. A damaged copy is deleted.

        Raises:
            UserError: the shard is used in its own folder, and cannot be read or is damaged there.
        """
        path = self._files.paths[index]
        try:
            wrong = self._files.verify(index, lambda count: self._count_read(index, count))
        except FileNotFoundError:
            if self._files.are_copies:
                return False
            raise self._files.missing_error(index) from None
        if wrong and not self._files.are_copies:
            raise UserError("data.shards", str(path), wrong, f"delete it and run `{command('prepare')}` again")
        if wrong:
            logger.warning("%s: %s; it is fetched again", path, wrong)
            self._quota.drop(path)
            with self._changed:
                self._unverified.pop(index, None)
        return not wrong

    def _count_read(self, index: int, count: int) -> None:
        """Count bytes that were read for verification."""
        with self._changed:
            if self._closed:
                raise CacheClosed
            if index in self._unverified:
                self._unverified[index] += count

    def _download(self, index: int) -> bool:
        """Fetch a shard; return False if there is no room for it."""
        with self._changed:
            is_urgent = self._is_urgent(index)
        partial = self._quota.reserve(self._files.names[index], self._shards[index].size, is_urgent)
        if partial is None:
            with self._changed:
                # The shard is not tried again until the plan changes or a thread waits for it.
                if not self._is_urgent(index):
                    self._missing.pop(index, None)
            return False
        try:
            self._files.copy(index, partial, lambda count: self._check_open(), self._count_download)
        finally:
            self._quota.drop(partial)
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise CacheClosed

    def _count_download(self) -> None:
        with self._changed:
            self.downloads += 1

    def _is_urgent(self, index: int) -> bool:
        """Return True if the shard is needed now. The caller holds the lock, since the answer may change any moment."""
        return self._plan.get(index) == NOW or index in self._demanded
