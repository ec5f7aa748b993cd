"""The files below a folder of this machine: links are followed, no folder is read twice, and loops end."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fsspec.utils import glob_translate

from job.errors import UserError

LOOP = "a link to a folder that holds it"
SAME_FOLDER = "another name of a folder that was read"
_BROKEN = "a link to nothing"
_SPECIAL = "neither a file nor a folder"

LeaveOut = Callable[[str, str], None]
"""Called with the name of what is left out, with a ``/`` at the end of a folder's, and the reason."""


class FileBelow(NamedTuple):
    """A file below a folder."""

    name: str
    """Path below the folder, with ``/``."""
    size: int
    real: str
    """Its path without any link."""


class Pattern:
    """A pattern of names below a folder: ``*``, ``**``, ``?`` and ``[…]``.

    Raises:
        UserError: it cannot be read as one.
    """

    def __init__(self, source: str, below: str) -> None:
        try:
            self._whole = re.compile(glob_translate(below))
            self._parts = [re.compile(glob_translate(part)) if part != "**" else None for part in below.split("/")]
        except (ValueError, re.error) as error:
            raise UserError("data.source", source, f"is no pattern that can be used: {error}") from None
        self._first_characters = {part[0] for part in below.split("/") if part}

    def matches(self, name: str) -> bool:
        """Whether it matches a file by its path below the folder."""
        return self._whole.fullmatch(name) is not None

    def may_match_below(self, name: str) -> bool:
        """Whether it may match anything in a folder."""
        parts = name.split("/")
        for part, expected in zip(parts, self._parts, strict=False):
            if expected is None:
                return True
            if not expected.fullmatch(part):
                return False
        return len(parts) < len(self._parts)

    def names_hidden(self, name: str) -> bool:
        """Whether it asks for names that begin like this one, with a ``.`` or a ``_``."""
        return name[0] in self._first_characters


def files_below(
    root: Path, pattern: Pattern | None, is_hidden: Callable[[str], bool], leave_out: LeaveOut
) -> Iterator[FileBelow]:
    """The files below a folder, sorted by name in each folder.

    Args:
        root: the folder.
        pattern: keeps the search out of folders in which nothing can match; None: all folders are searched, each once.
        is_hidden: tells of a file's or folder's own name that it is passed over. `leave_out` is not called for it.
        leave_out: told of everything else that is passed over.

    Raises:
        UserError: a folder cannot be read.
    """
    seen: set[str] = set()

    def search(folder: str, name: str, real: str) -> Iterator[FileBelow]:
        for entry in _entries(folder):
            below = f"{name}{entry.name}"
            if is_hidden(below):
                continue
            try:
                status = entry.stat()
            except OSError:  # also a link that leads back to itself, and what was removed meanwhile
                if entry.is_symlink():
                    leave_out(below, _BROKEN)
                continue
            target = str(Path(entry.path).resolve()) if entry.is_symlink() else f"{real.rstrip('/')}/{entry.name}"
            if stat.S_ISREG(status.st_mode):
                yield FileBelow(below, status.st_size, target)
            elif not stat.S_ISDIR(status.st_mode):
                leave_out(below, _SPECIAL)
            elif f"{real}/".startswith(f"{target.rstrip('/')}/"):
                leave_out(f"{below}/", LOOP)
            elif pattern is None and target in seen:
                leave_out(f"{below}/", SAME_FOLDER)
            elif pattern is None or pattern.may_match_below(below):
                seen.add(target)
                yield from search(entry.path, f"{below}/", target)

    top = str(root.resolve())
    seen.add(top)
    yield from search(str(root), "", top)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:  # removed meanwhile
        return []
    except OSError as error:
        wrong = f"this folder cannot be read: {error.strerror}"
        raise UserError("data.source", folder, wrong, "give this user the right to read it, or move it away") from None
