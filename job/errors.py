"""Exit codes, and the one-line error for every mistake that the user can correct."""

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
"""The program crashed, or the store failed until the deadline: starting the job again may help."""
EXIT_INTERRUPTED = 130
"""The user pressed Ctrl-C."""
EXIT_NO_PROGRESS = 70
"""Several attempts made no new checkpoint, or too many steps in a row were skipped: a person has to look."""
EXIT_STOPPED = 75
"""The job was asked to stop, and has saved a checkpoint but not finished: start it again."""
EXIT_REFUSED = 78
"""The configuration, the data or the credentials are wrong: starting the job again cannot help."""

_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_LONGEST_VALUE = 300
"""Characters of a value that an error message shows."""
_MOST_MISTAKES = 20
"""Mistakes that one line lists."""


class UserError(Exception):
    """A mistake that the user can correct. The command prints it as one line, without a traceback, and exits with 78.

    Args:
        setting: dotted name of the wrong setting (``data.source``), or the name of the environment variable.
        value: the value that the setting has; None: do not show a value.
        expected: what is wrong, and what was expected instead.
        remedy: what to do.
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
    """The run makes no progress, and starting it again will not help. The command exits with 70."""

    exit_code = EXIT_NO_PROGRESS


_NO_ROOM = "free some space, or name another folder"
_ANOTHER_FOLDER = "name another folder"
SOME_DISK = "a disk of this machine"
"""Name used in an error message if nothing tells which disk or path the error is about."""
_DISK_FAULTS = {
    errno.ENOSPC: ("no space left on the disk", _NO_ROOM),
    errno.EDQUOT: ("the disk quota is used up", _NO_ROOM),
    errno.EROFS: ("the file system is read-only", _ANOTHER_FOLDER),
    errno.EACCES: ("permission denied", f"give this user the right to it, or {_ANOTHER_FOLDER}"),
    errno.EPERM: ("not permitted", f"give this user the right to it, or {_ANOTHER_FOLDER}"),
    errno.ENOTDIR: ("a part of this path is a file, not a folder", _ANOTHER_FOLDER),
    errno.EEXIST: ("there is a file where a folder is needed", _ANOTHER_FOLDER),
    errno.EISDIR: ("there is a folder where a file is needed", _ANOTHER_FOLDER),
    errno.ENAMETOOLONG: ("a name in this path is too long", _ANOTHER_FOLDER),
}


def disk_error(error: Exception) -> UserError | None:
    """Return a UserError if a disk is full, read-only or forbidden to the user.

    Return None for every other error. It may be a mistake in the program, so its traceback is needed.
    """
    if isinstance(error, UnicodeEncodeError) and _encodes_file_names(error.encoding):
        expected = (
            f"it has characters that {error.encoding}, the encoding of file names here (LANG, LC_ALL), does not have"
        )
        return UserError(str(error.object), None, expected, "set LC_ALL=C.UTF-8")
    number, error_path = _error_number_and_path(error)
    if number == errno.ENOENT and "No usable temporary directory" in str(error):
        return UserError("TMPDIR", os.environ.get("TMPDIR"), "no folder for temporary files can be written", _NO_ROOM)
    if number not in _DISK_FAULTS:
        return None
    expected, remedy = _DISK_FAULTS[number]
    if error_path is None:  # A write to an open file tells no path.
        return UserError(SOME_DISK, None, expected, remedy) if number in (errno.ENOSPC, errno.EDQUOT) else None
    path = error_path.decode(errors="replace") if isinstance(error_path, bytes) else str(error_path)
    return None if "://" in path else UserError(path, None, expected, remedy)


def _encodes_file_names(encoding: str) -> bool:
    """Return True if this is the locale's encoding of file names, and it is not UTF-8."""
    own = codecs.lookup(sys.getfilesystemencoding()).name
    return own != "utf-8" and codecs.lookup(encoding).name in (own, "ascii")


def _error_number_and_path(error: Exception) -> tuple[int | None, object]:
    """Return the errno of an error and the path that it is about; None for each that is not known."""
    if isinstance(error, OSError):
        return error.errno, error.filename if error.filename2 is None else error.filename2
    match = _RUST_ERROR.search(str(error))  # tokenizers and safetensors raise exceptions of their own types.
    return None if match is None else int(match[1]), None


def one_line(text: str) -> str:
    """Return `text` without secrets and on one line: each run of white space becomes one blank.

    Call it before cutting a text to a length: a secret that is cut in half would no longer be recognized.
    """
    return " ".join(redacted(text).split())


def raise_all(mistakes: Iterable[UserError]) -> None:
    """Raise one UserError, on one line, for all mistakes in the settings; raise nothing if there are none."""
    listed = list(islice(mistakes, _MOST_MISTAKES + 1))
    if len(listed) == 1:
        raise listed[0] from None
    if listed:
        numbered = [f"({number}) {mistake}" for number, mistake in enumerate(listed[:_MOST_MISTAKES], 1)]
        are_all = len(listed) <= _MOST_MISTAKES
        count, rest = (str(len(listed)), []) if are_all else (f"more than {_MOST_MISTAKES}", ["and more"])
        raise UserError("settings", None, f"{count} mistakes: {' '.join([*numbered, *rest])}") from None


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits.
        return "a number of thousands of digits"
    text = redacted(text)  # Before the cut below: a secret that is cut in half would no longer be recognized.
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
