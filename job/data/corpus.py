"""The corpus: documents out of JSON, JSON lines and Parquet files, from anywhere, in slices of a fixed size.

    source → files → slices of a file → records → documents

A slice is the unit of work, and follows from the file and `slice_bytes` alone: slice k of a JSON file is all records
that start in bytes ``[k * slice_bytes, (k + 1) * slice_bytes)`` of its decompressed content; of a Parquet file,
consecutive row groups. Plain JSON lines and Parquet are read where the slice is; a JSON array and a compressed file can
only be read from the start, and then the records of other slices are passed over unparsed. Files of other kinds, and
configurations and splits of data sets, are for the `datasets` library: see `dataset_files` and `dataset_source`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from job import storage
from job.data import dataset_files, hub
from job.data.records import CHUNK_BYTES, ByteStream, Record, elements, holds_array, lines
from job.errors import UserError, one_line

Compression = Literal["gzip", "zstd"]
_COMPRESSIONS: dict[str, Compression] = {"gz": "gzip", "zst": "zstd"}
_JSON_NAMES = ("json", "jsonl", "ndjson")
_DATA_FILE = re.compile(rf"\.(?:(?:{'|'.join(_JSON_NAMES)})(?:\.({'|'.join(_COMPRESSIONS)}))?|(parquet))$")
_HUB_PATTERNS = ["*.parquet", *(f"*.{one}{end}" for one in _JSON_NAMES for end in ("", ".gz", ".zst"))]
# What hubs and the `datasets` library put beside the data.
_DESCRIPTIONS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"}
_PARQUET_READ_BYTES = 2**21


@dataclass(frozen=True)
class CorpusFile:
    """One file of the corpus. Whether JSON holds an array or lines is seen when it is read: names do not tell."""

    index: int
    """Its place among the files, sorted by URL."""
    url: str
    """Its name, which is the same for every worker."""
    path: str
    """What is opened: the URL, or this machine's copy of a hub's file."""
    size: int
    """Bytes, as stored."""
    format: Literal["json", "parquet", "rows"]
    """``rows``: what the `datasets` library reads."""
    compression: Compression | None
    rows: dataset_files.Rows | None = None
    """How that library reads it."""


@dataclass(frozen=True)
class Document:
    """A text and the name it goes by, if it has one."""

    id: str | None
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document, or a fault between records."""

    url: str
    position: str
    """``line 17, byte 2,031``, ``record 12, byte 9,001``, ``byte 9,001`` or ``row 12``: bytes are offsets in the
    decompressed file, counted from 0; lines, records and rows are counted from 1."""
    reason: str


@dataclass(frozen=True)
class SliceStart:
    """The records of this slice follow."""

    index: int


@dataclass(frozen=True)
class SliceEnd:
    """That was the whole slice."""

    index: int
    is_last: bool
    """Whether the file has no slice after it."""


SliceItem = SliceStart | Document | BadRecord | SliceEnd


