"""Shards on the node's disk: fetched ahead of use, once per node, verified, and dropped when others need the room.

All processes of a node share one folder and nothing else. It holds

    <shard>.shard             a whole and verified shard; its name begins with its sha256
    <shard>.<bytes>.partial   one that is being fetched, and so much room reserved for it
    <shard>.<mtime>.verified  says that a shard which is a local file, and used where it lies, had the right sha256
    <shard>.lock              locked by who fetches or verifies it
    room.lock                 locked by who counts and makes room
    <owner>.plan              the shards that a process uses now (1) or next (2), locked by it: others spare them

The locks are `flock`s, which the kernel takes from a process that dies, so there is nothing to clean up after one.
"""

import errno
import fcntl
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from job import storage
from job.data.manifest import Shard
from job.errors import UserError, one_line

_PARALLEL_FETCHES = 4
_LOOK_AGAIN_SECONDS = 0.05
"""Nothing tells a process that another one has released a lock."""
_RETRY_SECONDS = 1.0
_WARN_AGAIN_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_CHUNK_BYTES = 2**20
_NOW, _NEXT, _NEVER = 1, 2, 3

logger = logging.getLogger(__name__)


class CacheClosed(Exception):
    """The cache was closed while somebody waited for a shard."""


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
        self._urls = [storage.join(shards_url, shard.name) for shard in shards]
        self._names = [f"{shard.sha256[:16]}-{Path(shard.name).name}" for shard in shards]
        self._is_remote = storage.is_remote(shards_url)
        if self._is_remote:
            self._paths = [self._folder / f"{name}.shard" for name in self._names]
        else:
            self._paths = [Path(url.removeprefix("file://")).expanduser() for url in self._urls]
        self.downloads = 0
        """Shards that this process has copied from the store, repetitions included."""

        # Shared with the threads, and guarded by this condition.
        self._changed = threading.Condition()
        self._closed = False
        self._plan: dict[int, int] = {}  # shards to hold, each _NOW or _NEXT
        self._missing: dict[int, None] = {}  # those of them to fetch, in this order
        self._demanded: dict[int, None] = {}  # somebody waits for them
        self._fetching: dict[int, bool] = {}  # whether somebody waited for it when that was begun
        self._not_before: dict[int, float] = {}  # when to try again what another process has locked, or what failed
        self._failed: dict[int, Exception] = {}  # whoever waited is to be told
        self._quiet_until = 0.0

        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._plan_path = self._folder / f"{secrets.token_hex(8)}.plan"
            with _locked(self._folder / "room.lock"):
                self._plan_file = self._plan_path.open("w", encoding="utf-8")
                fcntl.flock(self._plan_file, fcntl.LOCK_EX)
        except OSError as error:
            wrong = f"cannot be written: {error.strerror}"
            raise UserError("data.cache_dir", str(cache_dir), wrong, "name a folder on a local disk") from None
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
        if room < 0 and self._is_remote:
            needed = self._cache_bytes - room
            wrong = f"{len(current)} shards are shuffled together and take {needed} bytes"
            raise UserError("data.cache_bytes", self._cache_bytes, wrong, f"set it to {needed} or more")
        plan = dict.fromkeys(current, _NOW)
        for index in ahead:
            if index not in plan:
                room -= self._shards[index].size
                if room < 0 and self._is_remote:
                    break
                plan[index] = _NEXT
        with _locked(self._folder / "room.lock"):
            self._plan_file.seek(0)
            self._plan_file.truncate()
            self._plan_file.writelines(f"{when} {self._names[index]}\n" for index, when in plan.items())
            self._plan_file.flush()
        with self._changed:
            self._plan = plan
            absent = (index for index in plan if index in self._demanded or not self._is_here(index))
            self._missing = {index: None for index in absent if not self._is_refused(index)}
            self._changed.notify_all()

    def demand(self, shards: Iterable[int]) -> None:
        """Has these shards of the plan brought here before all others; what the store failed to give is tried again."""
        absent = [index for index in shards if not self._is_here(index)]
        with self._changed:
            wanted = [index for index in absent if not self._is_refused(index)]
            for index in wanted:
                self._failed.pop(index, None)
            self._demanded |= dict.fromkeys(wanted)
            self._missing |= dict.fromkeys(index for index in wanted if index in self._plan)
            self._changed.notify_all()

    def open(self, index: int) -> BinaryIO:
        """Opens a shard's file, unbuffered, when it is here; it stays readable even if it is dropped meanwhile.

        Raises:
            UserError: the shard is not in the store, or was damaged twice.
            StoreError: the store failed until the deadline of an operation that began while the shard was waited for.
            CacheClosed: `close` was called.
        """
        while True:
            if self._is_here(index):
                try:
                    return self._paths[index].open("rb", buffering=0)
                except FileNotFoundError:
                    pass  # another process has dropped it this moment
            self.demand([index])
            with self._changed:
                self._changed.wait_for(lambda: self._closed or index in self._failed or index not in self._demanded)
                if self._closed:
                    raise CacheClosed
                if index in self._failed:
                    raise self._failed[index]

    @property
    def awaited(self) -> list[str]:
        """URLs of the shards that somebody waits for now."""
        with self._changed:
            return [self._urls[index] for index in self._demanded]

    def close(self) -> None:
        """Ends the threads and wakes all who wait; the files stay for the next one."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        self._plan_path.unlink(missing_ok=True)
        self._plan_file.close()

    def _is_here(self, index: int) -> bool:
        """Whether the shard's file is on this machine, and verified."""
        path = self._paths[index]
        return path.exists() and (self._is_remote or self._verified_note(index).exists())

    def _is_refused(self, index: int) -> bool:
        """Whether the shard is not to be had until a person has mended something."""
        return isinstance(self._failed.get(index), UserError)

    def _verified_note(self, index: int) -> Path:
        return self._folder / f"{self._names[index]}.{self._paths[index].stat().st_mtime_ns}.verified"

    # ---- The threads ----

    def _fetch_ahead(self) -> None:
        while (index := self._next_missing()) is not None:
            error: Exception | None = None
            is_here = False
            try:
                is_here = self._fetch(index)
            except CacheClosed:
                return
            except Exception as raised:  # whoever waits for the shard gets it
                error = raised
            with self._changed:
                was_demanded = self._fetching.pop(index)
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
        """Brings a shard here, or verifies it in place; False where another process is in the way."""
        with _locked(self._folder / f"{self._names[index]}.lock", wait=False) as is_ours:
            if not is_ours:
                return False
            if self._is_here(index):
                return True
            if not self._is_remote:
                self._verify(index, None)
                self._verified_note(index).touch()
                return True
            partial = self._folder / f"{self._names[index]}.{self._shards[index].size}.partial"
            partial.unlink(missing_ok=True)
            try:
                if not self._reserve(index, partial):
                    return False
                self._verify(index, partial)
                with _locked(self._folder / "room.lock"):
                    partial.rename(self._paths[index])
            finally:
                partial.unlink(missing_ok=True)
        return True

    def _verify(self, index: int, copy_to: Path | None) -> None:
        """Reads a shard, or copies it, and compares its checksum; a copy that came damaged is fetched once more."""
        shard, url = self._shards[index], self._urls[index]
        for _ in range(1 if copy_to is None else 2):
            try:
                found = self._read_whole(url, copy_to)
            except FileNotFoundError:
                wrong = "the manifest names this shard and it is not there"
                raise UserError("data.shards", url, wrong, "run `python -m job prepare` again") from None
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                wrong = "the disk is full before it holds data.cache_bytes"
                raise UserError("data.cache_dir", str(self._folder), wrong, "lower data.cache_bytes") from None
            if found == shard.sha256:
                return
        wrong = f"this shard is damaged: its sha256 is {found}, the manifest says {shard.sha256}"
        raise UserError("data.shards", url, wrong, "delete the folder and run `python -m job prepare` again")

    def _read_whole(self, url: str, copy_to: Path | None) -> str:
        digest = hashlib.sha256()
        with storage.open_read(url) as source, (copy_to or Path(os.devnull)).open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                if self._closed:
                    raise CacheClosed
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            if copy_to is not None:
                os.fsync(target.fileno())
                with self._changed:
                    self.downloads += 1
        return digest.hexdigest()

    # ---- The room on the disk ----

    def _reserve(self, index: int, partial: Path) -> bool:
        """Takes room by creating `partial`, and makes it by dropping shards that no process plans to use, oldest first.

        Where we need the shard now, what others plan to use next is dropped too, if need be when it has come, and then
        what they use now: two jobs with one cache that is too small for both go on, if slowly.
        """
        with self._changed:
            ours = {self._names[one] for one in self._plan}
            is_urgent = self._is_urgent(index)
        with _locked(self._folder / "room.lock"):
            used_bytes = self._shards[index].size
            planned: dict[str, int] = {}
            droppable, coming = [], []
            for path in list(self._folder.iterdir()):
                name, _, kind = path.name.rpartition(".")
                if kind == "shard":
                    status = path.stat()
                    used_bytes += status.st_size
                    if name not in ours:
                        droppable.append((status.st_mtime_ns, name, status.st_size))
                elif kind == "partial":
                    shard, _, reserved = name.rpartition(".")
                    with _locked(self._folder / f"{shard}.lock", wait=False) as is_abandoned:
                        if is_abandoned:
                            path.unlink(missing_ok=True)
                        else:
                            used_bytes += int(reserved)
                            coming.append(shard)
                elif kind == "plan" and path != self._plan_path:
                    with _locked(path, wait=False) as is_abandoned:
                        if is_abandoned:
                            path.unlink(missing_ok=True)
                        else:
                            for line in path.read_text(encoding="utf-8").splitlines():
                                when, shard = line.split(" ", 1)
                                planned[shard] = min(int(when), planned.get(shard, _NEXT))
            for _, name, size in sorted(droppable, key=lambda one: (-planned.get(one[1], _NEVER), one)):
                if used_bytes <= self._cache_bytes or (name in planned and not is_urgent):
                    break
                if planned.get(name) == _NOW and any(planned.get(shard) == _NEXT for shard in coming):
                    break
                (self._folder / f"{name}.shard").unlink()
                used_bytes -= size
            if used_bytes <= self._cache_bytes:
                partial.touch()
                return True
        with self._changed:
            if not self._is_urgent(index):  # until the plan changes, or somebody waits for it
                self._missing.pop(index, None)
        return False

    def _is_urgent(self, index: int) -> bool:
        """Whether the shard is needed now; to be asked under the lock, since that may change at any moment."""
        return self._plan.get(index) == _NOW or index in self._demanded


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the exclusive lock of a file, made if need be; yields False where it is not free and we do not `wait`."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_ours = True
        except BlockingIOError:
            is_ours = False
        yield is_ours
    finally:
        os.close(descriptor)
