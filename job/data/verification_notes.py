"""Files on this machine whose sha256 was compared, and the notes that spare the next process from reading them again.

A note says which file was verified: its size, inode, and times of modification and change in nanoseconds. It counts for
the file that is opened only while all four are the same, so other bytes of the same size, a replaced file, or a changed
one whose time was set back are read again.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_CHUNK_BYTES = 2**20
_CLOCK_TICK_SECONDS = 0.02
"""Longest time in which two changes of a file can get the same timestamp from the kernel."""
_NOTE_BYTES = 256
"""More than a note has."""


class Signature(NamedTuple):
    """Values that change when a file is changed or replaced. The kernel sets the time of change; no program can."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int


class Changed(Exception):
    """The file was changed while it was read."""


def signature(found: os.stat_result) -> Signature:
    """Return the signature of a file's status."""
    return Signature(found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


def hash_file(descriptor: int, on_bytes: Callable[[int], None]) -> tuple[str, Signature]:
    """Return the sha256 of an open file, read from its beginning, and the signature that it had meanwhile.

    Args:
        descriptor: of the file.
        on_bytes: called with the number of bytes of each piece; what it raises ends the reading.

    Raises:
        Changed: the file was changed meanwhile.
    """
    before = signature(os.fstat(descriptor))
    if abs(time.time() - before.ctime_ns / 1e9) < _CLOCK_TICK_SECONDS:
        time.sleep(_CLOCK_TICK_SECONDS)  # a change from now on gives another time
    if sys.platform == "linux":  # the kernel reads further ahead: twice as fast from a disk
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    position = 0
    while count := os.preadv(descriptor, [buffer], position):
        digest.update(buffer[:count])
        position += count
        on_bytes(count)
    if signature(os.fstat(descriptor)) != before:
        raise Changed
    return digest.hexdigest(), before


def write_note(path: Path, sha256: str, of: Signature) -> None:
    """Note that the file with this signature has this sha256; the caller holds a lock."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{sha256} {' '.join(map(str, of))}\n")


def is_noted(path: Path, sha256: str, of: Signature, is_trusted: Callable[[os.stat_result], bool]) -> bool:
    """Return True if a note says that the file with this signature has this sha256.

    Args:
        path: the note.
        sha256: expected.
        of: the signature of the file that is to be used.
        is_trusted: whether a note with this status was written by this user.
    """
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if is_trusted(os.fstat(descriptor)):
                return os.read(descriptor, _NOTE_BYTES) == f"{sha256} {' '.join(map(str, of))}\n".encode("ascii")
        finally:
            os.close(descriptor)
    return False
