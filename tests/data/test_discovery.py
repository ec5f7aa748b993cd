"""The files of a corpus are found once each, and every other file is left out with a reason."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import zstandard
from corpus_files import json_array, json_lines, parquet
from listed_corpus import DOCUMENTS, LINES, documents_in, left_out, listed, names, write

from job import storage
from job.data import discovery, hub
from job.data.corpus import list_corpus
from job.data.folders import LOOP, SAME_FOLDER
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import TextTokenizer
from job.errors import UserError

RUN = Path(__file__).parents[1] / "compatibility" / "written_by_99a7a34" / "run"


@pytest.fixture(params=["local", "s3"])
def folder_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty folder."""
    return str(tmp_path / "corpus") if request.param == "local" else request.getfixturevalue("bucket") + "/corpus"


# ---- Links ----


@pytest.mark.parametrize("source", ["", "/*.jsonl", "/**/*.jsonl", "/?.js*l"])
def test_links_to_files_are_followed(source: str, tmp_path: Path) -> None:
    write(tmp_path, "data/a.jsonl", "store/b.jsonl", "store/c.jsonl")
    for name in ("b", "c"):
        (tmp_path / f"data/{name}.jsonl").symlink_to(f"../store/{name}.jsonl")
    assert names(f"{tmp_path}/data{source}") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert documents_in(f"{tmp_path}/data{source}") == 30


@pytest.mark.parametrize("source", ["", "/*/*.jsonl", "/**/*.jsonl"])
def test_links_to_folders_are_followed(source: str, tmp_path: Path) -> None:
    write(tmp_path, "data/own/a.jsonl", "store/deep/b.jsonl")
    (tmp_path / "data/linked").symlink_to("../store/deep")
    assert names(f"{tmp_path}/data{source}") == ["linked/b.jsonl", "own/a.jsonl"]


def test_storage_glob_lists_links_to_files(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "sub/c.jsonl")
    (tmp_path / "b.jsonl").symlink_to("sub/c.jsonl")
    (tmp_path / "linked.jsonl").symlink_to("sub")
    expected = [storage.Entry(f"{tmp_path}/{name}.jsonl", len(LINES)) for name in ("a", "b")]
    assert storage.glob(f"{tmp_path}/*.jsonl") == expected


def test_hub_cache_made_of_links_is_read(tmp_path: Path) -> None:
    write(tmp_path, "blobs/5d41402a")
    snapshot = tmp_path / ".cache/snapshots/0a1b2c"
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").symlink_to(tmp_path / "blobs/5d41402a")
    assert names(snapshot) == names(f"{snapshot}/*.jsonl") == ["train.jsonl"]


@pytest.mark.parametrize("source", ["", "/**/*.jsonl"])
def test_link_loops_end_and_are_reported(source: str, tmp_path: Path) -> None:
    write(tmp_path, "data/sub/a.jsonl")
    (tmp_path / "data/sub/up").symlink_to("..")
    (tmp_path / "data/above").symlink_to("/")
    (tmp_path / "data/itself").symlink_to("itself")
    assert names(f"{tmp_path}/data{source}") == ["sub/a.jsonl"]
    if not source:
        assert left_out(tmp_path / "data") == {"sub/up/": LOOP, "above/": LOOP, "itself": "a broken link"}


def test_folders_that_link_to_each_other_are_read_once_each(tmp_path: Path) -> None:
    count = 12
    for number in range(count):
        write(tmp_path, f"{number:02d}/a.jsonl")
        for other in range(count):
            (tmp_path / f"{number:02d}/to-{other:02d}").symlink_to(f"../{other:02d}")
    assert documents_in(tmp_path) == 10 * count
    assert {LOOP, SAME_FOLDER} == set(left_out(tmp_path).values())


@pytest.mark.parametrize("linked", ["a.jsonl", "b.jsonl"])
def test_file_with_two_names_is_taken_once_under_the_first(linked: str, tmp_path: Path) -> None:
    target = {"a.jsonl": "b.jsonl", "b.jsonl": "a.jsonl"}[linked]
    write(tmp_path, target)
    (tmp_path / linked).symlink_to(target)
    assert names(tmp_path) == names(f"{tmp_path}/*") == ["a.jsonl"]
    assert left_out(tmp_path) == {"b.jsonl": discovery.OTHER_NAME}


