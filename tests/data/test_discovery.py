"""Which files are the corpus: each once, by whatever name, and everything else is left out with a reason."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import zstandard
from corpus_files import Fields, json_array, json_lines, parquet

from job import config as settings
from job import report, storage
from job.cli import main
from job.commands import _say_listed
from job.data import discovery
from job.data import prepare as shards
from job.data.corpus import Document, Listing, list_corpus, read_slices
from job.data.folders import LOOP, SAME_FOLDER
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import TextTokenizer
from job.errors import EXIT_REFUSED, UserError
from job.preflight.data_set import _check_corpus
from job.preflight.findings import RIGHT, UNSURE, Findings

DOCUMENTS: list[Fields] = [{"id": str(number), "text": f"第{number}段"} for number in range(10)]
LINES = json_lines(DOCUMENTS)
RUN = Path(__file__).parents[1] / "compatibility" / "written_by_99a7a34" / "run"


def listed(source: object) -> Listing:
    found: list[Listing] = []
    list_corpus(str(source), found.append)
    return found[0]


def names(source: object) -> list[str]:
    return list(listed(source).names)


def left_out(source: object) -> dict[str, str]:
    return {one.name: one.reason for one in listed(source).left_out}


def documents(source: object) -> int:
    items = (item for file in list_corpus(str(source)) for item in read_slices(file, 2**20, bool_true, "text", "id"))
    return sum(isinstance(item, Document) for item in items)


def bool_true(index: int) -> bool:
    return True


def write(folder: str | Path, *paths: str, content: bytes = LINES) -> None:
    for path in paths:
        if storage.is_remote(str(folder)):
            storage.write_bytes(storage.join(str(folder), path), content)
        else:
            Path(folder, path).parent.mkdir(parents=True, exist_ok=True)
            Path(folder, path).write_bytes(content)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty folder."""
    return str(tmp_path / "corpus") if request.param == "local" else request.getfixturevalue("bucket") + "/corpus"


# ---- Links ----


@pytest.mark.parametrize("source", ["", "/*.jsonl", "/**/*.jsonl", "/?.js*l"])
def test_links_to_files_are_followed(source: str, tmp_path: Path) -> None:
    write(tmp_path, "data/a.jsonl", "store/b.jsonl", "store/c.jsonl")
    for name in ("b", "c"):
        (tmp_path / f"data/{name}.jsonl").symlink_to(f"../store/{name}.jsonl")
    assert names(f"{tmp_path}/data{source}") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert documents(f"{tmp_path}/data{source}") == 30


@pytest.mark.parametrize("source", ["", "/*/*.jsonl", "/**/*.jsonl"])
def test_links_to_folders_are_followed(source: str, tmp_path: Path) -> None:
    write(tmp_path, "data/own/a.jsonl", "store/deep/b.jsonl")
    (tmp_path / "data/linked").symlink_to("../store/deep")
    assert names(f"{tmp_path}/data{source}") == ["linked/b.jsonl", "own/a.jsonl"]


def test_pattern_of_the_store_lists_links_to_files(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "sub/c.jsonl")
    (tmp_path / "b.jsonl").symlink_to("sub/c.jsonl")
    (tmp_path / "linked.jsonl").symlink_to("sub")
    expected = [storage.Entry(f"{tmp_path}/{name}.jsonl", len(LINES)) for name in ("a", "b")]
    assert storage.glob(f"{tmp_path}/*.jsonl") == expected


def test_corpus_of_a_hubs_cache_is_all_links(tmp_path: Path) -> None:
    write(tmp_path, "blobs/5d41402a")
    snapshot = tmp_path / ".cache/snapshots/0a1b2c"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(tmp_path / "blobs/5d41402a")
    assert names(snapshot) == names(f"{snapshot}/*.jsonl") == ["train.jsonl"]


