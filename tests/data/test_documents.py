"""Records become documents: only the text and the id are checked, and errors say what to do."""

import datetime
import decimal
import io
import json
import math
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import compressed, json_lines

from job.data.corpus import BadRecord, Document, list_corpus, read_slices
from job.data.documents import likely_text_field
from job.data.recipe import Recipe
from job.errors import UserError

MARK = b"\xef\xbb\xbf"


def read(path: Path, content: bytes, text_field: str = "text", slice_bytes: int = 2**20) -> list[Any]:
    """Write a file, and return its documents and bad records."""
    path.write_bytes(content)
    (file,) = list_corpus(str(path))
    items = read_slices(file, slice_bytes, lambda index: True, text_field, "id")
    return [item for item in items if isinstance(item, Document | BadRecord)]


# ---- Ids ----


@pytest.mark.parametrize(
    "literal",
    [
        *("0", "-0", "7", "1.5", "1.50", "1e5", "1E+5", "-0.0", "0.1000000000000000055511151231257827"),
        *("123456789012345678901234567890", "-9223372036854775809", "18446744073709551616", "1e999"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_number_id_is_kept_as_written_in_the_file(literal: str, name: str, tmp_path: Path) -> None:
    record = f'{{"id": {literal}, "text": "a"}}'
    content = f"[{record}]" if name == "a.json" else f"{record}\n"
    assert read(tmp_path / name, content.encode()) == [Document(literal, "a")]


UUID = uuid.UUID("0123456789abcdef0123456789abcdef")
MOMENT = datetime.datetime(2026, 1, 31, 12, 30, 5)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1.0, 1.5, 1e16], pa.float64(), ["1.0", "1.5", "1e+16"]),
        ([np.float32(0.1)], pa.float32(), ["0.1"]),
        ([np.float16(0.1)], pa.float16(), ["0.1"]),
        ([2**64 - 1], pa.uint64(), ["18446744073709551615"]),
        ([decimal.Decimal("1.50")], pa.decimal128(10, 2), ["1.50"]),
        ([decimal.Decimal("12345678901234567890123456789")], pa.decimal128(29, 0), ["12345678901234567890123456789"]),
        ([datetime.date(2026, 1, 31)], pa.date32(), ["2026-01-31"]),
        ([MOMENT], pa.timestamp("us"), ["2026-01-31 12:30:05.000000"]),
        ([MOMENT], pa.timestamp("ns", "UTC"), ["2026-01-31 12:30:05.000000000Z"]),
        ([datetime.time(1, 2, 3)], pa.time32("ms"), ["01:02:03.000"]),
        ([datetime.timedelta(seconds=2)], pa.duration("ms"), ["2000"]),
        ([UUID.bytes], pa.uuid(), [str(UUID)]),
        ([b"\xff\x00"], pa.binary(), ["ff00"]),
        (["a", None], pa.dictionary(pa.int8(), pa.string()), ["a", None]),
        ([None], pa.null(), [None]),
        ([None, 1], pa.int64(), [None, "1"]),
    ],
)
def test_parquet_scalar_becomes_an_id(
    values: list[Any], kind: pa.DataType, expected: list[str], tmp_path: Path
) -> None:
    file = io.BytesIO()
    ids = pa.array(values, kind)
    pq.write_table(pa.table({"id": ids, "text": ["a"] * len(values)}), file)
    documents = read(tmp_path / "a.parquet", file.getvalue())
    assert [document.id for document in documents] == expected


@pytest.mark.parametrize("value", ["false", "NaN", "-Infinity", "[1]", "{}"])
def test_invalid_id_error_names_the_setting(value: str, tmp_path: Path) -> None:
    (bad,) = read(tmp_path / "a.jsonl", f'{{"text": "a", "id": {value}}}\n'.encode())
    with pytest.raises(UserError) as raised:
        Recipe("", "text", "id", "stop", 1024, 0, 1).tolerate(bad)
    assert raised.value.setting == "data.id_field"
    assert "expected a string or a finite number; set data.id_field to another field" in str(raised.value)


@pytest.mark.parametrize("value", [True, math.nan, math.inf, [1], {"a": 1}])
def test_invalid_parquet_id_is_reported(value: object, tmp_path: Path) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": pa.array([value]), "text": ["a"]}), file)
    (bad,) = read(tmp_path / "a.parquet", file.getvalue())
    assert (bad.position, bad.setting) == ("row 1", "data.id_field")


# ---- Other fields ----

VALID = b'{"id": "1", "text": "a\\tb"}'