def test_name_with_a_known_suffix_is_preferred(tmp_path: Path) -> None:
    """Uses the layout of a data set in the hub's cache, where the blobs lie beside the snapshots."""
    write(tmp_path, "blobs/5d41402a")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots/train.jsonl").symlink_to("../blobs/5d41402a")
    assert names(tmp_path) == ["snapshots/train.jsonl"]


def test_pipes_and_broken_links_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    assert names(tmp_path) == ["a.jsonl"]
    assert left_out(tmp_path) == {"pipe.jsonl": "neither a file nor a folder", "gone.jsonl": "a broken link"}


# ---- Hidden names ----


def test_hidden_names_are_skipped_at_any_depth(folder_url: str) -> None:
    write(folder_url, "a.jsonl", ".b.jsonl", "_c.jsonl", "sub/.ipynb_checkpoints/a.jsonl", "sub/_old/deep/d.jsonl")
    hidden = {".b.jsonl", "_c.jsonl", "sub/.ipynb_checkpoints/", "sub/_old/"}
    assert names(folder_url) == names(f"{folder_url}/**/*.jsonl") == ["a.jsonl"]
    assert left_out(folder_url) == dict.fromkeys(hidden, discovery.HIDDEN)


def test_source_in_a_hidden_folder_is_read(folder_url: str) -> None:
    write(folder_url, ".cache/_x/a.jsonl", ".cache/_x/.b.jsonl")
    assert names(f"{folder_url}/.cache/_x") == names(f"{folder_url}/.cache/_x/*.jsonl") == ["a.jsonl"]
    assert names(f"{folder_url}/.cache/_x/.b.jsonl") == names(f"{folder_url}/.cache/_x/.*") == [".b.jsonl"]


# ---- Outputs of the program ----


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, trained: TextTokenizer) -> Path:
    """A folder with a finished data set, an unfinished one, a run and a tokenizer."""
    folder = tmp_path_factory.mktemp("outputs")
    write(folder, "corpus.jsonl")
    recipe = Recipe(str(folder / "corpus.jsonl"), "text", "id", "stop", 1024, 0.5, 1)
    write(folder, "large.jsonl", content=LINES * 30)
    assert prepare(recipe, trained, str(folder / "shards")) is not None
    large = Recipe(str(folder / "large.jsonl"), "text", "id", "stop", 1024, 0.5, 1)
    assert prepare(large, trained, str(folder / "unfinished"), (0, 2)) is None
    shutil.copytree(RUN, folder / "run")
    shutil.copytree(trained.folder, folder / "tokenizer")
    for name in ("corpus.jsonl", "large.jsonl"):
        (folder / name).unlink()
    return folder


def copy_files(folder: Path, folder_url: str) -> None:
    """Copy all files below a folder to a folder or URL."""
    for path in folder.rglob("*"):
        if path.is_file():
            write(folder_url, path.relative_to(folder).as_posix(), content=path.read_bytes())


@pytest.mark.parametrize("source", ["", "/**/*.json*"])
def test_own_output_below_the_source_is_left_out(source: str, folder_url: str, outputs: Path) -> None:
    copy_files(outputs, folder_url)
    write(folder_url, "wiki.jsonl", "sub/wiki.jsonl.gz", content=LINES)
    assert names(f"{folder_url}{source}") == ["sub/wiki.jsonl.gz", "wiki.jsonl"]
    kinds = {
        "shards/": "a data set of this program",
        "unfinished/": "a data set of this program",
        "run/": "a run of this program",
        "tokenizer/": "a tokenizer",
    }
    assert left_out(f"{folder_url}{source}") == kinds


@pytest.mark.parametrize("source", ["*/metrics.jsonl", "**/metrics.jsonl"])
def test_pattern_leaves_out_a_run_whose_record_it_does_not_match(source: str, folder_url: str, outputs: Path) -> None:
    copy_files(outputs / "run", f"{folder_url}/run")
    write(folder_url, "mine/metrics.jsonl")
    assert names(f"{folder_url}/{source}") == ["mine/metrics.jsonl"]


