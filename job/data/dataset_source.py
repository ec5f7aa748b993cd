"""Read documents from the files that the `datasets` library reads, in slices of consecutive rows.

Slice k of a file holds the rows whose text starts in bytes ``[k * slice_bytes, (k + 1) * slice_bytes)`` of the UTF-8
text of all rows. This rule needs only the file and `slice_bytes`, not the number of rows, and it limits the size of a
slice whether rows are lines or books.

Arrow files on this machine are mapped into memory, so skipping the rows of other slices reads little more than their
lengths. All other files can only be read from the start: each process that makes slices of such a file reads (and,
from a URL, downloads) the file up to its last slice, and parses the rows that it skips. With many processes, many small
files are faster than one large file.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from job import storage
from job.data.dataset_files import LibraryReader
from job.data.dataset_library import cache_dir, describe_error, library, library_url, open_content
from job.data.documents import (
    BadRecord,
    Document,
    RecordError,
    document_from_fields,
    likely_text_field,
    missing_text_field,
)
from job.data.file_forms import compression_by_name
from job.data.listing import CorpusFile
from job.data.parquet import column_ids, column_texts, decoded
from job.data.slices import Cursor, SliceItem

_BATCH_ROWS = 256
_BUILDER_CLASSES = {
    "text": "Text",
    "csv": "Csv",
    "arrow": "Arrow",
    "webdataset": "WebDataset",
    "json": "Json",
    "parquet": "Parquet",
}
_URL_SUFFIXES = {"text": ".txt", "webdataset": ".tar", "json": ".jsonl"}
_ENCODING = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""


class _Batch(NamedTuple):
    """Consecutive rows of a file."""

    text_sizes: NDArray[np.int64]
    """UTF-8 bytes of the text of each row, `[rows]`; 0 if it is not text."""
    records: Callable[[int, int], list[dict[str, Any]]]
    """Returns the records of the rows ``[first, end)`` of this batch."""


def row_slices(
    file: CorpusFile, slice_bytes: int, wanted: Callable[[int], bool], text_field: str, id_field: str
) -> Iterator[SliceItem]:
    """Yield the documents of the wanted slices of a file that the library reads; see `corpus.read_slices`.

    Rows after damage in a file cannot be read. They become one `BadRecord`, and the file's last slice ends there.

    Raises:
        UserError, storage.StoreError: the store or the hub refuses or fails.
    """
    assert file.library_reader is not None
    is_from_webdataset = file.library_reader.builder == "webdataset"
    cursor, rows, text_bytes = Cursor(wanted), 0, 0
    yield from cursor.advance(0)
    batches = _batches(file.path, file.library_reader, text_field, id_field)
    try:
        while (batch := next(batches, None)) is not None:
            slices = (text_bytes + np.cumsum(batch.text_sizes) - batch.text_sizes) // slice_bytes
            first = 0
            for end in (np.flatnonzero(np.diff(slices, append=-1)) + 1).tolist():
                yield from cursor.advance(slices[first])
                if cursor.is_wanted:
                    for record in batch.records(first, end):
                        rows += 1
                        position = f"row {rows:,}"
                        try:
                            item: SliceItem = document_from_fields(record, text_field, id_field)
                            if is_from_webdataset and isinstance(item, Document):
                                # The library has parsed the JSON, and lone surrogates pass its parser.
                                item.text.encode(), (item.id or "").encode()
                        except RecordError as error:
                            item = error.at(file.url, position)
                        except UnicodeEncodeError:
                            item = BadRecord(file.url, position, "a lone surrogate, which is not a character")
                        yield item
                else:
                    rows += end - first
                first = end
            text_bytes += int(batch.text_sizes.sum())
    except Exception as error:
        # The errors of the builders and of the packages below them have no base class in common.
        failure = error if isinstance(error, RecordError) else RecordError(describe_error(error, "read", file.url))
        if cursor.is_wanted:
            yield failure.at(file.url, f"row {rows + 1:,} and all after it")
    yield from cursor.finish()


def _batches(path: str, reader: LibraryReader, text_field: str, id_field: str) -> Iterator[_Batch]:
    """Yield the rows of a file, in order."""
    fields = {text_field: text_field, id_field: id_field}
    if reader.builder == "webdataset":
        yield from _sample_batches(_stream(path, reader), text_field, id_field)
    elif reader.builder == "text":
        is_paragraph = dict(reader.options).get("sample_by") == "paragraph"
        if is_paragraph:
            _check_paragraphs(path)
        for table in _tables(_stream(path, reader, {"encoding": _ENCODING})):
            yield from _arrow_batches(table, {text_field: "text"}, strip_newlines=is_paragraph)
    elif reader.builder == "csv":
        for table in _tables(_stream(path, reader, _csv_options(path, dict(reader.options), fields))):
            yield from _arrow_batches(table, fields, empty_id_is_null=True)
    else:
        mapped = _mapped_tables(path) if reader.builder == "arrow" and not storage.is_remote(path) else None
        for table in _tables(_stream(path, reader)) if mapped is None else mapped:
            yield from _arrow_batches(table, fields)
    _check_end(path, reader.builder)


def _check_paragraphs(path: str) -> None:
    """Raise RecordError if a large file starts without any empty line: it would be one document in memory."""
    with open_content(path) as content:
        beginning = content.read(_MAX_PARAGRAPH_BYTES)
    if len(beginning) == _MAX_PARAGRAPH_BYTES and not _EMPTY_LINE.search(beginning):
        fault = f"no empty line, which ends a document, within {_MAX_PARAGRAPH_BYTES // 2**20} MiB"
        raise RecordError(f"{fault}: set data.text_documents to line or file")


_MAX_PARAGRAPH_BYTES = 2**24
_EMPTY_LINE = re.compile(rb"\n\r?\n|\r\r")


def _check_end(path: str, builder: str) -> None:
    """Raise RecordError if the end marker of a file is missing.

    A file that is cut off between two archive members or record batches looks complete to the library. A truncated
    compressed file is detected when it is decompressed.
    """
    if builder not in _END_MARKERS or compression_by_name(path) is not None:
        return
    longest = max(map(len, _END_MARKERS[builder]))
    with open_content(path) as content:
        content.seek(-min(longest, content.seek(0, io.SEEK_END)), io.SEEK_END)
        if not content.read().endswith(_END_MARKERS[builder]):
            raise RecordError("the file is cut off here: its end marker is missing")


_END_MARKERS = {
    "webdataset": (bytes(1024),),  # Two empty blocks end a tar archive.
    "arrow": (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1"),  # Arrow's stream format, and Arrow's file format.
}


def _csv_options(path: str, options: dict[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Return the options to read a CSV file such that every value is the text in the file, as "007" and "NA" are.

    By default pandas guesses the types anew for each chunk. If the first row has more values than the header, pandas
    takes the first column as row names and shifts all values. To prevent this, the header and the first row are read
    without a header first, which raises an error if the row is longer.
    """
    common = {"encoding": _ENCODING, "na_filter": False, "chunksize": _BATCH_ROWS}
    if not options.keys() <= {"sep", "delimiter", "encoding"}:
        return common | {"converters": dict.fromkeys(fields, str)}
    import pandas

    separator = options.get("delimiter") or options.get("sep", ",")
    encoding = options.get("encoding") or _ENCODING
    with open_content(path) as content:
        head = pandas.read_csv(
            content, sep=separator, header=None, nrows=2, dtype=object, na_filter=False, encoding=encoding
        )
    header = [str(name) for name in head.iloc[0]]
    for name in fields:
        if header.count(name) > 1:
            raise RecordError(f"there are {header.count(name)} columns {name!r}, expected one")
    # Column names must be unique, so a name that occurs again gets its position in front.
    names = [name if header.index(name) == at else f"column {at + 1}: {name}" for at, name in enumerate(header)]
    datasets = library()
    text_type = datasets.Value("string")
    return common | {"names": names, "header": 0, "features": datasets.Features(dict.fromkeys(names, text_type))}


