"""Wrong choices and damaged files of the `datasets` library are reported in one line."""

import re
import shutil
from pathlib import Path

import pytest
from corpus_files import compressed, json_lines
from dataset_forms import RECORDS, SAMPLES, Form, arrow_stream, csv_table, put, read, read_form, tar_archive

from job.data.corpus import BadRecord, Document, Listing, list_corpus
from job.data.dataset_files import Choice
from job.data.prepare import prepare
from job.data.tokenizer import TextTokenizer
from job.errors import UserError


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
        (Form("*.t*"), r"data\.source: .*holds files of several formats: csv and webdataset; name files of one format"),
        (
            Form("configured/README.md"),
            r"data\.source: .*no file there can be read as a corpus.*\.txt, \.csv",
        ),
    ],
)
def test_wrong_choice_error_names_what_exists(form: Form, complaint: str, forms: Path) -> None:
    form = Form(f"{forms}/{form.source}", form.text_field, form.id_field, form.subset, form.source_split)
    with pytest.raises(UserError, match=complaint) as raised:
        form.files()
    assert "\n" not in str(raised.value)


def test_listing_shows_taken_and_left_out_formats(tmp_path: Path) -> None:
    put(tmp_path, **{"a.txt": b"a", "b.txt": b"b", "notes.md": b"c"})
    listings: list[Listing] = []
    list_corpus(str(tmp_path), listings.append)
    put(tmp_path, **{"c.jsonl": json_lines(RECORDS[:1])})
    list_corpus(str(tmp_path), listings.append)
    first, second = ({name.strip(): value for name, value in listing.rows()} for listing in listings)
    assert first["names"] == "a.txt, b.txt" and first["text, by the datasets library"].startswith("2 files")
    assert first["left out: no known suffix, and the content is not JSON lines"].startswith("notes.md")
    assert second["names"] == "c.jsonl"
    assert second["left out: another format, while there are JSON or Parquet files"].startswith("a.txt, b.txt")


def read_damaged(name: str, content: bytes, tmp_path: Path) -> tuple[list[Document], list[BadRecord]]:
    """Return the documents and bad records of a file with this content."""
    put(tmp_path, **{name: content})
    fields = {"text_field": "json.text", "id_field": "json.id"} if ".tar" in name else {}
    return read(list_corpus(f"{tmp_path}/{name}"), **fields)  # type: ignore[arg-type]


NOT_UTF_8 = "not UTF-8; if it is in GBK, convert it: iconv -f gb18030 -t utf-8"


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
        ("other.csv", b"id,content\n1,a\n", 0, "no field 'text', only 'id', 'content'"),
        ("cut.csv.gz", compressed(csv_table(RECORDS), ".gz")[:-20], 0, "the compressed file is cut off here"),
        ("cut.csv.zst", compressed(csv_table(RECORDS), ".zst", 2)[:-9], 0, "the compressed file is cut off here"),
        ("cut.tar", tar_archive(SAMPLES)[: 512 * 20 + 520], 10, "unexpected end of data"),
        ("between.tar", tar_archive(SAMPLES)[: 512 * 20 + 100], 10, "the file is cut off here"),
        ("cut.arrow", arrow_stream(RECORDS)[:-8], len(RECORDS), "the file is cut off here"),
        ("mixed.tar", tar_archive({"1.txt": b"a", "2.json": b"{}"}), 0, "should be in WebDataset format"),
        ("noise.arrow", b"\xff" * 5000, 0, ""),
    ],
)
def test_damaged_file_gives_one_bad_record_with_its_reason(
    name: str, content: bytes, kept: int, reason: str, tmp_path: Path
) -> None:
    documents, [bad] = read_damaged(name, content, tmp_path)
    assert reason in bad.reason and bad.reason
    assert re.fullmatch(r"row [\d,]+ and all after it", bad.position)
    assert "\n" not in bad.reason and bad.url.endswith(name)
    assert len(documents) >= kept


def test_rows_before_damage_are_kept(trained: TextTokenizer, tmp_path: Path) -> None:
    many = csv_table(RECORDS * 4)
    put(tmp_path, **{"a.csv": many + b'1,"x",y\n'})
    documents, [bad] = read(list_corpus(f"{tmp_path}/a.csv"))
    assert len(documents) >= 768 and bad.position == f"row {len(documents) + 1:,} and all after it"
    with pytest.raises(UserError, match=rf"data\.source: .*a\.csv': bad record at {bad.position}.*data\.on_bad_record"):
        prepare(Form(f"{tmp_path}/a.csv").recipe(slice_bytes=2**20), trained, f"{tmp_path}/shards")


def test_bad_record_does_not_affect_its_neighbours(tmp_path: Path) -> None:
    members = SAMPLES | {
        "013.json": b'{"id": "3", "text": 3}',
        "015.json": b'{"id": "5", "text": "\\ud800"}',
        "017.json": b'{"id": "7"}',
    }
    documents, bad = read_damaged("a.tar", tar_archive(members), tmp_path)
    assert len(documents) == len(RECORDS) - 3
    assert [record.position for record in bad] == ["row 14", "row 16", "row 18"]


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
        (
            "configured/configured.py",
            b"raise SystemExit('ran')",
            "needs its own Python script to be loaded; such scripts are never run",
        ),
    ],
)
def test_damaged_description_is_reported_in_one_line(
    name: str, content: bytes | None, complaint: str, forms: Path, tmp_path: Path
) -> None:
    top = name.partition("/")[0]
    shutil.copytree(forms / top, tmp_path / top)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    settings = {"splits": (None, "train"), "configured": ("zh", "train"), "saved": (None, None)}[top]
    with pytest.raises(UserError, match=complaint) as raised:
        list_corpus(str(tmp_path / top), choice=Choice(*settings))
    assert "\n" not in str(raised.value)


def test_foreign_state_json_does_not_make_a_saved_data_set(tmp_path: Path) -> None:
    put(tmp_path, **{"state.json": b"{}", "a.jsonl": json_lines(RECORDS)})
    assert len(read_form(Form(str(tmp_path)))) == len(RECORDS)
