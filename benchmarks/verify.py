"""Measure how long it takes to verify shards on this machine, and how much time the verification notes save.

    python -m benchmarks.verify [--gigabytes 16] [--shards 16] [--folder FOLDER]

It writes shards of random bytes and opens each once through `ShardCache`, as training does: *from the disk*, after the
kernel's cache of the files is dropped; *from memory*, with as much of them in the kernel's cache as fits; with *2
processes* that share the work; and *by the notes* that an earlier run left. It also measures how fast one thread hashes
data in memory, which limits all other rates. If the disk has too little room for `--gigabytes`, fewer bytes are
written, and the time for `--gigabytes` is calculated from them and marked as calculated.

It also measures how long the cache needs to make room for a shard when it is full with 10,000 shards. The cache counts
its files and does not list its folder each time.
"""

import argparse
import datetime
import hashlib
import multiprocessing
import os
import secrets
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.machine import cpu_name
from job.data.cache_quota import CacheQuota
from job.data.manifest import Shard
from job.data.shard_cache import ShardCache

_PIECE_BYTES = 2**24
_SPARE_BYTES = 8 * 10**9
"""Bytes to leave free on the disk."""


def write_shards(folder: Path, count: int, size: int) -> list[Shard]:
    """Write `count` shard files of `size` bytes, each with different bytes, and return their descriptions."""
    shards = []
    piece = secrets.token_bytes(_PIECE_BYTES)
    for number in range(count):
        digest, left = hashlib.sha256(), size
        with (folder / f"shard-{number}.bin").open("wb") as file:
            while left:
                content = (number.to_bytes(8, "little") + left.to_bytes(8, "little") + piece[16:])[:left]
                digest.update(content)
                file.write(content)
                left -= len(content)
            file.flush()
            os.fsync(file.fileno())
        shards.append(
            Shard(
                name=f"shard-{number}.bin",
                tokens=size // 4,
                documents=0,
                utf8_bytes=size,
                characters=size,
                size=size,
                sha256=digest.hexdigest(),
            )
        )
    return shards


def forget(folder: Path) -> None:
    """Drop all files in a folder from the kernel's cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def use_all(folder: str, shards: list[Shard], cache_dir: str) -> None:
    """Open every shard once, as a process does before it trains on them."""
    cache = ShardCache(folder, shards, cache_dir, 2**62)
    cache.use(range(len(shards)))
    for index in range(len(shards)):
        cache.open(index).close()
    cache.close()


def seconds_of(processes: int, folder: Path, shards: list[Shard], cache_dir: Path) -> float:
    """Return the seconds that this many running processes need to open every shard."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn) as pool:
        for started in [pool.submit(time.sleep, 0.5) for _ in range(processes)]:
            started.result()
        began = time.perf_counter()
        for task in [pool.submit(use_all, str(folder), shards, str(cache_dir)) for _ in range(processes)]:
            task.result()
        return time.perf_counter() - began


def hashed_per_second() -> float:
    """Return the number of bytes that one thread hashes in a second."""
    content, digest = secrets.token_bytes(_PIECE_BYTES), hashlib.sha256()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 1:
        digest.update(content)
        count += len(content)
    return count / (time.perf_counter() - began)


def report_verification(folder: Path, wanted_bytes: int, count: int) -> None:
    """Measure verification and print its table."""
    free = shutil.disk_usage(folder).free - _SPARE_BYTES
    size = min(wanted_bytes, max(free, count)) // count
    (folder / "data").mkdir()
    shards = write_shards(folder / "data", count, size)
    written = size * count
    factor = wanted_bytes / written
    seconds: dict[str, float] = {}
    forget(folder / "data")
    seconds["from the disk, 1 process"] = seconds_of(1, folder / "data", shards, folder / "one")
    seconds["from memory as far as they fit, 1 process"] = seconds_of(1, folder / "data", shards, folder / "two")
    seconds["the same, 2 processes that share the work"] = seconds_of(2, folder / "data", shards, folder / "three")
    how = "measured" if factor < 1.01 else f"calculated from {written / 1e9:.1f} GB, as the disk had no room for more"
    rate = hashed_per_second() / 1e9
    print(f"\n{count} shards, {wanted_bytes / 1e9:g} GB, {how}; one thread hashes {rate:.2f} GB/s\n")
    print("| verified | seconds | GB/s |\n|---|---|---|")
    for name, measured in seconds.items():
        print(f"| {name} | {measured * factor:.2f} | {written / measured / 1e9:.2f} |")
    noted_seconds = seconds_of(1, folder / "data", shards, folder / "one")
    print(f"| by the notes of an earlier start | {noted_seconds:.2f} | nothing is read |")


def report_room(folder: Path, shards: int) -> None:
    """Measure and print how long it takes to make room for a shard in a full cache of `shards` shards."""
    for number in range(shards):
        (folder / f"old-{number}.shard").write_bytes(b"x")
    quota = CacheQuota(folder, shards, holds_shards=True)
    fetched = max(1, shards // 5)
    began = time.perf_counter()
    for number in range(fetched):
        partial = quota.reserve(f"new-{number}", 1, is_urgent=False)
        assert partial is not None
        partial.write_bytes(b"x")
        quota.keep(partial, folder / f"new-{number}.shard")
    mean_seconds = (time.perf_counter() - began) / fetched
    quota.close()
    print(f"\nRoom for a shard in a full cache of {shards:,}: {1e3 * mean_seconds:.2f} ms, mean of {fetched:,}")


def main() -> None:
    """Measure verification and room in the cache and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16, help="GB of shards to verify")
    parser.add_argument("--shards", type=int, default=16, help="number of shards to verify")
    parser.add_argument("--cached-shards", type=int, default=10_000, help="number of shards in the full cache")
    parser.add_argument("--folder", help="folder on the disk to measure (default: the temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wikillm-verify-", dir=arguments.folder) as name:
        report_verification(Path(name), int(arguments.gigabytes * 1e9), arguments.shards)
        (Path(name) / "room").mkdir()
        report_room(Path(name) / "room", arguments.cached_shards)
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}")


if __name__ == "__main__":
    main()
