"""What must hold of a corpus that `datasets` reads: the documents and tokens of JSON, and faults in one line."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from corpus_files import compressed, json_lines, parquet
from dataset_hub import COMMIT, DatasetHub, dataset_hub

from job import commands, storage
from job.config import Config, load
from job.data.corpus import BadRecord, CorpusFile, Document, Listing, SliceEnd, SliceStart, list_corpus, read_slices
from job.data.dataset_files import Choice
from job.data.fingerprint import identify
from job.data.manifest import load_manifest
from job.data.prepare import Recipe, prepare
from job.data.prepare_processes import prepare_in_processes
from job.data.tokenizer import TextTokenizer
from job.errors import UserError
from job.preflight.data_set import check_data
from job.preflight.findings import Findings

KiB = 1024
RECORDS = [
    {"id": f"{number:03d}", "text": f'第{number}篇，“{"长江黄河" * (number % 9)}”\n"quoted", 第二行\t{number}'}
    for number in range(200)
]
README = b"""---
configs:
- config_name: zh
  data_files:
  - {split: train, path: zh/train-*.csv}
  - {split: test, path: zh/test.csv}
- config_name: lines
  data_files: lines.jsonl
---
"""


@dataclass(frozen=True)
class Form:
    """A way to keep the records, and the settings by which they are read."""

    source: str
    text_field: str = "text"
    id_field: str = "id"
    subset: str | None = None
    source_split: str | None = None
    text_documents: Any = None

    def files(self) -> list[CorpusFile]:
        return list_corpus(self.source, choice=Choice(self.subset, self.source_split, self.text_documents))

    def recipe(self, **changes: Any) -> Recipe:
        chosen = (self.subset, self.source_split, self.text_documents)
        values = {"on_bad_record": "stop", "slice_bytes": 4 * KiB} | changes
        return Recipe(
            self.source,
            self.text_field,
            self.id_field,
            values["on_bad_record"],
            values["slice_bytes"],
            0.2,
            1,
            Choice(*chosen),
        )


def csv_table(records: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return table.getvalue().encode()


def tar_archive(members: dict[str, bytes]) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive.getvalue()


def arrow_stream(records: list[dict[str, Any]]) -> bytes:
    table, content = pa.Table.from_pylist(records), io.BytesIO()
    with pa.ipc.new_stream(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return content.getvalue()


def put(folder: Path, **files: bytes) -> str:
    for name, content in files.items():
        storage.write_bytes(str(folder / name), content)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records in every form, each below a name of its own."""
    import datasets

    top = tmp_path_factory.mktemp("forms")
    data = datasets.Dataset.from_list(RECORDS)
    data.save_to_disk(top / "saved", num_shards=2)
    data.map(lambda row: {"text": "not of the corpus"}, cache_file_name=str(top / "saved" / "cache-1.arrow"))
    (top / "saved" / "data-00009-of-00010.arrow").write_bytes(b"left over")
    datasets.DatasetDict({"train": data, "test": data.select([1, 2])}).save_to_disk(top / "splits")
    with pa.OSFile(str(top / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, data.data.table.schema) as writer:
        writer.write_table(data.data.table)
    texts = {f"{one['id']}.txt": one["text"].encode() for one in RECORDS}
    samples = {f"{one['id']}.json": json.dumps(one).encode() for one in RECORDS}
    files = {
        "lines.jsonl": json_lines(RECORDS),
        "table.parquet": parquet(RECORDS),
        "table.csv": csv_table([{"number": n if n < 100 else "x", **one} for n, one in enumerate(RECORDS)]),
        "table.csv.gz": compressed(csv_table(RECORDS), ".gz", 3),
        "table.csv.zst": compressed(csv_table(RECORDS), ".zst", 3),
        "marked.tsv": b"\xef\xbb\xbf" + csv_table(RECORDS, "\t"),
        "texts.tar": tar_archive(texts),
        "samples.tar": tar_archive(samples),
        "samples.tar.gz": compressed(tar_archive(samples), ".gz"),
        "[1] odd::name #1.csv": csv_table(RECORDS),
        "configured/README.md": README,
        "configured/zh/train-0.csv": csv_table(RECORDS[:90]),
        "configured/zh/train-1.csv": csv_table(RECORDS[90:]),
        "configured/zh/test.csv": csv_table(RECORDS[:2]),
        "configured/lines.jsonl": json_lines(RECORDS),
    }
    for name, content in files.items():
        storage.write_bytes(str(top / name), content)
    return top


FORMS: dict[str, Callable[[str], Form]] = {
    "csv": lambda top: Form(f"{top}/table.csv"),
    "gzip": lambda top: Form(f"{top}/table.csv.gz"),
    "zstd": lambda top: Form(f"{top}/table.csv.zst"),
    "tsv with a byte order mark": lambda top: Form(f"{top}/marked.tsv"),
    "tar of texts": lambda top: Form(f"{top}/texts.tar", "txt", "__key__"),
    "tar of JSON": lambda top: Form(f"{top}/samples.tar", "json.text", "json.id"),
    "tar, compressed": lambda top: Form(f"{top}/samples.tar.gz", "json.text", "json.id"),
    "saved": lambda top: Form(f"{top}/saved"),
    "saved, a split": lambda top: Form(f"{top}/splits", source_split="train"),
    "Arrow file": lambda top: Form(f"{top}/file.arrow"),
    "configuration": lambda top: Form(f"{top}/configured", subset="zh", source_split="train"),
    "configuration of JSON": lambda top: Form(f"{top}/configured", subset="lines"),
}


def read(
    files: list[CorpusFile],
    slice_bytes: int = 4 * KiB,
    wanted: Callable[[int], bool] = lambda index: True,
    text_field: str = "text",
    id_field: str = "id",
) -> tuple[list[Document], list[BadRecord]]:
    """The documents of all wanted slices, and bad records."""
    documents: list[Document] = []
    bad: list[BadRecord] = []
    for file in files:
        ends: list[bool] = []
        opened = -1
        for item in read_slices(file, slice_bytes, wanted, text_field, id_field):
            match item:
                case SliceStart(index=index):
                    assert wanted(index) and index > opened
                    opened = index
                case SliceEnd(index=index, is_last=is_last):
                    assert index == opened
                    ends.append(is_last)
                case Document():
                    documents.append(item)
                case BadRecord():
                    bad.append(item)
        assert not any(ends[:-1]), "a slice after the last one"
    return documents, bad


def read_form(form: Form, **changes: Any) -> list[Document]:
    documents, bad = read(form.files(), text_field=form.text_field, id_field=form.id_field, **changes)
    assert not bad
    return documents


def tokens(url: str) -> tuple[bytes, bytes, dict[str, int]]:
    """The tokens of both splits over all shards, and the counts."""
    manifest = load_manifest(url)
    sizes = {"uint16": 2, "uint32": 4}
    splits = [
        b"".join(
            storage.read_bytes(storage.join(url, shard.name))[: shard.tokens * sizes[manifest.dtype]]
            for shard in shards
        )
        for shards in (manifest.train, manifest.validation)
    ]
    return splits[0], splits[1], dict(manifest.statistics)


# ── the same as from JSON ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def from_json(folder: Path, trained: TextTokenizer) -> tuple[bytes, bytes, dict[str, int]]:
    prepare(Form(f"{folder}/lines.jsonl").recipe(), trained, f"{folder}/shards/json")
    return tokens(f"{folder}/shards/json")


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_the_documents_and_tokens_of_json(
    name: str, folder: Path, trained: TextTokenizer, from_json: tuple[bytes, bytes, dict[str, int]]
) -> None:
    form = FORMS[name](str(folder))
    assert [(one.id, one.text) for one in read_form(form)] == [(one["id"], one["text"]) for one in RECORDS]
    manifest = prepare(form.recipe(), trained, f"{folder}/shards/{name}")
    assert manifest is not None and len(manifest.train) > 2
    assert tokens(f"{folder}/shards/{name}") == from_json


@pytest.mark.parametrize("name", ["csv", "tar of JSON", "saved"])
def test_each_slice_has_its_rows_whoever_reads_it(name: str, folder: Path) -> None:
    form = FORMS[name](str(folder))
    together = read_form(form, slice_bytes=KiB)
    apart = [read_form(form, slice_bytes=KiB, wanted=lambda index, part=part: index % 3 == part) for part in range(3)]
    assert all(apart)
    assert sorted(one.id or "" for part in apart for one in part) == [one.id for one in together]
    assert read_form(form, slice_bytes=2**30) == together


def test_row_longer_than_a_slice_leaves_an_empty_slice_behind(tmp_path: Path) -> None:
    [file] = list_corpus(f"{put(tmp_path, **{'a.csv': csv_table([{'text': '长' * 1000}, {'text': '江'}])})}/a.csv")
    items = list(read_slices(file, KiB, lambda index: True, "text", "id"))
    starts = [item.index for item in items if isinstance(item, SliceStart)]
    assert starts == [0, 1, 2] and items[-1] == SliceEnd(2, True)
    assert isinstance(items[1], Document) and isinstance(items[-2], Document)


def content(url: Path) -> dict[str, bytes]:
    """Every file of a finished data set."""
    found = {str(path.relative_to(url)): path.read_bytes() for path in url.rglob("*") if path.is_file()}
    assert "manifest.json" in found
    return found


def test_workers_of_an_array_make_the_bytes_of_one(folder: Path, trained: TextTokenizer, tmp_path: Path) -> None:
    form = Form(f"{folder}/configured", subset="zh", source_split="train")
    prepare(form.recipe(), trained, str(tmp_path / "alone"))
    for index in (2, 0, 1):
        prepare(form.recipe(), trained, str(tmp_path / "array"), (index, 3))
    assert content(tmp_path / "array") == content(tmp_path / "alone")


@pytest.mark.recovery
def test_processes_make_the_bytes_of_one(
    folder: Path, trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Form(f"{folder}/configured", subset="zh", source_split="train")
    prepare(form.recipe(), trained, str(tmp_path / "alone"))
    monkeypatch.setenv("WIKILLM_SCRATCH", str(tmp_path / "scratch"))
    told = (lambda documents, utf8_bytes: None, lambda record: None)
    prepare_in_processes(form.recipe(), trained, str(tmp_path / "processes"), storage.StoreOptions(), (0, 1), 2, *told)
    assert content(tmp_path / "processes") == content(tmp_path / "alone")
    assert not list((tmp_path / "scratch").glob("*/datasets-*")), "the processes have cleared up"


def test_store_gives_the_documents_and_the_identity_of_local_files(folder: Path, bucket: str) -> None:
    for name in ("table.csv.gz", "texts.tar", "saved/state.json", "saved/dataset_info.json", "configured/zh/test.csv"):
        storage.upload_file(folder / name, f"{bucket}/{name}")
    for path in (folder / "saved").glob("data-*-of-00002.arrow"):
        storage.upload_file(path, f"{bucket}/saved/{path.name}")
    for name in ("gzip", "tar of texts", "saved"):
        here, there = FORMS[name](str(folder)), FORMS[name](bucket)
        assert read_form(there) == read_form(here)
        assert identify(there.files()).fingerprints == identify(here.files()).fingerprints


def test_file_replaced_in_the_store_while_it_is_read_is_no_damage(bucket: str) -> None:
    content = csv_table([{"text": "长江" * 3_500}] * 1_100)
    storage.write_bytes(f"{bucket}/a.csv", content)
    items = read_slices(*list_corpus(f"{bucket}/a.csv"), 2**30, lambda index: True, "text", "id")
    assert isinstance(next(items), SliceStart) and isinstance(next(items), Document)
    storage.write_bytes(f"{bucket}/a.csv", content[:-9])
    with pytest.raises(storage.IntegrityError, match=r"a\.csv: it was replaced while it was read"):
        for item in items:
            assert isinstance(item, Document)


def test_file_at_a_web_server_is_read_and_named_with_its_query(folder: Path) -> None:
    with dataset_hub(DATA_SETS) as hub:
        url = f"{hub.url}/datasets/{NAME}/resolve/main/zh/train-0.csv?download=true"
        [file] = list_corpus(url)
        assert file.size == len(DATA_SETS[NAME]["zh/train-0.csv"])
        assert [one.id for one in read([file])[0]] == [one["id"] for one in RECORDS[:90]]
        assert identify([file]).fingerprints[0].name == "train-0.csv?download=true"


def test_name_with_characters_of_patterns_and_urls_is_read(folder: Path) -> None:
    [usual] = list_corpus(f"{folder}/table.csv")
    odd = replace(usual, path=f"{folder}/[1] odd::name #1.csv")
    assert read([odd]) == read([usual])


# ── text and CSV ─────────────────────────────────────────────────────────────────────────────────────────────────────

STORY = "\ufeff第一段\r\n第二行\r\n\r\n第二段\n\n\n\n第三段\n"


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("paragraph", ["第一段\n第二行", "第二段", "第三段"]),
        ("line", ["第一段", "第二行", "", "第二段", "", "", "", "第三段"]),
        ("file", ["第一段\n第二行\n\n第二段\n\n\n\n第三段\n"]),
    ],
)
def test_text_documents_are_paragraphs_lines_or_files(documents: Any, expected: list[str], tmp_path: Path) -> None:
    put(tmp_path, **{"story.txt": STORY.encode()})
    read_as = Form(str(tmp_path), text_field="content", text_documents=documents)
    assert [one.text for one in read_form(read_as)] == expected
    assert {one.id for one in read_form(read_as)} == {None}