def test_shards_may_be_inside_the_corpus_folder(
    tmp_path: Path, trained: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the default data/shards inside the corpus folder ./data; the workers run one after the other, then again."""
    write(tmp_path, "data/wiki.jsonl", content=LINES * 20)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe("data", "text", "id", "stop", 1024, 0, 1)
    assert prepare(recipe, trained, "data/shards", (0, 2)) is None
    for _ in range(2):
        manifest = prepare(recipe, trained, "data/shards", (1, 2))
        assert manifest is not None and manifest.statistics["documents"] == 200


def test_corpus_beside_its_shards_in_one_folder_is_read(folder_url: str, outputs: Path) -> None:
    copy_files(outputs / "shards", folder_url)
    write(folder_url, "wiki.jsonl", "train/more.jsonl")
    assert names(folder_url) == ["train/more.jsonl", "wiki.jsonl"]


def test_separate_checkpoint_and_model_are_left_out(folder_url: str) -> None:
    (checkpoint,) = (RUN / "checkpoints").iterdir()
    copy_files(checkpoint, f"{folder_url}/best")
    write(folder_url, "final/config.json", content=b'{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    write(folder_url, "final/generation_config.json", content=b'{"eos_token_id": 0}')
    write(folder_url, "wiki.jsonl")
    assert names(folder_url) == ["wiki.jsonl"]
    assert left_out(folder_url) == {"best/": "a checkpoint", "final/": "a model"}


@pytest.mark.parametrize("name", ["plan.json", "manifest.json", "run.json", "config.json", "tokenizer.json"])
def test_corpus_file_named_like_a_record_is_read(name: str, folder_url: str) -> None:
    write(folder_url, f"sub/{name}", "parts/a.jsonl", "final/b.jsonl", content=LINES)
    assert names(folder_url) == sorted([f"sub/{name}", "parts/a.jsonl", "final/b.jsonl"])
    write(folder_url, f"sub/{name}", content=json_array(DOCUMENTS))
    assert f"sub/{name}" in names(folder_url)
    write(folder_url, f"sub/{name}", content=json.dumps({"text": "一段", "id": "1"}).encode())
    assert f"sub/{name}" in names(folder_url)


# ---- Names and patterns ----


def test_missing_file_with_known_suffix_is_not_sought_on_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.Repository, "commit", lambda repository: pytest.fail("the hub was asked"))
    with pytest.raises(UserError, match=r"data\.source: 'owner/wiki\.jsonl': no such file or folder"):
        list_corpus("owner/wiki.jsonl")


def test_existing_path_is_not_a_pattern(folder_url: str) -> None:
    write(folder_url, "wiki[1].jsonl", "wiki1.jsonl", "part[2]/a.jsonl", "part2/b.jsonl")
    assert names(f"{folder_url}/wiki[1].jsonl") == ["wiki[1].jsonl"]
    assert names(f"{folder_url}/part[2]") == ["a.jsonl"]
    assert names(f"{folder_url}/wiki[12].jsonl") == ["wiki1.jsonl"]
    assert names(f"{folder_url}/part[!1]/*") == ["part2/b.jsonl"]


def test_invalid_pattern_is_refused_in_one_line(folder_url: str) -> None:
    write(folder_url, "a.jsonl")
    with pytest.raises(UserError, match=r"data\.source: .*is not a valid pattern"):
        list_corpus(f"{folder_url}/a**b.jsonl")


def test_suffixes_may_be_in_capitals(folder_url: str) -> None:
    write(folder_url, "A.JSONL")
    write(folder_url, "B.JSON.GZ", content=gzip.compress(json_array(DOCUMENTS)))
    write(folder_url, "C.Parquet", content=parquet(DOCUMENTS))
    assert [(file.format, file.compression) for file in list_corpus(folder_url)] == [
        ("json", None),
        ("json", "gzip"),
        ("parquet", None),
    ]
    assert documents_in(folder_url) == 30


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
def test_json_lines_are_detected_by_content(content: bytes, count: int, folder_url: str) -> None:
    """Covers the names that WikiExtractor writes, and an unknown suffix."""
    write(folder_url, "AA/wiki_00", "AA/wiki.backup", content=content)
    listing = listed(folder_url)
    assert listing.names == listing.by_content == ("AA/wiki.backup", "AA/wiki_00")
    assert documents_in(folder_url) == 2 * count


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
def test_file_without_json_lines_is_left_out(content: bytes, folder_url: str) -> None:
    write(folder_url, "other", content=content)
    write(folder_url, "a.jsonl")
    assert names(folder_url) == ["a.jsonl"]
    assert left_out(folder_url) == {"other": discovery.NO_RECORDS}
    with pytest.raises(UserError, match="no file there can be read as a corpus: no known suffix"):
        list_corpus(f"{folder_url}/other")


def test_only_the_head_of_an_unknown_file_is_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
