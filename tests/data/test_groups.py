"""Small files share a slice: which ones follows from names and sizes alone, and no byte depends on who makes it."""

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
from job.data import prepare as shards
from job.data.corpus import CorpusFile, Document, list_corpus, read_group, share_slices
from job.data.fingerprint import identify
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import TextTokenizer
from job.errors import UserError

KiB = 1024
TEXTS = [f"第{number}条：长江是中国的第{number % 7}条河流。" for number in range(1500)]


def files_of(sizes: list[int]) -> list[CorpusFile]:
    return [CorpusFile(index, f"{index:04d}", f"{index:04d}", size, "json", None) for index, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 30))
def test_groups_are_as_large_as_a_slice_allows(sizes: list[int], slice_bytes: int) -> None:
    groups = share_slices(files_of(sizes), slice_bytes)
    assert [group.index for group in groups] == list(range(len(groups)))
    assert [file.index for group in groups for file in group.files] == list(range(len(sizes)))
    totals = [sum(file.size for file in group.files) for group in groups]
    assert all(total <= slice_bytes or len(group.files) == 1 for total, group in zip(totals, groups, strict=True))
    for total, following in zip(totals, groups[1:], strict=False):
        assert total + following.files[0].size > slice_bytes


def test_small_files_share_slices_and_large_ones_are_cut() -> None:
    groups = share_slices(files_of([1, 4, 6, 25, 3, 10, 11, 0]), 10)
    assert [[file.size for file in group.files] for group in groups] == [[1, 4], [6], [25], [3], [10], [11], [0]]


@pytest.fixture
def small_files(tmp_path: Path) -> Path:
    """1,500 files of a document each."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:04d}.json").write_bytes(json_lines([{"id": str(number), "text": text}]))
    return folder


def test_many_small_files_make_a_handful_of_files(small_files: Path, trained: TextTokenizer, tmp_path: Path) -> None:
    manifest = prepare(recipe(small_files, slice_bytes=64 * 2**20), trained, str(tmp_path / "shards"))
    assert manifest is not None and manifest.statistics["documents"] == 1500
    written = [path for path in (tmp_path / "shards").rglob("*") if path.is_file()]
    assert len(written) == 7, written  # plan, manifest, tokenizer (2), a part, a shard of each split


def test_shared_slice_holds_the_documents_in_the_order_of_the_names(small_files: Path) -> None:
    (group,) = share_slices(list_corpus(str(small_files)), 64 * 2**20)
    items = list(read_group(group, 64 * 2**20, lambda index: True, "text", "id"))
    assert [item.text for item in items if isinstance(item, Document)] == TEXTS
    assert len(items) == 1502
    assert list(read_group(group, 64 * 2**20, lambda index: False, "text", "id")) == []


def recipe(source: object, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {"on_bad_record": "stop", "slice_bytes": 8 * KiB, "validation_fraction": 0.2, "seed": 7}
    return Recipe(str(source), "text", "id", **(settings | changes))


def objects(folder: Path) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Small files of every form between large ones, and empty ones."""
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


def test_shared_slices_are_the_same_bytes_whoever_makes_them(
    mixed: Path, trained: TextTokenizer, tmp_path: Path
) -> None:
    made = recipe(mixed)
    groups = share_slices(list_corpus(str(mixed)), made.slice_bytes)
    assert {len(group.files) > 1 for group in groups} == {True, False}
    manifest = prepare(made, trained, str(tmp_path / "one"))
    assert manifest is not None and manifest.statistics["documents"] == 17 * 9 + 3 * 400
    expected = objects(tmp_path / "one")
    assert len([name for name in expected if name.startswith("parts/")]) >= 8

    made_by = [prepare(made, trained, str(tmp_path / "three"), (worker, 3)) for worker in (2, 0, 1)]
    assert made_by == [None, None, manifest]
    assert objects(tmp_path / "three") == expected


def test_shared_slice_that_is_done_is_not_done_again(
    mixed: Path, trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, url = recipe(mixed), str(tmp_path / "shards")
    assert prepare(made, trained, url, (0, 2)) is None
    parts = {path.name for path in tmp_path.glob("shards/parts/*/*")}
    written: list[str] = []
    write_json = storage.write_json
    monkeypatch.setattr(storage, "write_json", lambda url, value: (written.append(url), write_json(url, value)))
    assert prepare(made, trained, url) is not None
    assert written and parts.isdisjoint(url.rpartition("/")[2] for url in written)


def test_bad_record_in_a_shared_slice_is_told_with_its_file(
    small_files: Path, trained: TextTokenizer, tmp_path: Path
) -> None:
    (small_files / "0700.json").write_bytes(json_lines([{"id": "x", "text": "a"}]) + b"broken\n")
    bad: list[Any] = []
    made = recipe(small_files, on_bad_record="skip", slice_bytes=64 * 2**20)
    manifest = prepare(made, trained, str(tmp_path / "shards"), on_bad_record=bad.append)
    assert manifest is not None and manifest.statistics["bad"] == 1
    assert [(one.url, one.position) for one in bad] == [(f"{small_files}/0700.json", "line 2, byte 25")]


def test_member_of_a_shared_slice_that_is_replaced_is_refused(
    small_files: Path, trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = shards.read_group

    def replace_one(group: Any, *arguments: Any) -> Any:
        for item in read(group, *arguments):
            if isinstance(item, Document) and item.id == "900":
                (small_files / "0003.json").write_bytes(json_lines([{"id": "3", "text": "another text"}]))
            yield item

    monkeypatch.setattr(shards, "read_group", replace_one)
    with pytest.raises(UserError, match=r"data\.source.*0003\.json.*was replaced or removed while it was read"):
        prepare(recipe(small_files, slice_bytes=64 * 2**20), trained, str(tmp_path / "shards"))
    assert not list(tmp_path.glob("shards/parts/*/*"))


def test_file_that_grows_after_it_was_listed_is_read_to_its_end(
    trained: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the listing and the identification; the plan has the size that counts."""
    path = tmp_path / "a.jsonl"
    records = [{"id": str(number), "text": text} for number, text in enumerate(TEXTS)]
    path.write_bytes(json_lines(records[:10]))

    def grown(files: Any) -> Any:
        path.write_bytes(json_lines(records))
        return identify(files)

    monkeypatch.setattr(shards, "identify", grown)
    manifest = prepare(recipe(path), trained, str(tmp_path / "shards"))
    assert manifest is not None and manifest.statistics["documents"] == 1500
    plan = json.loads((tmp_path / "shards/plan.json").read_bytes())
    assert (plan["version"], plan["source"][0]["size"]) == (3, path.stat().st_size)


def test_files_of_equal_content_are_reported(tmp_path: Path) -> None:
    for name, content in {"a": b"1", "b": b"2", "c": b"1", "d": b"", "e": b"", "f": b"1"}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    assert identify(list_corpus(str(tmp_path))).equal == [("a.jsonl", "c.jsonl", "f.jsonl")]
