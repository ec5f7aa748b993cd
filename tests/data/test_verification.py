"""Verification of shards before their first use: once per node, and again after a change."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cached_shards import ROOMY, Verifications, content, stored, use_all
from toy_data import LENGTH, DataSet, loader_of, rows, write_data_set

from job import config as settings
from job import storage
from job.data.loader import EvaluationLoader
from job.data.order import EvaluationOrder
from job.data.sequence_reader import SequenceReader
from job.data.shard_cache import ShardCache
from job.data.verification_notes import signature_of, write_note
from job.errors import UserError
from job.preflight.data_set import check_data
from job.preflight.findings import Finding, Findings

NOBODY = 65534
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="gives files to another user")


@pytest.fixture
def cached(bucket: str, tmp_path: Path) -> tuple[DataSet, Path, Path]:
    """Return a data set in a store, a cache folder that holds it, and the path of its first shard there."""
    data = write_data_set(bucket, [500, 400])
    assert use_all(data, tmp_path / "cache") == 2
    (path,) = (tmp_path / "cache").glob("*train-00000.bin.shard")
    return data, tmp_path / "cache", path


# ---- In the cache ----


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def long(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 8)


def one_other_bit_at_the_same_time(path: Path) -> None:
    found, changed = path.stat(), bytearray(path.read_bytes())
    changed[100] ^= 1
    path.write_bytes(changed)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def replaced(path: Path) -> None:
    found = path.stat()
    new = path.with_suffix(".new")
    new.write_bytes(bytes(found.st_size))
    os.utime(new, ns=(found.st_atime_ns, found.st_mtime_ns))
    new.rename(path)


def a_link(path: Path) -> None:
    path.rename(path.with_suffix(".old"))
    path.symlink_to(path.with_suffix(".old"))


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def another_users(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


@pytest.mark.parametrize(
    "damage",
    [
        *(zeros, short, empty, long, one_other_bit_at_the_same_time, replaced, a_link, a_pipe),
        pytest.param(another_users, marks=AS_ROOT),
    ],
)
def test_bad_file_in_the_cache_is_fetched_again_and_reported(
    damage: Callable[[Path], None], cached: tuple[DataSet, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    data, cache_dir, path = cached
    damage(path)
    assert use_all(data, cache_dir) == 1
    assert [message.startswith(f"{path}: this ") for message in caplog.messages] == [True]
    assert caplog.messages[0].endswith("; it is fetched again")
    assert use_all(data, cache_dir) == 0


def test_unchanged_file_is_verified_only_once(cached: tuple[DataSet, Path, Path], verifications: Verifications) -> None:
    data, cache_dir, path = cached
    assert [use_all(data, cache_dir), use_all(data, cache_dir)] == [0, 0]
    assert verifications.names == [], "a copy was verified when it was made"
    path.touch()
    assert [use_all(data, cache_dir), use_all(data, cache_dir)] == [0, 0]
    assert verifications.names == [path.name]
    path.chmod(0o400)  # This changes ctime alone.
    assert [use_all(data, cache_dir), use_all(data, cache_dir)] == [0, 0]
    assert verifications.names == [path.name] * 2


def deleted(note: Path, path: Path) -> None:
    note.unlink()


def emptied(note: Path, path: Path) -> None:
    os.truncate(note, 0)


def shortened(note: Path, path: Path) -> None:
    os.truncate(note, note.stat().st_size - 1)


def of_another_user(note: Path, path: Path) -> None:
    os.chown(note, NOBODY, NOBODY)


def writable_by_all(note: Path, path: Path) -> None:
    note.chmod(0o666)


def linked(note: Path, path: Path) -> None:
    note.rename(note.with_suffix(".old"))
    note.symlink_to(note.with_suffix(".old"))


@pytest.mark.parametrize(
    "forge",
    [
        *(deleted, emptied, shortened, writable_by_all, linked),
        pytest.param(of_another_user, marks=AS_ROOT),
    ],
)
def test_note_that_another_user_could_write_is_not_trusted(
    forge: Callable[[Path, Path], None], cached: tuple[DataSet, Path, Path], verifications: Verifications
) -> None:
    data, cache_dir, path = cached
    zeros(path)
    note = path.with_suffix(".verified")
    write_note(note, data.manifest.train[0].sha256, signature_of(path.stat()))
    forge(note, path)
    assert use_all(data, cache_dir) == 1
    assert verifications.names == [path.name]


def test_file_changed_while_the_cache_is_open_is_fetched_again(cached: tuple[DataSet, Path, Path]) -> None:
    data, cache_dir, path = cached
    cache = ShardCache(data.url, data.manifest.train, cache_dir, ROOMY)
    cache.use([0, 1])
    assert content(cache, 0) == stored(data, 0)
    zeros(path)
    assert content(cache, 0) == stored(data, 0)
    assert cache.downloads == 1
    cache.close()


def test_shard_damaged_in_cache_and_store_is_refused_by_name(cached: tuple[DataSet, Path, Path]) -> None:
    data, cache_dir, path = cached
    zeros(path)
    storage.write_bytes(storage.join(data.url, "train-00000.bin"), bytes(path.stat().st_size))
    with pytest.raises(UserError, match=rf"^data\.shards: '{data.url}/train-00000\.bin': this shard is damaged"):
        use_all(data, cache_dir)
    assert not path.exists()


def test_too_long_shard_is_not_copied_to_its_end(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data_set(bucket, [100])
    storage.write_bytes(storage.join(data.url, "train-00000.bin"), bytes(10 * 2**20))
    open_read, counts = storage.open_read, list[int]()

    class Counted(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            counts.append(len(content := super().read(size)))
            return content

    monkeypatch.setattr(storage, "open_read", lambda url: Counted(open_read(url).detach()))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"train-00000\.bin': this shard is damaged"):
        use_all(data, tmp_path)
    assert sum(counts) == 2 * 2**20, "the first piece of each of the two copies"
    assert not list(tmp_path.glob("*.partial"))


def test_validation_shards_are_verified_too(bucket: str, tmp_path: Path, verifications: Verifications) -> None:
    data = write_data_set(bucket, [10], [200])
    order = EvaluationOrder([200], LENGTH, seed=1)

    def labels() -> list[int]:
        cache: dict[str, Any] = {"cache_dir": tmp_path, "cache_bytes": ROOMY}
        with EvaluationLoader(data.url, data.manifest, order, batch_size=8, rank=0, world_size=1, **cache) as loader:
            return [label for batch in loader for label in batch.labels.flatten().tolist() if label > 0]

    expected = labels()
    (path,) = tmp_path.glob("*validation-00000.bin.shard")
    zeros(path)
    assert labels() == expected == data.validation[0][1:]
    assert verifications.names == [path.name]


# ---- Local shards ----


@pytest.mark.parametrize("damage", [zeros, short, empty, long, one_other_bit_at_the_same_time, replaced])
def test_damaged_local_shard_is_refused_by_name(
    damage: Callable[[Path], None], tmp_path: Path, verifications: Verifications
) -> None:
    data = write_data_set(str(tmp_path / "data"), [500, 400])
    assert [use_all(data, tmp_path / "cache"), use_all(data, tmp_path / "cache")] == [0, 0]
    assert sorted(verifications.names) == ["train-00000.bin", "train-00001.bin"]
    path = tmp_path / "data" / "train-00000.bin"
    damage(path)
    same_size = path.stat().st_size == data.manifest.train[0].size
    wrong = "its sha256 is" if same_size else f"it has {path.stat().st_size} bytes, the manifest says"
    with pytest.raises(UserError, match=rf"^data\.shards: '{path}': this shard is damaged: {wrong}") as caught:
        use_all(data, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_touched_local_shard_is_verified_again(tmp_path: Path, verifications: Verifications) -> None:
    data = write_data_set(str(tmp_path / "data"), [500, 400])
    use_all(data, tmp_path / "cache")
    verifications.names.clear()
    (tmp_path / "data" / "train-00001.bin").touch()
    assert [use_all(data, tmp_path / "cache"), use_all(data, tmp_path / "cache")] == [0, 0]
    assert verifications.names == ["train-00001.bin"]
    assert not list((tmp_path / "cache").glob("*.shard"))


def test_equal_shards_in_two_folders_have_separate_notes(tmp_path: Path, verifications: Verifications) -> None:
    one, other = (write_data_set(str(tmp_path / name), [500]) for name in ("one", "other"))
    for data in (one, other, one, other):
        use_all(data, tmp_path / "cache")
    assert len(verifications.names) == 2


@pytest.mark.parametrize("damage", [zeros, short])
def test_local_shard_changed_in_training_never_gives_other_tokens(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    data = write_data_set(str(tmp_path / "data"), [2000])
    with loader_of(data, tmp_path / "plain") as loader:
        expected = rows(list(loader))
    got = []
    with loader_of(data, tmp_path / "cache") as loader, pytest.raises(UserError, match=r"^data\.shards: .*train-00000"):
        for batch in loader:
            got.append(batch)
            if len(got) == 5:
                damage(tmp_path / "data" / "train-00000.bin")
    assert rows(got) == expected[: len(got)] and len(got) < len(expected)


def test_bytes_that_change_between_open_and_read_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_data_set(str(tmp_path / "data"), [50])
    path = tmp_path / "data" / "train-00000.bin"
    read_once, contents = SequenceReader._read_once, [bytes(path.stat().st_size), path.read_bytes()]

    def changed(*arguments: Any) -> bool:
        if contents:  # The first read gives zeros, and then the right content is back.
            path.write_bytes(contents.pop(0))
        return read_once(*arguments)

    monkeypatch.setattr(SequenceReader, "_read_once", changed)
    with loader_of(data, tmp_path / "cache", prefetch_steps=1) as loader, pytest.raises(UserError, match="damaged"):
        next(loader)


def deep_check(data: DataSet, cache_dir: Path) -> dict[str, Finding]:
    overrides = [("data.shards", data.url), ("data.cache_dir", str(cache_dir))]
    findings = Findings()
    config = settings.load(None, overrides)
    check_data(findings, config.data, config.tokenizer.source, deep=True)
    return {row.name: row for row in findings.rows}


def test_deep_check_ignores_notes_on_local_shards(tmp_path: Path) -> None:
    data = write_data_set(str(tmp_path / "data"), [500])
    use_all(data, tmp_path / "cache")
    path = tmp_path / "data" / "train-00000.bin"
    zeros(path)
    (note,) = (tmp_path / "cache").glob("*.verified")
    write_note(note, data.manifest.train[0].sha256, signature_of(path.stat()))
    row = deep_check(data, tmp_path / "cache")["shards"]
    assert (row.mark, row.found) == ("✗", "1 of 1 are damaged: train-00000.bin")


def test_deep_check_ignores_notes_on_cached_copies(cached: tuple[DataSet, Path, Path]) -> None:
    data, cache_dir, path = cached
    row = deep_check(data, cache_dir)["copies of shards"]
    assert (row.mark, row.found) == ("✓", f"2 files in {cache_dir}, every sha256 is right")
    zeros(path)
    write_note(path.with_suffix(".verified"), data.manifest.train[0].sha256, signature_of(path.stat()))
    row = deep_check(data, cache_dir)["copies of shards"]
    assert (row.mark, row.found) == ("!", f"1 of 2 files in {cache_dir} are damaged: {path.name}")
