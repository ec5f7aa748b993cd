"""What must hold of the corpus: the same documents whatever the form, each in one slice, every fault where it is."""

import io
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import Fields, compressed, json_array, json_lines, local_hub, parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job import storage
from job.data.corpus import BadRecord, CorpusFile, Document, SliceEnd, SliceStart, list_corpus, read_slices
from job.errors import UserError

DOCUMENTS: list[Fields] = [
    {"id": str(number), "title": f"标题{number}", "text": f'第{number}段,\n"引号" {{[\\]}} 𝄞 ' * (number % 7)}
    for number in range(300)
]
EXPECTED = [Document(one["id"], one["text"]) for one in DOCUMENTS]
ENDINGS = ["", ".gz", ".zst"]
BYTES_OF: dict[str, Callable[[Sequence[Fields]], bytes]] = {
    ".json": json_array,
    ".jsonl": json_lines,
    ".parquet": parquet,
}


def read(
    file: CorpusFile, slice_bytes: int = 2**20, wanted: Callable[[int], bool] = lambda index: True
) -> dict[int, list[Document | BadRecord]]:
    """The content of the wanted slices; checks that they come in order, whole, and the file's last one marked."""
    slices: dict[int, list[Document | BadRecord]] = {}
    asked: list[int] = []
    ends: list[tuple[int, bool]] = []

    def want(index: int) -> bool:
        asked.append(index)
        return wanted(index)

    for item in read_slices(file, slice_bytes, want, "text", "id"):
        match item:
            case SliceStart(index):
                assert len(ends) == len(slices), "a slice begins before the last one has ended"
                slices[index] = []
            case SliceEnd(index, is_last):
                assert list(slices)[-1] == index
                ends.append((index, is_last))
            case _:
                slices[list(slices)[-1]].append(item)
    assert asked == list(range(len(asked)))
    assert ends == [(index, index == asked[-1]) for index in asked if index in slices]
    assert list(slices) == [index for index in asked if wanted(index)]
    return slices


def read_all(file: CorpusFile) -> list[Document | BadRecord]:
    return [item for items in read(file).values() for item in items]


def corpus_file(folder: Path, name: str, data: bytes) -> CorpusFile:
    (folder / name).write_bytes(data)
    [file] = list_corpus(str(folder / name))
    return file


# ── one corpus, many forms ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["local", "s3"])
def test_the_same_documents_come_out_of_every_form(place, tmp_path, bucket):
    folder = str(tmp_path) if place == "local" else bucket
    for form, make in BYTES_OF.items():
        for ending in ENDINGS if form != ".parquet" else [""]:
            storage.write_bytes(storage.join(folder, f"corpus{form}{ending}"), compressed(make(DOCUMENTS), ending))
    files = list_corpus(folder)
    assert [file.url for file in files] == sorted(file.url for file in files)
    assert [file.index for file in files] == list(range(7))
    for file in files:
        assert read_all(file) == EXPECTED, file.url


@pytest.mark.parametrize(
    "data",
    [
        json_array(DOCUMENTS, indent=0),
        json_array(DOCUMENTS, indent=2, ascii_only=True),
        b"\xef\xbb\xbf \r\n" + json_array(DOCUMENTS) + b"\n\n",
        json_lines(DOCUMENTS, "\r\n"),
        json_lines(DOCUMENTS, "\n\n \t\r\n", ascii_only=True),
        b"\xef\xbb\xbf" + json_lines(DOCUMENTS).removesuffix(b"\n"),
    ],
)
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["wiki.json", "wiki.jsonl"])
def test_white_space_line_ends_and_names_do_not_matter(data, ending, name, tmp_path):
    assert read_all(corpus_file(tmp_path, name + ending, compressed(data, ending, members=3))) == EXPECTED


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf", b" [] ", b"[\n]"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_empty_file_has_one_empty_slice(data, ending, tmp_path):
    assert read(corpus_file(tmp_path, f"a.json{ending}", compressed(data, ending))) == {0: []}


@pytest.mark.parametrize(("given", "read_as"), [("x", "x"), (7, "7"), (-(2**63), str(-(2**63))), (None, None)])
@pytest.mark.parametrize("form", BYTES_OF)
def test_ids_are_strings_integers_or_absent(given, read_as, form, tmp_path):
    data = BYTES_OF[form]([{"id": given, "text": "a"}])
    assert read_all(corpus_file(tmp_path, f"a{form}", data)) == [Document(read_as, "a")]
    data = BYTES_OF[form]([{"text": "b"}])
    assert read_all(corpus_file(tmp_path, f"b{form}", data)) == [Document(None, "b")]


