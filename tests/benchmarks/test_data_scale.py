"""Tests of `benchmarks.data_scale`: it builds the requested data and prints its tables."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data_scale import CONTEXT_LENGTH, manifest_of, order_of

pytestmark = pytest.mark.benchmarks

REPOSITORY = Path(__file__).parents[2]


def test_order_has_the_requested_sequences() -> None:
    order = order_of(1_000_003, 1000, 10**6, 4)
    assert order.sequences_per_epoch == 1_000_003
    assert len(order.tokens) == 1000
    assert order.sequence_counts.max() - order.sequence_counts.min() == 1
    assert (order.tokens % CONTEXT_LENGTH == 1).all()


def test_manifest_has_the_requested_shards() -> None:
    manifest = manifest_of(50)
    assert (len(manifest.train), len(manifest.validation)) == (45, 5)
    assert len({shard.name for shard in manifest.train + manifest.validation}) == 50


def test_benchmark_prints_its_tables() -> None:
    command = [sys.executable, "-m", "benchmarks.data_scale"]
    command += ["--sequences", "2e5", "--shards", "300", "--batches", "5", "--times", "2"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    assert "200,000 sequences of 512 tokens" in run.stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in run.stdout.splitlines() if "|" in line]
    order = [row for row in rows if row[0] in ("3", "300")]
    assert [row[:3] for row in order] == [
        ["3", "one", "1"],
        ["300", "one", "1"],
        ["300", "100", "1"],
        ["300", "100", "16"],
    ]
    for row in order:
        start, slowest_start, microseconds, most_microseconds, memory = map(float, row[3:])
        assert 0 <= start <= slowest_start and 0 < microseconds <= most_microseconds and memory >= 0
    opened = {row[0]: list(map(float, row[1:])) for row in rows if row[0] in ("disk", "S3")}
    assert len(opened) == 2
    assert all(0 <= median <= most for _, median, most, _ in opened.values())