@pytest.mark.parametrize("source", ["", "/**/*.jsonl"])
def test_loops_of_links_end_and_are_reported(source: str, tmp_path: Path) -> None:
    write(tmp_path, "data/sub/a.jsonl")
    (tmp_path / "data/sub/up").symlink_to("..")
    (tmp_path / "data/above").symlink_to("/")
    (tmp_path / "data/itself").symlink_to("itself")
    assert names(f"{tmp_path}/data{source}") == ["sub/a.jsonl"]
    if not source:
        assert left_out(tmp_path / "data") == {"sub/up/": LOOP, "above/": LOOP, "itself": "a link to nothing"}


def test_folders_that_link_to_each_other_are_read_once_each(tmp_path: Path) -> None:
    count = 12
    for number in range(count):
        write(tmp_path, f"{number:02d}/a.jsonl")
        for other in range(count):
            (tmp_path / f"{number:02d}/to-{other:02d}").symlink_to(f"../{other:02d}")
    assert documents(tmp_path) == 10 * count
    assert {LOOP, SAME_FOLDER} == set(left_out(tmp_path).values())


@pytest.mark.parametrize("linked", ["a.jsonl", "b.jsonl"])
def test_file_of_two_names_is_taken_once_by_the_first_name(linked: str, tmp_path: Path) -> None:
    target = {"a.jsonl": "b.jsonl", "b.jsonl": "a.jsonl"}[linked]
    write(tmp_path, target)
    (tmp_path / linked).symlink_to(target)
    assert names(tmp_path) == names(f"{tmp_path}/*") == ["a.jsonl"]
    assert left_out(tmp_path) == {"b.jsonl": discovery.OTHER_NAME}


def test_name_that_says_what_a_file_is_goes_first(tmp_path: Path) -> None:
    """The folder of a data set in the hub's cache, with its blobs beside the snapshots."""
    write(tmp_path, "blobs/5d41402a")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots/train.jsonl").symlink_to("../blobs/5d41402a")
    assert names(tmp_path) == ["snapshots/train.jsonl"]


def test_pipes_and_broken_links_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    assert names(tmp_path) == ["a.jsonl"]
    assert left_out(tmp_path) == {"pipe.jsonl": "neither a file nor a folder", "gone.jsonl": "a link to nothing"}


# ---- Hidden names ----


def test_hidden_names_are_skipped_at_any_depth(place: str) -> None:
    write(place, "a.jsonl", ".b.jsonl", "_c.jsonl", "sub/.ipynb_checkpoints/a.jsonl", "sub/_old/deep/d.jsonl")
    hidden = {".b.jsonl", "_c.jsonl", "sub/.ipynb_checkpoints/", "sub/_old/"}
    assert names(place) == names(f"{place}/**/*.jsonl") == ["a.jsonl"]
    assert left_out(place) == dict.fromkeys(hidden, discovery.HIDDEN)


def test_source_in_a_hidden_folder_is_read(place: str) -> None:
    write(place, ".cache/_x/a.jsonl", ".cache/_x/.b.jsonl")
    assert names(f"{place}/.cache/_x") == names(f"{place}/.cache/_x/*.jsonl") == ["a.jsonl"]
    assert names(f"{place}/.cache/_x/.b.jsonl") == names(f"{place}/.cache/_x/.*") == [".b.jsonl"]


