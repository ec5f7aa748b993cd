"""Measure how long it takes to verify shards on this machine, and how much time the notes save.

    python -m benchmarks.verify [--gigabytes 16] [--shards 16] [--folder FOLDER]

Writes shards of random bytes, and has `ShardCache` give each once, as training does: *from the disk*, with the kernel's
copy of the files dropped before; *from memory*, with as much of them in the kernel's memory as fits; *2 processes* that
share the work; and *by the notes*, which the runs before have left. Beside it, what one thread hashes without reading
anything, which bounds the rest. If the disk has too little room for `--gigabytes`, fewer are written, and the time for
`--gigabytes` is calculated from them and marked so.

And how long a shard takes to find room in a full cache of 10,000: a count of what is there in place of a list of it.
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
from job.data.cache_quota import Room
from job.data.manifest import Shard
from job.data.shard_cache import ShardCache

_PIECE_BYTES = 2**24
_SPARE_BYTES = 8 * 10**9
"""Left free on the disk."""


def write_shards(folder: Path, count: int, size: int) -> list[Shard]:
    """Writes `count` files of `size` bytes, each with other bytes."""
    found = []
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
        found.append(
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
    return found


def forget(folder: Path) -> None:
    """Drops the kernel's copy of all files in a folder."""
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
    """Bytes that one thread hashes in a second."""
    content, digest = secrets.token_bytes(_PIECE_BYTES), hashlib.sha256()
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 1:
        digest.update(content)
        count += len(content)
    return count / (time.perf_counter() - began)


def report_verification(folder: Path, wanted_bytes: int, count: int) -> None:
    """Prints the table of verification."""
    free = shutil.disk_usage(folder).free - _SPARE_BYTES
    size = min(wanted_bytes, max(free, count)) // count
    (folder / "data").mkdir()
    shards = write_shards(folder / "data", count, size)
    written = size * count
    factor = wanted_bytes / written
    seconds: dict[str, float] = {}
    forget(folder / "data")
    seconds["from the disk, 1 process"] = seconds_of(1, folder / "data", shards, folder / "one")
    seconds["from memory as far as it fits, 1 process"] = seconds_of(1, folder / "data", shards, folder / "two")
    seconds["the same, 2 processes that share the work"] = seconds_of(2, folder / "data", shards, folder / "three")
    how = "measured" if factor < 1.01 else f"calculated from {written / 1e9:.1f} GB, for which the disk had room"
    rate = hashed_per_second() / 1e9
    print(f"\n{count} shards, {wanted_bytes / 1e9:g} GB, {how}; one thread hashes {rate:.2f} GB/s\n")
    print("| verified | seconds | GB/s |\n|---|---|---|")
    for name, taken in seconds.items():
        print(f"| {name} | {taken * factor:.2f} | {written / taken / 1e9:.2f} |")
    noted = seconds_of(1, folder / "data", shards, folder / "one")
    print(f"| by the notes of a start before | {noted:.2f} | nothing is read |")


def report_room(folder: Path, shards: int) -> None:
    """Prints how long it takes to find room for a shard in a full cache."""
    for number in range(shards):
        (folder / f"old-{number}.shard").write_bytes(b"x")
    room = Room(folder, shards, counts=True)
    fetched = max(1, shards // 5)
    began = time.perf_counter()
    for number in range(fetched):
        partial = room.reserve(f"new-{number}", 1, is_urgent=False)
        assert partial is not None
        partial.write_bytes(b"x")
        room.keep(partial, folder / f"new-{number}.shard")
    each = (time.perf_counter() - began) / fetched
    room.close()
    print(f"\nRoom for a shard in a full cache of {shards:,}: {1e3 * each:.2f} ms, mean of {fetched:,}")


def main() -> None:
    """Prints the table, and the line on room."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--cached-shards", type=int, default=10_000, help="in the full cache")
    parser.add_argument("--folder", help="on the disk to be measured; by default the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wikillm-verify-", dir=arguments.folder) as name:
        report_verification(Path(name), int(arguments.gigabytes * 1e9), arguments.shards)
        (Path(name) / "room").mkdir()
        report_room(Path(name) / "room", arguments.cached_shards)
    print(f"\n{cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}")


if __name__ == "__main__":
    main()
