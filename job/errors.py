"""What ends a command: the exit codes, and the one-line error for whatever a person can mend."""

import codecs
import errno
import os
import re
import sys
from collections.abc import Iterable
from itertools import islice

from job.redaction import redacted

EXIT_DONE = 0
"""The work is finished."""
EXIT_FAILED = 1
"""A crash, or a store that failed until the deadline: starting it again may help."""
EXIT_INTERRUPTED = 130
"""Ctrl-C."""
EXIT_NO_PROGRESS = 70
"""Started several times without one new checkpoint, or its numbers blow up step after step: a person has to look."""
EXIT_STOPPED = 75
"""Asked to stop: checkpointed, not finished, start it again."""
EXIT_REFUSED = 78
"""Bad configuration, data or credentials: starting it again cannot help."""

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_LONGEST_VALUE = 300
"""Characters of a value that an error shows."""
_MOST_MISTAKES = 20
"""Mistakes that one line lists."""


class UserError(Exception):
    """A mistake that the person who started the command can mend: one line, exit 78, no traceback.

    Args:
        setting: the dotted name of the setting at fault (``data.source``), or the environment variable.
        value: what it was set to.
        expected: what was found wrong and what was expected instead.
        remedy: what to do about it.
    """

    exit_code = EXIT_REFUSED

    def __init__(self, setting: str, value: object, expected: str, remedy: str = "") -> None:
        self.setting, self.value, self.expected, self.remedy = setting, value, expected, remedy
        super().__init__(str(self))

    def __reduce__(self) -> tuple[type, tuple[str, object, str, str]]:
        value = self.value if self.value is None else str(self.value)
        return UserError, (self.setting, value, self.expected, self.remedy)

    def __str__(self) -> str:
        shown = f"{self.setting}: {_shown(self.value)}" if self.value is not None else self.setting
        line = f"{shown}: {self.expected}" + (f"; {self.remedy}" if self.remedy else "")
        return one_line(line)


class NoProgress(Exception):
    """The run cannot go on by itself, and starting it again will not help: a person has to look; exit 70."""

    exit_code = EXIT_NO_PROGRESS


_NO_ROOM = "make room, or name another place"
_ANOTHER_PLACE = "name another place"
SOME_DISK = "a disk of this machine"
"""The setting of an error of which nothing says where it happened."""
_DISK_FAULTS = {
    errno.ENOSPC: ("no space left on the disk", _NO_ROOM),
    errno.EDQUOT: ("the disk quota is used up", _NO_ROOM),
    errno.EROFS: ("the file system is read-only", _ANOTHER_PLACE),
    errno.EACCES: ("permission denied", f"give this user the right to it, or {_ANOTHER_PLACE}"),
    errno.EPERM: ("not permitted", f"give this user the right to it, or {_ANOTHER_PLACE}"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", _ANOTHER_PLACE),
    errno.EEXIST: ("there is a file where a folder is needed", _ANOTHER_PLACE),
    errno.EISDIR: ("there is a folder where a file is needed", _ANOTHER_PLACE),
    errno.ENAMETOOLONG: ("a name in this path is too long", _ANOTHER_PLACE),
}


def disk_error(error: Exception) -> UserError | None:
    """Return an error of a disk as one line where a person can mend it: a disk that is full, read-only or forbidden.

    For every other one it is None: that may be a mistake of the program, whose traceback is wanted.
    """
    if isinstance(error, UnicodeEncodeError) and _is_for_names_of_files(error.encoding):
        expected = f"the names of files are in {error.encoding} here (LANG, LC_ALL), which lacks characters of this one"
        return UserError(str(error.object), None, expected, "set LC_ALL=C.UTF-8")
    number, found = _system_error(error)
    if number == errno.ENOENT and "No usable temporary directory" in str(error):
        return UserError("TMPDIR", os.environ.get("TMPDIR"), "no folder for temporary files can be written", _NO_ROOM)
    if number not in _DISK_FAULTS:
        return None
    expected, remedy = _DISK_FAULTS[number]
    if found is None:  # as where a file that is open already cannot grow
        return UserError(SOME_DISK, None, expected, remedy) if number in (errno.ENOSPC, errno.EDQUOT) else None
    path = found.decode(errors="replace") if isinstance(found, bytes) else str(found)
    return None if "://" in path else UserError(path, None, expected, remedy)


def _is_for_names_of_files(encoding: str) -> bool:
    """Whether it is the locale's, and one that lacks characters."""
    own = codecs.lookup(sys.getfilesystemencoding()).name
    return own != "utf-8" and codecs.lookup(encoding).name in (own, "ascii")


def _system_error(error: Exception) -> tuple[int | None, object]:
    """The operating system's number of an error, and the path that it is about; None for what is not known."""
    if isinstance(error, OSError):
        return error.errno, error.filename if error.filename2 is None else error.filename2
    told = _RUST_ERROR.search(str(error))  # tokenizers and safetensors raise exceptions of their own kinds
    return None if told is None else int(told[1]), None


def one_line(text: str) -> str:
    """`text` without secrets, and with every run of white space made one blank, so that a log keeps it on one line.

    What is cut to a length afterwards holds no half of a secret, of which nothing would say what it is.
    """
    return " ".join(redacted(text).split())


def refuse(mistakes: Iterable[UserError]) -> None:
    """Raise one error, which is one line, for all mistakes in the settings; none: raise nothing."""
    found = list(islice(mistakes, _MOST_MISTAKES + 1))
    if len(found) == 1:
        raise found[0] from None
    if found:
        said = [f"({number}) {error}" for number, error in enumerate(found[:_MOST_MISTAKES], 1)]
        is_all = len(found) <= _MOST_MISTAKES
        count, rest = (str(len(found)), []) if is_all else (f"more than {_MOST_MISTAKES}", ["and more"])
        raise UserError("settings", None, f"{count} mistakes: {' '.join([*said, *rest])}") from None


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    text = redacted(text)  # before it is cut: of half a secret nothing would say what it is
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
