"""Shards on the node's disk: fetched ahead of use, verified before first use, once per node, dropped to make room.

All processes of a node share one folder and nothing else. It holds

    <shard>.shard             a whole shard; its name begins with its sha256
    <shard>.<bytes>.partial   one that is being fetched, and so much room reserved for it
    <shard>.verified          the note that this file was verified (see `job.data.verification_notes`)
    <shard>.<place>.verified  the same for a shard that is a local file, used where it is; <place> stands for its path
    <shard>.lock              locked by the process that fetches or verifies it
    room.lock, room.count     locked by the process that counts and makes room; the bytes in use (job.data.cache_quota)
    <owner>.plan              the shards that a process uses now (1) or next (2), locked by it: others spare them

The locks are `flock`s, which the kernel takes from a process that dies, so there is nothing to clean up after one.
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
from job.data.cache_quota import NEXT, NOW, Room, locked
from job.data.manifest import Shard
from job.data.shard_files import ShardFiles
from job.errors import UserError, one_line
from job.invocation import command

_PARALLEL_FETCHES = 4
"""Threads that fetch and verify; reading and hashing do not hold Python's lock."""
_LOOK_AGAIN_SECONDS = 0.05
"""Nothing tells a process that another one has released a lock."""
_RETRY_SECONDS = 1.0
_WARN_AGAIN_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_MOST_VERIFICATIONS = 4
"""Verifications per `open`, if each time the file that is opened is not the file that was verified."""

logger = logging.getLogger(__name__)


class CacheClosed(Exception):
    """The cache was closed while somebody waited for a shard."""


class Verifying(NamedTuple):
    """Progress of verifying the files that were found on this machine."""

    done_bytes: int
    total_bytes: int
    seconds: float
    """Since this began."""

    def __str__(self) -> str:
        return f"verifying shards {self.done_bytes / 1e9:.1f}/{self.total_bytes / 1e9:.1f} GB"


