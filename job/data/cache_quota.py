"""Room for shards on the node's disk, counted and made by all processes that share the folder.

Counting what the folder holds takes longer the more it holds, so it is done when a process begins, and then only when
the count says that the folder is full. The count is kept in a file. It is raised before a file is made and lowered
after one is deleted, so a process that is killed in between leaves a count that is too large, never too small; the next
look at the folder mends it. A look makes room for a twentieth of the shards at once, if so many are there that no
process plans to use: the number of looks, and with it the work for each shard, does not grow with the number of shards.
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

NOW, NEXT, _NEVER = 1, 2, 3
_SHARE_DROPPED = 20
_LOOK_AGAIN_SECONDS = 1.0
"""A process that was killed frees what it had reserved, and nothing tells the others."""


class _Full(NamedTuple):
    """A look at the folder that found no room."""

    changes: int
    size: int
    is_urgent: bool
    until: float


class Room:
    """This process' share in the folder of the shards.

    Args:
        folder: the folder, which is there.
        limit_bytes: most bytes of shards in it.
        counts: whether shards are kept in it at all.
    """

    def __init__(self, folder: Path, limit_bytes: int, counts: bool) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._lock_path, self._count_path = folder / "room.lock", folder / "room.count"
        self._plan_path = folder / f"{secrets.token_hex(8)}.plan"
        self._planned: Mapping[str, int] = {}
        self._full: _Full | None = None
        with locked(self._lock_path):
            descriptor = os.open(self._plan_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._plan_file = os.fdopen(descriptor, "w", encoding="utf-8")
            fcntl.flock(self._plan_file, fcntl.LOCK_EX)
            if counts:
                self._write_count(self._look().used_bytes)
        mine = os.fstat(self._plan_file.fileno())
        self._uid, self._write_bits = mine.st_uid, mine.st_mode & 0o022

    def is_ours(self, found: os.stat_result) -> bool:
        """Return True if a file in the folder is this user's.

        Its owner is compared with that of a file that this process has just made there, since some network drives give
        all files one owner; in `is_ours_alone` the mode is, too.
        """
        return stat.S_ISREG(found.st_mode) and found.st_uid == self._uid

    def is_ours_alone(self, found: os.stat_result) -> bool:
        """Return True if a file in the folder is this user's, and no other user can write to it."""
        return self.is_ours(found) and not found.st_mode & 0o022 & ~self._write_bits

    def plan(self, planned: Mapping[str, int]) -> None:
        """Tell the other processes which shards this one uses NOW and NEXT."""
        with locked(self._lock_path):
            self._plan_file.seek(0)
            self._plan_file.truncate()
            self._plan_file.writelines(f"{when} {name}\n" for name, when in planned.items())
            self._plan_file.flush()
            self._planned = planned
            self._note_change()

    def reserve(self, name: str, size: int, is_urgent: bool) -> Path | None:
        """Take room for a shard and return its new, empty file; None if there is no room now.

        Room is made by dropping shards that no process plans to use, oldest first. If the shard is urgent, what others
        plan to use NEXT is dropped too, if need be when it has come, and then what they use NOW: two jobs with one
        cache that is too small for both go on, if slowly.
        """
        partial = self._folder / f"{name}.{size}.partial"
        with locked(self._lock_path):
            count = self._read_count()
            if count is not None and self._is_known_full(count, size, is_urgent):
                return None
            partial.unlink(missing_ok=True)  # of a process that was killed: this one holds the shard's lock
            if count is not None and count.used_bytes + size <= self._limit_bytes:
                used_bytes = count.used_bytes
            else:
                used_bytes = self._make_room(size, is_urgent)
            if used_bytes + size > self._limit_bytes:
                changes = self._write_count(used_bytes)
                self._full = _Full(changes, size, is_urgent, time.monotonic() + _LOOK_AGAIN_SECONDS)
                return None
            self._write_count(used_bytes + size)
            os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
            return partial

    def keep(self, partial: Path, path: Path) -> None:
        """Give a file that was reserved its name, now that it is whole."""
        with locked(self._lock_path):
            partial.rename(path)
            self._note_change()

    def drop(self, path: Path) -> None:
        """Delete a file, and give back the room that it has taken, or that it was reserved for."""
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
        """Take back the plan."""
        with locked(self._lock_path):
            self._plan_path.unlink(missing_ok=True)
            self._plan_file.close()
            self._note_change()

    # ---- With the lock held ----

    def _is_known_full(self, count: "_Count", size: int, is_urgent: bool) -> bool:
        """Return True if nothing has changed since no room was found for a shard no larger and no less urgent."""
        full = self._full
        return (
            full is not None
            and (full.changes, full.size <= size, full.is_urgent or not is_urgent) == (count.changes, True, True)
            and time.monotonic() < full.until
        )

    def _make_room(self, size: int, is_urgent: bool) -> int:
        """Drop shards until `size` more bytes fit, if that can be; return the bytes in use then."""
        found = self._look()
        used_bytes, planned = found.used_bytes, found.planned
        most_bytes = self._limit_bytes - size
        if used_bytes <= most_bytes:
            return used_bytes
        at_once, dropped = found.shards // _SHARE_DROPPED, 0
        for _, name, shard_bytes in sorted(found.droppable, key=lambda one: (-planned.get(one[1], _NEVER), one)):
            when = planned.get(name, _NEVER)
            if used_bytes <= most_bytes and (when != _NEVER or dropped >= at_once):
                break
            if when != _NEVER and not is_urgent:
                break
            if when == NOW and any(planned.get(shard) == NEXT for shard in found.coming):
                break
            for kind in ("shard", "verified"):
                (self._folder / f"{name}.{kind}").unlink(missing_ok=True)
            used_bytes, dropped = used_bytes - shard_bytes, dropped + 1
        return used_bytes

    def _look(self) -> "_Found":
        """Look at all that is in the folder, and clear away what killed processes have left."""
        found = _Found()
        with os.scandir(self._folder) as entries:
            listed = list(entries)
        for entry in listed:
            name, _, kind = entry.name.rpartition(".")
            if kind == "shard":
                with suppress(FileNotFoundError):  # deleted by hand
                    status = entry.stat(follow_symlinks=False)
                    found.used_bytes, found.shards = found.used_bytes + status.st_size, found.shards + 1
                    if name not in self._planned:
                        found.droppable.append((status.st_mtime_ns, name, status.st_size))
            elif kind == "partial":
                self._look_at_partial(Path(entry.path), name, found)
            elif kind == "plan" and entry.name != self._plan_path.name:
                self._look_at_plan(Path(entry.path), found)
        return found

    def _look_at_partial(self, path: Path, name: str, found: "_Found") -> None:
        shard, _, reserved = name.rpartition(".")
        with locked(self._folder / f"{shard}.lock", wait=False) as is_abandoned:
            if is_abandoned or not reserved.isdecimal():
                path.unlink(missing_ok=True)
            else:
                found.used_bytes += int(reserved)
                found.coming.append(shard)

    @staticmethod
    def _look_at_plan(path: Path, found: "_Found") -> None:
        with locked(path, wait=False) as is_abandoned:
            if is_abandoned:
                path.unlink(missing_ok=True)
                return
            for line in path.read_text(encoding="utf-8").splitlines():
                when, _, shard = line.partition(" ")
                if when in (str(NOW), str(NEXT)):
                    found.planned[shard] = min(int(when), found.planned.get(shard, NEXT))

    def _read_count(self) -> "_Count | None":
        try:
            used_bytes, changes = self._count_path.read_text(encoding="ascii").split()
            return _Count(int(used_bytes), int(changes))
        except (OSError, ValueError):  # it was deleted, or half written by a process that was killed
            return None

    def _write_count(self, used_bytes: int) -> int:
        """Write how much is in use; return the number of this change."""
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
        """Have the others look again, who found no room."""
        if (count := self._read_count()) is not None:
            self._write_count(count.used_bytes)


class _Count(NamedTuple):
    """The content of the file with the count."""

    used_bytes: int
    changes: int


@dataclass
class _Found:
    """The result of a look at the folder."""

    used_bytes: int = 0
    """Bytes of shards, and bytes reserved for shards."""
    shards: int = 0
    droppable: list[tuple[int, str, int]] = field(default_factory=list)
    """Age, name and bytes of the shards that this process does not plan to use."""
    coming: list[str] = field(default_factory=list)
    """Shards that are being fetched."""
    planned: dict[str, int] = field(default_factory=dict)
    """When other processes use their shards."""


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the exclusive lock of a file, made if need be; yields False if it is not free and `wait` is not set."""
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
