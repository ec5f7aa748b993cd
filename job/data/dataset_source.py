"""Documents out of the files that the `datasets` library reads, in slices of consecutive rows.

Slice k of a file holds the rows whose text starts in bytes ``[k * slice_bytes, (k + 1) * slice_bytes)`` of the UTF-8
text of all rows: that follows from the file and `slice_bytes` alone, needs no count of the rows beforehand, and bounds
a slice whether rows are lines or books. Arrow files on this machine are mapped into memory, so that passing over the
rows of other slices reads little more than their lengths. All other files can only be read from the start: each
process that makes slices of one reads, and from a URL fetches, all of it up to its last slice, and parses what it
passes over. With many processes, many files are faster than one large file.
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
from job.data.dataset_files import Rows
from job.data.dataset_library import address, cache_dir, fault, library, open_content
from job.data.documents import BadRecord, Document, Unfit, document, likely_text_field, no_text_field
from job.data.listing import CorpusFile
from job.data.parquet import column_ids, column_texts, decoded
from job.data.slices import Cursor, SliceItem

_BATCH_ROWS = 256
_CLASSES = {
    "text": "Text",
    "csv": "Csv",
    "arrow": "Arrow",
    "webdataset": "WebDataset",
    "json": "Json",
    "parquet": "Parquet",
}
_SUFFIXES = {"text": ".txt", "webdataset": ".tar", "json": ".jsonl"}
_ENCODING = "utf-8-sig"
"""UTF-8, with or without a byte order mark."""


class _Batch(NamedTuple):
    sizes: NDArray[np.int64]
    """UTF-8 bytes of the text in each row; 0 for what is no text."""
    records: Callable[[int, int], list[dict[str, Any]]]
    """The rows from one to before another."""


def row_slices(
    file: CorpusFile, slice_bytes: int, wanted: Callable[[int], bool], text_field: str, id_field: str
) -> Iterator[SliceItem]:
    """The documents of the wanted slices of a file that the library reads; see `corpus.read_slices`.

    What follows damage in a file cannot be read: it is one `BadRecord`, and the file's last slice ends there.

    Raises:
        UserError, storage.StoreError: the store or the hub refuses or fails.
    """
    assert file.rows is not None
    is_decoded_json = file.rows.builder == "webdataset"
    cursor, rows, size = Cursor(wanted), 0, 0
    yield from cursor.advance(0)
    batches = _batches(file.path, file.rows, text_field, id_field)
    try:
        while (batch := next(batches, None)) is not None:
            slices = (size + np.cumsum(batch.sizes) - batch.sizes) // slice_bytes
            first = 0
            for end in (np.flatnonzero(np.diff(slices, append=-1)) + 1).tolist():
                yield from cursor.advance(slices[first])
                if cursor.is_wanted:
                    for record in batch.records(first, end):
                        rows += 1
                        try:
                            item: SliceItem = document(record, text_field, id_field)
                            if is_decoded_json and isinstance(item, Document):
                                item.text.encode(), (item.id or "").encode()
                        except Unfit as error:
                            item = error.at(file.url, f"row {rows:,}")
                        except UnicodeEncodeError:
                            item = BadRecord(file.url, f"row {rows:,}", "a lone surrogate, which is no character")
                        yield item
                else:
                    rows += end - first
                first = end
            size += int(batch.sizes.sum())
    except Exception as error:  # the builders and what they are built on raise without any base in common
        unfit = error if isinstance(error, Unfit) else Unfit(fault(error, "read", file.url))
        if cursor.is_wanted:
            yield unfit.at(file.url, f"row {rows + 1:,} and all after it")
    yield from cursor.finish()


def _batches(path: str, rows: Rows, text_field: str, id_field: str) -> Iterator[_Batch]:
    """The rows of a file, in order."""
    fields = {text_field: text_field, id_field: id_field}
    if rows.builder == "webdataset":
        yield from _sample_batches(_stream(path, rows), text_field, id_field)
    elif rows.builder == "text":
        is_trimmed = dict(rows.options).get("sample_by") == "paragraph"
        if is_trimmed:
            _check_paragraphs(path)
        for table in _tables(_stream(path, rows, {"encoding": _ENCODING})):
            yield from _arrow_batches(table, {text_field: "text"}, trims_newlines=is_trimmed)
    elif rows.builder == "csv":
        for table in _tables(_stream(path, rows, _csv_options(path, dict(rows.options), fields))):
            yield from _arrow_batches(table, fields, is_empty_null=True)
    else:
        tables = _mapped(path) if rows.builder == "arrow" and not storage.is_remote(path) else None
        for table in _tables(_stream(path, rows)) if tables is None else tables:
            yield from _arrow_batches(table, fields)
    _check_end(path, rows.builder)


def _check_paragraphs(path: str) -> None:
    """Raise Unfit if the beginning of a large file has no empty line: all of it would be one document in memory."""
    with open_content(path) as content:
        beginning = content.read(_LONGEST_PARAGRAPH_BYTES)
    if len(beginning) == _LONGEST_PARAGRAPH_BYTES and not _EMPTY_LINE.search(beginning):
        wrong = f"no empty line, which would end a document, in {_LONGEST_PARAGRAPH_BYTES // 2**20} MiB"
        raise Unfit(f"{wrong}: set data.text_documents to line or file")


_LONGEST_PARAGRAPH_BYTES = 2**24
_EMPTY_LINE = re.compile(rb"\n\r?\n|\r\r")


def _check_end(path: str, builder: str) -> None:
    """Raise Unfit if the end of a file is missing: what is cut off between two members or batches looks whole."""
    if builder not in _ENDS or path.endswith((".gz", ".zst")):  # the compression tells
        return
    longest = max(map(len, _ENDS[builder]))
    with open_content(path) as content:
        content.seek(-min(longest, content.seek(0, io.SEEK_END)), io.SEEK_END)
        if not content.read().endswith(_ENDS[builder]):
            raise Unfit("the file is cut off here: it lacks the mark of its end")


_ENDS = {
    "webdataset": (bytes(1024),),  # two empty blocks of a tar archive
    "arrow": (b"\xff\xff\xff\xff\0\0\0\0", b"ARROW1"),  # of Arrow's stream format, and of its file format
}


def _csv_options(path: str, options: dict[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """How a CSV file is read: every value is the text that is written, as "007" is and NA.

    pandas would guess types anew for each chunk. It also takes the first column for the names of the rows where the
    first of them has more values than the header, and would misplace all values: so the header is compared to it.
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
            raise Unfit(f"there are {header.count(name)} columns {name!r}")
    names = [name if header.index(name) == at else f"column {at + 1}: {name}" for at, name in enumerate(header)]
    datasets = library()
    text = datasets.Value("string")
    return common | {"names": names, "header": 0, "features": datasets.Features(dict.fromkeys(names, text))}


