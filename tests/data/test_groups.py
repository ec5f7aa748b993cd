"""Small files share a slice, which depends only on their names and sizes and has the same bytes for any worker."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from corpus_files import json_array, json_lines, parquet
from hypothesis import given
from hypothesis import strategies as st

from job import storage
from job.data import make_shards
from job.data import prepare as prepare_module
from job.data.corpus import CorpusFile, Document, group_files, list_corpus, read_group
from job.data.fingerprint import identify
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import TextTokenizer
from job.errors import UserError

KiB = 1024
TEXTS = [f"第{number}条：长江是中国的第{number % 7}条河流。" for number in range(1500)]


def files_of(sizes: list[int]) -> list[CorpusFile]:
    return [CorpusFile(index, f"{index:04d}", f"{index:04d}", size, "json", None) for index, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 30))
def test_groups_fill_a_slice_as_far_as_possible(sizes: list[int], slice_bytes: int) -> None:
    groups = group_files(files_of(sizes), slice_bytes)
    assert [group.index for group in groups] == list(range(len(groups)))
    assert [file.index for group in groups for file in group.files] == list(range(len(sizes)))
    totals = [sum(file.size for file in group.files) for group in groups]
    assert all(total <= slice_bytes or len(group.files) == 1 for total, group in zip(totals, groups, strict=True))
    for total, following in zip(totals, groups[1:], strict=False):
        assert total + following.files[0].size > slice_bytes


def test_small_files_share_slices_and_large_ones_do_not() -> None:
    groups = group_files(files_of([1, 4, 6, 25, 3, 10, 11, 0]), 10)
    assert [[file.size for file in group.files] for group in groups] == [[1, 4], [6], [25], [3], [10], [11], [0]]


@pytest.fixture
def small_files(tmp_path: Path) -> Path:
    """A folder of 1,500 files with one document each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:04d}.json").write_bytes(json_lines([{"id": str(number), "text": text}]))
    return folder


def test_many_small_files_make_few_output_files(small_files: Path, trained: TextTokenizer, tmp_path: Path) -> None:
    manifest = prepare(recipe(small_files, slice_bytes=64 * 2**20), trained, str(tmp_path / "shards"))
    assert manifest is not None and manifest.statistics["documents"] == 1500
    written = [path for path in (tmp_path / "shards").rglob("*") if path.is_file()]
    # The files are the plan, the manifest, two of the tokenizer, one part, and one shard of each split.
    assert len(written) == 7, written


def test_shared_slice_keeps_documents_in_order_of_file_names(small_files: Path) -> None:
    (group,) = group_files(list_corpus(str(small_files)), 64 * 2**20)
    items = list(read_group(group, 64 * 2**20, lambda index: True, "text", "id"))
    assert [item.text for item in items if isinstance(item, Document)] == TEXTS
    assert len(items) == 1502
    assert list(read_group(group, 64 * 2**20, lambda index: False, "text", "id")) == []


def recipe(source: object, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"on_bad_record": "stop", "slice_bytes": 8 * KiB, "validation_fraction": 0.2, "seed": 7}
    return Recipe(str(source), "text", "id", **(settings | changes))


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file in a folder, by path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of small files in every format, with large and empty files between them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        records = [
            {"id": f"{number}-{i}", "text": TEXTS[20 * number + i]} for i in range(400 if number % 6 == 3 else 9)
        ]
        forms = {
            f"{number:02d}.jsonl": json_lines(records),
            f"{number:02d}.json.gz": gzip.compress(json_array(records)),
            f"{number:02d}.parquet": parquet(records),
            f"{number:02d}.json": json_array(records),
            f"{number:02d}": json_lines(records),
        }
        name = list(forms)[number % 5]
        (folder / name).write_bytes(forms[name])
    for name in ("00-empty.jsonl", "99-empty.jsonl"):
        (folder / name).touch()
    return folder


def test_shared_slices_have_the_same_bytes_for_any_worker(mixed: Path, trained: TextTokenizer, tmp_path: Path) -> None:
    chosen = recipe(mixed)
    groups = group_files(list_corpus(str(mixed)), chosen.slice_bytes)
    assert {len(group.files) > 1 for group in groups} == {True, False}
    manifest = prepare(chosen, trained, str(tmp_path / "one"))
    assert manifest is not None and manifest.statistics["documents"] == 17 * 9 + 3 * 400
    expected = hashes(tmp_path / "one")
    assert len([name for name in expected if name.startswith("parts/")]) >= 8

    manifests = [prepare(chosen, trained, str(tmp_path / "three"), (worker, 3)) for worker in (2, 0, 1)]
    assert manifests == [None, None, manifest]
    assert hashes(tmp_path / "three") == expected


def test_finished_shared_slice_is_not_made_again(
    mixed: Path, trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, url = recipe(mixed), str(tmp_path / "shards")
    assert prepare(chosen, trained, url, (0, 2)) is None
    parts = {path.name for path in tmp_path.glob("shards/parts/*/*")}
    written: list[str] = []
    write_json = storage.write_json
    monkeypatch.setattr(storage, "write_json", lambda url, value: (written.append(url), write_json(url, value)))
    assert prepare(chosen, trained, url) is not None
    assert written and parts.isdisjoint(url.rpartition("/")[2] for url in written)


def test_bad_record_in_a_shared_slice_is_reported_with_its_file(
    small_files: Path, trained: TextTokenizer, tmp_path: Path
) -> None:
    (small_files / "0700.json").write_bytes(json_lines([{"id": "x", "text": "a"}]) + b"broken\n")
    bad: list[Any] = []
    chosen = recipe(small_files, on_bad_record="skip", slice_bytes=64 * 2**20)
    manifest = prepare(chosen, trained, str(tmp_path / "shards"), on_bad_record=bad.append)
    assert manifest is not None and manifest.statistics["bad"] == 1
    assert [(record.url, record.position) for record in bad] == [(f"{small_files}/0700.json", "line 2, byte 25")]


def test_replaced_file_of_a_shared_slice_is_refused(
    small_files: Path, trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = make_shards.read_group

    def replace_one(group: Any, *arguments: Any) -> Any:
        for item in read(group, *arguments):
            if isinstance(item, Document) and item.id == "900":
                (small_files / "0003.json").write_bytes(json_lines([{"id": "3", "text": "another text"}]))
            yield item

    monkeypatch.setattr(make_shards, "read_group", replace_one)
    with pytest.raises(UserError, match=r"data\.source.*0003\.json.*was replaced or removed while it was read"):
        prepare(recipe(small_files, slice_bytes=64 * 2**20), trained, str(tmp_path / "shards"))
    assert not list(tmp_path.glob("shards/parts/*/*"))


def test_file_that_grows_after_listing_is_read_to_its_end(
    trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file grows between listing and identification; the size in the plan is decisive."""
    path = tmp_path / "a.jsonl"
    records = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    path.write_bytes(json_lines(records[:10]))

    def grown(files: Any) -> Any:
        path.write_bytes(json_lines(records))
        return identify(files)

    monkeypatch.setattr(prepare_module, "identify", grown)
    manifest = prepare(recipe(path), trained, str(tmp_path / "shards"))
    assert manifest is not None and manifest.statistics["documents"] == 1500
    plan = json.loads((tmp_path / "shards/plan.json").read_bytes())
    assert (plan["version"], plan["source"][0]["size"]) == (3, path.stat().st_size)
