"""Finds the prompts of `generate`: on the command line, in standard input, in the settings, or typed one by one."""

import stat
import sys
from collections.abc import Callable, Sequence
from os import fstat

from job.errors import UserError

STANDARD_INPUT = "-"
"""Word on the command line that stands for the text in standard input."""
_LARGEST_BYTES = 16 * 2**20
"""Largest text that is read from standard input. The longest context takes far less."""
_NAME = "standard input"


def find_prompts(words: Sequence[str], of_settings: list[str], say: Callable[[str], None]) -> list[str] | None:
    """Return the prompts to continue; None if a person at a terminal is to be asked for them.

    The words of the command line come first. Without any, it is the text of a pipe or file in standard input, then a
    person at a terminal, then the settings. The text of standard input is one prompt, whatever lines it has.

    Args:
        words: the words of the command line; ``-`` stands for the text in standard input.
        of_settings: `generate.prompts`.
        say: prints a line about where the prompts come from.

    Raises:
        UserError: standard input is empty, too long or not UTF-8, or it is named twice.
    """
    if words:
        if words.count(STANDARD_INPUT) > 1:
            raise UserError("command line", STANDARD_INPUT, "is given twice, but standard input can be read only once")
        return [_text_of_standard_input(say) if word == STANDARD_INPUT else word for word in words]
    if _has_text():
        if text := _read(say):
            return [text]
        say(f"{_NAME} is empty, so generate.prompts are continued")
        return of_settings
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        return None
    return of_settings


def is_terminal(stream: object) -> bool:
    """Return True if a stream is a terminal; False also if it is closed or None."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False


def _has_text() -> bool:
    """Return True if standard input is a pipe, a socket or a file: not a terminal, not /dev/null, and not closed."""
    try:
        mode = fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISREG(mode)


def _text_of_standard_input(say: Callable[[str], None]) -> str:
    if text := _read(say):
        return text
    raise UserError(_NAME, None, "is empty", "give it a text, as in `echo TEXT | ... generate -`")


def _read(say: Callable[[str], None]) -> str:
    """Return the text in standard input without the end of its last line, which `echo` and editors add."""
    if sys.stdin is None or sys.stdin.closed:
        raise UserError(_NAME, None, "is closed", "give the prompt on the command line, or give it a text")
    say("reading the prompt from standard input" + (": end it with Ctrl-D" if is_terminal(sys.stdin) else ""))
    try:
        content = sys.stdin.buffer.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise UserError(_NAME, None, f"cannot be read: {error}", "give the prompt on the command line") from None
    if len(content) > _LARGEST_BYTES:
        remedy = "a model continues the end of its prompt: give only that, as in `tail -c 2000 FILE | ... generate -`"
        raise UserError(_NAME, None, f"is longer than {_LARGEST_BYTES // 2**20} MiB", remedy)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        expected = f"is not UTF-8: byte {error.object[error.start]:#04x} at position {error.start:,}"
        raise UserError(_NAME, None, expected, "convert it, as in `iconv -f GB18030 -t UTF-8 FILE`") from None
    return text.removesuffix("\n").removesuffix("\r")
