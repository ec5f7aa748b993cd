"""Standard output and standard error that never fail a command.

A console may not know a character, a log disk may be full, a terminal may be closed and the reader of a pipe may go
away. Each process installs these streams first (`install`), and from then on nothing that prints has to care:

* a character that the stream's encoding does not have is written as ``?``;
* what cannot be written is counted, and reported on the other stream: the reason at once, the count at the end;
* a stream that was closed before the start stays closed, also for the processes that this one starts, and no file that
  is opened later takes its number;
* a secret (see `job.redaction`) is written as ``***``, also when a library or a traceback prints it.
"""

import atexit
import errno
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any, TextIO

from typing_extensions import override

from job import clock as awake
from job.redaction import learn_environment, redacted

_NAMES = {1: "standard output", 2: "standard error"}
_ATOMIC_BYTES = 4096
"""Linux takes so many bytes at once where `select` says that it takes any."""
_POLL_MILLISECONDS = 200
_ENCODING = "utf-8"
"""Encoding for a stream that was closed before the start."""


def install() -> None:
    """Replaces both streams of this process; call it before a library keeps one of them."""
    learn_environment()
    _keep_numbers()
    raw = {number: _RawStream(number) for number in _NAMES}
    raw[1].report = lambda line: _write_line(sys.stderr, line)
    raw[2].report = lambda line: _write_line(sys.stdout, line)
    sys.stdout = sys.__stdout__ = _text_stream(raw[1], sys.stdout)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text_stream(raw[2], sys.stderr)  # type: ignore[misc]
    _installed[:] = raw.values()
    atexit.register(close)


def wait_at_most(seconds: float) -> None:
    """From now on, leaves out what nobody reads for so long.

    Without it a paused terminal, or a pipe that is not read, is waited for as long as it takes.
    """
    for raw in _installed:
        raw.patience_seconds = seconds


def close() -> None:
    """Writes what is buffered, and says how much was lost; what is printed later still comes out."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for raw in _installed:
        raw.report_count()


_installed: list["_RawStream"] = []


class _RawStream(io.RawIOBase):
    """Writes to a file descriptor, and counts what that does not take."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.patience_seconds: float | None = None
        """Longest wait for a reader; None: no limit."""
        self.is_closed = False
        """True if the stream was closed when this process started: its number may be another file's by now."""
        self._lost_bytes, self._lost_lines, self._reason = 0, 0, ""
        self._is_stuck = False
        self.report: Callable[[str], None] = lambda line: None
        """Writes a line to the other stream."""

    @override
    def writable(self) -> bool:
        return True

    @override
    def fileno(self) -> int:
        return self._number

    @override
    def isatty(self) -> bool:
        return not self.is_closed and os.isatty(self._number)

    @override
    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            if self.is_closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            while left:
                if self.patience_seconds is not None:
                    self._wait()
                piece = left if self.patience_seconds is None else left[:_ATOMIC_BYTES]
                try:
                    left = left[os.write(self._number, piece) :]
                except BlockingIOError:  # another program has made the terminal or pipe that it shares non-blocking
                    self._wait()
        except OSError as error:
            self._lose(bytes(left), error)
        return size

    def _wait(self) -> None:
        """Waits until the stream takes something; only once for a reader who does not read."""
        poll = select.poll()
        poll.register(self._number, select.POLLOUT)
        if self.patience_seconds is None:
            poll.poll()
            return
        end = awake.seconds() + (0 if self._is_stuck else self.patience_seconds)
        while not poll.poll(0 if self._is_stuck else _POLL_MILLISECONDS):
            if awake.seconds() >= end:
                self._is_stuck = True
                raise TimeoutError(errno.ETIMEDOUT, f"nobody has read it for {self.patience_seconds:g} s")
        self._is_stuck = False

    def _lose(self, data: bytes, error: OSError) -> None:
        is_first = not self._reason
        self._lost_bytes, self._lost_lines = self._lost_bytes + len(data), self._lost_lines + data.count(b"\n")
        self._reason = "it is closed" if error.errno == errno.EBADF else error.strerror or repr(error)
        if is_first:
            self.report(f"{_NAMES[self._number]} cannot be written ({self._reason}); the command goes on without it")

    def report_count(self) -> None:
        """Says on the other stream how much was lost since the last report."""
        lost_bytes, lost_lines = self._lost_bytes, self._lost_lines
        self._lost_bytes = self._lost_lines = 0
        if lost_bytes:
            lines = "1 line" if lost_lines == 1 else f"{lost_lines:,} lines"
            self.report(f"{_NAMES[self._number]} has lost {lines} ({lost_bytes:,} bytes): {self._reason}")


class _TextStream(io.TextIOWrapper):
    """Text on its way to a standard stream."""

    @override
    def write(self, text: str) -> int:
        super().write(redacted(text))
        return len(text)


def _text_stream(raw: Any, before: TextIO | None) -> Any:
    """A text stream over `raw`, like the one before it in everything but its errors."""
    if not isinstance(before, io.TextIOWrapper):
        raw.is_closed = before is None
        return _TextStream(raw, _ENCODING, "replace", line_buffering=True)
    before.flush()
    return _TextStream(
        raw,
        before.encoding,
        "replace",
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )


def _write_line(stream: TextIO, line: str) -> None:
    stream.write(f"{line}\n")
    stream.flush()


def _keep_numbers() -> None:
    """Gives the numbers 0 to 2, where they are closed, to something that cannot be written."""
    for number in (0, *_NAMES):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)  # for the processes that this one starts
