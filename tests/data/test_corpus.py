"""A corpus gives the same documents in every format and from every source, each document in one slice."""

import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_files import compressed, json_array, json_lines, parquet
from corpus_reading import BYTES_OF, DOCUMENTS, ENDINGS, EXPECTED, corpus_file, counted_reads, read, read_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job import storage
from job.data.corpus import Document, list_corpus
from job.errors import UserError

# ---- Formats ----


@pytest.mark.parametrize("store", ["local", "s3"])
def test_every_format_gives_the_same_documents(store, tmp_path, bucket):
    folder = str(tmp_path) if store == "local" else bucket
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
def test_white_space_line_ends_and_file_names_do_not_matter(data, ending, name, tmp_path):
    assert read_all(corpus_file(tmp_path, name + ending, compressed(data, ending, members=3))) == EXPECTED


@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf", b" [] ", b"[\n]"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_empty_file_has_one_empty_slice(data, ending, tmp_path):
    assert read(corpus_file(tmp_path, f"a.json{ending}", compressed(data, ending))) == {0: []}


@pytest.mark.parametrize(("given", "read_as"), [("x", "x"), (7, "7"), (-(2**63), str(-(2**63))), (None, None)])
@pytest.mark.parametrize("form", BYTES_OF)
def test_id_may_be_a_string_an_integer_or_missing(given, read_as, form, tmp_path):
    data = BYTES_OF[form]([{"id": given, "text": "a"}])
    assert read_all(corpus_file(tmp_path, f"a{form}", data)) == [Document(read_as, "a")]
    data = BYTES_OF[form]([{"text": "b"}])
    assert read_all(corpus_file(tmp_path, f"b{form}", data)) == [Document(None, "b")]


def test_parquet_text_may_be_dictionary_large_string_or_binary(tmp_path):
    for number, kind in enumerate([pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.binary()]):
        data = (
            parquet(DOCUMENTS, text=kind)
            if kind != pa.binary()
            else parquet([record | {"text": record["text"].encode()} for record in DOCUMENTS])
        )
        assert read_all(corpus_file(tmp_path, f"{number}.parquet", data)) == EXPECTED


# ---- Slices ----

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
def test_slices_of_all_readers_hold_every_record_once(tmp_path, documents, form, slice_bytes, readers, cut_off):
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
    assert found[form == ".parquet" :] == [Document(record["id"], record["text"]) for record in documents]
    for reader in range(readers):
        part = read(file, slice_bytes, lambda index, reader=reader: index % readers == reader)
        assert all(whole[index] == part[index] for index in part)


@pytest.mark.parametrize("form", [".json", ".jsonl"])
def test_record_at_the_start_of_a_slice_is_only_in_that_slice(form, tmp_path):
    documents = [{"text": "a" * (number % 3)} for number in range(20)]
    file = corpus_file(tmp_path, f"a{form}", BYTES_OF[form](documents))
    for slice_bytes in range(1, file.size + 2):
        items = [item for items in read(file, slice_bytes).values() for item in items]
        assert items == [Document(None, record["text"]) for record in documents], f"slices of {slice_bytes} bytes"


def test_slice_of_plain_lines_is_read_without_the_rest_of_the_file(tmp_path, monkeypatch):
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


def test_only_needed_parquet_columns_and_row_groups_are_read(tmp_path, monkeypatch):
    records = [record | {"picture": random.Random(i).randbytes(10_000)} for i, record in enumerate(DOCUMENTS * 3)]
    file = corpus_file(tmp_path, "a.parquet", parquet(records, rows_per_group=50))
    opened = counted_reads(monkeypatch)
    assert sum(map(len, read(file, 1, lambda index: index == 7).values())) == 50
    assert file.size > 9_000_000 and opened[0].bytes_read < 200_000


