"""Files on this machine. A file is written under a temporary name, synced to the disk, and then renamed or linked."""

import ctypes
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from job.errors import disk_error
from job.storage import deadline

PARTIAL = ".partial"
"""Suffix of an unfinished file, which no listing shows."""
_UNSUPPORTED = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors by which a file system refuses link(2) or renameat2(2) because it does not support it."""
_PIECE_BYTES = 8 * 2**20
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def path_of(url: str) -> Path:
    """Return the path of a local file, from a path or a file:// URL."""
    return Path(url.removeprefix("file://")).expanduser()


@contextmanager
def atomic_file(path: Path, publish: Callable[[Path, Path], object]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` for writing, and publish it at the end of the block.

    If the block raises, the temporary file is removed and `path` is unchanged.

    Args:
        path: the final path.
        publish: moves the temporary file, its first argument, to `path`, its second; it is called after fsync.

    Raises:
        UserError: the disk is full, or the disk quota is used up.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_error(OSError(error.errno, error.strerror, str(path))) or error from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def write(url: str, size: int, read: Callable[[int, int], bytes]) -> None:
    """Write or replace a file with ``read(0, size)``, in pieces of 8 MiB."""
    with atomic_file(path_of(url), os.replace) as target:
        for start in range(0, size, _PIECE_BYTES):
            deadline.current.get().check("write", url)
            target.write(read(start, min(start + _PIECE_BYTES, size)))


def create(publish: Callable[[Path, Path], object], url: str, data: bytes) -> bool:
    """Create a file with a `publish` that fails if the file exists. Returns True if this call created it.

    Raises:
        NotImplementedError: the file system does not support this `publish`.
    """

    def try_publishing(partial: Path, path: Path) -> None:
        try:
            publish(partial, path)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                raise NotImplementedError(str(error)) from None
            raise

    try:
        with atomic_file(path_of(url), try_publishing) as target:
            target.write(data)
    except FileExistsError:
        return False
    return True


def link(source: Path, target: Path) -> None:
    """Make a hard link. Raises FileExistsError if `target` exists."""
    os.link(source, target)


def rename_if_free(source: Path, target: Path) -> None:
    """Rename a file, on a file system without hard links. Raises FileExistsError if `target` exists."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "this system has no renameat2")
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))  # With the code EEXIST, Python makes it a FileExistsError.