def _stream(path: str, reader: LibraryReader, options: dict[str, Any] | None = None) -> Any:
    """Return the library's stream of a file; the data set's own options override `options`."""
    datasets = library()
    name = reader.builder
    builder_class = getattr(import_module(f"datasets.packaged_modules.{name}.{name}"), _BUILDER_CLASSES[name])
    files = datasets.data_files.DataFilesList([library_url(path, _URL_SUFFIXES.get(name, f".{name}"))], [()])
    builder = builder_class(
        cache_dir=cache_dir(),
        data_files=datasets.data_files.DataFilesDict({"train": files}),
        **((options or {}) | dict(reader.options)),
    )
    return builder.as_streaming_dataset("train")


def _tables(stream: Any) -> Iterator[pa.Table]:
    return stream.with_format("arrow").iter(_BATCH_ROWS)


def _mapped_tables(path: str) -> Iterator[pa.Table] | None:
    """Return the rows of a file in Arrow's stream format, mapped into memory; None if it has another format."""
    if compression_by_name(path) is not None:
        return None
    try:
        mapped = library().Dataset.from_file(str(path))
    except pa.ArrowInvalid:
        return None
    return mapped.with_format("arrow").iter(_BATCH_ROWS)


def _arrow_batches(
    table: pa.Table,
    columns: dict[str, str],
    strip_newlines: bool = False,
    empty_id_is_null: bool = False,
) -> Iterator[_Batch]:
    """Yield the rows of a table; values are copied only when records are requested.

    Args:
        table: rows of a file.
        columns: the column of each field of a record: first the text field, then the id field, if any.
        strip_newlines: whether to remove line ends around a text.
        empty_id_is_null: whether an empty id counts as no id.
    """
    text_field = next(iter(columns))
    for batch in table.to_batches():
        arrays = {field: array for field, name in columns.items() if (array := _column(batch, name)) is not None}
        if text_field not in arrays:
            sizes = {name: int(_text_sizes(batch.column(at)).sum()) for at, name in enumerate(batch.schema.names)}
            raise missing_text_field(text_field, batch.schema.names, likely_text_field(sizes))

        def records(first: int, end: int, arrays: dict[str, pa.Array] = arrays) -> list[dict[str, Any]]:
            slices = {field: _validated(array.slice(first, end - first)) for field, array in arrays.items()}
            values = {
                field: column_texts(array) if field == text_field else column_ids(array)
                for field, array in slices.items()
            }
            rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
            for row in rows:
                if strip_newlines and isinstance(row[text_field], str):
                    row[text_field] = row[text_field].strip("\n")
                if empty_id_is_null:
                    row.update({field: None for field in list(row)[1:] if row[field] == ""})
            return rows

        yield _Batch(_text_sizes(arrays[text_field]), records)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """Return a column by name, or the member of a struct column by ``column.member``; None if there is none."""
    if name in batch.schema.names:
        return batch.column(batch.schema.names.index(name))
    outer, dot, member = name.partition(".")
    column = _column(batch, outer) if dot else None
    if column is None or not pa.types.is_struct(column.type) or column.type.get_field_index(member) < 0:
        return None
    return pc.struct_field(column, member)


