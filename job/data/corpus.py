"""The corpus: documents out of JSON, JSON lines and Parquet files, from anywhere, in slices of a fixed size.

    source → files → groups of files → slices of a group → records → documents

A slice is the unit of work, and follows from the names and sizes of the files and `slice_bytes` alone. Slice k of a
JSON file is all records that start in bytes ``[k * slice_bytes, (k + 1) * slice_bytes)`` of its decompressed content;
of a Parquet file, consecutive row groups. Small files that follow each other share one slice (see `share_slices`).
Plain JSON lines and Parquet are read where the slice is; a JSON array and a compressed file can only be read from the
start, and then the records of other slices are passed over unparsed. Files of other kinds, and configurations and
splits of data sets, are for the `datasets` library: see `dataset_files` and `dataset_source`.
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
from job.data.documents import BadRecord, Document, Unfit, json_document
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
    "list_corpus",
    "read_group",
    "read_slices",
    "share_slices",
]


OnListed = Callable[[Listing], None]


def list_corpus(source: str, on_listed: OnListed = lambda listing: None, choice: Choice = ALL) -> list[CorpusFile]:
    """The files of the corpus, sorted by URL.

    Args:
        source: a file, folder or glob, on this machine or at a URL; or a data set on a hub (see `hub.download`), which
            is downloaded to this machine now.
        on_listed: told of all that was found, and of what is left out and why.
        choice: the configuration and the split, where `source` is a data set that has them.

    Raises:
        UserError: there is nothing, or nothing readable, or the hub does not give it.
    """
    listing = discover(source, choice)
    on_listed(listing)
    return list(listing.files)


@dataclass(frozen=True)
class Group:
    """Files that are cut into slices together: one that is cut alone, or several that share one slice."""

    index: int
    files: tuple[CorpusFile, ...]


def share_slices(files: Sequence[CorpusFile], slice_bytes: int) -> tuple[Group, ...]:
    """The groups of a corpus: files that follow each other share a slice while they take `slice_bytes` at most.

    What counts is the size as stored. A file larger than that, or one without small neighbours, is cut alone.
    """
    groups: list[list[CorpusFile]] = []
    room = -1
    for file in files:
        if file.size > room:
            groups.append([])
            room = slice_bytes
        groups[-1].append(file)
        room -= file.size
    return tuple(Group(index, tuple(members)) for index, members in enumerate(groups))


def read_group(
    group: Group, slice_bytes: int, wanted: Callable[[int], bool], text_field: str, id_field: str
) -> Iterator[SliceItem]:
    """The documents of the wanted slices of a group, in order; arguments and items as in `read_slices`."""
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
    """The documents of the wanted slices of a file, in order.

    A file has at least one slice, and all readers agree on how many: ``ceil(bytes / slice_bytes)`` where it holds JSON.
    One in which no record starts is empty. Memory is constant.

    Args:
        file: what to read.
        slice_bytes: the size of a slice; of Parquet, the least size of the two columns' values, as the footer has it.
        wanted: asked once for each slice of the file, in order, when reading comes to it.
        text_field: the field or column that holds the text, a string.
        id_field: the one that holds the id, any scalar but a boolean (see `documents`); it may be absent or null.

    Yields:
        For each wanted slice `SliceStart`, its `Document`s and `BadRecord`s, `SliceEnd`.
    """
    if file.rows is not None:
        yield from row_slices(file, slice_bytes, wanted, text_field, id_field)
        return
    with storage.open_read(file.path) as source:
        if file.format == "parquet":
            for index, is_last, found in parquet.slices(source, file.url, slice_bytes, wanted, text_field, id_field):
                yield SliceStart(index)
                yield from found
                yield SliceEnd(index, is_last)
            return

        is_array = holds_array(source, file.compression)

        def document(record: Record) -> Document | BadRecord:
            try:
                return json_document(record, text_field, id_field)
            except Unfit as error:
                return error.at(file.url, _position(record, "record" if is_array else "line"))

        if is_array or file.compression:
            stream = ByteStream(source, file.compression)
            records = elements(stream) if is_array else lines(stream)
            yield from _scanned_slices(records, stream, slice_bytes, wanted, document)
        else:
            yield from _line_slices(source, file.size, slice_bytes, wanted, document)


def _slice_count(size: int, slice_bytes: int) -> int:
    return max(1, -(-size // slice_bytes))


def _line_slices(
    source: BinaryIO,
    size: int,
    slice_bytes: int,
    wanted: Callable[[int], bool],
    document: Callable[[Record], Document | BadRecord],
) -> Iterator[SliceItem]:
    count = _slice_count(size, slice_bytes)
    for index in range(count):
        if wanted(index):
            yield SliceStart(index)
            begin = index * slice_bytes
            source.seek(max(0, begin - 1))
            stream = ByteStream(source, None, min(CHUNK_BYTES, slice_bytes))
            yield from map(document, lines(stream, begin, begin + slice_bytes))
            yield SliceEnd(index, index == count - 1)


def _scanned_slices(
    records: Iterable[Record],
    stream: ByteStream,
    slice_bytes: int,
    wanted: Callable[[int], bool],
    document: Callable[[Record], Document | BadRecord],
) -> Iterator[SliceItem]:
    cursor = Cursor(wanted)
    for record in records:
        yield from cursor.advance(record.offset // slice_bytes)
        if cursor.is_wanted:
            yield document(record)
    yield from cursor.advance(_slice_count(stream.offset, slice_bytes) - 1)
    yield from cursor.finish()


def _position(record: Record, unit: str) -> str:
    byte = f"byte {record.offset:,}"
    return byte if record.number is None else f"{unit} {record.number:,}, {byte}"