def test_parquet_text_may_be_stored_as_dictionaries_large_strings_or_bare_bytes(tmp_path):
    for number, kind in enumerate([pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.binary()]):
        data = (
            parquet(DOCUMENTS, text=kind)
            if kind != pa.binary()
            else parquet([one | {"text": one["text"].encode()} for one in DOCUMENTS])
        )
        assert read_all(corpus_file(tmp_path, f"{number}.parquet", data)) == EXPECTED


# ── slices ───────────────────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.text(st.sampled_from('"\\[]{},:\n aé的𝄞'), max_size=20)
RECORDS = st.lists(
    st.fixed_dictionaries({"id": st.uuids().map(str), "text": TEXTS, "tags": st.lists(TEXTS, max_size=2)})
)
FORMS = st.sampled_from([f"{form}{ending}" for form in (".json", ".jsonl") for ending in ENDINGS] + [".parquet"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=RECORDS,
    form=FORMS,
    slice_bytes=st.integers(1, 300),
    readers=st.integers(1, 4),
    cut_off=st.booleans(),
)
def test_the_slices_of_any_readers_hold_every_record_once(tmp_path, documents, form, slice_bytes, readers, cut_off):
    if form == ".parquet":
        plain = data = parquet([{"id": "", "text": ""}, *documents], rows_per_group=3)
    else:
        plain = json_lines(documents) if form.startswith(".jsonl") else json_array(documents)
        plain = plain[:-1] if cut_off else plain
        data = compressed(plain, form.removeprefix(".jsonl").removeprefix(".json"), members=2)
    file = corpus_file(tmp_path, f"a{form}", data)
    whole = read(file, slice_bytes)
    if form != ".parquet":
        assert len(whole) == max(1, -(-len(plain) // slice_bytes))
    items = [item for items in whole.values() for item in items]
    assert items == read_all(file)
    found = [item for item in items if isinstance(item, Document)]
    assert found[form == ".parquet" :] == [Document(one["id"], one["text"]) for one in documents]
    for reader in range(readers):
        part = read(file, slice_bytes, lambda index, reader=reader: index % readers == reader)
        assert all(whole[index] == part[index] for index in part)


@pytest.mark.parametrize("form", [".json", ".jsonl"])
def test_a_record_at_the_very_start_of_a_slice_belongs_to_it_alone(form, tmp_path):
    documents = [{"text": "a" * (number % 3)} for number in range(20)]
    file = corpus_file(tmp_path, f"a{form}", BYTES_OF[form](documents))
    for slice_bytes in range(1, file.size + 2):
        items = [item for items in read(file, slice_bytes).values() for item in items]
        assert items == [Document(None, one["text"]) for one in documents], f"slices of {slice_bytes} bytes"


def test_a_slice_of_plain_lines_is_read_alone(tmp_path, monkeypatch):
    data = json_lines(DOCUMENTS * 20)
    file = corpus_file(tmp_path, "a.jsonl", data)
    opened = counted_reads(monkeypatch)
    slice_bytes = len(data) // 10
    [documents] = read(file, slice_bytes, lambda index: index == 7).values()
    assert 500 < len(documents) < 700
    longest = max(map(len, json_lines(DOCUMENTS).splitlines()))
    assert opened[0].bytes_read < slice_bytes + 4096 + slice_bytes + longest
    begin = min(opened[0].offsets - {0})
    assert begin == 7 * slice_bytes - 1


def test_only_the_needed_columns_and_row_groups_of_parquet_are_read(tmp_path, monkeypatch):
    noise = [one | {"picture": random.Random(i).randbytes(10_000)} for i, one in enumerate(DOCUMENTS * 3)]
    file = corpus_file(tmp_path, "a.parquet", parquet(noise, rows_per_group=50))
    opened = counted_reads(monkeypatch)
    assert sum(map(len, read(file, 1, lambda index: index == 7).values())) == 50
    assert file.size > 9_000_000 and opened[0].bytes_read < 200_000


def test_parquet_slices_are_consecutive_row_groups_of_at_least_the_size(tmp_path):
    file = corpus_file(tmp_path, "a.parquet", parquet(DOCUMENTS, rows_per_group=10))
    one_each = read(file, 1)
    assert [len(items) for items in one_each.values()] == [10] * 30
    sizes = [len(items) for items in read(file, 2000).values()]
    assert 2 < len(sizes) < 30 and sum(sizes) == 300 and all(size % 10 == 0 for size in sizes)


@pytest.mark.parametrize("form", [".json", ".jsonl"])
def test_a_record_longer_than_many_slices_is_read_once(form, tmp_path, monkeypatch):
    documents = [{"text": "a"}, {"text": "字" * 500_000}, {"text": "b"}]
    file = corpus_file(tmp_path, f"a{form}", BYTES_OF[form](documents))
    opened = counted_reads(monkeypatch)
    slices = read(file, 10_000)
    assert [items for items in slices.values() if items] == [
        [Document(None, "a"), Document(None, "字" * 500_000)],
        [Document(None, "b")],
    ]
    assert opened[0].bytes_read < 3.5 * file.size


class CountedReader(io.BufferedReader):
    """A file that remembers where it was read and how much."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path))
        self.bytes_read = 0
        self.offsets: set[int] = set()

    def read(self, size: int | None = -1) -> bytes:
        self.offsets.add(self.tell())
        data = super().read(size)
        self.bytes_read += len(data)
        return data


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[CountedReader]:
    opened: list[CountedReader] = []

    def open_read(path: str) -> CountedReader:
        opened.append(CountedReader(path))
        return opened[-1]

    monkeypatch.setattr(storage, "open_read", open_read)
    return opened


# ── bad records ──────────────────────────────────────────────────────────────────────────────────────────────────────

BAD_RECORDS = {
    '{"text": "a", "id": 1': "broken JSON",
    '{"text": "a"}{"text": "b"}': "broken JSON",
    '{"text": NaN}': "'text' is a number and not a string",
    '{"text": "a", "id": NaN}': "'id' is NaN, which names no document",
    '{"text": "a", "id": -Infinity}': "'id' is -Infinity, which names no document",
    '{"text": "tab\t"}': "broken JSON",
    "hello": "broken JSON",
    '["text"]': "an array and not an object",
    '"text"': "a string and not an object",
    "17": "a number and not an object",
    '{"Text": "a", "id": 1}': "no 'text', only 'Text', 'id'",
    "{}": "no 'text', only nothing",
    '{"text": null}': "'text' is null and not a string",
    '{"text": ["a"]}': "'text' is an array and not a string",
    '{"text": true}': "'text' is a boolean and not a string",
    '{"text": "a", "id": false}': "'id' is a boolean, which names no document",
    '{"text": "a", "id": {}}': "'id' is an object, which names no document",
    '{"text": "a\\ud800b"}': r"a lone surrogate, \ud800",
    '{"text": "\udcff"}': "invalid UTF-8 at its byte 10",
}


def planted(bad: str) -> bytes:
    return bad.encode(errors="surrogateescape")


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_bad_line_is_told_of_where_it_is_and_the_good_ones_survive(ending, tmp_path):
    data, expected = b"", []
    for number, (bad, reason) in enumerate(BAD_RECORDS.items()):
        data += json_lines([DOCUMENTS[number]]) + b"\r\n"
        expected.append((f"line {3 * number + 3}, byte {len(data):,}", reason))
        data += planted(bad) + b"\n"
    file = corpus_file(tmp_path, f"a.jsonl{ending}", compressed(data + json_lines(DOCUMENTS[-1:]), ending, members=5))
    check(file, EXPECTED[: len(BAD_RECORDS)] + EXPECTED[-1:], expected)


def test_a_reader_that_starts_inside_a_file_tells_the_byte_alone(tmp_path):
    data = json_lines(DOCUMENTS)
    file = corpus_file(tmp_path, "a.jsonl", data + b"x\n")
    [bad] = [
        item for item in read(file, 1000, lambda index: index > 0)[len(data) // 1000] if isinstance(item, BadRecord)
    ]
    assert bad.position == f"byte {len(data):,}"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("separator", [", ", ",\n", "\n,"])
def test_every_bad_element_is_told_of_where_it_is_and_the_good_ones_survive(separator, ending, tmp_path):
    # What lacks its closing bracket swallows what follows, and two objects in a row are two records.
    bad_records = {bad: reason for bad, reason in BAD_RECORDS.items() if bad.count("{") == bad.count("}") < 2}
    data, expected = b"[", []
    for number, (bad, reason) in enumerate(bad_records.items()):
        data += json.dumps(DOCUMENTS[number]).encode() + separator.encode()
        expected.append((f"record {2 * number + 2}, byte {len(data):,}", reason))
        data += planted(bad) + separator.encode()
    data += json.dumps(DOCUMENTS[-1]).encode() + b"]"
    file = corpus_file(tmp_path, f"a.json{ending}", compressed(data, ending, members=5))
    check(file, EXPECTED[: len(bad_records)] + EXPECTED[-1:], expected)


A, B = '{"text": "a"}', '{"text": "b"}'


@pytest.mark.parametrize(
    ("array", "documents", "position", "reason"),
    [
        (f"[{A}, {B}", "ab", "byte 28", "the file ends, the array does not"),
        (f"[{A}, {B},", "ab", "byte 29", "the file ends, the array does not"),
        (f'[{A}, {{"text": "b', "a", "record 2, byte 16", "the file ends inside this record"),
        ("[", "", "byte 0", "the file ends, the array does not"),
        (f"[{A}, {B}, ]", "ab", "byte 29", "no record after this comma"),
        (f"[{A},, {B}]", "ab", "byte 15", "no record before this comma"),
        (f"[, {A}]", "a", "byte 1", "no record before this comma"),
        (f"[{A} {B}]", "ab", "byte 15", "no comma before this record"),
        (f"[{A} x, {B}]", "ab", "byte 15", "no comma before this record"),
        (f"[{A}, {B}}}]", "ab", "byte 29", "no comma before this record"),
        (f"[{A}, {B}] ]", "ab", "byte 31", "something after the end of the array"),
        (f"[{A}]\n[{B}]", "a", "byte 16", "something after the end of the array"),
        (f'[\n{A},\n{{"text": "x"y"}},\n{B}\n]', "ab", "record 2, byte 17", "a line ends inside a string"),
        (f'[\n{A},\n{{"text": "x\n{B}\n]', "ab", "record 2, byte 17", "a line ends inside a string"),
    ],
)
def test_a_fault_of_an_array_is_told_of_where_it_is_and_costs_no_neighbour(
    array, documents, position, reason, tmp_path
):
    items = read_all(corpus_file(tmp_path, "a.json", array.encode()))
    assert [item.text for item in items if isinstance(item, Document)] == list(documents)
    first = next(item for item in items if isinstance(item, BadRecord))
    assert (first.position, first.reason) == (position, reason)


@pytest.mark.parametrize("form", [".json", ".jsonl"])
@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_cut_off_gives_what_is_whole_and_tells_where_it_breaks(form, ending, tmp_path):
    data = BYTES_OF[form](DOCUMENTS)
    whole = compressed(data, ending, members=4)
    for size in [*range(40, len(whole), len(whole) // 25), len(whole) - 1]:
        *items, last = read_all(corpus_file(tmp_path, f"a{form}{ending}", whole[:size]))
        assert items == EXPECTED[: len(items)]
        assert isinstance(last, BadRecord) and last.reason in (
            "the compressed file is cut off here",
            "the file ends, the array does not",  # where a member ends
            "the file ends inside this record",
        )


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_told_of(ending, tmp_path):
    whole = compressed(json_lines(DOCUMENTS), ending, members=3)
    *items, last = read_all(corpus_file(tmp_path, f"a.jsonl{ending}", whole + b"garbage"))
    assert items == EXPECTED
    assert isinstance(last, BadRecord) and last.reason.startswith("the compressed file is damaged here")
    [only] = read_all(corpus_file(tmp_path, f"b.jsonl{ending}", json_lines(DOCUMENTS)))
    assert isinstance(only, BadRecord) and only.position == "byte 0"
    assert read_all(corpus_file(tmp_path, f"c.jsonl{ending}", whole + b"\0" * 1000)) == EXPECTED


def test_every_bad_row_of_parquet_is_told_of_by_its_number(tmp_path):
    texts = [f"第{number}段".encode() for number in range(1000)]
    texts[123], texts[999] = b"\xff", b"a\xed\xa0\x80"
    column = pa.array([None if number == 7 else text for number, text in enumerate(texts)], pa.binary())
    pq.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "a.parquet", row_group_size=50)
    [file] = list_corpus(str(tmp_path))
    expected = [
        ("row 8", "'text' is null and not a string"),
        ("row 124", "'text' is invalid UTF-8 and not a string"),
        ("row 1,000", "'text' is invalid UTF-8 and not a string"),
    ]
    good = [Document(None, text.decode()) for number, text in enumerate(texts) if number not in (7, 123, 999)]
    check(file, good, expected)


@pytest.mark.parametrize(
    ("data", "position", "reason"),
    [
        (parquet(DOCUMENTS)[:-100], "footer", "not a whole Parquet file"),
        (b"", "footer", "not a whole Parquet file"),
        (parquet([{"body": "a", "id": "1"}]), "rows 1 to 1", "no 'text', only 'body', 'id'"),
        (parquet([{"text": 1.5}]), "row 1", "'text' is a number and not a string"),
        (parquet([{"text": "a", "id": float("nan")}]), "row 1", "'id' is nan, which names no document"),
        (parquet([{"text": "a", "id": True}]), "row 1", "'id' is a boolean, which names no document"),
    ],
)
def test_parquet_that_holds_no_documents_is_told_of(data, position, reason, tmp_path):
    check(corpus_file(tmp_path, "a.parquet", data), [], [(position, reason)])


def test_a_damaged_row_group_costs_no_other(tmp_path):
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
def test_a_failing_store_is_no_bad_record(name, tmp_path, monkeypatch):
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
    items = read_all(file)
    assert [item for item in items if isinstance(item, Document)] == good
    found = [item for item in items if isinstance(item, BadRecord)]
    assert [one.position for one in found] == [position for position, _ in bad]
    for one, (_, reason) in zip(found, bad, strict=True):
        assert one.reason.startswith(reason) and one.url == file.url


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────

MEASURE = """
import re, sys
from pathlib import Path
from job.data.corpus import BadRecord, Document, list_corpus, read_slices
def peak_bytes():  # getrusage would count what the parent held when it started this process
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
[file] = list_corpus(sys.argv[1])
before, documents = peak_bytes(), 0
for item in read_slices(file, 2**26, lambda index: True, "text", "id"):
    documents += isinstance(item, Document)
    assert not isinstance(item, BadRecord)
print(documents, peak_bytes() - before)
"""


@pytest.mark.parametrize(("name", "most_bytes"), [("a.json", 5e7), ("a.json.gz", 5e7), ("a.parquet", 15e7)])
def test_memory_does_not_grow_with_the_file(name, most_bytes, tmp_path):
    path, blocks = tmp_path / name, 20
    block = [{"id": "1", "text": f"{number}{'维基百科' * 900}"} for number in range(1000)]
    if name == "a.parquet":
        with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="none") as writer:
            writer.write_table(pa.table({"text": [one["text"] for one in block] * blocks}), row_group_size=10**9)
    else:
        elements = b",\n".join(json_lines(block).splitlines())
        with path.open("wb") as file:
            for number in range(blocks):
                plain = (b"," if number else b"[") + elements + (b"]" if number == blocks - 1 else b"")
                file.write(compressed(plain, path.suffix.replace(".json", "")))
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True)
    path.unlink()
    assert result.returncode == 0, result.stderr
    documents, grown_bytes = map(int, result.stdout.split())
    assert documents == blocks * 1000
    assert grown_bytes < most_bytes


# ── where a corpus is ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> str:
    folder = str(tmp_path / "corpus") if request.param == "local" else request.getfixturevalue("bucket") + "/corpus"
    names = ["a.jsonl", "sub/b.json.gz", "c.parquet", "README.md", "dataset_infos.json", ".hidden.jsonl"]
    for name in names:
        storage.write_bytes(f"{folder}/{name}", b"")
    return folder


def test_a_corpus_is_a_file_a_folder_or_a_glob(folder):
    def names(source: str) -> list[str]:
        return [file.url.removeprefix(folder + "/") for file in list_corpus(source)]

    assert names(folder) == names(folder + "/") == ["a.jsonl", "c.parquet", "sub/b.json.gz"]
    assert names(f"{folder}/a.jsonl") == names(f"{folder}/a*") == ["a.jsonl"]
    assert names(f"{folder}/**/*.json*") == ["a.jsonl", "sub/b.json.gz"]
    assert [(file.format, file.compression) for file in list_corpus(folder)] == [
        ("json", None),
        ("parquet", None),
        ("json", "gzip"),
    ]


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("nothing.jsonl", "there is no file"),
        ("nothing*", "there is no file"),
        (
            "README.md",
            "none of the files there is a corpus: no suffix that says what it is, and no JSON lines in it: README.md",
        ),
    ],
)
def test_a_source_without_documents_is_refused_in_one_line(folder, source, complaint):
    with pytest.raises(UserError) as raised:
        list_corpus(f"{folder}/{source}")
    assert raised.value.setting == "data.source"
    assert str(raised.value) == (
        f"data.source: '{folder}/{source}': {complaint}; give .json, .jsonl, .json.gz, .json.zst or .parquet files, "
        "or .txt, .csv, .tsv, .arrow or .tar"
    )


# ── hubs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

LIST = """
import sys
from job.data.corpus import Document, list_corpus, read_slices
from job.errors import UserError
try:
    for file in list_corpus(sys.argv[1]):
        items = read_slices(file, 2**20, lambda index: True, "text", "id")
        print(file.url, sum(isinstance(item, Document) for item in items))
except UserError as error:
    print(error)
"""
COMMIT_URL = "hf://datasets/fjcanyue/wikipedia-zh-cn@c0ffee" + "0" * 34
HUB_FILES = {
    "README.md": b"# Wikipedia",
    "zh/a.json": json_array(DOCUMENTS),
    "zh/b.jsonl.gz": b"",
    "c.parquet": parquet(DOCUMENTS),
}


def list_from_hub(source: str, endpoint: str, home: Path, offline: bool = False) -> list[str]:
    """What a fresh process prints of `source`: huggingface_hub reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_ETAG_TIMEOUT": "2",
    }
    command = [sys.executable, "-c", LIST, source]
    result = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=Path.cwd())
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_data_set_of_the_hub_is_downloaded_once_and_found_without_a_network(tmp_path):
    expected = [f"{COMMIT_URL}/c.parquet 300", f"{COMMIT_URL}/zh/a.json 300", f"{COMMIT_URL}/zh/b.jsonl.gz 0"]
    with local_hub("fjcanyue/wikipedia-zh-cn", HUB_FILES) as endpoint:
        assert list_from_hub("fjcanyue/wikipedia-zh-cn", endpoint, tmp_path) == expected
        assert list_from_hub("hf://datasets/fjcanyue/wikipedia-zh-cn@main/zh", endpoint, tmp_path) == expected[1:]
    assert list_from_hub("fjcanyue/wikipedia-zh-cn@main", endpoint, tmp_path) == expected, "the hub is gone now"
    assert list_from_hub(f"{COMMIT_URL}/zh/*.json", endpoint, tmp_path, offline=True) == expected[1:2]


@pytest.mark.parametrize(
    ("source", "gated", "complaint"),
    [
        ("fjcanyue/wikipedia", False, "no such path here, and no such data set on the hub"),
        ("fjcanyue/wikipedia-zh-cn@v9", False, "the data set has no revision 'v9'"),
        ("fjcanyue/wikipedia-zh-cn", True, "this data set is given only to those who asked for it"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(source, gated, complaint, tmp_path):
    with local_hub("fjcanyue/wikipedia-zh-cn", HUB_FILES, gated) as endpoint:
        [line] = list_from_hub(source, endpoint, tmp_path)
    assert line.startswith(f"data.source: '{source}': {complaint}")


@pytest.mark.parametrize("how", ["closed", "silent", "offline"])
def test_a_hub_out_of_reach_is_told_soon_with_the_way_round_it(how, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never answers
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        if how == "closed":
            server.close()
        started = time.monotonic()
        [line] = list_from_hub("fjcanyue/wikipedia-zh-cn", endpoint, tmp_path, how == "offline")
        assert time.monotonic() - started < 15
    assert line.startswith(
        f"data.source: 'fjcanyue/wikipedia-zh-cn': no such path here, and the hub {endpoint} cannot be reached"
    )
    assert "set HF_ENDPOINT (for example https://hf-mirror.com), or use modelscope://owner/name, or a URL" in line
    assert ("HF_HUB_OFFLINE is set" in line) == (how == "offline")


def test_modelscope_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        list_corpus("modelscope://AI-ModelScope/wikipedia")