def _text_sizes(column: pa.Array) -> NDArray[np.int64]:
    """Return the bytes of each value of a column, `[rows]`; all 0 if it is not a column of text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    if not any(is_text(column.type) for is_text in _TEXT_TYPE_TESTS):
        return np.zeros(len(column), np.int64)
    return pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


_TEXT_TYPE_TESTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _validated(column: pa.Array) -> pa.Array:
    """Return the column after a check of its offsets, which may come from a damaged file.

    Text is checked as bytes, because text that is not UTF-8 is reported row by row later.
    """
    raw = column
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    raw.validate(full=True)
    return column


def _sample_batches(stream: Any, text_field: str, id_field: str) -> Iterator[_Batch]:
    """Yield the samples of a WebDataset archive, without casting them to the types of the first five samples."""
    stream.info.features = None
    samples = iter(stream)
    damage: Exception | None = None
    while damage is None:
        records: list[dict[str, Any]] = []
        try:
            records.extend(_with_members(sample, (text_field, id_field)) for sample in islice(samples, _BATCH_ROWS))
        except Exception as error:
            # The error is raised below, after the samples that precede it.
            damage = error
        if not records and damage is None:
            return
        texts = [record.get(text_field) for record in records]
        sizes = [len(text.encode(errors="replace")) if isinstance(text, str) else 0 for text in texts]
        yield _Batch(np.array(sizes, np.int64), lambda first, end, records=records: records[first:end])  # type: ignore[misc]
    raise damage


def _with_members(sample: dict[str, Any], fields: tuple[str, str]) -> dict[str, Any]:
    """Return a sample with the values of `fields`: also members of its JSON, as ``json.text``, and decoded bytes."""
    values = {}
    for field in fields:
        outer, dot, member = field.partition(".")
        inner = sample.get(outer) if dot and field not in sample else None
        if isinstance(inner, dict) and member in inner:
            values[field] = inner[member]
        elif isinstance(value := sample.get(field), bytes):
            values[field] = decoded(value)
    return sample | values