def list_corpus(
    source: str,
    subset: str | None = None,
    source_split: str | None = None,
    text_documents: dataset_files.TextDocuments | None = None,
) -> list[CorpusFile]:
    """The files of the corpus, sorted by URL.

    Args:
        source: a file, folder or glob, on this machine or at a URL; or a data set on a hub (see `hub.download`), which
            is downloaded to this machine now.
        subset, source_split: the configuration and the split, where `source` is a data set that has them.
        text_documents: what of a text file is a document; None: a paragraph, or what a data set says.

    Raises:
        UserError: there is nothing, or nothing readable, or the hub does not give it.
    """
    chosen = dataset_files.chosen_files(
        source, subset, source_split, text_documents, reads_itself=lambda url: _data_file(url) is not None
    )
    found = _find(source) if chosen is None else [(one.url, one.path, one.size) for one in chosen if one.rows is None]
    files = [(*one, match) for one in sorted(found) if (match := _data_file(one[0]))]
    if not files:
        others = dataset_files.other_files(source, found, text_documents) if chosen is None else chosen
        if others:
            ordered = enumerate(sorted(others, key=lambda one: one.url))
            return [CorpusFile(index, *one[:3], "rows", None, one.rows) for index, one in ordered]
        expected = f"none of the {len(found)} files there is a corpus" if found else "there is no file"
        remedy = f"give .json, .jsonl, .json.gz, .json.zst or .parquet files, or {dataset_files.ENDINGS}"
        raise UserError("data.source", source, expected, remedy)
    return [
        CorpusFile(index, url, path, size, "parquet" if match[2] else "json", _COMPRESSIONS.get(match[1]))
        for index, (url, path, size, match) in enumerate(files)
    ]


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
        id_field: the one that holds the id, a string or an integer; it may be absent or null.

    Yields:
        For each wanted slice `SliceStart`, its `Document`s and `BadRecord`s, `SliceEnd`.
    """
    if file.rows is not None:
        from job.data.dataset_source import row_slices

        yield from row_slices(file, slice_bytes, wanted, text_field, id_field)
        return
    with storage.open_read(file.path) as source:
        if file.format == "parquet":
            yield from _parquet_slices(source, file.url, slice_bytes, wanted, text_field, id_field)
            return

        is_array = holds_array(source, file.compression)

        def document(record: Record) -> Document | BadRecord:
            try:
                return _document(_parsed(record), text_field, id_field)
            except ValueError as error:
                return BadRecord(file.url, _position(record, "record" if is_array else "line"), str(error))

        if is_array or file.compression:
            stream = ByteStream(source, file.compression)
            records = elements(stream) if is_array else lines(stream)
            yield from _scanned_slices(records, stream, slice_bytes, wanted, document)
        else:
            yield from _line_slices(source, file.size, slice_bytes, wanted, document)


# ── where the files are ──────────────────────────────────────────────────────────────────────────────────────────────


def _find(source: str) -> list[tuple[str, str, int]]:
    """URL, path and size of every file at `source`."""
    if hub.has_scheme(source):
        return hub.download(source, _HUB_PATTERNS)
    if source.startswith(("http://", "https://")):
        entries = [storage.Entry(source, storage.size(source))] if storage.exists(source) else []
    elif source.endswith("/") or (storage.is_remote(source) and source.count("/") == 2):
        entries = storage.list_files(source)
    else:
        entries = storage.glob(source) or storage.list_files(source)
    if not entries and hub.is_name(source) and not _data_file(source) and not Path(source).exists():
        return hub.download(source, _HUB_PATTERNS)
    return [(entry.url, entry.url, entry.size) for entry in entries]


def _data_file(url: str) -> re.Match[str] | None:
    """How the name says that a file is read; None for one that holds no documents."""
    path = urlsplit(url).path if url.startswith(("http://", "https://")) else url
    name = path.rpartition("/")[2]
    return None if name in _DESCRIPTIONS or name.startswith(".") else _DATA_FILE.search(name)


# ── slices ───────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    current, taken = 0, wanted(0)
    if taken:
        yield SliceStart(0)

    def advance(target: int) -> Iterator[SliceItem]:
        nonlocal current, taken
        while current < target:
            if taken:
                yield SliceEnd(current, False)
            current, taken = current + 1, wanted(current + 1)
            if taken:
                yield SliceStart(current)

    for record in records:
        yield from advance(record.offset // slice_bytes)
        if taken:
            yield document(record)
    yield from advance(_slice_count(stream.offset, slice_bytes) - 1)
    if taken:
        yield SliceEnd(current, True)


def _parquet_slices(
    source: BinaryIO, url: str, slice_bytes: int, wanted: Callable[[int], bool], text_field: str, id_field: str
) -> Iterator[SliceItem]:
    try:
        table = pq.ParquetFile(source, pre_buffer=False, buffer_size=_PARQUET_READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        _raise_unless_damage(error)
        if wanted(0):
            yield SliceStart(0)
            yield BadRecord(url, "footer", f"not a whole Parquet file: {one_line(str(error))}")
            yield SliceEnd(0, True)
        return
    groups = _row_groups(table.metadata, slice_bytes, {text_field, id_field})
    for index, slice_groups in enumerate(groups):
        if wanted(index):
            yield SliceStart(index)
            for group, first_row in slice_groups:
                yield from _group_documents(table, group, first_row, url, text_field, id_field)
            yield SliceEnd(index, index == len(groups) - 1)


def _row_groups(footer: pq.FileMetaData, slice_bytes: int, columns: set[str]) -> list[list[tuple[int, int]]]:
    """For each slice its row groups: their numbers, and the rows before them."""
    slices: list[list[tuple[int, int]]] = [[]]
    size = first_row = 0
    for index in range(footer.num_row_groups):
        if size >= slice_bytes:
            slices.append([])
            size = 0
        group = footer.row_group(index)
        slices[-1].append((index, first_row))
        size += _column_bytes(group, columns)
        first_row += group.num_rows
    return slices


def _column_bytes(group: pq.RowGroupMetaData, columns: set[str]) -> int:
    found = (group.column(index) for index in range(group.num_columns))
    return sum(one.total_uncompressed_size for one in found if one.path_in_schema in columns)


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _group_documents(
    table: pq.ParquetFile, group: int, first_row: int, url: str, text_field: str, id_field: str
) -> Iterator[Document | BadRecord]:
    """The documents of a row group, read in batches of about `_PARQUET_READ_BYTES`."""
    names = table.schema_arrow.names
    described = table.metadata.row_group(group)
    if text_field not in names:
        reason = f"no column {text_field!r}, only {', '.join(map(repr, names)) or 'none'}"
        yield BadRecord(url, f"rows {first_row + 1:,} to {first_row + described.num_rows:,}", reason)
        return
    columns = list(dict.fromkeys(name for name in (text_field, id_field) if name in names))
    row_bytes = max(1, _column_bytes(described, set(columns)) // max(1, described.num_rows))
    batch_rows = min(1024, max(1, _PARQUET_READ_BYTES // row_bytes))
    row = first_row
    try:
        for batch in table.iter_batches(batch_rows, [group], columns, use_threads=False):
            for record in zip(*(_values(batch.column(name)) for name in columns), strict=True):
                row += 1
                try:
                    yield _document(dict(zip(columns, record, strict=True)), text_field, id_field)
                except ValueError as error:
                    yield BadRecord(url, f"row {row:,}", str(error))
    except (pa.ArrowException, OSError) as error:
        _raise_unless_damage(error)
        rows = f"rows {row + 1:,} to {first_row + described.num_rows:,}"
        yield BadRecord(url, rows, f"damaged Parquet: {one_line(str(error))}")


def _values(column: pa.Array) -> list[Any]:
    """The values of a column. Bytes are text where they are UTF-8, as writers that name no string type mean them."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return [_text(value) if isinstance(value, bytes) else value for value in values]


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _raise_unless_damage(error: Exception) -> None:
    """Raises what is not about the file's content. pyarrow says that with OSErrors of its own, which have no number."""
    of_arrow = isinstance(error, pa.ArrowException) and not isinstance(error, MemoryError)
    if not of_arrow and not (type(error) is OSError and error.errno is None):
        raise error