# ---- What the program has written ----


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, trained: TextTokenizer) -> Path:
    """A folder with a finished data set, a half-made one, a run and a tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    write(folder, "corpus.jsonl")
    recipe = Recipe(str(folder / "corpus.jsonl"), "text", "id", "stop", 1024, 0.5, 1)
    write(folder, "large.jsonl", content=LINES * 30)
    assert prepare(recipe, trained, str(folder / "shards")) is not None
    large = Recipe(str(folder / "large.jsonl"), "text", "id", "stop", 1024, 0.5, 1)
    assert prepare(large, trained, str(folder / "half-made"), (0, 2)) is None
    shutil.copytree(RUN, folder / "run")
    shutil.copytree(trained.folder, folder / "tokenizer")
    for name in ("corpus.jsonl", "large.jsonl"):
        (folder / name).unlink()
    return folder


def copied(made: Path, place: str) -> None:
    for path in made.rglob("*"):
        if path.is_file():
            write(place, path.relative_to(made).as_posix(), content=path.read_bytes())


@pytest.mark.parametrize("source", ["", "/**/*.json*"])
def test_own_output_below_the_source_is_no_corpus(source: str, place: str, made: Path) -> None:
    copied(made, place)
    write(place, "wiki.jsonl", "sub/wiki.jsonl.gz", content=LINES)
    assert names(f"{place}{source}") == ["sub/wiki.jsonl.gz", "wiki.jsonl"]
    kinds = {
        "shards/": "a data set of this program",
        "half-made/": "a data set of this program",
        "run/": "a run of this program",
        "tokenizer/": "a tokenizer",
    }
    assert left_out(f"{place}{source}") == kinds


@pytest.mark.parametrize("source", ["*/metrics.jsonl", "**/metrics.jsonl"])
def test_pattern_that_matches_no_record_still_skips_a_run(source: str, place: str, made: Path) -> None:
    copied(made / "run", f"{place}/run")
    write(place, "mine/metrics.jsonl")
    assert names(f"{place}/{source}") == ["mine/metrics.jsonl"]


def test_shards_may_lie_below_the_corpus(
    tmp_path: Path, trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corpus in ./data and data/shards, the default; workers that start one after the other, and once more."""
    write(tmp_path, "data/wiki.jsonl", content=LINES * 20)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("data", "text", "id", "stop", 1024, 0, 1)
    assert prepare(recipe, trained, "data/shards", (0, 2)) is None
    for _ in range(2):
        manifest = prepare(recipe, trained, "data/shards", (1, 2))
        assert manifest is not None and manifest.statistics["documents"] == 200


def test_corpus_beside_its_shards_in_one_folder_is_read(place: str, made: Path) -> None:
    copied(made / "shards", place)
    write(place, "wiki.jsonl", "train/more.jsonl")
    assert names(place) == ["train/more.jsonl", "wiki.jsonl"]


def test_checkpoint_and_model_of_their_own_are_skipped(place: str) -> None:
    (checkpoint,) = (RUN / "checkpoints").iterdir()
    copied(checkpoint, f"{place}/best")
    write(place, "final/config.json", content=b'{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    write(place, "final/generation_config.json", content=b'{"eos_token_id": 0}')
    write(place, "wiki.jsonl")
    assert names(place) == ["wiki.jsonl"]
    assert left_out(place) == {"best/": "a checkpoint", "final/": "a model"}


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "run.json", "config.json", "tokenizer.json"])
def test_corpus_by_the_name_of_a_record_is_read(name: str, place: str) -> None:
    write(place, f"sub/{name}", "parts/a.jsonl", "final/b.jsonl", content=LINES)
    assert names(place) == sorted([f"sub/{name}", "parts/a.jsonl", "final/b.jsonl"])
    write(place, f"sub/{name}", content=json_array(DOCUMENTS))
    assert f"sub/{name}" in names(place)
    write(place, f"sub/{name}", content=json.dumps({"text": "一段", "id": "1"}).encode())
    assert f"sub/{name}" in names(place)


# ---- Patterns ----


def test_path_that_exists_is_no_pattern(place: str) -> None:
    write(place, "wiki[1].jsonl", "wiki1.jsonl", "part[2]/a.jsonl", "part2/b.jsonl")
    assert names(f"{place}/wiki[1].jsonl") == ["wiki[1].jsonl"]
    assert names(f"{place}/part[2]") == ["a.jsonl"]
    assert names(f"{place}/wiki[12].jsonl") == ["wiki1.jsonl"]
    assert names(f"{place}/part[!1]/*") == ["part2/b.jsonl"]


