"""What ends a command: the exit codes, and the one-line error for whatever a person can mend."""

import re

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

_URL_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


class UserError(Exception):
    """A mistake that the person who started the command can mend: one line, exit 78, no traceback.

    Args:
        setting: the dotted name of the setting at fault (``data.source``), or the environment variable.
        value: what it was set to; passwords inside URLs are removed before it is shown.
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
        shown = f"{self.setting}: {self.value!r}" if self.value is not None else self.setting
        line = f"{shown}: {self.expected}" + (f"; {self.remedy}" if self.remedy else "")
        return one_line(without_passwords(line))


class NoProgress(Exception):
    """The run cannot go on by itself, and starting it again will not help: a person has to look; exit 70."""

    exit_code = EXIT_NO_PROGRESS


def one_line(text: str) -> str:
    """`text` with every run of white space made one blank, so that a log keeps it on one line."""
    return " ".join(text.split())


def without_passwords(text: str) -> str:
    """`text` with the ``user:password@`` part of every URL in it removed."""
    return _URL_PASSWORD.sub("***@", text)
