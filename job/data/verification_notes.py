"""Verification of files by sha256, and notes on verified files so that they are not read again at the next start.

A note identifies the file that was verified by its size, inode, and times of modification and change in nanoseconds. It
is valid only while all four are the same. So a file with other bytes of the same size, a replaced file, and a changed
file whose modification time was set back are all read again.
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
"""An upper limit of a note's size."""


class Signature(NamedTuple):
    """Values that change when a file is changed or replaced. The kernel sets `ctime_ns`; no program can set it."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int


class FileChanged(Exception):
    """The file was changed while it was read."""


def signature_of(status: os.stat_result) -> Signature:
    """Return the signature of the file with this status."""
    return Signature(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def hash_file(descriptor: int, on_bytes: Callable[[int], None]) -> tuple[str, Signature]:
    """Read an open file from its beginning; return its sha256, and the signature that it had meanwhile.

    Args:
        descriptor: the open file.
        on_bytes: called with the number of bytes of each piece that was read; an exception from it ends the reading.

    Raises:
        FileChanged: the file was changed while it was read.
    """
    before = signature_of(os.fstat(descriptor))
    if abs(time.time() - before.ctime_ns / 1e9) < _CLOCK_TICK_SECONDS:
        time.sleep(_CLOCK_TICK_SECONDS)  # A change from now on gets another timestamp.
    if sys.platform == "linux":  # The kernel reads further ahead, which is twice as fast from a disk.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    position = 0
    while count := os.preadv(descriptor, [buffer], position):
        digest.update(buffer[:count])
        position += count
        on_bytes(count)
    if signature_of(os.fstat(descriptor)) != before:
        raise FileChanged
    return digest.hexdigest(), before


def write_note(path: Path, sha256: str, signature: Signature) -> None:
    """Note that the file has this sha256 as long as it has this signature; the caller must hold the shard's lock."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(_note_content(sha256, signature))


def is_noted(path: Path, sha256: str, signature: Signature, is_trusted: Callable[[os.stat_result], bool]) -> bool:
    """Return True if a note says that the file with this signature has this sha256.

    Args:
        path: the note's file.
        sha256: the expected sha256.
        signature: the signature of the file that is to be used.
        is_trusted: returns True if a note with this status was written by this user.
    """
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if is_trusted(os.fstat(descriptor)):
                return os.read(descriptor, _NOTE_BYTES) == _note_content(sha256, signature).encode("ascii")
        finally:
            os.close(descriptor)
    return False


def _note_content(sha256: str, signature: Signature) -> str:
    return f"{sha256} {' '.join(map(str, signature))}\n"
