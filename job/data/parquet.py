"""Read documents from Parquet files: a slice is a number of consecutive row groups, and only two columns are read.

An id may be of any scalar type and becomes text as Python writes it: an integer in decimal digits, a float in the
fewest digits that identify it, a decimal with all its digits, a date as 2026-01-31, a UUID with hyphens, bytes that are
not UTF-8 in hexadecimal. Times and timestamps are written as Arrow writes them. Null, booleans, NaN and Infinity are
treated as in JSON.
"""

import math
import uuid
from collections.abc import Callable, Iterator
from datetime import date
from decimal import Decimal
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from job.data.documents import (
    BadRecord,
    Document,
    RecordError,
    document_from_fields,
    likely_text_field,
    missing_text_field,
)
from job.errors import one_line

_READ_BYTES = 2**21
_MIN_BATCH_ROWS, _MAX_BATCH_ROWS = 1, 1024

Slices = Iterator[tuple[int, bool, Iterator[Document | BadRecord]]]


def slices(
    source: BinaryIO, url: str, slice_bytes: int, wanted: Callable[[int], bool], text_field: str, id_field: str
) -> Slices:
    """Yield (index, is it the last slice, documents) of each wanted slice of a file.

    Args:
        source: the open file.
        url: its name, for error messages.
        slice_bytes: minimum size of the values of both columns in a slice, as recorded in the footer.
        wanted: tells whether to read a slice; called once for each slice, in order.
        text_field: column of the text.
        id_field: column of the id, which may be missing.
    """
    try:
        table = pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        _raise_unless_damaged(error)
        if wanted(0):
            yield 0, True, iter([BadRecord(url, "footer", f"not a complete Parquet file: {one_line(str(error))}")])
        return
    groups = _row_groups_by_slice(table.metadata, slice_bytes, {text_field, id_field})
    for index, slice_groups in enumerate(groups):
        if wanted(index):
            documents = (
                document
                for group, first_row in slice_groups
                for document in _group_documents(table, group, first_row, url, text_field, id_field)
            )
            yield index, index == len(groups) - 1, documents


def _row_groups_by_slice(footer: pq.FileMetaData, slice_bytes: int, columns: set[str]) -> list[list[tuple[int, int]]]:
    """Return for each slice its row groups, each as (index, number of rows before it)."""
    slices: list[list[tuple[int, int]]] = [[]]
    size = first_row = 0
    for index in range(footer.num_row_groups):
        if size >= slice_bytes:
            slices.append([])
            size = 0
        group = footer.row_group(index)
        slices[-1].append((index, first_row))
        size += sum(_column_bytes(group, columns).values())
        first_row += group.num_rows
    return slices


def text_bytes(source: BinaryIO, text_field: str) -> int:
    """Return the uncompressed bytes of the text column of a file, as recorded in the footer; 0 if there is none."""
    footer = pq.ParquetFile(source, pre_buffer=False).metadata
    groups = map(footer.row_group, range(footer.num_row_groups))
    return sum(sum(_column_bytes(group, {text_field}).values()) for group in groups)


def _column_bytes(group: pq.RowGroupMetaData, columns: set[str]) -> dict[str, int]:
    """Return the uncompressed size in bytes of each of these columns in a row group."""
    all_columns = (group.column(index) for index in range(group.num_columns))
    return {
        column.path_in_schema: column.total_uncompressed_size
        for column in all_columns
        if column.path_in_schema in columns
    }


