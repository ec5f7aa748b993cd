"""Reads prompts from a person at a terminal, with line editing and the prompts of earlier times.

It uses `readline` of the standard library. prompt_toolkit could do more, but nothing else here needs it, while nearly
every Python on Linux and macOS has readline, which edits Chinese text, searches the history (Ctrl-R) and works over
ssh. Without it, the terminal alone edits the line, and no prompt is remembered.
"""

import sys
from collections.abc import Callable
from pathlib import Path

try:
    import readline
except ImportError:
    readline = None  # type: ignore[assignment]  # Some Pythons are built without it.

_MOST_REMEMBERED = 1000
_QUESTION = "text> "


class PromptLine:
    """The line in which a person types a prompt. Up and Down bring back earlier ones, also those of earlier times."""

    def __init__(self, history: Path, say: Callable[[str], None]) -> None:
        self._history, self._say = history, say
        self._can_write = readline is not None
        if readline is None:
            self._say("this Python has no readline: a line cannot be edited with the arrow keys, nor found again")
            return
        readline.set_history_length(_MOST_REMEMBERED)
        readline.set_auto_history(False)  # `_remember` adds each prompt once, without blank lines.
        try:
            readline.read_history_file(history)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._say(f"{history}: earlier prompts cannot be read: {error.strerror}")

    def ask(self) -> str | None:
        """Return the next text that is not blank; None after Ctrl-D or at the end of the input.

        Ctrl-C discards the line, as in a shell.
        """
        while True:
            try:
                text = input(_QUESTION)
                text.encode()
            except EOFError:
                sys.stdout.write("\n")
                return None
            except KeyboardInterrupt:
                sys.stdout.write("\n")
                continue
            except UnicodeError:
                self._say("that line is not text in the encoding of this terminal; set LANG to it, such as C.UTF-8")
                continue
            if text.strip():
                self._remember(text)
                return text

    def _remember(self, text: str) -> None:
        """Add a prompt to the history and store it at once: a closed terminal ends this program."""
        if readline is None:
            return
        last = readline.get_current_history_length()
        if last == 0 or readline.get_history_item(last) != text:
            readline.add_history(text)
        if not self._can_write:
            return
        try:
            readline.write_history_file(self._history)
        except OSError as error:
            self._can_write = False
            self._say(f"{self._history}: prompts are not remembered: {error.strerror}")
