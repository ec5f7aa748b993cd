"""Split a stream of JSON into records without parsing it: the lines of a file, or the elements of an array.

Elements are found only by quotes, brackets and commas. Memory use is constant, and time is proportional to the bytes,
whatever the size of the file or of one record. Offsets count the bytes of the decompressed file, from 0. Numbers count
lines or elements, from 1.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

CHUNK_BYTES = 2**20
LONGEST_RECORD_BYTES = 2**28
"""A longer record is assumed to lack its end; it is reported and not kept in memory."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_LONGEST_BLANK_BYTES = 64
"""Length up to which white space and byte order marks between two records of an array are ignored."""


class Record(NamedTuple):
    """A part of the file that should be one JSON object."""

    offset: int
    """Offset of the first byte; for a line, of the start of the line."""
    number: int | None
    """Number of the line or element; None if the reader did not start at the start of the file, or if it is neither."""
    content: bytes
    fault: str | None = None
    """A fault that is already known. The content is then not worth parsing."""


class ByteStream:
    """The decompressed bytes of a file, in chunks, from the current position of `source`."""

    fault: str | None = None
    """Why the stream ended early; None if the file was complete."""

    def __init__(self, source: BinaryIO, compression: str | None, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._source, self._compression, self._chunk_bytes = source, compression, chunk_bytes
        self.offset = source.tell()
        """Offset of the next chunk; at the end, the size of the decompressed file."""

    def __iter__(self) -> Iterator[bytes]:
        pieces = self._decompressed() if self._compression else iter(lambda: self._source.read(self._chunk_bytes), b"")
        buffer: list[bytes] = []
        buffer_bytes = 0
        for piece in pieces:
            buffer.append(piece)
            buffer_bytes += len(piece)
            if buffer_bytes >= self._chunk_bytes:
                self.offset += buffer_bytes
                yield b"".join(buffer)
                buffer, buffer_bytes = [], 0
        if buffer_bytes:
            self.offset += buffer_bytes
            yield b"".join(buffer)

    def _decompressed(self) -> Iterator[bytes]:
        """Yield the content of consecutive gzip members or Zstandard frames; zero bytes between them are ignored."""
        member: Any = None
        while data := self._source.read(_COMPRESSED_BYTES):
            while data := data.lstrip(b"\0") if member is None or member.eof else data:
                if member is None or member.eof:
                    member = _DECOMPRESSORS[self._compression]()
                try:
                    yield member.decompress(data)
                except (zlib.error, zstandard.ZstdError) as error:
                    self.fault = f"the compressed file is damaged here: {error}"
                    return
                data = member.unused_data
        if member is not None and not member.eof:
            self.fault = "the compressed file is cut off here"


# Deflate can turn one byte into a thousand, Zstandard into more. A small read bounds the memory of one step.
_COMPRESSED_BYTES = 2**12
_DECOMPRESSORS: dict[str | None, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}


Compression = Literal["gzip", "zstd"]
COMPRESSIONS: dict[str, Compression] = {"gz": "gzip", "zst": "zstd"}
"""Compression by the suffix of the file name."""


def holds_array(source: BinaryIO, compression: str | None) -> bool:
    """Return True if the first byte that is not blank opens an array. Leaves `source` at its start."""
    content = b""
    for chunk in ByteStream(source, compression, _COMPRESSED_BYTES):
        if content := without_blank(content + chunk):
            break
    source.seek(0)
    return content.startswith(b"[")


def without_blank(content: bytes) -> bytes:
    """Return `content` without the white space and byte order marks at its start."""
    while (rest := content.lstrip(_BLANK).removeprefix(_BYTE_ORDER_MARK)) != content:
        content = rest
    return content


class _RecordBuffer:
    """The start and the pieces of the record that is being read."""

    def __init__(self, offset: int) -> None:
        self.offset, self.size = offset, 0
        self._pieces: list[bytes] = []

    def skip_blank(self, piece: bytes) -> bytes:
        """Return `piece` without the white space before the record."""
        if self.size:
            return piece
        content = piece.lstrip(_BLANK)
        self.offset += len(piece) - len(content)
        return content

    def skip_if_blank(self, last: bytes) -> bool:
        """Return True, and empty the buffer, if it and `last` hold only byte order marks and white space."""
        if self.size + len(last) > _LONGEST_BLANK_BYTES or without_blank(b"".join([*self._pieces, last])):
            return False
        self.offset, self.size = self.offset + self.size + len(last), 0
        self._pieces.clear()
        return True

    def add(self, piece: bytes) -> None:
        """Append a piece; drop the content of a record that is too long."""
        self.size += len(piece)
        self._pieces.append(piece)
        if self.size > LONGEST_RECORD_BYTES:
            self._pieces.clear()

    def take(self, last: bytes, number: int | None, fault: str | None = None) -> Record:
        """Return the record that ends with `last`, and start the next one after it."""
        start, size = self.offset, self.size + len(last)
        content = b"".join([*self._pieces, last]) if self.size else last
        self.offset, self.size = start + size, 0
        self._pieces.clear()
        if size > LONGEST_RECORD_BYTES:
            return Record(start, number, b"", f"the record does not end within {LONGEST_RECORD_BYTES:,} bytes")
        return Record(start, number, content, fault)


def lines(stream: ByteStream, begin: int = 0, end: float = math.inf) -> Iterator[Record]:
    """Yield the lines that start in bytes `begin` to `end` and are not blank.

    To start inside a file, pass a stream that starts at byte ``begin - 1``. What precedes the first line end belongs
    to the slice before, even if it is only the line end itself.
    """
    number = 1 if stream.offset == 0 else None
    buffer = _RecordBuffer(stream.offset)

    def finish_line(last: bytes, fault: str | None = None) -> Iterator[Record]:
        record = buffer.take(last, number, fault)
        # A byte order mark also stands inside a file that was joined from several files.
        if record.content.startswith(_BYTE_ORDER_MARK):
            record = record._replace(content=record.content.removeprefix(_BYTE_ORDER_MARK))
        if record.offset >= begin and (record.fault or record.content.strip(_BLANK)):
            yield record

    for chunk in stream:
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            if buffer.offset >= end:
                return
            yield from finish_line(line)
            buffer.offset += 1
            number = number and number + 1
        buffer.add(rest)
        covers_slice = buffer.offset < begin and buffer.offset + buffer.size >= end
        if buffer.offset >= end or covers_slice:
            return
    if buffer.size:
        yield from finish_line(b"", stream.fault)
    elif stream.fault:
        yield Record(max(0, stream.offset - 1), None, b"", stream.fault)


def elements(stream: ByteStream) -> Iterator[Record]:
    """Yield the elements of the array that a stream holds, and a faulty record for everything out of place.

    An element is the text between two commas of the array, or one complete bracketed value, so a fault does not spread
    to its neighbours. If the first record of the array starts on a new line, a line end inside a string shows that a
    quote is missing or left over; reading then restarts at the next line. A missing closing bracket makes the record
    swallow everything after it.
    """
    scanner, buffer = _BracketScanner(), _RecordBuffer(0)
    number = 0
    comma_offset: int | None = None
    is_open = is_closed = is_trailing_reported = False
    is_separated = True
    for chunk in stream:
        base = stream.offset - len(chunk)
        begin = 0
        if not is_open:
            begin = chunk.find(b"[") + 1
            is_open = begin > 0
        marks = scanner.marks(chunk, begin) if is_open and not is_closed else iter(())
        if not buffer.size:
            buffer.offset = base + begin
        for at, mark in marks:
            last = buffer.skip_blank(chunk[begin : at + (mark == _CLOSE)])
            if (last or buffer.size) and not buffer.skip_if_blank(last):
                number += 1
                if not is_separated:
                    yield Record(buffer.offset, None, b"", "a comma is missing before this record")
                fault = "a line ends inside a string (missing quote?)" if mark == _LINE_END else None
                yield buffer.take(last, number, fault)
                is_separated = False
            elif is_separated and mark == _COMMA:
                yield Record(base + at, None, b"", "there is no record before this comma")
            elif is_separated and mark == _END and comma_offset is not None:
                yield Record(comma_offset, None, b"", "there is no record after this comma")
            begin = at + (mark != _OPEN)
            buffer.offset = base + begin
            if mark == _COMMA:
                comma_offset = base + at
            if mark in (_COMMA, _LINE_END):
                is_separated = True
            if mark == _END:
                is_closed = True
                break
        rest = buffer.skip_blank(chunk[begin:])
        if rest and not is_closed:
            buffer.add(rest)
        elif without_blank(rest) and not is_trailing_reported:
            is_trailing_reported = True
            yield Record(buffer.offset, None, b"", "unexpected content after the end of the array")
    if buffer.size:
        yield buffer.take(b"", number + 1, stream.fault or "the file ends inside this record")
    elif stream.fault or not is_closed:
        fault = stream.fault or "the file ends before the array is closed"
        yield Record(max(0, stream.offset - 1), None, b"", fault)


# Only bit 5 tells { from [ and } from ]. Without this bit, two comparisons find all four brackets.
_FOLD = np.uint8(0xDF)
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OPEN, _CLOSE, _COMMA, _LINE_END = (ord(character) & 0xDF for character in "[],\n")
_END = 0


class _BracketScanner:
    """Find the brackets and commas of the array itself, chunk by chunk, among those of its elements and strings."""

    def __init__(self) -> None:
        self._depth = 1
        self._in_string = self._is_escaped = self._has_begun = self._starts_on_new_line = False

    def marks(self, chunk: bytes, begin: int) -> Iterator[tuple[int, int]]:
        """Yield (position, mark) for each place from `begin` on that decides where the array may be split.

        The marks are `_OPEN` and `_CLOSE` for the begin and end of an object or array, `_COMMA` between two elements,
        `_END` for the end of the whole array, and `_LINE_END` for a line end inside a string.
        """
        if not self._has_begun:
            content = chunk[begin:].lstrip(_BLANK)
            self._starts_on_new_line |= b"\n" in chunk[begin : len(chunk) - len(content)]
            self._has_begun = bool(content)
        data = np.frombuffer(chunk, np.uint8)[begin:]
        is_quote = self._quotes(data)
        folded = data & _FOLD
        is_token = is_quote | (data == ord(",")) | (folded == _OPEN) | (folded == _CLOSE)
        if self._starts_on_new_line:
            is_token |= data == ord("\n")
        at = np.flatnonzero(is_token)
        if not at.size:
            return
        kind, is_quote = folded[at], is_quote[at]
        is_line_end = kind == _LINE_END
        quotes = np.cumsum(is_quote) + self._in_string
        # If line ends are tokens, quotes are counted from the start of the line: valid strings hold no line end.
        quotes_before_line = np.maximum.accumulate(np.where(is_line_end, quotes, 0))
        in_string = (quotes - _shifted(quotes_before_line, 0)) % 2 == 1
        self._in_string = bool((quotes[-1] - quotes_before_line[-1]) % 2)
        is_torn = is_line_end & in_string
        is_kept = is_torn | ~(is_quote | is_line_end | in_string)
        at, kind, is_torn = at[is_kept], kind[is_kept], is_torn[is_kept]
        start = 0
        for stop in [*np.flatnonzero(is_torn).tolist(), at.size]:
            yield from self._array_marks(at[start:stop] + begin, kind[start:stop], data[at[start:stop]])
            if stop < at.size:
                self._depth = 1
                yield int(at[stop]) + begin, _LINE_END
            start = stop + 1

    def _quotes(self, data: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return which bytes are quotes that are not escaped: those after an even number of backslashes."""
        is_quote: NDArray[np.bool_] = data == _QUOTE
        backslashes = np.flatnonzero(data == _BACKSLASH)
        if self._is_escaped and data.size:
            is_quote[0] = False
            backslashes = backslashes[backslashes > 0]
            self._is_escaped = False
        if backslashes.size:
            runs = np.flatnonzero(np.diff(backslashes, prepend=-2) != 1)
            lengths = np.diff(runs, append=backslashes.size)
            escaped = (backslashes[runs] + lengths)[lengths % 2 == 1]
            self._is_escaped = bool(escaped.size and escaped[-1] == data.size)
            is_quote[escaped[: escaped.size - self._is_escaped]] = False
        return is_quote

    def _array_marks(
        self, at: NDArray[np.int64], kind: NDArray[np.uint8], byte: NDArray[np.uint8]
    ) -> Iterator[tuple[int, int]]:
        """Yield (position, mark) of the tokens that belong to the array itself, and keep track of the depth."""
        if not at.size:
            return
        depth = self._depth + np.cumsum((kind == _OPEN).astype(np.int64) - (kind == _CLOSE))
        # A closing bracket without an opening one does not change the depth.
        depth += np.maximum(1 - np.minimum.accumulate(depth), 0)
        before = _shifted(depth, self._depth)
        self._depth = int(depth[-1])
        is_end = (before == 1) & (byte == ord("]"))
        is_own = is_end | ((before == 1) & (kind != _CLOSE)) | ((before == 2) & (kind == _CLOSE))
        yield from zip(at[is_own].tolist(), np.where(is_end, _END, kind)[is_own].tolist(), strict=True)


def _shifted(values: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    """Return `values` moved by one place to the right, with `first` in front."""
    return np.concatenate([[first], values[:-1]])
