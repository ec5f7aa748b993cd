"""Read a corpus: list its files, cut them into slices of a fixed size, and yield the documents of each slice.

    source → files → groups of files → slices of a group → records → documents

A slice is the unit of work. It depends only on the names and sizes of the files and on `slice_bytes`. Slice k of a
JSON file holds the records that start in bytes ``[k * slice_bytes, (k + 1) * slice_bytes)`` of the decompressed
content. A slice of a Parquet file is a number of consecutive row groups. Consecutive small files share one slice (see
`group_files`).

A slice of plain JSON lines or Parquet is read without reading the rest of the file. A JSON array or a compressed file
can only be read from its start; the records of other slices are then skipped without being parsed. Files of other
formats, and configurations and splits of data sets, are read by the `datasets` library: see `dataset_files` and
`dataset_source`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from job import storage
from job.data import parquet
from job.data.dataset_files import ALL, Choice
from job.data.dataset_source import row_slices
from job.data.discovery import discover
from job.data.documents import BadRecord, Document, RecordError, document_from_json
from job.data.json_stream import CHUNK_BYTES, ByteStream, Record, elements, holds_array, lines
from job.data.listing import CorpusFile, Listing
from job.data.slices import Cursor, SliceEnd, SliceItem, SliceStart

__all__ = [
    "BadRecord",
    "CorpusFile",
    "Document",
    "Group",
    "Listing",
    "OnListed",
    "SliceEnd",
    "SliceItem",
    "SliceStart",
    "group_files",
    "list_corpus",
    "read_group",
    "read_slices",
]


OnListed = Callable[[Listing], None]


def list_corpus(source: str, on_listed: OnListed = lambda listing: None, choice: Choice = ALL) -> list[CorpusFile]:
    """Return the files of the corpus, sorted by URL.

    Args:
        source: a file, folder or glob, as a local path or a URL; or a data set on a hub (see `hub.download`), which
            is downloaded now.
        on_listed: called with everything that was found, including the files that are left out and why.
        choice: the configuration and the split to read, if `source` is a data set that has them.

    Raises:
        UserError: no file was found, no file can be read, or the hub refuses access.
    """
    listing = discover(source, choice)
    on_listed(listing)
    return list(listing.files)


@dataclass(frozen=True)
class Group:
    """Files that are cut into slices together: one file, or several small files that share one slice."""

    index: int
    files: tuple[CorpusFile, ...]


def group_files(files: Sequence[CorpusFile], slice_bytes: int) -> tuple[Group, ...]:
    """Return the groups of a corpus: consecutive files share a slice while their total size is at most `slice_bytes`.

    The sizes are those of the stored files, before decompression. A larger file, or one without small neighbours, is
    a group of its own.
    """
    groups: list[list[CorpusFile]] = []
    remaining_bytes = -1
    for file in files:
        if file.size > remaining_bytes:
            groups.append([])
            remaining_bytes = slice_bytes
        groups[-1].append(file)
        remaining_bytes -= file.size
    return tuple(Group(index, tuple(members)) for index, members in enumerate(groups))


def read_group(
    group: Group, slice_bytes: int, wanted: Callable[[int], bool], text_field: str, id_field: str
) -> Iterator[SliceItem]:
    """Yield the documents of the wanted slices of a group, in order; see `read_slices` for arguments and items."""
    if len(group.files) == 1:
        yield from read_slices(group.files[0], slice_bytes, wanted, text_field, id_field)
    elif wanted(0):
        yield SliceStart(0)
        for file in group.files:
            for item in read_slices(file, sys.maxsize, lambda _: True, text_field, id_field):
                if not isinstance(item, SliceStart | SliceEnd):
                    yield item
        yield SliceEnd(0, True)


def read_slices(
    file: CorpusFile, slice_bytes: int, wanted: Callable[[int], bool], text_field: str, id_field: str
) -> Iterator[SliceItem]:
    """Yield the documents of the wanted slices of a file, in order.

    A file has at least one slice, and all readers agree on their number: ``ceil(bytes / slice_bytes)`` for JSON. A
    slice in which no record starts is empty. Memory use does not depend on the size of the file.

    Args:
        file: the file to read.
        slice_bytes: the size of a slice. For Parquet, the minimum size of the values of the two columns, as recorded
            in the footer.
        wanted: tells whether to read a slice; called once for each slice, in order, when the reader reaches it.
        text_field: the field or column that holds the text, a string.
        id_field: the field or column that holds the id, any scalar but a boolean (see `documents`). It may be missing
            or null.

    Yields:
        For each wanted slice a `SliceStart`, its `Document`s and `BadRecord`s, and a `SliceEnd`.
    """
    if file.library_reader is not None:
        yield from row_slices(file, slice_bytes, wanted, text_field, id_field)
        return
    with storage.open_read(file.path) as source:
        if file.format == "parquet":
            for index, is_last, documents in parquet.slices(
                source, file.url, slice_bytes, wanted, text_field, id_field
            ):
                yield SliceStart(index)
                yield from documents
                yield SliceEnd(index, is_last)
            return

        is_array = holds_array(source, file.compression)

        def document_of(record: Record) -> Document | BadRecord:
            try:
                return document_from_json(record, text_field, id_field)
            except RecordError as error:
                return error.at(file.url, _position(record, "record" if is_array else "line"))

        if is_array or file.compression:
            stream = ByteStream(source, file.compression)
            records = elements(stream) if is_array else lines(stream)
            yield from _scanned_slices(records, stream, slice_bytes, wanted, document_of)
        else:
            yield from _line_slices(source, file.size, slice_bytes, wanted, document_of)


def _slice_count(size_bytes: int, slice_bytes: int) -> int:
    return max(1, -(-size_bytes // slice_bytes))


def _line_slices(
    source: BinaryIO,
    size_bytes: int,
    slice_bytes: int,
    wanted: Callable[[int], bool],
    document_of: Callable[[Record], Document | BadRecord],
) -> Iterator[SliceItem]:
    """Yield the wanted slices of plain JSON lines, reading only these slices."""
    count = _slice_count(size_bytes, slice_bytes)
    for index in range(count):
        if wanted(index):
            yield SliceStart(index)
            begin = index * slice_bytes
            source.seek(max(0, begin - 1))
            stream = ByteStream(source, None, min(CHUNK_BYTES, slice_bytes))
            yield from map(document_of, lines(stream, begin, begin + slice_bytes))
            yield SliceEnd(index, index == count - 1)


def _scanned_slices(
    records: Iterable[Record],
    stream: ByteStream,
    slice_bytes: int,
    wanted: Callable[[int], bool],
    document_of: Callable[[Record], Document | BadRecord],
) -> Iterator[SliceItem]:
    """Yield the wanted slices of a file that can only be read from its start."""
    cursor = Cursor(wanted)
    for record in records:
        yield from cursor.advance(record.offset // slice_bytes)
        if cursor.is_wanted:
            yield document_of(record)
    yield from cursor.advance(_slice_count(stream.offset, slice_bytes) - 1)
    yield from cursor.finish()


def _position(record: Record, unit: str) -> str:
    byte = f"byte {record.offset:,}"
    return byte if record.number is None else f"{unit} {record.number:,}, {byte}"
