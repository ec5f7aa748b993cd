"""The quota of the shard cache: the work of making room does not grow with the number of shards."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from job.data.cache_quota import NEXT, NOW, CacheQuota


class Listings:
    """Counts listings of the folder and the entries that were listed, as a measure of work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries = self.listings = 0
        self._scandir = os.scandir
        monkeypatch.setattr("job.data.cache_quota.os.scandir", self._counted)

    @contextmanager
    def _counted(self, folder: Path) -> Iterator[list[Any]]:
        with self._scandir(folder) as entries:
            listed = list(entries)
        self.listings, self.entries = self.listings + 1, self.entries + len(listed)
        yield listed


@pytest.fixture
def listings(monkeypatch: pytest.MonkeyPatch) -> Listings:
    monkeypatch.setattr("job.data.cache_quota._LOOK_AGAIN_SECONDS", 3600.0)
    return Listings(monkeypatch)


def fetch(quota: CacheQuota, name: str, size: int = 1) -> bool:
    """Put a shard into the folder; return False if there is no room for it."""
    partial = quota.reserve(name, size, is_urgent=False)
    if partial is not None:
        partial.write_bytes(bytes(size))
        quota.keep(partial, partial.parent / f"{name}.shard")
    return partial is not None


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.shard"))


@pytest.mark.parametrize("shards", [500, 10_000])
def test_work_per_shard_does_not_grow_with_the_number_of_shards(
    shards: int, tmp_path: Path, listings: Listings
) -> None:
    """Two processes take turns to fetch into a full folder."""
    for number in range(shards):
        (tmp_path / f"old-{number}.shard").write_bytes(b"x")
    quotas = [CacheQuota(tmp_path, shards, holds_shards=True) for _ in range(2)]
    assert listings.entries <= 2 * (shards + 10), "each process lists the folder once when it starts"
    listings.entries = 0
    fetched = shards // 10
    for number in range(fetched):
        assert fetch(quotas[number % 2], f"new-{number}")
    # One listing for each twentieth of the shards; without the count each fetch would list them all.
    assert listings.entries / fetched <= 2 * 20
    assert bytes_in(tmp_path) <= shards
    assert len(list(tmp_path.glob("new-*.shard"))) == fetched


def test_folder_is_not_listed_while_there_is_room(tmp_path: Path, listings: Listings) -> None:
    quotas = [CacheQuota(tmp_path, 1000, holds_shards=True) for _ in range(2)]
    listings.listings = 0
    assert all(fetch(quotas[number % 2], f"shard-{number}") for number in range(1000))
    assert listings.listings == 0
    assert bytes_in(tmp_path) == 1000


def test_full_folder_is_listed_once_until_something_changes(tmp_path: Path, listings: Listings) -> None:
    one, other = (CacheQuota(tmp_path, 100, holds_shards=True) for _ in range(2))
    names = [f"held-{number}" for number in range(100)]
    one.plan(dict.fromkeys(names, NOW))
    assert all(fetch(one, name) for name in names)
    listings.listings = 0
    assert not any(fetch(other, f"ahead-{number}") for number in range(200))
    assert listings.listings == 1
    one.plan(dict.fromkeys(names[1:], NOW))
    assert fetch(other, "ahead-0")
    assert listings.listings == 2


def test_few_shards_are_deleted_one_at_a_time(tmp_path: Path) -> None:
    quota = CacheQuota(tmp_path, 10, holds_shards=True)
    assert all(fetch(quota, f"old-{number}") for number in range(10))
    assert fetch(quota, "new")
    assert len(list(tmp_path.glob("old-*.shard"))) == 9


def test_only_unplanned_shards_are_deleted_ahead_of_need(tmp_path: Path) -> None:
    one, other = (CacheQuota(tmp_path, 100, holds_shards=True) for _ in range(2))
    planned = [f"shard-{number}" for number in range(98)]
    other.plan(dict.fromkeys(planned, NEXT))
    assert all(fetch(one, name) for name in [*planned, "shard-98", "shard-99"])
    assert fetch(one, "new")
    assert {path.stem for path in tmp_path.glob("*.shard")} == {*planned, "new"}


@pytest.mark.parametrize("content", ["", "12", "999999 5\n", "x y\n", "-"])
def test_count_that_is_damaged_or_too_large_is_corrected(content: str, tmp_path: Path) -> None:
    quota = CacheQuota(tmp_path, 3, holds_shards=True)
    assert fetch(quota, "first")
    (tmp_path / "room.count").write_text(content)
    assert fetch(quota, "second") and fetch(quota, "third") and fetch(quota, "fourth")
    assert bytes_in(tmp_path) == 3


def test_killed_process_never_leaves_too_small_a_count(tmp_path: Path) -> None:
    """Whenever a process is killed, the bytes that it has reserved or not yet deleted are counted."""
    quota = CacheQuota(tmp_path, 10, holds_shards=True)
    partial = quota.reserve("first", 4, is_urgent=False)
    assert partial is not None and (tmp_path / "room.count").read_text().split()[0] == f"{4:020d}"
    partial.write_bytes(bytes(4))
    quota.keep(partial, tmp_path / "first.shard")
    assert (tmp_path / "room.count").read_text().split()[0] == f"{4:020d}"
    quota.drop(tmp_path / "first.shard")
    assert (tmp_path / "room.count").read_text().split()[0] == f"{0:020d}"


def test_unknown_files_in_the_folder_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "odd.partial").touch()
    (tmp_path / "odd.many.partial").touch()
    (tmp_path / "odd.plan").write_text("what is this\n\n3 x\n")
    quota = CacheQuota(tmp_path, 1, holds_shards=True)
    assert fetch(quota, "first") and fetch(quota, "second")
