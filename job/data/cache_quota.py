"""The quota of the shard cache on a node's disk: `data.cache_bytes`, counted by all processes that share the folder.

Listing the folder takes longer the more shards it holds. A process therefore lists it when it starts, and later only
when the count says that the cache is full. The count is kept in a file. It is raised before a file is created and
lowered after a file is deleted, so a process that is killed in between leaves a count that is too large, never too
small. The next listing corrects it. A listing frees a twentieth of the shards at once, if no process plans to use that
many: so the number of listings, and the work for each shard, does not grow with the number of shards.
"""

import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from job import storage
from job.data.manifest import Manifest
from job.errors import UserError

NOW, NEXT, _NEVER = 1, 2, 3
"""When a process uses a shard. NOW and NEXT are stored in the files of plans."""
_SHARE_DROPPED = 20
_LOOK_AGAIN_SECONDS = 1.0
"""Seconds after which a full cache is listed again: a process that was killed freed its room without a notice."""


def check_cache_bytes(shards_url: str, largest_buffer_bytes: int, node_groups: int, cache_bytes: int) -> None:
    """Raise a UserError if `data.cache_bytes` has no room for the shards that are shuffled together.

    Shards on this machine are not copied and need no room. With several node groups a node holds only its part of the
    shards, and how much that is becomes known when they are used: `ShardCache.use` checks it then.

    Args:
        shards_url: folder or URL of the data set.
        largest_buffer_bytes: bytes of the shards that are shuffled together; see `order.largest_buffer_bytes`.
        node_groups: the setting `data.node_groups`.
        cache_bytes: the setting `data.cache_bytes`.
    """
    if storage.is_remote(shards_url) and node_groups == 1 and largest_buffer_bytes > cache_bytes:
        raise cache_too_small(largest_buffer_bytes, cache_bytes)


def cache_too_small(needed_bytes: int, cache_bytes: int) -> UserError:
    """Return the error for shards that are used together and do not fit into the cache."""
    expected = f"the shards that are used together take up to {needed_bytes:,} bytes"
    remedy = f"set data.cache_bytes to {needed_bytes} or more, or data.shuffle_bytes to less"
    return UserError("data.cache_bytes", cache_bytes, expected, remedy)


def most_cached_bytes(manifest: Manifest, cache_bytes: int) -> int:
    """Return the most bytes that a data set's shards take in a cache of `cache_bytes`."""
    return min(cache_bytes, sum(shard.size for shard in manifest.train + manifest.validation))


class _NoRoom(NamedTuple):
    """A listing of the folder that found no room for a shard."""

    changes: int
    """Number of the last change of the folder before the listing."""
    size: int
    is_urgent: bool
    valid_until: float
    """Time of `time.monotonic` after which the folder is listed again."""