def _parsed(record: Record) -> Any:
    """The value of a record. Raises ValueError with what is wrong with it."""
    if record.fault:
        raise ValueError(record.fault)
    try:
        return orjson.loads(record.content)
    except orjson.JSONDecodeError as error:
        reason = f"broken JSON: {error.msg} at its character {error.pos + 1:,}"
    try:
        json.dumps(json.loads(record.content.decode()), ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8 at its byte {error.start:,}"
    except UnicodeEncodeError as error:
        reason = f"a lone surrogate, \\u{ord(error.object[error.start]):x}, which is no character and has no UTF-8"
    except (ValueError, RecursionError):
        pass
    raise ValueError(reason)


def _document(record: Any, text_field: str, id_field: str) -> Document:
    """The document in a record. Raises ValueError with why there is none."""
    if not isinstance(record, dict):
        raise ValueError(f"{_kind(record)} and not an object")
    if text_field not in record:
        raise ValueError(f"no {text_field!r}, only {', '.join(map(repr, list(record)[:8])) or 'nothing'}")
    text, name = record[text_field], record.get(id_field)
    if not isinstance(text, str):
        raise ValueError(f"{text_field!r} is {_kind(text)} and not a string")
    if (name is not None and not isinstance(name, (str, int))) or isinstance(name, bool):
        raise ValueError(f"{id_field!r} is {_kind(name)}, neither a string nor an integer")
    return Document(None if name is None else str(name), text)


def _kind(value: object) -> str:
    return next((words for kinds, words in _KINDS if isinstance(value, kinds)), type(value).__name__)


_KINDS: list[tuple[type | tuple[type, ...], str]] = [
    (type(None), "null"),
    (bool, "a boolean"),
    ((int, float), "a number"),
    (str, "a string"),
    (bytes, "invalid UTF-8"),
    (list, "an array"),
    (dict, "an object"),
]


def _position(record: Record, unit: str) -> str:
    byte = f"byte {record.offset:,}"
    return byte if record.number is None else f"{unit} {record.number:,}, {byte}"