def _group_documents(
    table: pq.ParquetFile, group_index: int, first_row: int, url: str, text_field: str, id_field: str
) -> Iterator[Document | BadRecord]:
    """Yield the documents of a row group, read in batches of about `_READ_BYTES`."""
    group = table.metadata.row_group(group_index)
    last_row = first_row + group.num_rows
    row = first_row
    try:
        columns = _columns_to_read(table.schema_arrow, group, text_field, id_field)
        row_bytes = max(1, sum(_column_bytes(group, set(columns)).values()) // max(1, group.num_rows))
        batch_rows = min(_MAX_BATCH_ROWS, max(_MIN_BATCH_ROWS, _READ_BYTES // row_bytes))
        for batch in table.iter_batches(batch_rows, [group_index], columns, use_threads=False):
            texts = column_texts(batch.column(text_field))
            ids = column_ids(batch.column(id_field)) if id_field in columns else [None] * len(texts)
            for text, document_id in zip(texts, ids, strict=True):
                row += 1
                if type(text) is str and (type(document_id) is str or document_id is None):
                    yield Document(document_id, text)
                    continue
                try:
                    yield document_from_fields({text_field: text, id_field: document_id}, text_field, id_field)
                except RecordError as error:
                    yield error.at(url, f"row {row:,}")
    except RecordError as error:
        yield error.at(url, f"rows {row + 1:,} to {last_row:,}")
    except (pa.ArrowException, OSError) as error:
        _raise_unless_damaged(error)
        yield BadRecord(url, f"rows {row + 1:,} to {last_row:,}", f"damaged Parquet: {one_line(str(error))}")


def _columns_to_read(schema: pa.Schema, group: pq.RowGroupMetaData, text_field: str, id_field: str) -> list[str]:
    """Return the columns to read. Raises RecordError if there is no text column, or two columns of one name."""
    if text_field not in schema.names:
        strings = {field.name for field in schema if _is_text(field.type) and field.name != id_field}
        raise missing_text_field(text_field, schema.names, likely_text_field(_column_bytes(group, strings)))
    names = [name for name in dict.fromkeys((text_field, id_field)) if name in schema.names]
    for name in names:
        if (count := schema.names.count(name)) > 1:
            setting = "data.text_field" if name == text_field else "data.id_field"
            remedy = f"rename them in the file, or set {setting} to another column"
            raise RecordError(f"there are {count} columns {name!r}, expected one", setting, remedy)
    return names


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in (*tests, pa.types.is_binary, pa.types.is_large_binary))


def column_texts(column: pa.Array) -> list[Any]:
    """Return the values of a column; bytes become text if they are UTF-8.

    Some writers store text as bytes, without a string type.
    """
    return [decoded(value) if isinstance(value, bytes) else value for value in _values(column)]


def _values(column: pa.Array) -> list[Any]:
    """Return the values of a column; if any text in it is not valid UTF-8, all its values are returned as bytes."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return values


def decoded(value: bytes) -> str | bytes:
    """Return bytes as text if they are UTF-8, otherwise unchanged."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def column_ids(column: pa.Array) -> list[Any]:
    """Return the values of a column as ids in text form; a value that cannot be an id is returned unchanged."""
    if _is_text(column.type):
        return [value.hex() if isinstance(value, bytes) else value for value in column_texts(column)]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_temporal(kind) and not pa.types.is_date(kind):
        text_type = pa.int64() if pa.types.is_duration(kind) else pa.string()
        return [None if value is None else str(value) for value in _values(column.cast(text_type))]
    # As a Python float, a narrower float would be written with more digits than it has.
    narrow_float = {"halffloat": np.float16, "float": np.float32}.get(str(kind))
    return [
        _id_text(value if narrow_float is None or value is None else narrow_float(value)) for value in _values(column)
    ]


def _id_text(value: Any) -> Any:
    match value:
        case bool():
            return value
        case np.floating() | float():
            return str(value) if math.isfinite(value) else float(value)
        case Decimal():
            return format(value, "f")
        case bytes():
            text = decoded(value)
            return text if isinstance(text, str) else value.hex()
        case int() | uuid.UUID():
            return str(value)
        case date():
            return value.isoformat()
    return value


def _raise_unless_damaged(error: Exception) -> None:
    """Raise an error that is not about the content of the file.

    For damaged content pyarrow raises an ArrowException, or an OSError without an errno.
    """
    of_arrow = isinstance(error, pa.ArrowException) and not isinstance(error, MemoryError)
    if not of_arrow and not (type(error) is OSError and error.errno is None):
        raise error
