"""Bad records and damaged files are reported at their position, and the other records are kept."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import compressed, json_lines, parquet
from corpus_reading import (
    BYTES_OF,
    DOCUMENTS,
    ENDINGS,
    EXPECTED,
    CountedReader,
    corpus_file,
    read,
    read_all,
)

from job import storage
from job.data.corpus import BadRecord, CorpusFile, Document, list_corpus

BAD_RECORDS = {
    '{"text": "a", "id": 1': "invalid JSON",
    '{"text": "a"}{"text": "b"}': "invalid JSON",
    '{"text": NaN}': "'text' is a number, expected a string",
    '{"text": "a", "id": NaN}': "'id' is NaN, expected a string or a finite number",
    '{"text": "a", "id": -Infinity}': "'id' is -Infinity, expected a string or a finite number",
    '{"text": "tab\t"}': "invalid JSON",
    "hello": "invalid JSON",
    '["text"]': "an array, expected an object",
    '"text"': "a string, expected an object",
    "17": "a number, expected an object",
    '{"Text": "a", "id": 1}': "no field 'text', only 'Text', 'id'",
    "{}": "no field 'text', the record is empty",
    '{"text": null}': "'text' is null, expected a string",
    '{"text": ["a"]}': "'text' is an array, expected a string",
    '{"text": true}': "'text' is a boolean, expected a string",
    '{"text": "a", "id": false}': "'id' is a boolean, expected a string or a finite number",
    '{"text": "a", "id": {}}': "'id' is an object, expected a string or a finite number",
    '{"text": "a\\ud800b"}': r"a lone surrogate, \ud800",
    '{"text": "\udcff"}': "invalid UTF-8 at byte 10 of the record",
}


def as_bytes(bad: str) -> bytes:
    return bad.encode(errors="surrogateescape")


@pytest.mark.parametrize("ending", ENDINGS)
def test_bad_lines_are_reported_by_position_and_others_are_kept(ending, tmp_path):
    data, expected = b"", []
    for number, (bad, reason) in enumerate(BAD_RECORDS.items()):
        data += json_lines([DOCUMENTS[number]]) + b"\r\n"
        expected.append((f"line {3 * number + 3}, byte {len(data):,}", reason))
        data += as_bytes(bad) + b"\n"
    file = corpus_file(tmp_path, f"a.jsonl{ending}", compressed(data + json_lines(DOCUMENTS[-1:]), ending, members=5))
    check(file, EXPECTED[: len(BAD_RECORDS)] + EXPECTED[-1:], expected)


def test_reader_that_starts_inside_a_file_reports_only_the_byte(tmp_path):
    data = json_lines(DOCUMENTS)
    file = corpus_file(tmp_path, "a.jsonl", data + b"x\n")
    [bad] = [
        item for item in read(file, 1000, lambda index: index > 0)[len(data) // 1000] if isinstance(item, BadRecord)
    ]
    assert bad.position == f"byte {len(data):,}"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("separator", [", ", ",\n", "\n,"])
def test_bad_elements_are_reported_by_position_and_others_are_kept(separator, ending, tmp_path):
    # A record without its closing bracket swallows what follows, and two objects in a row are two records.
    bad_records = {bad: reason for bad, reason in BAD_RECORDS.items() if bad.count("{") == bad.count("}") < 2}
    data, expected = b"[", []
    for number, (bad, reason) in enumerate(bad_records.items()):
        data += json.dumps(DOCUMENTS[number]).encode() + separator.encode()
        expected.append((f"record {2 * number + 2}, byte {len(data):,}", reason))
        data += as_bytes(bad) + separator.encode()
    data += json.dumps(DOCUMENTS[-1]).encode() + b"]"
    file = corpus_file(tmp_path, f"a.json{ending}", compressed(data, ending, members=5))
    check(file, EXPECTED[: len(bad_records)] + EXPECTED[-1:], expected)


A, B = '{"text": "a"}', '{"text": "b"}'


@pytest.mark.parametrize(
    ("array", "documents", "position", "reason"),
    [
        (f"[{A}, {B}", "ab", "byte 28", "the file ends before the array is closed"),
        (f"[{A}, {B},", "ab", "byte 29", "the file ends before the array is closed"),
        (f'[{A}, {{"text": "b', "a", "record 2, byte 16", "the file ends inside this record"),
        ("[", "", "byte 0", "the file ends before the array is closed"),
        (f"[{A}, {B}, ]", "ab", "byte 29", "there is no record after this comma"),
        (f"[{A},, {B}]", "ab", "byte 15", "there is no record before this comma"),
        (f"[, {A}]", "a", "byte 1", "there is no record before this comma"),
        (f"[{A} {B}]", "ab", "byte 15", "a comma is missing before this record"),
        (f"[{A} x, {B}]", "ab", "byte 15", "a comma is missing before this record"),
        (f"[{A}, {B}}}]", "ab", "byte 29", "a comma is missing before this record"),
        (f"[{A}, {B}] ]", "ab", "byte 31", "unexpected content after the end of the array"),
        (f"[{A}]\n[{B}]", "a", "byte 16", "unexpected content after the end of the array"),
        (
            f'[\n{A},\n{{"text": "x"y"}},\n{B}\n]',
            "ab",
            "record 2, byte 17",
            "a line ends inside a string (missing quote?)",
        ),
        (
            f'[\n{A},\n{{"text": "x\n{B}\n]',
            "ab",
            "record 2, byte 17",
            "a line ends inside a string (missing quote?)",
        ),
    ],
)
def test_fault_in_an_array_is_located_and_does_not_spread(array, documents, position, reason, tmp_path):
    items = read_all(corpus_file(tmp_path, "a.json", array.encode()))
    assert [item.text for item in items if isinstance(item, Document)] == list(documents)
    first = next(item for item in items if isinstance(item, BadRecord))
    assert (first.position, first.reason) == (position, reason)


@pytest.mark.parametrize("form", [".json", ".jsonl"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_truncated_compressed_file_gives_the_records_before_the_end(form, ending, tmp_path):
    data = BYTES_OF[form](DOCUMENTS)
    whole = compressed(data, ending, members=4)
    for size in [*range(40, len(whole), len(whole) // 25), len(whole) - 1]:
        *items, last = read_all(corpus_file(tmp_path, f"a{form}{ending}", whole[:size]))
        assert items == EXPECTED[: len(items)]
        assert isinstance(last, BadRecord) and last.reason in (
            "the compressed file is cut off here",
            "the file ends before the array is closed",  # The cut is at the end of a member.
            "the file ends inside this record",
        )


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_compressed_file_is_reported(ending, tmp_path):
    whole = compressed(json_lines(DOCUMENTS), ending, members=3)
    *items, last = read_all(corpus_file(tmp_path, f"a.jsonl{ending}", whole + b"garbage"))
    assert items == EXPECTED
    assert isinstance(last, BadRecord) and last.reason.startswith("the compressed file is damaged here")
    [only] = read_all(corpus_file(tmp_path, f"b.jsonl{ending}", json_lines(DOCUMENTS)))
    assert isinstance(only, BadRecord) and only.position == "byte 0"
    assert read_all(corpus_file(tmp_path, f"c.jsonl{ending}", whole + b"\0" * 1000)) == EXPECTED


def test_bad_parquet_rows_are_reported_by_number(tmp_path):
    texts = [f"第{number}段".encode() for number in range(1000)]
    texts[123], texts[999] = b"\xff", b"a\xed\xa0\x80"
    column = pa.array([None if number == 7 else text for number, text in enumerate(texts)], pa.binary())
    pq.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "a.parquet", row_group_size=50)
    [file] = list_corpus(str(tmp_path))
    expected = [
        ("row 8", "'text' is null, expected a string"),
        ("row 124", "'text' is invalid UTF-8, expected a string"),
        ("row 1,000", "'text' is invalid UTF-8, expected a string"),
    ]
    good = [Document(None, text.decode()) for number, text in enumerate(texts) if number not in (7, 123, 999)]
    check(file, good, expected)


@pytest.mark.parametrize(
    ("data", "position", "reason"),
    [
        (parquet(DOCUMENTS)[:-100], "footer", "not a complete Parquet file"),
        (b"", "footer", "not a complete Parquet file"),
        (parquet([{"body": "a", "id": "1"}]), "rows 1 to 1", "no field 'text', only 'body', 'id'"),
        (parquet([{"text": 1.5}]), "row 1", "'text' is a number, expected a string"),
        (parquet([{"text": "a", "id": float("nan")}]), "row 1", "'id' is nan, expected a string or a finite number"),
        (parquet([{"text": "a", "id": True}]), "row 1", "'id' is a boolean, expected a string or a finite number"),
    ],
)
def test_parquet_without_documents_is_reported(data, position, reason, tmp_path):
    check(corpus_file(tmp_path, "a.parquet", data), [], [(position, reason)])


def test_damaged_row_group_does_not_affect_others(tmp_path):
    data = bytearray(parquet(DOCUMENTS, rows_per_group=100))
    middle = data.find("第150段".encode())
    assert middle < 0, "the values are compressed"
    offset = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(2).data_page_offset
    data[offset : offset + 16] = b"\xff" * 16
    file = corpus_file(tmp_path, "a.parquet", bytes(data))
    items = read_all(file)
    assert [item for item in items if isinstance(item, Document)] == EXPECTED[:100] + EXPECTED[200:]
    [bad] = [item for item in items if isinstance(item, BadRecord)]
    assert bad.position == "rows 101 to 200" and bad.reason.startswith("damaged Parquet: ")


@pytest.mark.parametrize("name", ["a.parquet", "a.json", "a.jsonl.gz"])
def test_store_failure_is_not_reported_as_a_bad_record(name, tmp_path, monkeypatch):
    form, ending = (".parquet", "") if name == "a.parquet" else (".json", ".gz" if name.endswith("gz") else "")
    file = corpus_file(tmp_path, name, compressed(BYTES_OF[form](DOCUMENTS), ending))

    class Failing(CountedReader):
        def read(self, size: int | None = -1) -> bytes:
            raise storage.StoreError("gone")

        def readinto(self, buffer: object) -> int:
            raise storage.StoreError("gone")

    monkeypatch.setattr(storage, "open_read", Failing)
    with pytest.raises(storage.StoreError, match="gone"):
        read_all(file)


def check(file: CorpusFile, good: list[Document], bad: list[tuple[str, str]]) -> None:
    """Check the documents of a file, and the position and the start of the reason of each bad record."""
    items = read_all(file)
    assert [item for item in items if isinstance(item, Document)] == good
    found = [item for item in items if isinstance(item, BadRecord)]
    assert [record.position for record in found] == [position for position, _ in bad]
    for record, (_, reason) in zip(found, bad, strict=True):
        assert record.reason.startswith(reason) and record.url == file.url
