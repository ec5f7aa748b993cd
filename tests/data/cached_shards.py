"""Reading shards through a `ShardCache`, and records of what it fetches and verifies, for the tests of the cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from toy_data import DataSet

from job import storage
from job.data.cache_quota import locked
from job.data.shard_cache import ShardCache
from job.data.verification_notes import hash_file

ROOMY = 10**9
"""A `cache_bytes` that is larger than all shards of a test."""


def content(cache: ShardCache, index: int) -> bytes:
    """Return the content of a shard's file, read through the cache."""
    with cache.open(index) as file:
        return file.read()


def stored(data: DataSet, index: int) -> bytes:
    """Return the content of a training shard in the store."""
    return storage.read_bytes(storage.join(data.url, data.manifest.train[index].name))


def bytes_on_disk(cache_dir: Path) -> int:
    """Return the bytes of the shards in a cache folder, and of the room that is reserved for shards."""
    with locked(cache_dir / "room.lock"):
        held = sum(path.stat().st_size for path in cache_dir.glob("*.shard"))
        return held + sum(int(path.name.split(".")[-2]) for path in cache_dir.glob("*.partial"))


def use_all(data: DataSet, cache_dir: Path) -> int:
    """Read every training shard through a new cache, and check it; return how many were fetched."""
    cache = ShardCache(data.url, data.manifest.train, cache_dir, ROOMY)
    try:
        cache.use(range(len(data.manifest.train)))
        for index, tokens in enumerate(data.train):
            assert content(cache, index)[: 4 * len(tokens)] == b"".join(token.to_bytes(4, "little") for token in tokens)
    finally:
        cache.close()
    return cache.downloads


class Fetches:
    """The name of every shard that is fetched from the store, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.before: Callable[[str, int], None] = lambda name, number: None
        """Called at the start of a fetch with the shard's name and the number of its fetches so far."""
        self._open = storage.open_read
        monkeypatch.setattr(storage, "open_read", self._counted)

    def _counted(self, url: str) -> BinaryIO:
        name = url.rpartition("/")[2]
        self.names.append(name)
        self.before(name, self.names.count(name))
        return self._open(url)


class Verifications:
    """The name of every file that is read to be verified, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.before: Callable[[], object] = lambda: None
        """Called at the start of each verification."""
        monkeypatch.setattr("job.data.shard_files.hash_file", self._counted)

    def _counted(self, descriptor: int, on_bytes: Callable[[int], None]) -> Any:
        self.names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        self.before()
        return hash_file(descriptor, on_bytes)