def test_pattern_that_is_none_is_refused_in_one_line(place: str) -> None:
    write(place, "a.jsonl")
    with pytest.raises(UserError, match=r"data\.source: .*is no pattern that can be used"):
        list_corpus(f"{place}/a**b.jsonl")


def test_suffixes_in_capitals_are_known(place: str) -> None:
    write(place, "A.JSONL")
    write(place, "B.JSON.GZ", content=gzip.compress(json_array(DOCUMENTS)))
    write(place, "C.Parquet", content=parquet(DOCUMENTS))
    assert [(file.format, file.compression) for file in list_corpus(place)] == [
        ("json", None),
        ("json", "gzip"),
        ("parquet", None),
    ]
    assert documents(place) == 30


# ---- Content ----

LONG = json_lines([{"text": "字" * 30_000}, {"text": "b"}])
VERY_LONG = json_lines([{"text": "字" * 500_000}])
MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (LINES, 10),
        (MARK + b"\n\n" + LINES, 10),
        (LINES[:-1], 10),
        (gzip.compress(LINES), 10),
        (zstandard.compress(LINES), 10),
        (b'{"score": NaN, "text": "a"}\n', 1),
        (LONG, 2),
        (VERY_LONG, 1),
        (gzip.compress(VERY_LONG), 1),
    ],
    ids=["plain", "marked", "no end", "gzip", "zstd", "NaN", "long line", "very long line", "very long line, gzip"],
)
def test_json_lines_are_known_by_their_content(content: bytes, count: int, place: str) -> None:
    """As in the folders that WikiExtractor makes; the suffix of the other one says nothing either."""
    write(place, "AA/wiki_00", "AA/wiki.backup", content=content)
    listing = listed(place)
    assert listing.names == listing.by_content == ("AA/wiki.backup", "AA/wiki_00")
    assert documents(place) == 2 * count


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# Wikipedia\n",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        json.dumps({"cells": []}, indent=1).encode(),
        b"{broken\n",
        b"[1, 2]\n",
        b'"text"\n',
        gzip.compress(b"text"),
        gzip.compress(LINES)[:20],
        b"{" * 2_000_000,
    ],
    ids=["empty", "text", "picture", "object", "broken", "array", "string", "packed text", "cut off", "braces"],
)
def test_what_holds_no_json_lines_is_left_out(content: bytes, place: str) -> None:
    write(place, "other", content=content)
    write(place, "a.jsonl")
    assert names(place) == ["a.jsonl"]
    assert left_out(place) == {"other": discovery.NO_RECORDS}
    with pytest.raises(UserError, match="none of the files there is a corpus: no suffix that says what it is"):
        list_corpus(f"{place}/other")


def test_head_of_an_unknown_file_is_enough(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bucket, "AA/wiki_00", content=LINES * 20_000)
    read = 0
    open_ranges = storage.open_ranges

    def counted(url: str) -> storage.Ranges:
        ranges = open_ranges(url)

        def count(start: int, end: int) -> bytes:
            nonlocal read
            read += end - start
            return ranges.read(start, end)

        return storage.Ranges(ranges.size, ranges.version, count)

    monkeypatch.setattr(storage, "open_ranges", counted)
    assert names(bucket) == ["AA/wiki_00"]
    assert 0 < read <= 2**16


# ---- The table ----


