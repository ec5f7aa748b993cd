"""Files that the `datasets` library reads give the same documents and tokens as JSON."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from corpus_files import compressed, json_lines
from dataset_forms import (
    DATA_SETS,
    FORMS,
    NAME,
    RECORDS,
    SAMPLES,
    Form,
    KiB,
    csv_table,
    put,
    read,
    read_form,
    tar_archive,
    tokens,
)
from dataset_hub import dataset_hub

from job import commands, storage
from job.config import Config, load
from job.data.corpus import Document, SliceEnd, SliceStart, list_corpus, read_slices
from job.data.dataset_files import Choice
from job.data.fingerprint import identify
from job.data.prepare import prepare
from job.data.prepare_processes import prepare_in_processes
from job.data.tokenizer import TextTokenizer
from job.errors import UserError
from job.preflight.data_set import check_data
from job.preflight.findings import Findings

# ---- Same as JSON ----


@pytest.fixture(scope="module")
def from_json(forms: Path, trained: TextTokenizer) -> tuple[bytes, bytes, dict[str, int]]:
    """Tokens and statistics of the records as JSON lines."""
    prepare(Form(f"{forms}/lines.jsonl").recipe(), trained, f"{forms}/shards/json")
    return tokens(f"{forms}/shards/json")


@pytest.mark.parametrize("name", FORMS)
def test_each_format_gives_the_documents_and_tokens_of_json(
    name: str, forms: Path, trained: TextTokenizer, from_json: tuple[bytes, bytes, dict[str, int]]
) -> None:
    form = FORMS[name](str(forms))
    assert [(document.id, document.text) for document in read_form(form)] == [
        (record["id"], record["text"]) for record in RECORDS
    ]
    manifest = prepare(form.recipe(), trained, f"{forms}/shards/{name}")
    assert manifest is not None and len(manifest.train) > 2
    assert tokens(f"{forms}/shards/{name}") == from_json


@pytest.mark.parametrize("name", ["csv", "tar of JSON", "saved"])
def test_slice_has_the_same_rows_for_every_reader(name: str, forms: Path) -> None:
    form = FORMS[name](str(forms))
    together = read_form(form, slice_bytes=KiB)
    apart = [read_form(form, slice_bytes=KiB, wanted=lambda index, part=part: index % 3 == part) for part in range(3)]
    assert all(apart)
    assert sorted(document.id or "" for part in apart for document in part) == [document.id for document in together]
    assert read_form(form, slice_bytes=2**30) == together


def test_row_longer_than_a_slice_leaves_an_empty_slice(tmp_path: Path) -> None:
    [file] = list_corpus(f"{put(tmp_path, **{'a.csv': csv_table([{'text': '长' * 1000}, {'text': '江'}])})}/a.csv")
    items = list(read_slices(file, KiB, lambda index: True, "text", "id"))
    starts = [item.index for item in items if isinstance(item, SliceStart)]
    assert starts == [0, 1, 2] and items[-1] == SliceEnd(2, True)
    assert isinstance(items[1], Document) and isinstance(items[-2], Document)


def content_of(url: Path) -> dict[str, bytes]:
    """Return the content of every file of a finished data set."""
    files = {str(path.relative_to(url)): path.read_bytes() for path in url.rglob("*") if path.is_file()}
    assert "manifest.json" in files
    return files


def test_array_workers_make_the_same_bytes_as_one_worker(forms: Path, trained: TextTokenizer, tmp_path: Path) -> None:
    form = Form(f"{forms}/configured", subset="zh", source_split="train")
    prepare(form.recipe(), trained, str(tmp_path / "alone"))
    for index in (2, 0, 1):
        prepare(form.recipe(), trained, str(tmp_path / "array"), (index, 3))
    assert content_of(tmp_path / "array") == content_of(tmp_path / "alone")


@pytest.mark.recovery
def test_processes_make_the_same_bytes_as_one(
    forms: Path, trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Form(f"{forms}/configured", subset="zh", source_split="train")
    prepare(form.recipe(), trained, str(tmp_path / "alone"))
    monkeypatch.setenv("WIKILLM_SCRATCH", str(tmp_path / "scratch"))
    callbacks = (lambda documents, utf8_bytes: None, lambda record: None)
    prepare_in_processes(
        form.recipe(), trained, str(tmp_path / "processes"), storage.StoreOptions(), (0, 1), 2, *callbacks
    )
    assert content_of(tmp_path / "processes") == content_of(tmp_path / "alone")
    assert not list((tmp_path / "scratch").glob("*/datasets-*")), "the processes have removed their folders"


def test_store_gives_same_documents_and_fingerprints_as_local(forms: Path, bucket: str) -> None:
    for name in ("table.csv.gz", "texts.tar", "saved/state.json", "saved/dataset_info.json", "configured/zh/test.csv"):
        storage.upload_file(forms / name, f"{bucket}/{name}")
    for path in (forms / "saved").glob("data-*-of-00002.arrow"):
        storage.upload_file(path, f"{bucket}/saved/{path.name}")
    for name in ("gzip", "tar of texts", "saved"):
        here, there = FORMS[name](str(forms)), FORMS[name](bucket)
        assert read_form(there) == read_form(here)
        assert identify(there.files()).fingerprints == identify(here.files()).fingerprints


def test_file_replaced_in_the_store_is_not_reported_as_damage(bucket: str) -> None:
    content = csv_table([{"text": "长江" * 3_500}] * 1_100)
    storage.write_bytes(f"{bucket}/a.csv", content)
    items = read_slices(*list_corpus(f"{bucket}/a.csv"), 2**30, lambda index: True, "text", "id")
    assert isinstance(next(items), SliceStart) and isinstance(next(items), Document)
    storage.write_bytes(f"{bucket}/a.csv", content[:-9])
    with pytest.raises(storage.IntegrityError, match=r"a\.csv: it was replaced while it was read"):
        for item in items:
            assert isinstance(item, Document)


def test_web_file_is_read_and_named_with_its_query(forms: Path) -> None:
    with dataset_hub(DATA_SETS) as hub:
        url = f"{hub.url}/datasets/{NAME}/resolve/main/zh/train-0.csv?download=true"
        [file] = list_corpus(url)
        assert file.size == len(DATA_SETS[NAME]["zh/train-0.csv"])
        assert [document.id for document in read([file])[0]] == [record["id"] for record in RECORDS[:90]]
        assert identify([file]).fingerprints[0].name == "train-0.csv?download=true"


def test_name_with_pattern_and_url_characters_is_read(forms: Path) -> None:
    [usual] = list_corpus(f"{forms}/table.csv")
    odd = replace(usual, path=f"{forms}/[1] odd::name #1.csv")
    assert read([odd]) == read([usual])


def test_compression_suffix_may_be_in_capitals(tmp_path: Path) -> None:
    archive = compressed(tar_archive(SAMPLES), ".gz")
    [file] = list_corpus(f"{put(tmp_path, **{'A.TAR.GZ': archive})}/A.TAR.GZ")
    documents, bad = read([file], text_field="json.text", id_field="json.id")
    assert len(documents) == len(RECORDS) and not bad


# ---- Text and CSV ----

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
    form = Form(str(tmp_path), text_field="content", text_documents=documents)
    assert [document.text for document in read_form(form)] == expected
    assert {document.id for document in read_form(form)} == {None}


def test_text_gives_the_same_tokens_as_json_without_ids(trained: TextTokenizer, tmp_path: Path) -> None:
    texts = [record["text"] for record in RECORDS]
    put(tmp_path, **{"a.txt": "\n\n".join(texts).encode(), "a.jsonl": json_lines([{"text": text} for text in texts])})
    for name in ("a.txt", "a.jsonl"):
        prepare(Form(f"{tmp_path}/{name}").recipe(), trained, f"{tmp_path}/shards/{name}")
    assert tokens(f"{tmp_path}/shards/a.txt") == tokens(f"{tmp_path}/shards/a.jsonl")


def test_large_text_without_empty_lines_is_refused(tmp_path: Path) -> None:
    put(tmp_path, **{"lines.txt": "长江与黄河\n".encode() * (2**24 // 16 + 1)})
    documents, [bad] = read(list_corpus(str(tmp_path)))
    assert not documents and bad.reason.endswith("within 16 MiB: set data.text_documents to line or file")
    items = read_slices(
        list_corpus(str(tmp_path), choice=Choice(documents="line"))[0], KiB, lambda index: True, "text", "id"
    )
    assert isinstance(next(items), SliceStart) and next(items) == Document(None, "长江与黄河")


def test_other_text_documents_setting_makes_another_plan(trained: TextTokenizer, tmp_path: Path) -> None:
    put(tmp_path, **{"story.txt": STORY.encode() * 20})
    prepare(Form(f"{tmp_path}/story.txt").recipe(), trained, f"{tmp_path}/shards")
    other = Form(f"{tmp_path}/story.txt", text_documents="line").recipe()
    with pytest.raises(UserError, match=r"differs: data\.text_documents is not set there and 'line' here; set"):
        prepare(other, trained, f"{tmp_path}/shards")
    prepare(other, trained, f"{tmp_path}/lines")
    with pytest.raises(UserError, match=r"differs: data\.text_documents is 'line' there and not set here; set"):
        prepare(Form(f"{tmp_path}/story.txt").recipe(), trained, f"{tmp_path}/lines")


def test_configuration_options_are_used_and_part_of_the_plan(trained: TextTokenizer, tmp_path: Path) -> None:
    def describe(name: str, option: str) -> None:
        options = f"---\nconfigs:\n- {{config_name: {name}, data_files: {name}.*, {option}}}\n---\n"
        put(tmp_path / name, **{"README.md": options.encode()})

    put(tmp_path / "a", **{"a.csv": b"id;text\n1;a,b\n2;c,d\n" * 9})
    put(tmp_path / "b", **{"b.txt": "一\n二\n".encode()})
    put(tmp_path / "c", **{"c.json": b'{"rows": [{"id": 1, "text": "a"}], "about": 1}'})
    for name, option in (("a", 'sep: ";"'), ("b", "sample_by: line"), ("c", "field: rows")):
        describe(name, option)
    found = {name: [document.text for document in read_form(Form(f"{tmp_path}/{name}", subset=name))] for name in "abc"}
    assert found["a"][:2] == ["a,b", "c,d"] and found["b"] == ["一", "二"] and found["c"] == ["a"]
    prepare(Form(f"{tmp_path}/a", subset="a").recipe(), trained, f"{tmp_path}/shards")
    describe("a", "encoding: gbk, sep: ';'")
    with pytest.raises(UserError, match=r"differs: data\.source was read with other options there; set"):
        prepare(Form(f"{tmp_path}/a", subset="a").recipe(), trained, f"{tmp_path}/shards")


def test_csv_values_are_kept_as_written(tmp_path: Path) -> None:
    rows = [
        {"id": "007", "text": "NA"},
        {"id": "1e3", "text": "12"},
        {"id": "", "text": "null"},
        {"id": "x", "text": ""},
    ]
    put(tmp_path, **{"a.csv": csv_table(rows)})
    documents = read_form(Form(str(tmp_path)))
    expected = [("007", "NA"), ("1e3", "12"), (None, "null"), ("x", "")]
    assert [(document.id, document.text) for document in documents] == expected


def test_plan_of_json_has_no_library_settings(forms: Path) -> None:
    form = Form(f"{forms}/lines.jsonl")
    assert not form.recipe().settings.keys() & {"data.subset", "data.source_split", "data.text_documents"}
    assert [file.reader for file in identify(form.files()).fingerprints] == [None]
    chosen = Form(f"{forms}/configured", subset="zh", source_split="train")
    assert chosen.recipe().settings.items() >= {"data.subset": "zh", "data.source_split": "train"}.items()
    assert [file.reader for file in identify(chosen.files()).fingerprints] == ["csv", "csv"]


# ---- Commands ----


def test_check_and_tokenizer_read_a_configured_data_set(forms: Path, tmp_path: Path) -> None:
    def config(**data: str) -> Config:
        words = {"source": f"{forms}/configured", "shards": f"{tmp_path}/shards", **data}
        chosen = [(f"data.{name}", value) for name, value in words.items()]
        return load(None, [*chosen, ("tokenizer.source", f"{tmp_path}/made"), ("tokenizer.vocab_size", "300")])

    findings = Findings()
    for split in ("train", "dev"):
        chosen = config(subset="zh", source_split=split)
        assert check_data(findings, chosen.data, chosen.tokenizer.source, deep=False) is None
    shown = [row for row in map(str, findings.rows) if "corpus" in row]
    assert "2 files" in shown[0] and "'train', 'test'" in shown[1]
    assert commands.tokenizer(config(subset="zh", source_split="train")) == 0
    assert (tmp_path / "made" / "tokenizer.json").is_file()