@pytest.mark.parametrize(
    "field",
    [
        *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b'[NaN, {"a": NaN}]', b'"\\ud800"', b'"\xff\xfe"'),
        *(b'"tab\there"', b'"\\"\x01\\\\"', b'"\xed\xa0\x80"', b"1" * 5000),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_invalid_value_in_another_field_keeps_the_document(field: bytes, name: str, tmp_path: Path) -> None:
    record = VALID.replace(b"}", b', "other": ' + field + b"}")
    content = b"[" + record + b"]" if name == "a.json" else record
    assert read(tmp_path / name, content) == [Document("1", "a\tb")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"text": "\\ud800", "other": NaN}', "a lone surrogate, \\ud800"),
        (b'{"text": "a", "id": "\\ud800", "other": NaN}', "a lone surrogate, \\ud800"),
        (b'{"text": "\xff", "other": NaN}', "invalid UTF-8 at byte 10 of the record"),
        (b'{"text": "a\tb", "other": NaN}', "invalid JSON: the control character \\x09"),
        (b'{"text": "a", "other": NaN', "invalid JSON"),
        (b'{"text": "a", "other": nan}', "invalid JSON"),
    ],
)
def test_fault_in_text_is_reported_despite_one_in_another_field(record: bytes, reason: str, tmp_path: Path) -> None:
    (bad,) = read(tmp_path / "a.jsonl", record)
    assert bad.reason.startswith(reason)


def test_error_for_a_file_in_gbk_says_how_to_convert_it(tmp_path: Path) -> None:
    (bad,) = read(tmp_path / "a.jsonl", '{"text": "长江"}'.encode("gbk"))
    assert bad.reason == "invalid UTF-8 at byte 10 of the record" and "iconv -f gb18030 -t utf-8" in bad.remedy


# ---- Byte order marks ----


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("slice_bytes", [7, 40, 2**20])
def test_byte_order_marks_are_ignored(ending: str, slice_bytes: int, tmp_path: Path) -> None:
    """Joins files that start with the mark, one of which holds nothing else."""
    records = [{"id": str(number), "text": "段"} for number in range(6)]
    members = [MARK + json_lines(records[:3]), MARK + b"\n", MARK + b"\r\n" + MARK + json_lines(records[3:])]
    content = b"".join(compressed(member, ending) for member in members)
    expected = [Document(record["id"], record["text"]) for record in records]
    assert read(tmp_path / f"a.jsonl{ending}", content, slice_bytes=slice_bytes) == expected


@pytest.mark.parametrize("between", [b",", b",\n", b" ,\n "])
def test_byte_order_marks_inside_an_array_are_ignored(between: bytes, tmp_path: Path) -> None:
    content = MARK + MARK + b"[" + VALID + between + MARK + VALID + MARK + b"]" + MARK
    assert read(tmp_path / "a.json", content) == [Document("1", "a\tb")] * 2


# ---- The text field ----


@pytest.mark.parametrize(
    ("record", "likely"),
    [
        ({"id": "1" * 99, "title": "标题", "content": "正"}, "content"),
        ({"raw_content": "a", "url": "https://example.org/long"}, "raw_content"),
        ({"正文": "a", "标题": "比正文长"}, "正文"),
        ({"Text": "a", "summary": "longer"}, "Text"),
        ({"title": "short", "story": "the longest one", "length": 7}, "story"),
    ],
)
@pytest.mark.parametrize("form", ["json", "parquet"])
def test_wrong_text_field_error_names_the_likely_field(
    record: dict[str, Any], likely: str, form: str, tmp_path: Path
) -> None:
    if form == "json":
        (bad,) = read(tmp_path / "a.jsonl", json.dumps(record).encode())
    else:
        file = io.BytesIO()
        pq.write_table(pa.table({name: [value] * 50 for name, value in record.items()}), file, use_dictionary=False)
        (bad,) = read(tmp_path / "a.parquet", file.getvalue())
    assert bad.reason == f"no field 'text', only {', '.join(map(repr, record))}"
    with pytest.raises(UserError) as raised:
        Recipe("", "text", "id", "stop", 1024, 0, 1).tolerate(bad)
    assert (raised.value.setting, raised.value.value) == ("data.text_field", "text")
    assert f"; set data.text_field to {likely} if that is the text; otherwise fix the record, or" in str(raised.value)


def test_error_shortens_a_long_list_of_fields(tmp_path: Path) -> None:
    (bad,) = read(tmp_path / "a.jsonl", json.dumps({f"f{number}": 1 for number in range(20)}).encode())
    assert bad.reason == "no field 'text', only 'f0', 'f1', 'f2', 'f3', 'f4', 'f5', 'f6', 'f7' and 12 more"
    assert bad.remedy == ""


def test_empty_field_is_never_the_likely_text_field() -> None:
    assert likely_text_field({"text": 0, "title": 3}) == "title"
    assert likely_text_field({"text": 0}) is None


@pytest.mark.parametrize(("column", "setting"), [("text", "data.text_field"), ("id", "data.id_field")])
def test_duplicate_column_is_reported(column: str, setting: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    other = {"text": "id", "id": "text"}[column]
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=[column, column, other]), file)
    (bad,) = read(tmp_path / "a.parquet", file.getvalue())
    assert (bad.position, bad.reason, bad.setting) == (
        "rows 1 to 1",
        f"there are 2 columns {column!r}, expected one",
        setting,
    )


def test_duplicate_of_an_unused_column_is_ignored(tmp_path: Path) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "tag", "tag"]), file)
    assert read(tmp_path / "a.parquet", file.getvalue()) == [Document(None, "a")]