def test_table_names_what_is_taken_and_left_out(tmp_path: Path) -> None:
    write(tmp_path, *(f"part/{number:04d}.jsonl" for number in range(1500)), "AA/wiki_00")
    write(tmp_path, "part/.a", "part/_b", "part/.c", "part/.d", "notes.md", content=b"text")
    write(tmp_path, "x.json", content=json_array(DOCUMENTS))
    write(tmp_path, "x.jsonl.gz", content=gzip.compress(LINES))
    size, packed = 1501 * len(LINES) + len(json_array(DOCUMENTS)), len(gzip.compress(LINES))
    assert listed(tmp_path).rows() == [
        ("files taken", f"1,503 files, {(size + packed) / 1e6:.1f} MB"),
        ("  names", "AA/wiki_00, part/0000.jsonl, part/0001.jsonl and 1,500 more"),
        ("  JSON", f"1,502 files, {size / 1e6:.1f} MB"),
        ("  JSON, gzip", f"1 file, {packed / 1e3:.1f} kB"),
        ("  JSON lines by their content", "AA/wiki_00"),
        (f"left out: {discovery.HIDDEN}", "part/.a, part/.c, part/.d and 1 more"),
        (f"left out: {discovery.NO_RECORDS}", "notes.md (1 file, 0.0 kB)"),
        ("the same twice?", "x.json and x.jsonl.gz"),
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_table_is_plain_lines_in_a_log(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "a.jsonl")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    _say_listed(report.Report(), listed(tmp_path))
    said = capsys.readouterr().out.splitlines()
    if terminal:
        assert any("│" in line and "files taken" in line for line in said)
    else:
        assert said[0] == f"corpus {tmp_path}: files taken: 1 file, {len(LINES) / 1e3:.1f} kB"
        assert len(said) == 3


def test_prepare_says_what_is_taken_before_it_works(
    tmp_path: Path, trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "data/a.jsonl", "data/b.jsonl", "data/.c.jsonl")

    def broken(*arguments: object) -> None:
        raise UserError("test", None, "the work begins")

    monkeypatch.setattr(shards, "_prepare_group", broken)
    words = ("--data.source", f"{tmp_path}/data", "--data.shards", f"{tmp_path}/shards")
    assert main(["prepare", *words, "--tokenizer.source", str(trained.folder)]) == EXIT_REFUSED
    said = capsys.readouterr()
    assert said.err == "test: the work begins\n"
    assert f"corpus {tmp_path}/data: left out: {discovery.HIDDEN}: .c.jsonl\n" in said.out
    assert "warning: the same content, so that each document counts 2 times: a.jsonl, b.jsonl\n" in said.out


def test_check_says_what_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "x.json", "x.jsonl", ".c.jsonl")
    findings = Findings()
    _check_corpus(findings, settings.load(None, [("data.source", str(tmp_path))]))
    assert [(row.mark, row.name, row.found) for row in findings.rows] == [
        (RIGHT, "corpus", "2 files, 0.0 MB"),
        (RIGHT, "corpus, left out", f"{discovery.HIDDEN}: .c.jsonl"),
        (UNSURE, "corpus, twice?", "1 name in several forms: x.json and x.jsonl"),
    ]


@pytest.mark.parametrize(
    ("paths", "twice"),
    [
        (["x.json", "x.jsonl"], [("x.json", "x.jsonl")]),
        (["a/x.jsonl", "a/x.jsonl.gz", "b/x.jsonl"], [("a/x.jsonl", "a/x.jsonl.gz")]),
        (["wiki_00", "wiki_00.gz", "wiki_01"], [("wiki_00", "wiki_00.gz")]),
        (["x-0.parquet", "x-1.parquet"], []),
    ],
)
def test_names_in_two_forms_are_reported(paths: list[str], twice: list[tuple[str, ...]], tmp_path: Path) -> None:
    for path in paths:
        write(tmp_path, path, content=gzip.compress(LINES) if path.endswith(".gz") else LINES)
    assert listed(tmp_path).in_two_forms() == twice


def test_name_in_another_encoding_is_read_and_printed(tmp_path: Path, trained: TextTokenizer) -> None:
    """A name in GBK, as archives made on Windows have it."""
    (tmp_path / "data").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path) + "/data/中文.jsonl".encode("gbk"))).write_bytes(LINES)
    assert names(tmp_path / "data") == [r"\xd6\xd0\xce\xc4.jsonl"]
    recipe = Recipe(str(tmp_path / "data"), "text", "id", "stop", 1024, 0, 1)
    manifest = prepare(recipe, trained, str(tmp_path / "shards"))
    assert manifest is not None and manifest.statistics["documents"] == 10