def _stream(path: str, rows: Rows, options: dict[str, Any] | None = None) -> Any:
    """The library's stream of a file; `options` give way to those of the data set itself."""
    datasets = library()
    suffix = _SUFFIXES.get(rows.builder, f".{rows.builder}")
    builder = getattr(import_module(f"datasets.packaged_modules.{rows.builder}.{rows.builder}"), _CLASSES[rows.builder])
    files = datasets.data_files.DataFilesList([address(path, suffix)], [()])
    made = builder(
        cache_dir=cache_dir(),
        data_files=datasets.data_files.DataFilesDict({"train": files}),
        **((options or {}) | dict(rows.options)),
    )
    return made.as_streaming_dataset("train")


def _tables(stream: Any) -> Iterator[pa.Table]:
    return stream.with_format("arrow").iter(_BATCH_ROWS)


def _mapped(path: str) -> Iterator[pa.Table] | None:
    """The rows of a file in Arrow's stream format, mapped into memory; None if it is of another format."""
    if path.endswith((".gz", ".zst")):
        return None
    try:
        mapped = library().Dataset.from_file(str(path))
    except pa.ArrowInvalid:
        return None
    return mapped.with_format("arrow").iter(_BATCH_ROWS)


def _arrow_batches(
    table: pa.Table,
    columns: dict[str, str],
    trims_newlines: bool = False,
    is_empty_null: bool = False,
) -> Iterator[_Batch]:
    """The rows of a table, without a copy until they are asked for.

    Args:
        table: some rows.
        columns: for the fields of a record the columns that hold them: the text's first, then the id's, if any.
        trims_newlines: whether line ends around a text are no part of it.
        is_empty_null: whether an empty id is none.
    """
    text_field = next(iter(columns))
    for batch in table.to_batches():
        found = {field: column for field, name in columns.items() if (column := _column(batch, name)) is not None}
        if text_field not in found:
            sizes = {name: int(_sizes(batch.column(at)).sum()) for at, name in enumerate(batch.schema.names)}
            raise no_text_field(text_field, batch.schema.names, likely_text_field(sizes))

        def records(first: int, end: int, found: dict[str, pa.Array] = found) -> list[dict[str, Any]]:
            slices = {field: _valid(column.slice(first, end - first)) for field, column in found.items()}
            values = {
                field: column_texts(one) if field == text_field else column_ids(one) for field, one in slices.items()
            }
            rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
            for row in rows:
                if trims_newlines and isinstance(row[text_field], str):
                    row[text_field] = row[text_field].strip("\n")
                if is_empty_null:
                    row.update({field: None for field in list(row)[1:] if row[field] == ""})
            return rows

        yield _Batch(_sizes(found[text_field]), records)


