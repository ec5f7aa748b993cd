"""The listing of a corpus shows which files are read and which are left out, before the work starts."""

import gzip
import os
from pathlib import Path

import pytest
from corpus_files import json_array
from listed_corpus import DOCUMENTS, LINES, listed, names, write

from job import amounts, report
from job import config as settings
from job.cli import main
from job.commands import _say_listed
from job.data import discovery, make_shards
from job.data.corpus import Listing
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import TextTokenizer
from job.errors import EXIT_REFUSED, UserError
from job.preflight.data_set import _check_corpus
from job.preflight.findings import RIGHT, UNSURE, Findings


def test_table_shows_taken_and_left_out_files(tmp_path: Path) -> None:
    write(tmp_path, *(f"part/{number:04d}.jsonl" for number in range(1500)), "AA/wiki_00")
    write(tmp_path, "part/.a", "part/_b", "part/.c", "part/.d", "notes.md", content=b"text")
    write(tmp_path, "x.json", content=json_array(DOCUMENTS))
    write(tmp_path, "x.jsonl.gz", content=gzip.compress(LINES))
    size, packed = 1501 * len(LINES) + len(json_array(DOCUMENTS)), len(gzip.compress(LINES))
    assert listed(tmp_path).rows() == [
        ("files taken", f"1,503 files, {amounts.size(size + packed)}"),
        ("  names", "AA/wiki_00, part/0000.jsonl, part/0001.jsonl and 1,500 more"),
        ("  JSON", f"1,502 files, {amounts.size(size)}"),
        ("  JSON, gzip", f"1 file, {amounts.size(packed)}"),
        ("  JSON lines, detected by content", "AA/wiki_00"),
        (f"left out: {discovery.HIDDEN}", "part/.a, part/.c, part/.d and 1 more"),
        (f"left out: {discovery.NO_RECORDS}", "notes.md (1 file, 4 bytes)"),
        ("possible duplicates", "x.json and x.jsonl.gz"),
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_table_is_plain_lines_in_a_log(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.jsonl")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    _say_listed(report.Report(), listed(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    if terminal:
        assert any("│" in line and "files taken" in line for line in printed)
    else:
        assert printed[0] == f"corpus {tmp_path}: files taken: 1 file, {amounts.size(len(LINES))}"
        assert len(printed) == 3


def test_prepare_prints_the_listing_before_it_starts(
    tmp_path: Path, trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "data/a.jsonl", "data/b.jsonl", "data/.c.jsonl")

    def refuse(*arguments: object) -> None:
        raise UserError("test", None, "the work begins")

    monkeypatch.setattr(make_shards, "_prepare_group", refuse)
    words = ("--data.source", f"{tmp_path}/data", "--data.shards", f"{tmp_path}/shards")
    assert main(["prepare", *words, "--tokenizer.source", str(trained.folder)]) == EXIT_REFUSED
    printed = capsys.readouterr()
    assert printed.err == "test: the work begins\n"
    assert f"corpus {tmp_path}/data: left out: {discovery.HIDDEN}: .c.jsonl\n" in printed.out
    assert "warning: these files are equal, so each document counts 2 times: a.jsonl, b.jsonl\n" in printed.out


def test_check_reports_left_out_files(tmp_path: Path) -> None:
    write(tmp_path, "x.json", "x.jsonl", ".c.jsonl")
    findings, listings = Findings(), list[Listing]()
    _check_corpus(findings, settings.load(None, [("data.source", str(tmp_path))]).data, listings.append)
    assert [len(listing.files) for listing in listings] == [2]
    assert [(row.mark, row.name, row.found) for row in findings.rows] == [
        (RIGHT, "corpus", f"2 files, {amounts.size(2 * len(LINES))}"),
        (RIGHT, "corpus, left out", f"{discovery.HIDDEN}: .c.jsonl"),
        (UNSURE, "corpus, twice?", "1 name in several forms: x.json and x.jsonl"),
    ]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["x.json", "x.jsonl"], [("x.json", "x.jsonl")]),
        (["a/x.jsonl", "a/x.jsonl.gz", "b/x.jsonl"], [("a/x.jsonl", "a/x.jsonl.gz")]),
        (["wiki_00", "wiki_00.gz", "wiki_01"], [("wiki_00", "wiki_00.gz")]),
        (["x-0.parquet", "x-1.parquet"], []),
    ],
)
def test_names_in_several_forms_are_reported(paths: list[str], expected: list[tuple[str, ...]], tmp_path: Path) -> None:
    for path in paths:
        write(tmp_path, path, content=gzip.compress(LINES) if path.endswith(".gz") else LINES)
    assert listed(tmp_path).in_several_forms() == expected


def test_file_name_in_gbk_is_read_and_printed(tmp_path: Path, trained: TextTokenizer) -> None:
    """Archives made on Windows contain such names."""
    (tmp_path / "data").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + "/data/中文.jsonl".encode("gbk"))).write_bytes(LINES)
    assert names(tmp_path / "data") == [r"\xd6\xd0\xce\xc4.jsonl"]
    recipe = Recipe(str(tmp_path / "data"), "text", "id", "stop", 1024, 0, 1)
    manifest = prepare(recipe, trained, str(tmp_path / "shards"))
    assert manifest is not None and manifest.statistics["documents"] == 10
