"""Errors of preparation on a real S3 server: bad records, other recipes, and damaged plans and part records."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from corpus_files import json_lines
from preparation import SAMPLE, KiB, objects, parts, prepare_command, recipe

from job import storage
from job.cli import main
from job.data.corpus import BadRecord
from job.data.manifest import MANIFEST_NAME
from job.data.prepare import describe, prepare
from job.data.prepare_processes import prepare_in_processes
from job.data.tokenizer import TextTokenizer, store_tokenizer, train_tokenizer
from job.errors import EXIT_REFUSED, UserError


@pytest.fixture
def broken(bucket: str) -> str:
    """Return the URL of a corpus of ten records: the fourth is cut short, and the ninth has no text."""
    lines = json_lines(SAMPLE[:10]).splitlines(keepends=True)
    lines[3] = lines[3][:40] + b"\n"
    lines[8] = b'{"id": 9}\n'
    storage.write_bytes(f"{bucket}/corpus/broken.jsonl", b"".join(lines))
    return f"{bucket}/corpus/broken.jsonl"


def test_bad_record_stops_the_run_or_is_left_out_and_counted(
    broken: str, bucket: str, tokenizer: TextTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{bucket}/shards"
    assert main(prepare_command(broken, url, tokenizer, slice_bytes=2 * KiB)) == EXIT_REFUSED
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    place = f"byte {len(json_lines(SAMPLE[:3])):,}"
    assert line.startswith(f"data.source: '{broken}': bad record at {place}: invalid JSON")
    assert "set data.on_bad_record to skip" in line
    assert "tokens dropped" not in said.out
    assert len(parts(url)) > 0
    assert not storage.exists(f"{url}/{MANIFEST_NAME}")

    bad: list[BadRecord] = []
    skipping = recipe(broken, slice_bytes=2 * KiB, on_bad_record="skip")
    manifest = prepare(skipping, tokenizer, url, on_bad_record=bad.append)
    assert manifest is not None
    assert [one.url for one in bad] == [broken, broken]
    assert (bad[0].position, bad[1].reason) == (place, "no field 'text', only 'id'")
    assert manifest.statistics["bad"] == 2
    assert manifest.statistics["documents"] == 8 == sum(one.documents for one in manifest.train + manifest.validation)
    assert dict(describe(manifest))["  bad, left out"] == "2"


def test_error_in_one_process_ends_the_others(bucket: str, tokenizer: TextTokenizer) -> None:
    storage.write_bytes(f"{bucket}/corpus.jsonl", b"{\n" + json_lines(SAMPLE * 8))
    shown: list[BadRecord] = []
    made = recipe(f"{bucket}/corpus.jsonl", slice_bytes=KiB)
    arguments = (storage.StoreOptions(), (0, 1), 2, lambda documents, utf8_bytes: None, shown.append)
    with pytest.raises(UserError, match=r"data\.source.*corpus\.jsonl.*bad record at line 1, byte 0.*on_bad_record"):
        prepare_in_processes(made, tokenizer, f"{bucket}/shards", *arguments)
    at_the_end = parts(f"{bucket}/shards")
    assert len(at_the_end) < 500  # The other process had half of the 1,200 slices.
    assert not [one for one in psutil.Process().children() if "spawn_main" in " ".join(one.cmdline())]


@pytest.mark.parametrize(
    ("setting", "changes"),
    [
        ("data.seed", {"seed": 1}),
        ("data.validation_fraction", {"validation_fraction": 0.2}),
        ("data.slice_bytes", {"slice_bytes": 64 * KiB}),
        ("data.text_field", {"text_field": "title"}),
        ("data.id_field", {"id_field": "title"}),
        ("data.source", {}),
        ("tokenizer.source", {}),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_by_setting(
    setting: str, changes: dict[str, Any], half_done: tuple[str, str], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    source, url = half_done
    before = objects(url)
    if setting == "data.source":
        source = f"{source}.jsonl"
        storage.write_bytes(source, json_lines(SAMPLE))
    if setting == "tokenizer.source":
        tokenizer = train_tokenizer([], 257, tmp_path)
    with pytest.raises(UserError, match=f"data\\.shards.*holds an unfinished data set that differs: {setting} "):
        prepare(recipe(source, **changes), tokenizer, url)
    assert objects(url) == before


@pytest.fixture(scope="module")
def half_done(s3_server: Any, tokenizer: TextTokenizer) -> Iterator[tuple[str, str]]:
    """Return the URLs of a corpus, and of its data set, of which one of two workers has made its part."""
    bucket = s3_server.create_bucket("half-done")
    storage.write_bytes(f"{bucket}/corpus.jsonl", json_lines(SAMPLE))
    prepare(recipe(f"{bucket}/corpus.jsonl"), tokenizer, f"{bucket}/shards", (0, 2))
    yield f"{bucket}/corpus.jsonl", f"{bucket}/shards"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version": 2, "source": 1}'])
def test_damaged_plan_is_refused_in_one_line(content: bytes, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE[:3]))
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.shards.*its plan\.json is damaged.*delete that folder"):
        prepare(recipe(f"{tmp_path}/corpus.jsonl"), tokenizer, str(tmp_path))
    assert (tmp_path / "plan.json").read_bytes() == content


def test_plan_of_another_version_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE[:3]))
    (tmp_path / "plan.json").write_bytes(b'{"version": 99}')
    with pytest.raises(
        UserError, match=r"data\.shards.*plan\.json has version 99, but this program reads up to version 3"
    ):
        prepare(recipe(f"{tmp_path}/corpus.jsonl"), tokenizer, str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"[" * 100_000, b'{"file": 0}', b"another slice"])
def test_damaged_part_record_is_refused_by_name(content: bytes, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE[:9]))
    made = recipe(f"{tmp_path}/corpus.jsonl", slice_bytes=4 * KiB)
    assert prepare(made, tokenizer, f"{tmp_path}/shards", (0, 2)) is None
    first, *_, other = sorted((tmp_path / "shards" / "parts").glob("*/*.json"))
    first.write_bytes(other.read_bytes() if content == b"another slice" else content)
    with pytest.raises(UserError, match=rf"data\.shards: '{first}': this part record (is damaged|belongs to another)"):
        prepare(made, tokenizer, f"{tmp_path}/shards", (1, 2))
    first.unlink()
    assert prepare(made, tokenizer, f"{tmp_path}/shards") is not None


def test_tokenizer_left_by_a_failed_prepare_is_replaced(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json_lines(SAMPLE[:3]))
    store_tokenizer(train_tokenizer([], 257, tmp_path / "other"), f"{tmp_path}/shards/tokenizer")
    (tmp_path / "shards" / "tokenizer" / "added_tokens.json").write_text("{}")
    prepare(recipe(f"{tmp_path}/corpus.jsonl"), tokenizer, f"{tmp_path}/shards")
    left = {path.name: path.read_bytes() for path in (tmp_path / "shards" / "tokenizer").iterdir()}
    assert left == {path.name: path.read_bytes() for path in tokenizer.files()}