def test_text_gives_the_tokens_of_json_without_ids(trained: TextTokenizer, tmp_path: Path) -> None:
    texts = [one["text"] for one in RECORDS]
    put(tmp_path, **{"a.txt": "\n\n".join(texts).encode(), "a.jsonl": json_lines([{"text": text} for text in texts])})
    for name in ("a.txt", "a.jsonl"):
        prepare(Form(f"{tmp_path}/{name}").recipe(), trained, f"{tmp_path}/shards/{name}")
    assert tokens(f"{tmp_path}/shards/a.txt") == tokens(f"{tmp_path}/shards/a.jsonl")


def test_large_text_without_empty_lines_is_no_single_document(tmp_path: Path) -> None:
    put(tmp_path, **{"lines.txt": "长江与黄河\n".encode() * (2**24 // 16 + 1)})
    documents, [bad] = read(list_corpus(str(tmp_path)))
    assert not documents and bad.reason.endswith("in 16 MiB: set data.text_documents to line or file")
    items = read_slices(
        list_corpus(str(tmp_path), choice=Choice(documents="line"))[0], KiB, lambda index: True, "text", "id"
    )
    assert isinstance(next(items), SliceStart) and next(items) == Document(None, "长江与黄河")


def test_other_way_to_cut_text_is_another_plan(trained: TextTokenizer, tmp_path: Path) -> None:
    put(tmp_path, **{"story.txt": STORY.encode() * 20})
    prepare(Form(f"{tmp_path}/story.txt").recipe(), trained, f"{tmp_path}/shards")
    other = Form(f"{tmp_path}/story.txt", text_documents="line").recipe()
    with pytest.raises(UserError, match=r"differs: data\.text_documents is not set there and 'line' here; choose"):
        prepare(other, trained, f"{tmp_path}/shards")
    prepare(other, trained, f"{tmp_path}/lines")
    with pytest.raises(UserError, match=r"differs: data\.text_documents is 'line' there and not set here; choose"):
        prepare(Form(f"{tmp_path}/story.txt").recipe(), trained, f"{tmp_path}/lines")


def test_options_of_a_configuration_are_followed_and_in_the_plan(trained: TextTokenizer, tmp_path: Path) -> None:
    def describe(name: str, separator: str) -> None:
        options = f"---\nconfigs:\n- {{config_name: {name}, data_files: {name}.*, {separator}}}\n---\n"
        put(tmp_path / name, **{"README.md": options.encode()})

    put(tmp_path / "a", **{"a.csv": b"id;text\n1;a,b\n2;c,d\n" * 9})
    put(tmp_path / "b", **{"b.txt": "一\n二\n".encode()})
    put(tmp_path / "c", **{"c.json": b'{"rows": [{"id": 1, "text": "a"}], "about": 1}'})
    for name, option in (("a", 'sep: ";"'), ("b", "sample_by: line"), ("c", "field: rows")):
        describe(name, option)
    found = {name: [one.text for one in read_form(Form(f"{tmp_path}/{name}", subset=name))] for name in "abc"}
    assert found["a"][:2] == ["a,b", "c,d"] and found["b"] == ["一", "二"] and found["c"] == ["a"]
    prepare(Form(f"{tmp_path}/a", subset="a").recipe(), trained, f"{tmp_path}/shards")
    describe("a", "encoding: gbk, sep: ';'")
    with pytest.raises(UserError, match=r"differs: data\.source is read in another way there; choose"):
        prepare(Form(f"{tmp_path}/a", subset="a").recipe(), trained, f"{tmp_path}/shards")


def test_csv_values_are_the_text_that_is_written(tmp_path: Path) -> None:
    rows = [
        {"id": "007", "text": "NA"},
        {"id": "1e3", "text": "12"},
        {"id": "", "text": "null"},
        {"id": "x", "text": ""},
    ]
    put(tmp_path, **{"a.csv": csv_table(rows)})
    documents = read_form(Form(str(tmp_path)))
    expected = [("007", "NA"), ("1e3", "12"), (None, "null"), ("x", "")]
    assert [(one.id, one.text) for one in documents] == expected


def test_json_plan_has_nothing_of_the_library_in_it(folder: Path) -> None:
    form = Form(f"{folder}/lines.jsonl")
    assert not form.recipe().settings.keys() & {"data.subset", "data.source_split", "data.text_documents"}
    assert [one.reader for one in identify(form.files()).fingerprints] == [None]
    chosen = Form(f"{folder}/configured", subset="zh", source_split="train")
    assert chosen.recipe().settings.items() >= {"data.subset": "zh", "data.source_split": "train"}.items()
    assert [one.reader for one in identify(chosen.files()).fingerprints] == ["csv", "csv"]


# ── what is wrong, in one line ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        (Form("splits"), r"data\.source_split: .*splits has the splits 'train', 'test'; set data\.source_split to one"),
        (Form("splits", source_split="dev"), r"data\.source_split: 'dev': .*has the splits 'train', 'test'"),
        (Form("saved", subset="zh"), r"data\.subset: 'zh': .*saved was made by save_to_disk and has no subsets"),
        (Form("saved", source_split="train"), r"data\.source_split: 'train': .* is one data set without splits"),
        (Form("configured", subset="en"), r"data\.subset: 'en': .*\['zh', 'lines'\]"),
        (Form("configured", source_split="train"), r"data\.subset: .*\['zh', 'lines'\]"),
        (Form("configured", subset="zh"), r"data\.source_split: .*has the splits 'train', 'test'"),
        (Form("table.csv", subset="zh"), r"data\.subset: 'zh': data\.source .* has neither configurations nor splits"),
        (Form("*.csv", source_split="train"), r"data\.source_split: 'train': .*has neither configurations nor splits"),
        (Form("*.t*"), r"data\.source: .*holds files of several kinds, which are csv and webdataset; name one kind"),
        (Form("configured/README.md"), r"data\.source: .*none of the files there is a corpus.*\.txt, \.csv"),
    ],
)
def test_wrong_choice_names_what_there_is(form: Form, complaint: str, folder: Path) -> None:
    whole = Form(f"{folder}/{form.source}", form.text_field, form.id_field, form.subset, form.source_split)
    with pytest.raises(UserError, match=complaint) as told:
        whole.files()
    assert "\n" not in str(told.value)


def test_listing_names_the_kinds_that_are_taken_and_left_out(tmp_path: Path) -> None:
    put(tmp_path, **{"a.txt": b"a", "b.txt": b"b", "notes.md": b"c"})
    told: list[Listing] = []
    list_corpus(str(tmp_path), told.append)
    put(tmp_path, **{"c.jsonl": json_lines(RECORDS[:1])})
    list_corpus(str(tmp_path), told.append)
    first, second = ({name.strip(): value for name, value in one.rows()} for one in told)
    assert first["names"] == "a.txt, b.txt" and first["text, by the datasets library"].startswith("2 files")
    assert first["left out: no suffix that says what it is, and no JSON lines in it"].startswith("notes.md")
    assert second["names"] == "c.jsonl"
    assert second["left out: of another kind than JSON and Parquet, which are there"].startswith("a.txt, b.txt")


def damaged(name: str, content: bytes, tmp_path: Path) -> tuple[list[Document], list[BadRecord]]:
    put(tmp_path, **{name: content})
    fields = {"text_field": "json.text", "id_field": "json.id"} if ".tar" in name else {}
    return read(list_corpus(f"{tmp_path}/{name}"), **fields)  # type: ignore[arg-type]


NOT_UTF_8 = "not UTF-8; if it is GBK, convert it: iconv -f GB18030 -t UTF-8"
SAMPLES = {f"{one['id']}.json": json.dumps(one).encode() for one in RECORDS}


@pytest.mark.parametrize(
    ("name", "content", "kept", "reason"),
    [
        ("gbk.csv", csv_table(RECORDS).decode().encode("gb18030"), 0, NOT_UTF_8),
        ("gbk.txt", "长江与黄河".encode("gb18030"), 0, NOT_UTF_8),
        ("first.csv", b"id,text\n1,a,b\n2,a,b\n", 0, "Expected 2 fields in line 2, saw 3"),
        ("second.csv", b"id,text\n1,a\n2,a,b\n", 0, "Expected 2 fields in line 3, saw 3"),
        ("short.csv", b"id,text\n1\n2,a,b\n", 0, "Expected 2 fields in line 3, saw 3"),
        ("twice.csv", b"id,text,text\n1,a,b\n", 0, "there are 2 columns 'text'"),
        ("empty.csv", b"", 0, "No columns to parse from file"),
        ("other.csv", b"id,content\n1,a\n", 0, "no 'text', only 'id', 'content'"),
        ("cut.csv.gz", compressed(csv_table(RECORDS), ".gz")[:-20], 0, "the compressed file is cut off here"),
        ("cut.csv.zst", compressed(csv_table(RECORDS), ".zst", 2)[:-9], 0, "the compressed file is cut off here"),
        ("cut.tar", tar_archive(SAMPLES)[: 512 * 20 + 520], 10, "unexpected end of data"),
        ("between.tar", tar_archive(SAMPLES)[: 512 * 20 + 100], 10, "the file is cut off here"),
        ("cut.arrow", arrow_stream(RECORDS)[:-8], len(RECORDS), "the file is cut off here"),
        ("mixed.tar", tar_archive({"1.txt": b"a", "2.json": b"{}"}), 0, "should be in WebDataset format"),
        ("noise.arrow", b"\xff" * 5000, 0, ""),
    ],
)
def test_damage_is_one_bad_record_with_its_reason(
    name: str, content: bytes, kept: int, reason: str, tmp_path: Path
) -> None:
    documents, [bad] = damaged(name, content, tmp_path)
    assert reason in bad.reason and bad.reason
    assert re.fullmatch(r"row [\d,]+ and all after it", bad.position)
    assert "\n" not in bad.reason and bad.url.endswith(name)
    assert len(documents) >= kept


def test_rows_before_the_damage_are_kept_when_it_is_skipped(trained: TextTokenizer, tmp_path: Path) -> None:
    many = csv_table(RECORDS * 4)
    put(tmp_path, **{"a.csv": many + b'1,"x",y\n'})
    documents, [bad] = read(list_corpus(f"{tmp_path}/a.csv"))
    assert len(documents) >= 768 and bad.position == f"row {len(documents) + 1:,} and all after it"
    with pytest.raises(UserError, match=rf"data\.source: .*a\.csv': bad record at {bad.position}.*data\.on_bad_record"):
        prepare(Form(f"{tmp_path}/a.csv").recipe(slice_bytes=2**20), trained, f"{tmp_path}/shards")


def test_record_that_is_no_document_is_bad_alone(tmp_path: Path) -> None:
    members = SAMPLES | {
        "013.json": b'{"id": "3", "text": 3}',
        "015.json": b'{"id": "5", "text": "\\ud800"}',
        "017.json": b'{"id": "7"}',
    }
    documents, bad = damaged("a.tar", tar_archive(members), tmp_path)
    assert len(documents) == len(RECORDS) - 3
    assert [one.position for one in bad] == ["row 14", "row 16", "row 18"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("saved/state.json", b"{", "state.json': is damaged"),
        ("saved/state.json", b'{"_data_files": [{"filename": "../../x"}]}', "is damaged: it names no data files"),
        ("saved/state.json", b'{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow': is missing, though state.json"),
        ("splits/dataset_dict.json", b'{"splits": []}', "is damaged: it names no splits"),
        ("splits/train/state.json", None, "state.json': is damaged: it is missing"),
        ("configured/README.md", b"---\nconfigs: [\n---\n", "data.source: "),
        ("configured/README.md", b"---\nconfigs:\n- {config_name: zh, data_files: no*.csv}\n---\n", "data.source: "),
        ("configured/configured.py", b"raise SystemExit('ran')", "has a program of its own|a program of its own"),
    ],
)
def test_damaged_description_is_told_in_one_line(
    name: str, content: bytes | None, complaint: str, folder: Path, tmp_path: Path
) -> None:
    top = name.partition("/")[0]
    shutil.copytree(folder / top, tmp_path / top)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    settings = {"splits": (None, "train"), "configured": ("zh", "train"), "saved": (None, None)}[top]
    with pytest.raises(UserError, match=complaint) as told:
        list_corpus(str(tmp_path / top), choice=Choice(*settings))
    assert "\n" not in str(told.value)


def test_folder_with_another_programs_state_is_no_saved_data_set(tmp_path: Path) -> None:
    put(tmp_path, **{"state.json": b"{}", "a.jsonl": json_lines(RECORDS)})
    assert len(read_form(Form(str(tmp_path)))) == len(RECORDS)


# ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_and_tokenizer_take_such_a_corpus(folder: Path, tmp_path: Path) -> None:
    def config(**data: str) -> Config:
        words = {"source": f"{folder}/configured", "shards": f"{tmp_path}/shards", **data}
        chosen = [(f"data.{name}", value) for name, value in words.items()]
        return load(None, [*chosen, ("tokenizer.source", f"{tmp_path}/made"), ("tokenizer.vocab_size", "300")])

    findings = Findings()
    assert check_data(findings, config(subset="zh", source_split="train"), deep=False) is None
    check_data(findings, config(subset="zh", source_split="dev"), deep=False)
    shown = [one for one in map(str, findings.rows) if "corpus" in one]
    assert "2 files" in shown[0] and "'train', 'test'" in shown[1]
    assert commands.tokenizer(config(subset="zh", source_split="train")) == 0
    assert (tmp_path / "made" / "tokenizer.json").is_file()


# ── hubs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

READ = """
import json, sys
from job import local_dirs as scratch
from job.data.corpus import BadRecord, Document, list_corpus, read_slices
from job.data.dataset_files import Choice
from job.data.fingerprint import identify
from job.errors import UserError
scratch.use_scratch(print)
for case in json.loads(sys.argv[1]):
    try:
        files = list_corpus(case[0], choice=Choice(*case[1:]))
        items = [item for file in files for item in read_slices(file, 2**20, lambda index: True, "text", "id")]
        [print(item.reason) for item in items if isinstance(item, BadRecord)]
        found = identify(files).fingerprints
        documents = sum(isinstance(item, Document) for item in items)
        print(documents, *(f"{file.url} {one.revision} {one.hub_hash is not None}" for file, one in zip(files, found)))
    except UserError as error:
        print(error)
    print("datasets" in sys.modules)
"""
NAME = "owner/wiki"


DATA_SETS = {
    NAME: {
        "README.md": README,
        "zh/train-0.csv": csv_table(RECORDS[:90]),
        "zh/train-1.csv": csv_table(RECORDS[90:]),
        "zh/test.csv": csv_table(RECORDS[:2]),
        "lines.jsonl": json_lines(RECORDS),
    },
    "owner/texts": {"a.txt": "第一篇\n\n第二篇\n".encode(), "b.txt.gz": compressed("第三篇\n".encode(), ".gz")},
    "owner/gated": {},
}
Case = list[str | None]


def read_from_hub(hub: DatasetHub, home: Path, *cases: Case) -> list[tuple[str, bool]]:
    """What a fresh process prints of each case, and whether it has imported the library by then.

    It may print nothing else, and leave nothing outside of its scratch folder, and there no folder of locks.
    """
    settings = {
        "HF_ENDPOINT": hub.url,
        "HTTPS_PROXY": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HOME": str(home / "home"),
        "WIKILLM_SCRATCH": str(home / "scratch"),
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of downloads
    }
    (home / "home").mkdir(exist_ok=True)
    cleared = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_", "WIKILLM"))}
    command = [sys.executable, "-c", READ, json.dumps(cases)]
    result = subprocess.run(command, env=cleared | settings, capture_output=True, text=True, cwd=Path.cwd())
    warned = [line for line in result.stderr.splitlines() if not re.search("thrown while requesting|Retrying in", line)]
    assert (result.returncode, warned) == (0, [])
    assert not list((home / "home").rglob("*"))
    assert not list((home / "scratch").glob("*/datasets-*"))
    lines = result.stdout.splitlines()
    return list(zip(lines[0::2], [line == "True" for line in lines[1::2]], strict=True))


def test_hub_is_streamed_at_a_commit_and_told_in_one_line(tmp_path: Path) -> None:
    """Configurations, splits, plain data sets, answers that break off, and what there is not."""
    put(tmp_path, **{"plain.jsonl": json_lines(RECORDS)})
    good: list[Case] = [[f"{NAME}@main", "lines"], [NAME, "zh", "train"]]
    texts: list[Case] = [["owner/texts"], ["owner/texts", None, "train", "paragraph"]]
    wrong: list[Case] = [
        *([NAME, "zh"], [NAME, "en"], [f"{NAME}@v9", "zh"], [f"{NAME}/zh", "zh"], ["owner/gated", "zh"]),
        *(["owner/none", "zh"], ["modelscope://owner/wiki", "zh"]),
    ]
    with dataset_hub(DATA_SETS) as hub:
        hub.cut_off = 2
        (plain, is_imported), *others = read_from_hub(hub, tmp_path, [f"{tmp_path}/plain.jsonl"], *good, *texts, *wrong)
    assert plain.startswith("200 ") and not is_imported, "JSON has no need of the library"
    lines = [line for line, _ in others]
    prefix, end = f"hf://datasets/{NAME}@{COMMIT}", f"{COMMIT} True"
    assert lines[0] == f"200 {prefix}/lines.jsonl {end}"
    assert lines[1] == f"200 {prefix}/zh/train-0.csv {end} {prefix}/zh/train-1.csv {end}"
    assert hub.cut_off == 0, "answers broke off"
    texts_url = f"hf://datasets/owner/texts@{COMMIT}"
    assert lines[2] == f"4 {texts_url}/a.txt {end} {texts_url}/b.txt.gz {end}"
    assert lines[3].startswith("3 ")
    complaints = [
        *("'train', 'test'", "['zh', 'lines']", "no revision 'v9'", "neither configurations nor splits"),
        *("given only to those who asked for it", "no such data set on the hub", "name files: modelscope://owner/wiki"),
    ]
    assert all(complaint in line for line, complaint in zip(lines[4:], complaints, strict=True))
    assert all("/datasets/owner/" in one for one in hub.requests), "nothing is asked or told beyond the data sets"
    revisions = re.findall(r"/(?:revision|resolve|tree|paths-info)/([^/?\s]+)", "\n".join(hub.requests))
    assert set(revisions) == {"main", "v9", COMMIT}
    assert not any("/resolve/main/" in one for one in hub.requests), "a branch may move meanwhile"
