"""Whether the data path stays quick at a size that no test has: a billion windows, a hundred thousand shards.

    python -m benchmarks.data_scale [--windows 1e9] [--shards 100000] [--batches 200] [--times 5]

The order of training is asked for whole batches of 1,024 windows at cursors anywhere in ten epochs; a start is what a
resumed run does first: the order is made and the batch at its cursor taken, each time at another cursor in a new
process. The manifest is opened from this machine's disk and from an S3 server of its own (`job/demo/server.py`).
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.machine import cpu_name, peak_bytes
from job import storage
from job.data.manifest import MANIFEST_NAME, Manifest, Shard, load_manifest, manifest_bytes, shard_size
from job.data.order import WindowOrder
from job.demo.server import S3Server

REPOSITORY = Path(__file__).parent.parent
CONTEXT_LENGTH, BATCH, EPOCHS = 512, 1024, 10
TOKEN_BYTES = 4


def order_of(windows: int, shards: int, buffer_bytes: int, node_groups: int) -> WindowOrder:
    """An order over so many windows in shards of about equal size."""
    tokens = np.full(shards, CONTEXT_LENGTH * (windows // shards), np.int64)
    tokens[: windows % shards] += CONTEXT_LENGTH
    tokens += 1  # the first is no target
    return WindowOrder(tokens, TOKEN_BYTES * tokens, CONTEXT_LENGTH, 2333, buffer_bytes, node_groups)  # type: ignore[arg-type]


def time_order(windows: int, shards: int, buffer_bytes: int, node_groups: int, seed: int, batches: int) -> None:
    """Prints as JSON: seconds of a start, microseconds a window of the batches after it, and the memory of all that."""
    cursors = [int(one) for one in np.random.default_rng(seed).integers(0, EPOCHS * windows - BATCH, batches)]
    order_of(BATCH, 2, 10**6, 1).window_ids(0, BATCH)  # numpy is awake, and its memory counted
    before, began = peak_bytes(), time.perf_counter()
    order = order_of(windows, shards, buffer_bytes, node_groups)
    order.window_ids(cursors[0], BATCH)
    start = time.perf_counter() - began
    epoch = cursors[0] // order.windows_per_epoch * order.windows_per_epoch
    each = []
    for cursor in cursors:
        position = epoch + min(cursor % order.windows_per_epoch, order.windows_per_epoch - BATCH)
        began = time.perf_counter()
        order.window_ids(position, BATCH)
        each.append((time.perf_counter() - began) / BATCH * 1e6)
    print(json.dumps({"start": start, "microseconds": each, "growth_bytes": peak_bytes() - before}))


def time_manifest(url: str) -> None:
    """Prints as JSON the seconds to open the manifest at `url`, its size, and the memory that took."""
    storage.exists(storage.join(url, MANIFEST_NAME))  # connected, as a run is long before
    before, began = peak_bytes(), time.perf_counter()
    manifest = load_manifest(url)
    seconds = time.perf_counter() - began
    shards = len(manifest.train) + len(manifest.validation)
    print(json.dumps({"seconds": seconds, "shards": shards, "growth_bytes": peak_bytes() - before}))


def manifest_of(shards: int) -> Manifest:
    """A manifest of so many shards, a tenth of them for validation."""

    def shard(split: str, number: int) -> Shard:
        tokens, documents = 17_000_000 + number, 60_000
        return Shard(
            name=f"{split}/00000-{number:05d}.bin",
            tokens=tokens,
            documents=documents,
            utf8_bytes=4 * tokens,
            characters=tokens,
            size=shard_size(tokens, documents, "uint32"),
            sha256=f"{number:064x}",
        )

    return Manifest(
        fingerprint="0" * 64,
        tokenizer_fingerprint="0" * 64,
        vocab_size=151_646,
        dtype="uint32",
        eod_id=151_643,
        seed=2333,
        validation_fraction=0.1,
        split_rule="as made",
        train=tuple(shard("train", number) for number in range(shards - shards // 10)),
        validation=tuple(shard("validation", number) for number in range(shards // 10)),
        statistics={},
    )


def in_new_process(*case: object) -> dict[str, float | list[float]]:
    """What a case prints."""
    command = [sys.executable, "-m", "benchmarks.data_scale", "--case", *map(str, case)]
    run = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float | list[float]] = json.loads(run.stdout)
    return result


def order_rows(windows: int, shards: int, batches: int, times: int) -> list[str]:
    """Rows of the table of the order."""
    whole = 2 * TOKEN_BYTES * windows * CONTEXT_LENGTH
    cases = [(1, shards // 100, whole), (1, shards, whole), (1, shards, whole // 200), (16, shards, whole // 200)]
    rows = []
    for node_groups, count, buffer_bytes in cases:
        runs = [in_new_process("order", windows, count, buffer_bytes, node_groups, i, batches) for i in range(times)]
        each = [one for run in runs for one in run["microseconds"]]  # type: ignore[union-attr]
        starts, growth = ([float(run[name]) for run in runs] for name in ("start", "growth_bytes"))  # type: ignore[arg-type]
        buffers = "one" if buffer_bytes == whole else "100"
        rows.append(
            f"| {count:,} | {buffers} | {node_groups} | {statistics.median(starts):.3f} | {max(starts):.3f} "
            f"| {statistics.median(each):.2f} | {max(each):.2f} | {max(growth) / 1e6:.1f} |"
        )
    return rows


def manifest_rows(shards: int, times: int) -> list[str]:
    """Rows of the table of the manifest."""
    content = manifest_bytes(manifest_of(shards))
    rows = []
    with S3Server() as server, tempfile.TemporaryDirectory() as folder:
        server.take_over_environment()
        for place, url in (("disk", folder), ("S3", f"{server.create_bucket('data-scale')}/shards")):
            storage.write_bytes(storage.join(url, MANIFEST_NAME), content)
            runs = [in_new_process("manifest", url) for _ in range(times)]
            assert all(run["shards"] == shards for run in runs)
            seconds, growth = ([float(run[name]) for run in runs] for name in ("seconds", "growth_bytes"))  # type: ignore[arg-type]
            rows.append(
                f"| {place} | {len(content) / 1e6:.1f} | {statistics.median(seconds):.3f} | {max(seconds):.3f} "
                f"| {max(growth) / 1e6:.0f} |"
            )
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=lambda word: int(float(word)), default=10**9)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--batches", type=int, default=200, help="cursors in each process")
    parser.add_argument("--times", type=int, default=5, help="processes for each case")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    match arguments.case:
        case ["order", *numbers]:
            time_order(*map(int, numbers))
            return
        case ["manifest", url]:
            time_manifest(url)
            return
    ordered = order_rows(arguments.windows, arguments.shards, arguments.batches, arguments.times)
    opened = manifest_rows(arguments.shards, arguments.times)
    print(
        f"{cpu_name()}, {os.cpu_count()} cores, numpy {np.__version__}, {datetime.date.today()}; "
        f"{arguments.windows:,} windows of {CONTEXT_LENGTH} tokens, batches of {BATCH:,}\n"
    )
    print("| shards | buffers | node groups | start, s | most | a window, µs | most | memory, MB |")
    print("|---|---|---|---|---|---|---|---|", *ordered, sep="\n")
    print(f"\n| manifest of {arguments.shards:,} shards on | MB | opens in s | most | memory, MB |")
    print("|---|---|---|---|---|", *opened, sep="\n")


if __name__ == "__main__":
    main()
