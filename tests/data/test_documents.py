"""Only a record's text and id are judged, any scalar is an id, and a message names what helps."""

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
from job.data.prepare import Recipe
from job.errors import UserError

MARK = b"\xef\xbb\xbf"


def read(path: Path, content: bytes, text_field: str = "text", slice_bytes: int = 2**20) -> list[Any]:
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
def test_number_is_an_id_as_it_stands_in_the_file(literal: str, name: str, tmp_path: Path) -> None:
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
def test_scalar_of_parquet_is_an_id(values: list[Any], kind: pa.DataType, expected: list[str], tmp_path: Path) -> None:
    file = io.BytesIO()
    ids = pa.array(values, kind)
    pq.write_table(pa.table({"id": ids, "text": ["a"] * len(values)}), file)
    found = read(tmp_path / "a.parquet", file.getvalue())
    assert [one.id for one in found] == expected


@pytest.mark.parametrize("value", ["false", "NaN", "-Infinity", "[1]", "{}"])
def test_message_about_an_id_names_the_setting(value: str, tmp_path: Path) -> None:
    (bad,) = read(tmp_path / "a.jsonl", f'{{"text": "a", "id": {value}}}\n'.encode())
    with pytest.raises(UserError) as raised:
        Recipe("", "text", "id", "stop", 1024, 0, 1).tolerate(bad)
    assert raised.value.setting == "data.id_field"
    assert "names no document; name another field in data.id_field" in str(raised.value)


@pytest.mark.parametrize("value", [True, math.nan, math.inf, [1], {"a": 1}])
def test_parquet_id_that_names_nothing_is_told_of(value: object, tmp_path: Path) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": pa.array([value]), "text": ["a"]}), file)
    (bad,) = read(tmp_path / "a.parquet", file.getvalue())
    assert (bad.position, bad.setting) == ("row 1", "data.id_field")


# ---- Other fields ----

SOUND = b'{"id": "1", "text": "a\\tb"}'


@pytest.mark.parametrize(
    "field",
    [
        *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b'[NaN, {"a": NaN}]', b'"\\ud800"', b'"\xff\xfe"'),
        *(b'"tab\there"', b'"\\"\x01\\\\"', b'"\xed\xa0\x80"', b"1" * 5000),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_what_another_field_holds_costs_no_document(field: bytes, name: str, tmp_path: Path) -> None:
    record = SOUND.replace(b"}", b', "other": ' + field + b"}")
    content = b"[" + record + b"]" if name == "a.json" else record
    assert read(tmp_path / name, content) == [Document("1", "a\tb")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"text": "\\ud800", "other": NaN}', "a lone surrogate, \\ud800"),
        (b'{"text": "a", "id": "\\ud800", "other": NaN}', "a lone surrogate, \\ud800"),
        (b'{"text": "\xff", "other": NaN}', "invalid UTF-8 at its byte 10"),
        (b'{"text": "a\tb", "other": NaN}', "broken JSON: the control character \\x09"),
        (b'{"text": "a", "other": NaN', "broken JSON"),
        (b'{"text": "a", "other": nan}', "broken JSON"),
    ],
)
def test_fault_of_the_text_is_told_beside_one_of_another_field(record: bytes, reason: str, tmp_path: Path) -> None:
    (bad,) = read(tmp_path / "a.jsonl", record)
    assert bad.reason.startswith(reason)


def test_file_that_is_not_utf8_says_how_to_convert_it(tmp_path: Path) -> None:
    (bad,) = read(tmp_path / "a.jsonl", '{"text": "长江"}'.encode("gbk"))
    assert bad.reason == "invalid UTF-8 at its byte 10" and "iconv -f gb18030 -t utf-8" in bad.remedy


# ---- Byte order marks ----


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("slice_bytes", [7, 40, 2**20])
def test_byte_order_mark_costs_no_document(ending: str, slice_bytes: int, tmp_path: Path) -> None:
    """Files that begin with one, one behind the other; also one of nothing but the mark."""
    records = [{"id": str(number), "text": "段"} for number in range(6)]
    members = [MARK + json_lines(records[:3]), MARK + b"\n", MARK + b"\r\n" + MARK + json_lines(records[3:])]
    content = b"".join(compressed(member, ending) for member in members)
    expected = [Document(one["id"], one["text"]) for one in records]
    assert read(tmp_path / f"a.jsonl{ending}", content, slice_bytes=slice_bytes) == expected


@pytest.mark.parametrize("between", [b",", b",\n", b" ,\n "])
def test_byte_order_mark_inside_an_array_costs_no_document(between: bytes, tmp_path: Path) -> None:
    content = MARK + MARK + b"[" + SOUND + between + MARK + SOUND + MARK + b"]" + MARK
    assert read(tmp_path / "a.json", content) == [Document("1", "a\tb")] * 2


# ---- The field of the text ----


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
def test_wrong_text_field_names_the_likely_one(record: dict[str, Any], likely: str, form: str, tmp_path: Path) -> None:
    if form == "json":
        (bad,) = read(tmp_path / "a.jsonl", json.dumps(record).encode())
    else:
        file = io.BytesIO()
        pq.write_table(pa.table({name: [value] * 50 for name, value in record.items()}), file, use_dictionary=False)
        (bad,) = read(tmp_path / "a.parquet", file.getvalue())
    assert bad.reason == f"no 'text', only {', '.join(map(repr, record))}"
    with pytest.raises(UserError) as raised:
        Recipe("", "text", "id", "stop", 1024, 0, 1).tolerate(bad)
    assert (raised.value.setting, raised.value.value) == ("data.text_field", "text")
    assert f"; set data.text_field to {likely} if that is the text; else mend it, or" in str(raised.value)


def test_many_fields_are_shortened(tmp_path: Path) -> None:
    (bad,) = read(tmp_path / "a.jsonl", json.dumps({f"f{number}": 1 for number in range(20)}).encode())
    assert bad.reason == "no 'text', only 'f0', 'f1', 'f2', 'f3', 'f4', 'f5', 'f6', 'f7' and 12 more"
    assert bad.remedy == ""


def test_empty_fields_are_never_likely() -> None:
    assert likely_text_field({"text": 0, "title": 3}) == "title"
    assert likely_text_field({"text": 0}) is None


@pytest.mark.parametrize(("column", "setting"), [("text", "data.text_field"), ("id", "data.id_field")])
def test_column_that_stands_twice_is_told_of(column: str, setting: str, tmp_path: Path) -> None:
    file = io.BytesIO()
    other = {"text": "id", "id": "text"}[column]
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=[column, column, other]), file)
    (bad,) = read(tmp_path / "a.parquet", file.getvalue())
    assert (bad.position, bad.reason, bad.setting) == ("rows 1 to 1", f"there are 2 columns {column!r}", setting)


def test_other_column_that_stands_twice_costs_no_document(tmp_path: Path) -> None:
    file = io.BytesIO()
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["text", "tag", "tag"]), file)
    assert read(tmp_path / "a.parquet", file.getvalue()) == [Document(None, "a")]
