"""Find the files below a local folder: follow links, read each folder once, and stop at loops."""

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fsspec.utils import glob_translate

from job.errors import UserError

LOOP = "a link to a folder that contains the link"
SAME_FOLDER = "a link to a folder that is read under another name"
_BROKEN = "a broken link"
_SPECIAL = "neither a file nor a folder"

LeaveOut = Callable[[str, str], None]
"""Called with the name of an item that is left out (a folder's name ends with ``/``) and the reason."""


class FileBelow(NamedTuple):
    """A file below a folder."""

    name: str
    """Path below the folder, with ``/``."""
    size: int
    """Size in bytes."""
    real_path: str
    """Path with all links resolved."""


class Pattern:
    """A pattern of names below a folder, made of ``*``, ``**``, ``?`` and ``[…]``.

    Args:
        source: value of data.source, for the error message.
        below: the pattern, relative to the folder.

    Raises:
        UserError: the pattern is not valid.
    """

    def __init__(self, source: str, below: str) -> None:
        try:
            self._regex = re.compile(glob_translate(below))
            self._part_regexes = [
                re.compile(glob_translate(part)) if part != "**" else None for part in below.split("/")
            ]
        except (ValueError, re.error) as error:
            expected = f"is not a valid pattern: {error}"
            raise UserError("data.source", source, expected, "use *, **, ? and […] in data.source") from None
        self._first_characters = {part[0] for part in below.split("/") if part}

    def matches(self, name: str) -> bool:
        """Return True if the pattern matches a file with this path below the folder."""
        return self._regex.fullmatch(name) is not None

    def may_match_below(self, name: str) -> bool:
        """Return True if the pattern may match a file in the folder with this path."""
        parts = name.split("/")
        for part, regex in zip(parts, self._part_regexes, strict=False):
            if regex is None:
                return True
            if not regex.fullmatch(part):
                return False
        return len(parts) < len(self._part_regexes)

    def names_hidden(self, name: str) -> bool:
        """Return True if a part of the pattern begins with the same ``.`` or ``_`` as this hidden name."""
        return name[0] in self._first_characters


def files_below(
    root: Path, pattern: Pattern | None, is_hidden: Callable[[str], bool], leave_out: LeaveOut
) -> Iterator[FileBelow]:
    """Yield the files below a folder, sorted by name within each folder.

    Args:
        root: the folder.
        pattern: limits the search to folders in which it can match. None searches all folders, each once.
        is_hidden: tells whether to skip the file or folder at a path below the root. `leave_out` is not called for it.
        leave_out: called for everything else that is skipped.

    Raises:
        UserError: a folder cannot be read.
    """
    seen: set[str] = set()

    def search(folder: str, prefix: str, real_folder: str) -> Iterator[FileBelow]:
        for entry in _entries(folder):
            name = f"{prefix}{entry.name}"
            if is_hidden(name):
                continue
            try:
                status = entry.stat()
            except OSError:
                # The entry was removed meanwhile, or it is a link to nothing or to itself.
                if entry.is_symlink():
                    leave_out(name, _BROKEN)
                continue
            real_path = (
                str(Path(entry.path).resolve()) if entry.is_symlink() else f"{real_folder.rstrip('/')}/{entry.name}"
            )
            if stat.S_ISREG(status.st_mode):
                yield FileBelow(name, status.st_size, real_path)
            elif not stat.S_ISDIR(status.st_mode):
                leave_out(name, _SPECIAL)
            elif f"{real_folder}/".startswith(f"{real_path.rstrip('/')}/"):
                leave_out(f"{name}/", LOOP)
            elif pattern is None and real_path in seen:
                leave_out(f"{name}/", SAME_FOLDER)
            elif pattern is None or pattern.may_match_below(name):
                seen.add(real_path)
                yield from search(entry.path, f"{name}/", real_path)

    real_root = str(root.resolve())
    seen.add(real_root)
    yield from search(str(root), "", real_root)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name; none if the folder was removed meanwhile."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []
    except OSError as error:
        expected = f"this folder cannot be read: {error.strerror}"
        remedy = "give this user the right to read it, or move it out of data.source"
        raise UserError("data.source", folder, expected, remedy) from None
