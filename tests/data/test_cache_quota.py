"""Room for shards: how much work it takes to find some, however many shards are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from job.data.cache_quota import NEXT, NOW, Room


class Looks:
    """Directory entries that were listed, as a measure of work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entries = self.looks = 0
        self._scandir = os.scandir
        monkeypatch.setattr("job.data.cache_quota.os.scandir", self._counted)

    @contextmanager
    def _counted(self, folder: Path) -> Iterator[list[Any]]:
        with self._scandir(folder) as entries:
            listed = list(entries)
        self.looks, self.entries = self.looks + 1, self.entries + len(listed)
        yield listed


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    monkeypatch.setattr("job.data.cache_quota._LOOK_AGAIN_SECONDS", 3600.0)
    return Looks(monkeypatch)


def fetch(room: Room, name: str, size: int = 1) -> bool:
    """Puts a shard into the folder, if there is room for it."""
    partial = room.reserve(name, size, is_urgent=False)
    if partial is not None:
        partial.write_bytes(bytes(size))
        room.keep(partial, partial.parent / f"{name}.shard")
    return partial is not None


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.shard"))


@pytest.mark.parametrize("shards", [500, 10_000])
def test_work_for_each_shard_does_not_grow_with_the_number_of_shards(shards: int, tmp_path: Path, looks: Looks) -> None:
    """Two processes fetch in turns into a folder that is full."""
    for number in range(shards):
        (tmp_path / f"old-{number}.shard").write_bytes(b"x")
    rooms = [Room(tmp_path, shards, counts=True) for _ in range(2)]
    assert looks.entries <= 2 * (shards + 10), "each process looks once when it begins"
    looks.entries = 0
    fetched = shards // 10
    for number in range(fetched):
        assert fetch(rooms[number % 2], f"new-{number}")
    # One look for each twentieth of the shards; without the count each fetch would list them all.
    assert looks.entries / fetched <= 2 * 20
    assert bytes_in(tmp_path) <= shards
    assert len(list(tmp_path.glob("new-*.shard"))) == fetched


def test_no_look_is_needed_while_there_is_room(tmp_path: Path, looks: Looks) -> None:
    rooms = [Room(tmp_path, 1000, counts=True) for _ in range(2)]
    looks.looks = 0
    assert all(fetch(rooms[number % 2], f"shard-{number}") for number in range(1000))
    assert looks.looks == 0
    assert bytes_in(tmp_path) == 1000


def test_full_folder_is_looked_at_once_until_something_changes(tmp_path: Path, looks: Looks) -> None:
    one, other = (Room(tmp_path, 100, counts=True) for _ in range(2))
    names = [f"held-{number}" for number in range(100)]
    one.plan(dict.fromkeys(names, NOW))
    assert all(fetch(one, name) for name in names)
    looks.looks = 0
    assert not any(fetch(other, f"ahead-{number}") for number in range(200))
    assert looks.looks == 1
    one.plan(dict.fromkeys(names[1:], NOW))
    assert fetch(other, "ahead-0")
    assert looks.looks == 2


def test_few_shards_are_dropped_one_at_a_time(tmp_path: Path) -> None:
    room = Room(tmp_path, 10, counts=True)
    assert all(fetch(room, f"old-{number}") for number in range(10))
    assert fetch(room, "new")
    assert len(list(tmp_path.glob("old-*.shard"))) == 9


def test_only_shards_that_nobody_plans_to_use_are_dropped_ahead_of_need(tmp_path: Path) -> None:
    one, other = (Room(tmp_path, 100, counts=True) for _ in range(2))
    planned = [f"shard-{number}" for number in range(98)]
    other.plan(dict.fromkeys(planned, NEXT))
    assert all(fetch(one, name) for name in [*planned, "shard-98", "shard-99"])
    assert fetch(one, "new")
    assert {path.stem for path in tmp_path.glob("*.shard")} == {*planned, "new"}


@pytest.mark.parametrize("content", ["", "12", "999999 5\n", "x y\n", "-"])
def test_count_that_is_damaged_or_too_large_is_mended(content: str, tmp_path: Path) -> None:
    room = Room(tmp_path, 3, counts=True)
    assert fetch(room, "first")
    (tmp_path / "room.count").write_text(content)
    assert fetch(room, "second") and fetch(room, "third") and fetch(room, "fourth")
    assert bytes_in(tmp_path) == 3


def test_process_that_dies_leaves_a_count_that_is_not_too_small(tmp_path: Path) -> None:
    """At each moment in which a process can be killed, what it has reserved or not yet deleted is counted."""
    room = Room(tmp_path, 10, counts=True)
    partial = room.reserve("first", 4, is_urgent=False)
    assert partial is not None and (tmp_path / "room.count").read_text().split()[0] == f"{4:020d}"
    partial.write_bytes(bytes(4))
    room.keep(partial, tmp_path / "first.shard")
    assert (tmp_path / "room.count").read_text().split()[0] == f"{4:020d}"
    room.drop(tmp_path / "first.shard")
    assert (tmp_path / "room.count").read_text().split()[0] == f"{0:020d}"


def test_files_that_others_have_put_there_are_no_harm(tmp_path: Path) -> None:
    (tmp_path / "odd.partial").touch()
    (tmp_path / "odd.many.partial").touch()
    (tmp_path / "odd.plan").write_text("what is this\n\n3 x\n")
    room = Room(tmp_path, 1, counts=True)
    assert fetch(room, "first") and fetch(room, "second")
