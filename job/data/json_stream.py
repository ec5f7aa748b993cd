"""Records cut from JSON without parsing it: lines, and the elements of an array, found by quotes and brackets alone.

Memory is constant and time proportional to the bytes, whatever the size of the file or of one record. Offsets count
the bytes of the decompressed file from 0; numbers count lines or elements from 1.
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
"""A record that has not ended after so many bytes is taken to lack its end, and is not kept in memory."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK = b" \t\r\n"
_LONGEST_BLANK_BYTES = 64
"""White space and byte order marks between two records of an array that are no record themselves."""


class Record(NamedTuple):
    """A piece of the file that should be one JSON object."""

    offset: int
    """Of its first byte; of a line, where the line starts."""
    number: int | None
    """Of the line or element; None where the reader did not come from the file's start, and for what is neither."""
    content: bytes
    fault: str | None = None
    """What is already known to be wrong; the content is not worth parsing then."""


class ByteStream:
    """The decompressed bytes of a file from where it stands, in chunks."""

    fault: str | None = None
    """Why it broke off, once it has; None where the file was whole."""

    def __init__(self, source: BinaryIO, compression: str | None, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._source, self._compression, self._chunk_bytes = source, compression, chunk_bytes
        self.offset = source.tell()
        """Of the next chunk; at the end, the size of the decompressed file."""

    def __iter__(self) -> Iterator[bytes]:
        pieces = self._inflated() if self._compression else iter(lambda: self._source.read(self._chunk_bytes), b"")
        waiting: list[bytes] = []
        size = 0
        for piece in pieces:
            waiting.append(piece)
            size += len(piece)
            if size >= self._chunk_bytes:
                self.offset += size
                yield b"".join(waiting)
                waiting, size = [], 0
        if size:
            self.offset += size
            yield b"".join(waiting)

    def _inflated(self) -> Iterator[bytes]:
        """The content of all gzip members or Zstandard frames in a row; there may be zeros between and after them."""
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


# Deflate makes up to a thousand bytes of one, Zstandard more: this bounds what one step can bring into memory.
_COMPRESSED_BYTES = 2**12
_DECOMPRESSORS: dict[str | None, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}


Compression = Literal["gzip", "zstd"]
COMPRESSIONS: dict[str, Compression] = {"gz": "gzip", "zst": "zstd"}
"""Compression by the suffix of a file's name."""


def holds_array(source: BinaryIO, compression: str | None) -> bool:
    """Whether the first byte that is not blank opens an array. Leaves `source` at its start."""
    found = b""
    for chunk in ByteStream(source, compression, _COMPRESSED_BYTES):
        if found := without_blank(found + chunk):
            break
    source.seek(0)
    return found.startswith(b"[")


def without_blank(content: bytes) -> bytes:
    """`content` without the white space and the byte order marks at its start."""
    while (rest := content.lstrip(_BLANK).removeprefix(_BYTE_ORDER_MARK)) != content:
        content = rest
    return content


class _Gathered:
    """The record being read: where it starts, and the pieces of it from earlier chunks."""

    def __init__(self, offset: int) -> None:
        self.offset, self.size = offset, 0
        self._pieces: list[bytes] = []

    def skip_blank(self, piece: bytes) -> bytes:
        """`piece` without the white space before the record."""
        if self.size:
            return piece
        content = piece.lstrip(_BLANK)
        self.offset += len(piece) - len(content)
        return content

    def is_blank(self, last: bytes) -> bool:
        """Whether there is nothing but byte order marks and white space, which are passed over then."""
        if self.size + len(last) > _LONGEST_BLANK_BYTES or without_blank(b"".join([*self._pieces, last])):
            return False
        self.offset, self.size = self.offset + self.size + len(last), 0
        self._pieces.clear()
        return True

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self._pieces.append(piece)
        if self.size > LONGEST_RECORD_BYTES:
            self._pieces.clear()

    def take(self, last: bytes, number: int | None, fault: str | None = None) -> Record:
        """The record, of which `last` is the last piece; the next one starts after it."""
        start, size = self.offset, self.size + len(last)
        content = b"".join([*self._pieces, last]) if self.size else last
        self.offset, self.size = start + size, 0
        self._pieces.clear()
        if size > LONGEST_RECORD_BYTES:
            return Record(start, number, b"", f"no end within {LONGEST_RECORD_BYTES:,} bytes")
        return Record(start, number, content, fault)


def lines(stream: ByteStream, begin: int = 0, end: float = math.inf) -> Iterator[Record]:
    """The lines that start in bytes `begin` to `end` and are not blank.

    A reader that starts in the middle of a file gives the stream from byte ``begin - 1`` on: what comes before the
    first line end belongs to a line of the slice before, even where that is only the line end itself.
    """
    number = 1 if stream.offset == 0 else None
    gathered = _Gathered(stream.offset)

    def taken(last: bytes, fault: str | None = None) -> Iterator[Record]:
        record = gathered.take(last, number, fault)
        if record.content.startswith(_BYTE_ORDER_MARK):  # also inside a file: several files, one behind the other
            record = record._replace(content=record.content.removeprefix(_BYTE_ORDER_MARK))
        if record.offset >= begin and (record.fault or record.content.strip(_BLANK)):
            yield record

    for chunk in stream:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            if gathered.offset >= end:
                return
            yield from taken(line)
            gathered.offset += 1
            number = number and number + 1
        gathered.add(rest)
        covers_slice = gathered.offset < begin and gathered.offset + gathered.size >= end
        if gathered.offset >= end or covers_slice:
            return
    if gathered.size:
        yield from taken(b"", stream.fault)
    elif stream.fault:
        yield Record(max(0, stream.offset - 1), None, b"", stream.fault)


def elements(stream: ByteStream) -> Iterator[Record]:
    """The elements of the array that a stream holds, and everything that stands where none may.

    An element is what stands between two commas of the array, or one whole bracketed value, so that a record survives
    the faults of its neighbours. Where the array's first record begins on a new line, a line end inside a string shows
    a quote too many or too few, and reading starts afresh with the next line. A bracket too few swallows what follows.
    """
    structure, gathered = _Structure(), _Gathered(0)
    number = 0
    comma: int | None = None
    opened = ended = told = False
    separated = True
    for chunk in stream:
        base = stream.offset - len(chunk)
        begin = 0
        if not opened:
            begin = chunk.find(b"[") + 1
            opened = begin > 0
        marks = structure.marks(chunk, begin) if opened and not ended else iter(())
        if not gathered.size:
            gathered.offset = base + begin
        for at, mark in marks:
            last = gathered.skip_blank(chunk[begin : at + (mark == _CLOSE)])
            if (last or gathered.size) and not gathered.is_blank(last):
                number += 1
                if not separated:
                    yield Record(gathered.offset, None, b"", "no comma before this record")
                yield gathered.take(last, number, "a line ends inside a string" if mark == _LINE_END else None)
                separated = False
            elif separated and mark == _COMMA:
                yield Record(base + at, None, b"", "no record before this comma")
            elif separated and mark == _END and comma is not None:
                yield Record(comma, None, b"", "no record after this comma")
            begin = at + (mark != _OPEN)
            gathered.offset = base + begin
            if mark == _COMMA:
                comma = base + at
            if mark in (_COMMA, _LINE_END):
                separated = True
            if mark == _END:
                ended = True
                break
        rest = gathered.skip_blank(chunk[begin:])
        if rest and not ended:
            gathered.add(rest)
        elif without_blank(rest) and not told:
            told = True
            yield Record(gathered.offset, None, b"", "something after the end of the array")
    if gathered.size:
        yield gathered.take(b"", number + 1, stream.fault or "the file ends inside this record")
    elif stream.fault or not ended:
        yield Record(max(0, stream.offset - 1), None, b"", stream.fault or "the file ends, the array does not")


# Bit 5 is all that tells { from [ and } from ]: without it, two comparisons find four brackets.
_FOLD = np.uint8(0xDF)
_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_OPEN, _CLOSE, _COMMA, _LINE_END = (ord(character) & 0xDF for character in "[],\n")
_END = 0


class _Structure:
    """Tells an array's own brackets and commas from those inside its elements and strings, chunk after chunk."""

    def __init__(self) -> None:
        self._depth = 1
        self._in_string = self._escaped = self._begun = self._by_line = False

    def marks(self, chunk: bytes, begin: int) -> Iterator[tuple[int, int]]:
        """(position, mark) of where elements open and close, of commas between them, and of the end, from `begin` on.

        With `_LINE_END`, of the line ends inside a string.
        """
        if not self._begun:
            content = chunk[begin:].lstrip(_BLANK)
            self._by_line |= b"\n" in chunk[begin : len(chunk) - len(content)]
            self._begun = bool(content)
        data = np.frombuffer(chunk, np.uint8)[begin:]
        quote = self._quotes(data)
        folded = data & _FOLD
        token = quote | (data == ord(",")) | (folded == _OPEN) | (folded == _CLOSE)
        if self._by_line:
            token |= data == ord("\n")
        at = np.flatnonzero(token)
        if not at.size:
            return
        kind, is_quote = folded[at], quote[at]
        line_end = kind == _LINE_END
        quotes = np.cumsum(is_quote) + self._in_string
        before_line = np.maximum.accumulate(np.where(line_end, quotes, 0))
        inside = (quotes - _shifted(before_line, 0)) % 2 == 1
        self._in_string = bool((quotes[-1] - before_line[-1]) % 2)
        torn = line_end & inside
        kept = torn | ~(is_quote | line_end | inside)
        at, kind, torn = at[kept], kind[kept], torn[kept]
        start = 0
        for stop in [*np.flatnonzero(torn).tolist(), at.size]:
            yield from self._own_marks(at[start:stop] + begin, kind[start:stop], data[at[start:stop]])
            if stop < at.size:
                self._depth = 1
                yield int(at[stop]) + begin, _LINE_END
            start = stop + 1

    def _quotes(self, data: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which bytes are quotes that no backslash escapes: those after an even number of backslashes in a row."""
        quote: NDArray[np.bool_] = data == _QUOTE
        slashes = np.flatnonzero(data == _BACKSLASH)
        if self._escaped and data.size:
            quote[0] = False
            slashes = slashes[slashes > 0]
            self._escaped = False
        if slashes.size:
            runs = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
            lengths = np.diff(runs, append=slashes.size)
            escaped = (slashes[runs] + lengths)[lengths % 2 == 1]
            self._escaped = bool(escaped.size and escaped[-1] == data.size)
            quote[escaped[: escaped.size - self._escaped]] = False
        return quote

    def _own_marks(
        self, at: NDArray[np.int64], kind: NDArray[np.uint8], byte: NDArray[np.uint8]
    ) -> Iterator[tuple[int, int]]:
        if not at.size:
            return
        depth = self._depth + np.cumsum((kind == _OPEN).astype(np.int64) - (kind == _CLOSE))
        depth += np.maximum(1 - np.minimum.accumulate(depth), 0)  # a bracket that closes nothing changes no depth
        before = _shifted(depth, self._depth)
        self._depth = int(depth[-1])
        end = (before == 1) & (byte == ord("]"))
        own = end | ((before == 1) & (kind != _CLOSE)) | ((before == 2) & (kind == _CLOSE))
        yield from zip(at[own].tolist(), np.where(end, _END, kind)[own].tolist(), strict=True)


def _shifted(values: NDArray[np.int64], first: int) -> NDArray[np.int64]:
    return np.concatenate([[first], values[:-1]])
