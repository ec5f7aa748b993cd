"""Documents out of Parquet files: consecutive row groups make a slice, and only the two columns are read.

An id may be of any scalar type; what it is as text is Python's: an integer in decimal digits, a float by the shortest
digits that give it back, a decimal with all its digits, a date as 2026-01-31, a UUID with hyphens, bytes that are no
UTF-8 in hexadecimal. Times and timestamps are as Arrow writes them. Null, booleans, NaN and Infinity are as in JSON.
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

from job.data.documents import BadRecord, Document, Unfit, document, likely_text_field, no_text_field
from job.errors import one_line

_READ_BYTES = 2**21
_LEAST_ROWS, _MOST_ROWS = 1, 1024

Slices = Iterator[tuple[int, bool, Iterator[Document | BadRecord]]]


def slices(
    source: BinaryIO, url: str, slice_bytes: int, wanted: Callable[[int], bool], text_field: str, id_field: str
) -> Slices:
    """Number, whether it is the last, and documents of each wanted slice of a file.

    Args:
        source: the open file.
        url: its name.
        slice_bytes: least size of the values of both columns in a slice, as the footer has it.
        wanted: asked once for each slice, in order.
        text_field: column of the text.
        id_field: column of the id, which need not be there.
    """
    try:
        table = pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        _raise_unless_damage(error)
        if wanted(0):
            yield 0, True, iter([BadRecord(url, "footer", f"not a whole Parquet file: {one_line(str(error))}")])
        return
    groups = _row_groups(table.metadata, slice_bytes, {text_field, id_field})
    for index, slice_groups in enumerate(groups):
        if wanted(index):
            documents = (
                one
                for group, first_row in slice_groups
                for one in _group_documents(table, group, first_row, url, text_field, id_field)
            )
            yield index, index == len(groups) - 1, documents


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
        size += sum(_column_bytes(group, columns).values())
        first_row += group.num_rows
    return slices


def _column_bytes(group: pq.RowGroupMetaData, columns: set[str]) -> dict[str, int]:
    """Bytes of the values of these columns in a row group."""
    found = (group.column(index) for index in range(group.num_columns))
    return {one.path_in_schema: one.total_uncompressed_size for one in found if one.path_in_schema in columns}


def _group_documents(
    table: pq.ParquetFile, group: int, first_row: int, url: str, text_field: str, id_field: str
) -> Iterator[Document | BadRecord]:
    """The documents of a row group, read in batches of about `_READ_BYTES`."""
    described = table.metadata.row_group(group)
    last_row = first_row + described.num_rows
    columns = list(dict.fromkeys((text_field, id_field)))
    row = first_row
    try:
        columns = _columns(table.schema_arrow, described, text_field, id_field)
        row_bytes = max(1, sum(_column_bytes(described, set(columns)).values()) // max(1, described.num_rows))
        batch_rows = min(_MOST_ROWS, max(_LEAST_ROWS, _READ_BYTES // row_bytes))
        for batch in table.iter_batches(batch_rows, [group], columns, use_threads=False):
            texts = column_texts(batch.column(text_field))
            ids = column_ids(batch.column(id_field)) if id_field in columns else [None] * len(texts)
            for text, name in zip(texts, ids, strict=True):
                row += 1
                if type(text) is str and (type(name) is str or name is None):
                    yield Document(name, text)
                    continue
                try:
                    yield document({text_field: text, id_field: name}, text_field, id_field)
                except Unfit as error:
                    yield error.at(url, f"row {row:,}")
    except Unfit as error:
        yield error.at(url, f"rows {row + 1:,} to {last_row:,}")
    except (pa.ArrowException, OSError) as error:
        _raise_unless_damage(error)
        yield BadRecord(url, f"rows {row + 1:,} to {last_row:,}", f"damaged Parquet: {one_line(str(error))}")


def _columns(schema: pa.Schema, group: pq.RowGroupMetaData, text_field: str, id_field: str) -> list[str]:
    """The columns to read. Raises Unfit if there is none for the text, or one stands twice."""
    if text_field not in schema.names:
        strings = {one.name for one in schema if _is_text(one.type) and one.name != id_field}
        raise no_text_field(text_field, schema.names, likely_text_field(_column_bytes(group, strings)))
    found = [name for name in dict.fromkeys((text_field, id_field)) if name in schema.names]
    for name in found:
        if (count := schema.names.count(name)) > 1:
            setting = "data.text_field" if name == text_field else "data.id_field"
            remedy = "rename one of them in the file, or name another column"
            raise Unfit(f"there are {count} columns {name!r}", setting, remedy)
    return found


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in (*tests, pa.types.is_binary, pa.types.is_large_binary))


def column_texts(column: pa.Array) -> list[Any]:
    """The values of a column. Bytes are text where they are UTF-8, as writers that name no string type mean them."""
    return [decoded(value) if isinstance(value, bytes) else value for value in _values(column)]


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = column.cast(pa.large_binary()).to_pylist()
    return values


def decoded(value: bytes) -> str | bytes:
    """Bytes as text if they are UTF-8, else as they are."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def column_ids(column: pa.Array) -> list[Any]:
    """The values of a column as the text of ids; what names no document is left as it is."""
    if _is_text(column.type):
        return [value.hex() if isinstance(value, bytes) else value for value in column_texts(column)]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_temporal(kind) and not pa.types.is_date(kind):
        whole = pa.types.is_duration(kind)
        return [None if one is None else str(one) for one in _values(column.cast(pa.int64() if whole else pa.string()))]
    narrow = {"halffloat": np.float16, "float": np.float32}.get(str(kind))
    return [_id(value if narrow is None or value is None else narrow(value)) for value in _values(column)]


def _id(value: Any) -> Any:
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


def _raise_unless_damage(error: Exception) -> None:
    """Raises what is not about the file's content. pyarrow says that with OSErrors of its own, which have no number."""
    of_arrow = isinstance(error, pa.ArrowException) and not isinstance(error, MemoryError)
    if not of_arrow and not (type(error) is OSError and error.errno is None):
        raise error