class ShardCache:
    """The shards of one split, as files on this node.

    Args:
        shards_url: folder of the manifest. Shards in a folder of this machine are used where they are.
        shards: the split's shards; everything below names one by its index here.
        cache_dir: folder of the cache, the same for all processes of a node.
        cache_bytes: most bytes of shards to keep in it.
    """

    def __init__(self, shards_url: str, shards: Sequence[Shard], cache_dir: str | Path, cache_bytes: int) -> None:
        self._shards, self._cache_bytes = shards, cache_bytes
        self._folder = Path(cache_dir).expanduser()
        self.downloads = 0
        """Shards that this process has copied from the store, repetitions included."""

        # Shared with the threads, and guarded by this condition.
        self._changed = threading.Condition()
        self._closed = False
        self._plan: dict[int, int] = {}  # shards to hold, each NOW or NEXT
        self._missing: dict[int, None] = {}  # those of them to fetch or to verify, in this order
        self._demanded: dict[int, None] = {}  # somebody waits for them
        self._fetching: dict[int, bool] = {}  # whether somebody waited for it when that was begun
        self._not_before: dict[int, float] = {}  # when to try again what another process has locked, or what failed
        self._failed: dict[int, Exception] = {}  # whoever waited is to be told
        self._quiet_until = 0.0
        self._unverified: dict[int, int] = {}  # files that are here and have to be verified: bytes read of each
        self._verified_bytes, self._verifying_since = 0, 0.0  # since there was nothing to verify

        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._room = Room(self._folder, cache_bytes, counts=storage.is_remote(shards_url))
        except OSError as error:
            wrong = f"cannot be written: {error.strerror}"
            raise UserError("data.cache_dir", str(cache_dir), wrong, "name a folder on a local disk") from None
        self._files = ShardFiles(shards_url, shards, self._folder, self._room)
        self._threads = [
            threading.Thread(target=self._fetch_ahead, name=f"fetch-shards-{number}", daemon=True)
            for number in range(_PARALLEL_FETCHES)
        ]
        for thread in self._threads:
            thread.start()

    def use(self, current: Iterable[int], ahead: Iterable[int] = ()) -> None:
        """Has all of the `current` shards brought here and kept, then of those `ahead` as many as there is room for.

        Raises:
            UserError: `current` alone is more than `cache_bytes`.
        """
        current = list(dict.fromkeys(current))
        room = self._cache_bytes - sum(self._shards[index].size for index in current)
        if room < 0 and self._files.are_copies:
            needed = self._cache_bytes - room
            wrong = f"{len(current)} shards are shuffled together and take {needed} bytes"
            raise UserError("data.cache_bytes", self._cache_bytes, wrong, f"set it to {needed} or more")
        plan = dict.fromkeys(current, NOW)
        for index in ahead:
            if index not in plan:
                room -= self._shards[index].size
                if room < 0 and self._files.are_copies:
                    break
                plan[index] = NEXT
        self._room.plan({self._files.names[index]: when for index, when in plan.items()})
        absent = {index for index in plan if not self._files.is_here(index)}
        unverified = [index for index in absent if self._files.is_on_disk(index)]
        with self._changed:
            self._plan = plan
            missing = [index for index in plan if index in self._demanded or index in absent]
            self._missing = {index: None for index in missing if not self._is_refused(index)}
            kept = self._missing.keys() | self._fetching.keys()
            self._unverified = {index: count for index, count in self._unverified.items() if index in kept}
            self._expect(unverified)
            self._changed.notify_all()

    def demand(self, shards: Iterable[int]) -> None:
        """Has these shards of the plan brought here before all others; what the store failed to give is tried again."""
        absent = [index for index in shards if not self._files.is_here(index)]
        unverified = [index for index in absent if self._files.is_on_disk(index)]
        with self._changed:
            wanted = [index for index in absent if not self._is_refused(index)]
            for index in wanted:
                self._failed.pop(index, None)
            self._demanded |= dict.fromkeys(wanted)
            self._missing |= dict.fromkeys(index for index in wanted if index in self._plan)
            self._expect(unverified)
            self._changed.notify_all()

    def open(self, index: int) -> BinaryIO:
        """Opens a shard's file, unbuffered, when it is here and verified; it stays readable if it is dropped meanwhile.

        Raises:
            UserError: the shard is not in the store, or it is damaged.
            StoreError: the store failed until the deadline of an operation that began while the shard was waited for.
            CacheClosed: `close` was called.
        """
        verifications = 0
        while verifications < _MOST_VERIFICATIONS:
            with suppress(OSError):  # not there, or not to be read: the threads find out
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
        wrong = f"this file was verified {verifications - 1} times and was another one each time it was opened"
        raise UserError(
            "data.shards", str(self._files.paths[index]), wrong, "copy it to a disk where nothing changes it"
        )

    def is_unchanged(self, index: int, file: BinaryIO) -> bool:
        """Return True if what was just read from an open shard was verified: nobody has written to it since."""
        return self._files.is_unchanged(index, file)

    @property
    def awaited(self) -> list[str]:
        """URLs of the shards that somebody waits for now."""
        with self._changed:
            return [self._files.urls[index] for index in self._demanded]

    @property
    def verifying(self) -> Verifying | None:
        """Progress of verifying files on this machine; None if there are none to verify."""
        with self._changed:
            if not self._unverified:
                return None
            total_bytes = self._verified_bytes + sum(self._shards[index].size for index in self._unverified)
            done_bytes = self._verified_bytes + sum(self._unverified.values())
            return Verifying(done_bytes, total_bytes, time.monotonic() - self._verifying_since)

    def close(self) -> None:
        """Ends the threads and wakes all who wait; the files stay for the next one."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        with suppress(OSError):  # the folder was deleted
            self._room.close()

    def _is_refused(self, index: int) -> bool:
        """Whether the shard is not to be had until a person has mended something."""
        return isinstance(self._failed.get(index), UserError)

    def _expect(self, unverified: Iterable[int]) -> None:
        """Counts these files among those to verify, under the lock."""
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
                error = self._files.explained(raised)
            except Exception as raised:  # whoever waits for the shard gets it
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
        """Says, once in a while, that the store fails: a run goes on without it as long as it has shards."""
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _WARN_AGAIN_SECONDS
            logger.warning("shards cannot be fetched now: %s", one_line(str(error)))

    def _next_missing(self) -> int | None:
        """Waits for something to fetch; None when the cache is closed."""
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
        """Verifies the shard's file, or brings it here; False where another process is in the way."""
        with locked(self._folder / f"{self._files.names[index]}.lock", wait=False) as is_ours:
            if not is_ours:
                return False
            return self._files.is_here(index) or self._verify(index) or self._download(index)

    def _verify(self, index: int) -> bool:
        """Compares the sha256 of the file that is here; a damaged one is deleted if it can be fetched.

        Raises:
            UserError: a shard that is used where it is cannot be read, or is damaged.
        """
        path = self._files.paths[index]
        try:
            wrong = self._files.find_wrong(index, lambda count: self._count_read(index, count))
        except FileNotFoundError:
            if self._files.are_copies:
                return False
            raise self._files.missing(index) from None
        if wrong and not self._files.are_copies:
            raise UserError("data.shards", str(path), wrong, f"delete it and run `{command('prepare')}` again")
        if wrong:
            logger.warning("%s: %s; it is fetched again", path, wrong)
            self._room.drop(path)
            with self._changed:
                self._unverified.pop(index, None)
        return not wrong

    def _count_read(self, index: int, count: int) -> None:
        """Counts bytes that were read for verification."""
        with self._changed:
            if self._closed:
                raise CacheClosed
            if index in self._unverified:
                self._unverified[index] += count

    def _download(self, index: int) -> bool:
        """Fetches a shard; False where there is no room for it."""
        with self._changed:
            is_urgent = self._is_urgent(index)
        partial = self._room.reserve(self._files.names[index], self._shards[index].size, is_urgent)
        if partial is None:
            with self._changed:
                if not self._is_urgent(index):  # until the plan changes, or somebody waits for it
                    self._missing.pop(index, None)
            return False
        try:
            self._files.copy(index, partial, lambda count: self._go_on(), self._count_download)
        finally:
            self._room.drop(partial)
        return True

    def _go_on(self) -> None:
        if self._closed:
            raise CacheClosed

    def _count_download(self) -> None:
        with self._changed:
            self.downloads += 1

    def _is_urgent(self, index: int) -> bool:
        """Whether the shard is needed now; to be asked under the lock, since that may change at any moment."""
        return self._plan.get(index) == NOW or index in self._demanded
