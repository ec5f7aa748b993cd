"""Files on this machine: written beside their place, made safe on the disk, and then put in place at once."""

import ctypes
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from job.errors import UserError
from job.storage import deadline

PARTIAL = ".partial"
"""Suffix of an unfinished file; no list shows it."""
_NO_WAY = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of a file system that does not support an operation (link(2), renameat2(2))."""
_PIECE_BYTES = 8 * 2**20
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def path_of(url: str) -> Path:
    """Return the path that a path or a file:// URL names."""
    return Path(url.removeprefix("file://")).expanduser()


@contextmanager
def published(path: Path, publish: Callable[[Path, Path], object]) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; `publish` puts it in place, safe on the disk, if nothing was raised."""
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
            raise UserError(str(path), None, "no space left on the disk", "make room, or name another place") from None
        raise
    finally:
        partial.unlink(missing_ok=True)


def write(url: str, size: int, read: Callable[[int, int], bytes]) -> None:
    """Write or replace a file with ``read(0, size)``, piece by piece."""
    with published(path_of(url), os.replace) as target:
        for start in range(0, size, _PIECE_BYTES):
            deadline.current.get().check("write", url)
            target.write(read(start, min(start + _PIECE_BYTES, size)))


def create(publish: Callable[[Path, Path], object], url: str, data: bytes) -> bool:
    """Write a file that `publish` puts in place only if there is none; return whether it was put in place.

    Raises:
        NotImplementedError: the file system cannot do that.
    """

    def try_publishing(partial: Path, path: Path) -> None:
        try:
            publish(partial, path)
        except OSError as error:
            if error.errno in _NO_WAY:
                raise NotImplementedError(str(error)) from None
            raise

    try:
        with published(path_of(url), try_publishing) as target:
            target.write(data)
    except FileExistsError:
        return False
    return True


def link(source: Path, target: Path) -> None:
    """Give a file a second name; raises FileExistsError if the name is taken."""
    os.link(source, target)


def rename_if_free(source: Path, target: Path) -> None:
    """Rename a file unless the name is taken (FileExistsError): for file systems without hard links."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "this system has no renameat2")
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))  # Python makes it a FileExistsError by its code
