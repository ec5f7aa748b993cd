"""Measure the data path at a size that no test has: a billion sequences in a hundred thousand shards.

    python -m benchmarks.data_scale [--sequences 1e9] [--shards 100000] [--batches 200] [--times 5]

The order is asked for batches of 1,024 sequences at random positions in ten epochs. *start* is the first work of a
resumed run: create the order and get the batch at one position; each start uses another position and a new process. The
manifest is opened from this machine's disk and from a local S3 server (`job/demo/server.py`).
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
from job.data.order import SequenceOrder
from job.demo.server import S3Server

REPOSITORY = Path(__file__).parent.parent
CONTEXT_LENGTH, BATCH, EPOCHS = 512, 1024, 10
TOKEN_BYTES = 4


def order_of(sequences: int, shards: int, buffer_bytes: int, node_groups: int) -> SequenceOrder:
    """Return an order over `sequences` sequences in `shards` shards of about equal size."""
    tokens = np.full(shards, CONTEXT_LENGTH * (sequences // shards), np.int64)
    tokens[: sequences % shards] += CONTEXT_LENGTH
    tokens += 1  # The first token of a shard is not a target.
    return SequenceOrder(tokens, TOKEN_BYTES * tokens, CONTEXT_LENGTH, 2333, buffer_bytes, node_groups)  # type: ignore[arg-type]


def time_order(sequences: int, shards: int, buffer_bytes: int, node_groups: int, seed: int, batches: int) -> None:
    """Print the measurements of the order as JSON.

    They are the seconds of a start, the microseconds per sequence of each batch after it, and the bytes by which the
    peak memory of this process grew.
    """
    generator = np.random.default_rng(seed)
    cursors = [int(cursor) for cursor in generator.integers(0, EPOCHS * sequences - BATCH, batches)]
    order_of(BATCH, 2, 10**6, 1).sequence_ids(0, BATCH)  # Initialize numpy, so that the measurements exclude that.
    before, began = peak_bytes(), time.perf_counter()
    order = order_of(sequences, shards, buffer_bytes, node_groups)
    order.sequence_ids(cursors[0], BATCH)
    start_seconds = time.perf_counter() - began
    epoch = cursors[0] // order.sequences_per_epoch * order.sequences_per_epoch
    microseconds = []
    for cursor in cursors:
        position = epoch + min(cursor % order.sequences_per_epoch, order.sequences_per_epoch - BATCH)
        began = time.perf_counter()
        order.sequence_ids(position, BATCH)
        microseconds.append((time.perf_counter() - began) / BATCH * 1e6)
    print(json.dumps({"start": start_seconds, "microseconds": microseconds, "growth_bytes": peak_bytes() - before}))


def time_manifest(url: str) -> None:
    """Print as JSON the seconds to open the manifest at `url`, its number of shards, and the growth of peak memory."""
    storage.exists(storage.join(url, MANIFEST_NAME))  # Connect first: a run has a connection long before this.
    before, began = peak_bytes(), time.perf_counter()
    manifest = load_manifest(url)
    seconds = time.perf_counter() - began
    shards = len(manifest.train) + len(manifest.validation)
    print(json.dumps({"seconds": seconds, "shards": shards, "growth_bytes": peak_bytes() - before}))


def manifest_of(shards: int) -> Manifest:
    """Return a manifest of `shards` shards, a tenth of them for validation."""

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
    """Run a case in a new process and return the measurements it prints."""
    command = [sys.executable, "-m", "benchmarks.data_scale", "--case", *map(str, case)]
    run = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float | list[float]] = json.loads(run.stdout)
    return result


def order_rows(sequences: int, shards: int, batches: int, times: int) -> list[str]:
    """Measure the order in each case and return the rows of its table."""
    # This buffer holds every shard. A hundredth of the data is a 200th of it, since it has room for twice the data.
    whole = 2 * TOKEN_BYTES * sequences * CONTEXT_LENGTH
    cases = [(1, shards // 100, whole), (1, shards, whole), (1, shards, whole // 200), (16, shards, whole // 200)]
    rows = []
    for node_groups, count, buffer_bytes in cases:
        runs = [in_new_process("order", sequences, count, buffer_bytes, node_groups, i, batches) for i in range(times)]
        microseconds = [value for run in runs for value in run["microseconds"]]  # type: ignore[union-attr]
        starts, growth = ([float(run[name]) for run in runs] for name in ("start", "growth_bytes"))  # type: ignore[arg-type]
        buffers = "one" if buffer_bytes == whole else "100"
        rows.append(
            f"| {count:,} | {buffers} | {node_groups} | {statistics.median(starts):.3f} | {max(starts):.3f} "
            f"| {statistics.median(microseconds):.2f} | {max(microseconds):.2f} | {max(growth) / 1e6:.1f} |"
        )
    return rows


def manifest_rows(shards: int, times: int) -> list[str]:
    """Measure opening the manifest from disk and from S3 and return the rows of its table."""
    content = manifest_bytes(manifest_of(shards))
    rows = []
    with S3Server() as server, tempfile.TemporaryDirectory() as folder:
        server.take_over_environment()
        for store, url in (("disk", folder), ("S3", f"{server.create_bucket('data-scale')}/shards")):
            storage.write_bytes(storage.join(url, MANIFEST_NAME), content)
            runs = [in_new_process("manifest", url) for _ in range(times)]
            assert all(run["shards"] == shards for run in runs)
            seconds, growth = ([float(run[name]) for run in runs] for name in ("seconds", "growth_bytes"))  # type: ignore[arg-type]
            rows.append(
                f"| {store} | {len(content) / 1e6:.1f} | {statistics.median(seconds):.3f} | {max(seconds):.3f} "
                f"| {max(growth) / 1e6:.0f} |"
            )
    return rows


def main(command_line: Sequence[str] | None = None) -> None:
    """Run all measurements and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sequences", type=lambda number: int(float(number)), default=10**9, help="sequences in the data set"
    )
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--batches", type=int, default=200, help="batches to get in each process")
    parser.add_argument("--times", type=int, default=5, help="processes for each case")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(command_line)
    match arguments.case:
        case ["order", *numbers]:
            time_order(*map(int, numbers))
            return
        case ["manifest", url]:
            time_manifest(url)
            return
    order_table = order_rows(arguments.sequences, arguments.shards, arguments.batches, arguments.times)
    manifest_table = manifest_rows(arguments.shards, arguments.times)
    print(
        f"{cpu_name()}, {os.cpu_count()} cores, numpy {np.__version__}, {datetime.date.today()}; "
        f"{arguments.sequences:,} sequences of {CONTEXT_LENGTH} tokens, batches of {BATCH:,}\n"
    )
    print("| shards | buffers | node groups | start, s | maximum | µs per sequence | maximum | memory, MB |")
    print("|---|---|---|---|---|---|---|---|", *order_table, sep="\n")
    print(f"\n| manifest of {arguments.shards:,} shards on | MB | seconds to open | maximum | memory, MB |")
    print("|---|---|---|---|---|", *manifest_table, sep="\n")


if __name__ == "__main__":
    main()
