"""Tests of `benchmarks.verify`: its shards match their descriptions and it prints its table."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import verify

pytestmark = pytest.mark.benchmarks


def test_shards_match_their_sha256(tmp_path: Path) -> None:
    shards = verify.write_shards(tmp_path, 3, 20_000_000)
    contents = [(tmp_path / shard.name).read_bytes() for shard in shards]
    assert [len(content) for content in contents] == [20_000_000] * 3
    assert [hashlib.sha256(content).hexdigest() for content in contents] == [shard.sha256 for shard in shards]
    assert len(set(contents)) == 3


def test_verify_benchmark_prints_its_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.verify", "--gigabytes", "0.01", "--shards", "4", "--folder", tmp_path]
    printed = subprocess.run([*command, "--cached-shards", "100"], check=True, capture_output=True, text=True).stdout
    assert "4 shards, 0.01 GB, measured; one thread hashes " in printed
    rows = [line for line in printed.splitlines() if line.startswith(("| from", "| the same", "| by the notes"))]
    assert len(rows) == 4
    assert "Room for a shard in a full cache of 100: " in printed
    assert not list(tmp_path.iterdir())