class CacheQuota:
    """This process's share in the folder of cached shards.

    Args:
        folder: the folder, which must exist.
        limit_bytes: most bytes of shards in it.
        holds_shards: False if the folder only holds notes, because the shards are on this machine already.
    """

    def __init__(self, folder: Path, limit_bytes: int, holds_shards: bool) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._lock_path, self._count_path = folder / "room.lock", folder / "room.count"
        self._plan_path = folder / f"{secrets.token_hex(8)}.plan"
        self._planned: Mapping[str, int] = {}
        self._no_room: _NoRoom | None = None
        with locked(self._lock_path):
            descriptor = os.open(self._plan_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._plan_file = os.fdopen(descriptor, "w", encoding="utf-8")
            fcntl.flock(self._plan_file, fcntl.LOCK_EX)
            if holds_shards:
                self._write_count(self._list_folder().used_bytes)
        plan_status = os.fstat(self._plan_file.fileno())
        self._uid, self._write_bits = plan_status.st_uid, plan_status.st_mode & 0o022

    def is_ours(self, status: os.stat_result) -> bool:
        """Return True if a file in the folder belongs to this user.

        The owner is compared with the owner of a file that this process created there, since some network drives give
        all files one owner. `is_ours_alone` compares the mode in the same way.
        """
        return stat.S_ISREG(status.st_mode) and status.st_uid == self._uid

    def is_ours_alone(self, status: os.stat_result) -> bool:
        """Return True if a file in the folder belongs to this user, and no other user can write to it."""
        return self.is_ours(status) and not status.st_mode & 0o022 & ~self._write_bits

    def plan(self, planned: Mapping[str, int]) -> None:
        """Tell the other processes which shards this process uses NOW and NEXT."""
        with locked(self._lock_path):
            self._plan_file.seek(0)
            self._plan_file.truncate()
            self._plan_file.writelines(f"{when} {name}\n" for name, when in planned.items())
            self._plan_file.flush()
            self._planned = planned
            self._note_change()

    def reserve(self, name: str, size: int, is_urgent: bool) -> Path | None:
        """Reserve room for a shard and return its new, empty file; None if there is no room now.

        To make room, shards are deleted in this order, the oldest first:

        1. shards that no process plans to use;
        2. if the shard is urgent: shards that other processes will use after the ones in use now;
        3. if it is urgent and no process is fetching such a later shard: shards that other processes use now.

        So two jobs that share a cache which is too small for both still make progress, slowly.
        """
        partial = self._folder / f"{name}.{size}.partial"
        with locked(self._lock_path):
            count = self._read_count()
            if count is not None and self._is_known_full(count, size, is_urgent):
                return None
            partial.unlink(missing_ok=True)  # Left by a process that was killed: this process holds the shard's lock.
            if count is not None and count.used_bytes + size <= self._limit_bytes:
                used_bytes = count.used_bytes
            else:
                used_bytes = self._make_room(size, is_urgent)
            if used_bytes + size > self._limit_bytes:
                changes = self._write_count(used_bytes)
                self._no_room = _NoRoom(changes, size, is_urgent, time.monotonic() + _LOOK_AGAIN_SECONDS)
                return None
            self._write_count(used_bytes + size)
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            return partial

    def keep(self, partial: Path, path: Path) -> None:
        """Rename a reserved file to `path`, now that its content is complete."""
        with locked(self._lock_path):
            partial.rename(path)
            self._note_change()

    def drop(self, path: Path) -> None:
        """Delete a shard or a reserved file, if it exists, and release its room."""
        with locked(self._lock_path):
            try:
                size = path.lstat().st_size
                path.unlink()
            except FileNotFoundError:
                return
            if path.suffix == ".partial":
                size = int(path.stem.rpartition(".")[2])
            count = self._read_count()
            if count is not None:
                self._write_count(max(0, count.used_bytes - size))

    def close(self) -> None:
        """Delete this process's plan."""
        with locked(self._lock_path):
            self._plan_path.unlink(missing_ok=True)
            self._plan_file.close()
            self._note_change()

    # ---- The lock is held in all of these ----

    def _is_known_full(self, count: "_Count", size: int, is_urgent: bool) -> bool:
        """Return True if there was no room for a shard no larger and at least as urgent, and nothing has changed."""
        last = self._no_room
        return (
            last is not None
            and last.changes == count.changes
            and last.size <= size
            and (last.is_urgent or not is_urgent)
            and time.monotonic() < last.valid_until
        )

    def _make_room(self, size: int, is_urgent: bool) -> int:
        """Delete shards until `size` more bytes fit, if that is possible; return the bytes in use afterwards."""
        folder = self._list_folder()
        used_bytes, planned = folder.used_bytes, folder.planned
        most_bytes = self._limit_bytes - size
        if used_bytes <= most_bytes:
            return used_bytes
        at_once, dropped = folder.shards // _SHARE_DROPPED, 0
        for _, name, shard_bytes in sorted(folder.droppable, key=lambda shard: (-planned.get(shard[1], _NEVER), shard)):
            when = planned.get(name, _NEVER)
            if used_bytes <= most_bytes and (when != _NEVER or dropped >= at_once):
                break
            if when != _NEVER and not is_urgent:
                break
            if when == NOW and any(planned.get(shard) == NEXT for shard in folder.fetching):
                break
            for kind in ("shard", "verified"):
                (self._folder / f"{name}.{kind}").unlink(missing_ok=True)
            used_bytes, dropped = used_bytes - shard_bytes, dropped + 1
        return used_bytes

    def _list_folder(self) -> "_FolderState":
        """List the folder, and delete the files that killed processes have left."""
        state = _FolderState()
        with os.scandir(self._folder) as entries:
            listed = list(entries)
        for entry in listed:
            name, _, kind = entry.name.rpartition(".")
            if kind == "shard":
                with suppress(FileNotFoundError):  # Somebody deleted it by hand.
                    status = entry.stat(follow_symlinks=False)
                    state.used_bytes, state.shards = state.used_bytes + status.st_size, state.shards + 1
                    if name not in self._planned:
                        state.droppable.append((status.st_mtime_ns, name, status.st_size))
            elif kind == "partial":
                self._read_partial(Path(entry.path), name, state)
            elif kind == "plan" and entry.name != self._plan_path.name:
                self._read_plan(Path(entry.path), state)
        return state

    def _read_partial(self, path: Path, name: str, state: "_FolderState") -> None:
        shard, _, reserved = name.rpartition(".")
        with locked(self._folder / f"{shard}.lock", wait=False) as is_abandoned:
            if is_abandoned or not reserved.isdecimal():
                path.unlink(missing_ok=True)
            else:
                state.used_bytes += int(reserved)
                state.fetching.append(shard)

    @staticmethod
    def _read_plan(path: Path, state: "_FolderState") -> None:
        with locked(path, wait=False) as is_abandoned:
            if is_abandoned:
                path.unlink(missing_ok=True)
                return
            for line in path.read_text(encoding="utf-8").splitlines():
                when, _, shard = line.partition(" ")
                if when in (str(NOW), str(NEXT)):
                    state.planned[shard] = min(int(when), state.planned.get(shard, NEXT))

    def _read_count(self) -> "_Count | None":
        try:
            used_bytes, changes = self._count_path.read_text(encoding="ascii").split()
            return _Count(int(used_bytes), int(changes))
        except (OSError, ValueError):  # It was deleted, or a process was killed while it wrote it.
            return None

    def _write_count(self, used_bytes: int) -> int:
        """Write the bytes in use; return the number of this change."""
        count = self._read_count()
        changes = 1 if count is None else count.changes + 1
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._count_path, flags, 0o600)
        try:
            os.pwrite(descriptor, f"{used_bytes:020d} {changes:020d}\n".encode("ascii"), 0)
        finally:
            os.close(descriptor)
        return changes

    def _note_change(self) -> None:
        """Make processes that found no room list the folder again."""
        if (count := self._read_count()) is not None:
            self._write_count(count.used_bytes)


class _Count(NamedTuple):
    """The content of the file with the count."""

    used_bytes: int
    changes: int


@dataclass
class _FolderState:
    """The result of listing the folder."""

    used_bytes: int = 0
    """Bytes of shards, and bytes reserved for shards."""
    shards: int = 0
    droppable: list[tuple[int, str, int]] = field(default_factory=list)
    """Modification time, name and bytes of the shards that this process does not plan to use."""
    fetching: list[str] = field(default_factory=list)
    """Names of the shards that are being fetched."""
    planned: dict[str, int] = field(default_factory=dict)
    """NOW or NEXT for each shard that other processes plan to use."""


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the exclusive lock of a file, which is created if it does not exist.

    Yields:
        True; or False if another process holds the lock and `wait` is False.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_ours = True
        except BlockingIOError:
            is_ours = False
        yield is_ours
    finally:
        os.close(descriptor)