def _column(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """The column of a name, or by ``column.member`` a member of one; None if there is none."""
    if name in batch.schema.names:
        return batch.column(batch.schema.names.index(name))
    outer, dot, member = name.partition(".")
    column = _column(batch, outer) if dot else None
    if column is None or not pa.types.is_struct(column.type) or column.type.get_field_index(member) < 0:
        return None
    return pc.struct_field(column, member)


def _sizes(column: pa.Array) -> NDArray[np.int64]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string_view(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(pa.large_binary())
    if not any(is_text(column.type) for is_text in _TEXT_TYPES):
        return np.zeros(len(column), np.int64)
    return pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)


_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def _valid(column: pa.Array) -> pa.Array:
    """The column, whose offsets may come from a damaged file. Text that is not UTF-8 is judged row by row."""
    raw = column
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        raw = column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())
    raw.validate(full=True)
    return column


def _sample_batches(stream: Any, text_field: str, id_field: str) -> Iterator[_Batch]:
    """The samples of a WebDataset archive; they are not cast to the types that the first five have."""
    stream.info.features = None
    samples = iter(stream)
    damage: Exception | None = None
    while damage is None:
        some: list[dict[str, Any]] = []
        try:
            some.extend(_with_members(sample, (text_field, id_field)) for sample in islice(samples, _BATCH_ROWS))
        except Exception as error:  # raised again below, after the samples that came before it
            damage = error
        if not some and damage is None:
            return
        texts = [sample.get(text_field) for sample in some]
        sizes = [len(text.encode(errors="replace")) if isinstance(text, str) else 0 for text in texts]
        yield _Batch(np.array(sizes, np.int64), lambda first, end, some=some: some[first:end])  # type: ignore[misc]
    raise damage


def _with_members(sample: dict[str, Any], fields: tuple[str, str]) -> dict[str, Any]:
    """A sample with what is asked for: members of its JSON values too, as ``json.text``, and bytes that are text."""
    asked = {}
    for field in fields:
        outer, dot, member = field.partition(".")
        inner = sample.get(outer) if dot and field not in sample else None
        if isinstance(inner, dict) and member in inner:
            asked[field] = inner[member]
        elif isinstance(value := sample.get(field), bytes):
            asked[field] = decoded(value)
    return sample | asked
