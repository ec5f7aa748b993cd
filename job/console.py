"""Standard output and standard error that never make a command fail.

A terminal may lack a character, the disk of a log may be full, a terminal may be closed, and the reader of a pipe may
exit. Each process calls `install` first. After that, printing always succeeds:

* A character that the stream's encoding lacks is written as ``?``.
* Text that cannot be written is counted and reported on the other stream: the reason at once, the count at the end.
* A stream that was closed before the start stays closed, also for child processes, and no file that is opened later
  gets its file descriptor.
* A secret (see `job.redaction`) is written as ``***``, even when a library or a traceback prints it.
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

from job import clock
from job.redaction import learn_environment, redacted

_NAMES = {1: "standard output", 2: "standard error"}
_ATOMIC_BYTES = 4096
"""Bytes that one write never blocks on, if poll says that the stream is writable (PIPE_BUF of Linux)."""
_POLL_MILLISECONDS = 200
_ENCODING = "utf-8"
"""Encoding for a stream that was closed before the start."""


def install() -> None:
    """Replace both streams of this process. Call it before any library keeps a reference to one of them."""
    learn_environment()
    _occupy_closed_descriptors()
    raw = {number: _RawStream(number) for number in _NAMES}
    raw[1].report = lambda line: _write_line(sys.stderr, line)
    raw[2].report = lambda line: _write_line(sys.stdout, line)
    sys.stdout = sys.__stdout__ = _text_stream(raw[1], sys.stdout)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text_stream(raw[2], sys.stderr)  # type: ignore[misc]
    _installed[:] = raw.values()
    atexit.register(close)


def wait_at_most(seconds: float) -> None:
    """Drop output that nobody reads for this many seconds.

    Without this call, a write to a paused terminal or an unread pipe waits without limit.
    """
    for raw in _installed:
        raw.patience_seconds = seconds


def let_reader_leave() -> None:
    """Say nothing if the reader of standard output exits early, as `head` does: all that the command does is print."""
    for raw in _installed:
        raw.reader_may_leave = True


def close() -> None:
    """Write all buffered output, and report how much was lost. Printing afterwards still works."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for raw in _installed:
        raw.report_count()


_installed: list["_RawStream"] = []


class _RawStream(io.RawIOBase):
    """A stream that writes to a file descriptor and counts what cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._number = number
        self.patience_seconds: float | None = None
        """Longest wait for a reader; None: no limit."""
        self.reader_may_leave = False
        """True if it is no fault that the reader of a pipe exits."""
        self.is_closed = False
        """True if the stream was closed when this process started."""
        self._lost_bytes, self._lost_lines, self._reason = 0, 0, ""
        self._is_stuck = False
        """True if the last wait for a reader took too long; the next write then does not wait."""
        self.report: Callable[[str], None] = lambda line: None
        """Function that writes a line to the other stream."""

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
                except BlockingIOError:  # Another program that shares the terminal or pipe made it non-blocking.
                    self._wait()
        except OSError as error:
            self._lose(bytes(left), error)
        return size

    def _wait(self) -> None:
        """Wait until the stream is writable; do not wait again if the last wait was too long."""
        poll = select.poll()
        poll.register(self._number, select.POLLOUT)
        if self.patience_seconds is None:
            poll.poll()
            return
        end = clock.seconds() + (0 if self._is_stuck else self.patience_seconds)
        while not poll.poll(0 if self._is_stuck else _POLL_MILLISECONDS):
            if clock.seconds() >= end:
                self._is_stuck = True
                raise TimeoutError(errno.ETIMEDOUT, f"nobody has read it for {self.patience_seconds:g} s")
        self._is_stuck = False

    def _lose(self, data: bytes, error: OSError) -> None:
        if self.reader_may_leave and error.errno == errno.EPIPE:
            return
        is_first = not self._reason
        self._lost_bytes, self._lost_lines = self._lost_bytes + len(data), self._lost_lines + data.count(b"\n")
        self._reason = "it is closed" if error.errno == errno.EBADF else error.strerror or repr(error)
        if is_first:
            self.report(f"{_NAMES[self._number]} cannot be written ({self._reason}); the command goes on without it")

    def report_count(self) -> None:
        """Report on the other stream how much was lost since the last report."""
        lost_bytes, lost_lines = self._lost_bytes, self._lost_lines
        self._lost_bytes = self._lost_lines = 0
        if lost_bytes:
            lines = "1 line" if lost_lines == 1 else f"{lost_lines:,} lines"
            self.report(f"{_NAMES[self._number]} has lost {lines} ({lost_bytes:,} bytes): {self._reason}")


class _TextStream(io.TextIOWrapper):
    """A text stream that removes secrets."""

    @override
    def write(self, text: str) -> int:
        super().write(redacted(text))
        return len(text)


def _text_stream(raw: Any, before: TextIO | None) -> Any:
    """Return a text stream over `raw` with the encoding and buffering of the stream before it."""
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


def _occupy_closed_descriptors() -> None:
    """Open /dev/null for reading on each closed file descriptor from 0 to 2, so that no other file gets it."""
    for number in (0, *_NAMES):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)  # Child processes need the same protection.
