"""Tests of `benchmarks.checkpoint`: its arithmetic is right and it prints its table."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

from benchmarks import checkpoint

pytestmark = pytest.mark.benchmarks


def test_memory_of_saving_is_counted_in_copies_of_the_state() -> None:
    saved: dict[str, Sequence[float]] = {
        "parameters": [10**8],
        "peak_bytes": [4.8e9],
        "pause": [0.2, 0.9, 0.3],
        "upload": [10.0, 12.0, 11.0],
        "step": [1.0, 2.0, 3.0],
        "step during upload": [4.0, 3.0],
    }
    not_saved = {"peak_bytes": [3.6e9]}
    restarted = {
        "peak_bytes": [4e9],
        "model built": [3.0],
        "downloaded": [20.0],
        "loaded": [2.0],
        "first step": [0.5],
    }
    cells = checkpoint.rows({"saved": saved, "not saved": not_saved, "restarted": restarted})
    assert cells["pause of training (median, maximum)"] == "0.30 s, 0.90 s"
    assert cells["upload in the background"] == "11.0 s, 109 MB/s"
    assert cells["step during an upload ÷ step without"] == "1.75 (2.00 s without)"
    assert cells["additional memory when saving"] == "1.20 GB, 1.00 copies"
    assert cells["restart to the end of the first step"].startswith("25.5 s: ")


def test_benchmark_prints_its_table() -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--saves", "1", "--strategies", "ddp"]
    command += ["--vocab-size", "400", "--hidden-size", "64"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert finished.returncode == 0, finished.stderr
    rows = [line.strip("|").split("|") for line in finished.stdout.splitlines() if line.startswith("| ")]
    cells = {name.strip(): value.strip() for name, value in rows}
    stages = cells["restart to the end of the first step"]
    assert all(stage in stages for stage in ("model built", "downloaded", "loaded", "first step"))
