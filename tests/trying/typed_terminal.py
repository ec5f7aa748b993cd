"""A program on a real pseudo-terminal, which a test types into and reads from."""

import codecs
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

_SECONDS = 250
_SECONDS_TO_REPEAT = 2


class Terminal:
    """A terminal of 80 columns on which `python -m job` runs. Leaving the block ends the program."""

    def __init__(self, *words: str, cwd: Path, **environment: str) -> None:
        variables = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": str(Path.cwd())} | environment
        self.shown = ""
        """Everything that the program has printed so far."""
        self._read = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # A read may end within a character.
        self.process, self._terminal = pty.fork()
        if self.process == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # A test run in the background ignores it.
            os.chdir(cwd)
            os.execve(sys.executable, [sys.executable, "-m", "job", *words], variables)
        self._code: int | None = None

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        if self._code is None:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        os.close(self._terminal)

    def type(self, keys: str) -> None:
        """Press these keys."""
        os.write(self._terminal, keys.encode())

    def read_until(self, text: str, pressing: str = "") -> str:
        """Read up to `text`, and return what was printed since the last call.

        Args:
            text: what will be printed.
            pressing: keys that are pressed again and again until then, as a person would: a Ctrl-C that comes after
                readline has looked for signals, but before it waits for a key, is seen at the next key only.
        """
        deadline = time.monotonic() + _SECONDS
        self.type(pressing)
        while text not in self.shown[self._read :]:
            readable, _, _ = select.select([self._terminal], [], [], _SECONDS_TO_REPEAT)
            if not readable:
                assert time.monotonic() < deadline, f"{text!r} was not printed:\n{self.shown}"
                self.type(pressing)
                continue
            assert self._add(), f"the program ended before it printed {text!r}:\n{self.shown}"
        start, self._read = self._read, self.shown.index(text, self._read) + len(text)
        return self.shown[start : self._read]

    def end(self) -> int:
        """Read until the program ends, and return its exit code."""
        while self._add():
            pass
        self._code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return self._code

    def _add(self) -> bool:
        try:
            data = os.read(self._terminal, 2**16)
        except OSError:  # Linux reports the end of a terminal as an error.
            return False
        self.shown += self._decoder.decode(data)
        return bool(data)