def test_parquet_slice_is_row_groups_of_at_least_slice_bytes(tmp_path):
    file = corpus_file(tmp_path, "a.parquet", parquet(DOCUMENTS, rows_per_group=10))
    single = read(file, 1)
    assert [len(items) for items in single.values()] == [10] * 30
    sizes = [len(items) for items in read(file, 2000).values()]
    assert 2 < len(sizes) < 30 and sum(sizes) == 300 and all(size % 10 == 0 for size in sizes)


@pytest.mark.parametrize("form", [".json", ".jsonl"])
def test_record_longer_than_many_slices_is_read_once(form, tmp_path, monkeypatch):
    documents = [{"text": "a"}, {"text": "字" * 500_000}, {"text": "b"}]
    file = corpus_file(tmp_path, f"a{form}", BYTES_OF[form](documents))
    opened = counted_reads(monkeypatch)
    slices = read(file, 10_000)
    assert [items for items in slices.values() if items] == [
        [Document(None, "a"), Document(None, "字" * 500_000)],
        [Document(None, "b")],
    ]
    assert opened[0].bytes_read < 3.5 * file.size


# ---- Memory ----

MEASURE = """
import re, sys
from pathlib import Path
from job.data.corpus import BadRecord, Document, list_corpus, read_slices
def peak_bytes():
    # getrusage would include the memory of the parent process at the moment of the fork.
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
[file] = list_corpus(sys.argv[1])
before, documents = peak_bytes(), 0
for item in read_slices(file, 2**26, lambda index: True, "text", "id"):
    documents += isinstance(item, Document)
    assert not isinstance(item, BadRecord)
print(documents, peak_bytes() - before)
"""


@pytest.mark.parametrize(("name", "most_bytes"), [("a.json", 5e7), ("a.json.gz", 5e7), ("a.parquet", 15e7)])
def test_memory_does_not_grow_with_file_size(name, most_bytes, tmp_path):
    path, blocks = tmp_path / name, 20
    block = [{"id": "1", "text": f"{number}{'维基百科' * 900}"} for number in range(1000)]
    if name == "a.parquet":
        with pq.ParquetWriter(path, pa.schema({"text": pa.string()}), compression="none") as writer:
            writer.write_table(pa.table({"text": [record["text"] for record in block] * blocks}), row_group_size=10**9)
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


# ---- Sources ----


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path) -> str:
    """URL of a folder with a corpus of empty files."""
    folder = str(tmp_path / "corpus") if request.param == "local" else request.getfixturevalue("bucket") + "/corpus"
    names = ["a.jsonl", "sub/b.json.gz", "c.parquet", "README.md", "dataset_infos.json", ".hidden.jsonl"]
    for name in names:
        storage.write_bytes(f"{folder}/{name}", b"")
    return folder


def test_source_may_be_a_file_a_folder_or_a_glob(folder):
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


@pytest.mark.parametrize("source", ["nothing.jsonl", "nothing", "./nothing", "data/nothing/", "a/b/c"])
def test_missing_path_is_refused_with_the_folder_that_was_looked_in(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, sought in ((source, f" (looked in {tmp_path})"), (f"{tmp_path}/{source}", "")):
        with pytest.raises(UserError) as raised:
            list_corpus(path)
        assert str(raised.value) == f"data.source: '{path}': no such file or folder{sought}; correct the path"
    (tmp_path / source).mkdir(parents=True)
    with pytest.raises(UserError, match=": no file found; expected"):
        list_corpus(source if "/" in source else f"./{source}")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("nothing*", "no file found"),
        (
            "README.md",
            "no file there can be read as a corpus: no known suffix, and the content is not JSON lines: README.md",
        ),
    ],
)
def test_source_without_documents_is_refused_in_one_line(folder, source, complaint):
    with pytest.raises(UserError) as raised:
        list_corpus(f"{folder}/{source}")
    assert raised.value.setting == "data.source"
    assert str(raised.value) == (
        f"data.source: '{folder}/{source}': {complaint}; expected .json, .jsonl, .json.gz, .json.zst or .parquet "
        "files, or .txt, .csv, .tsv, .arrow or .tar"
    )
