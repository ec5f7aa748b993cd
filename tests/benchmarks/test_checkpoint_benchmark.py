"""The measurement of checkpoints: its sums are right, and it comes to its table."""

import subprocess
import sys
from collections.abc import Sequence

import pytest

from benchmarks import checkpoint

pytestmark = pytest.mark.benchmarks


def test_what_saving_takes_is_counted_in_copies_of_the_state() -> None:
    saved: dict[str, Sequence[float]] = {
        "parameters": [10**8],
        "peak_bytes": [4.8e9],
        "still": [0.2, 0.9, 0.3],
        "upload": [10.0, 12.0, 11.0],
        "alone": [1.0, 2.0, 3.0],
        "beside": [4.0, 3.0],
    }
    plain = {"peak_bytes": [3.6e9]}
    again = {"peak_bytes": [4e9], "built": [3.0], "brought": [20.0], "taken in": [2.0], "stepped": [0.5]}
    cells = checkpoint.rows({"saved": saved, "not saved": plain, "restarted": again})
    assert cells["training stands still (median, most)"] == "0.30 s, 0.90 s"
    assert cells["the upload beside it"] == "11.0 s, 109 MB/s"
    assert cells["a step beside the upload ÷ one alone"] == "1.75 (2.00 s alone)"
    assert cells["more of it, saving"] == "1.20 GB: 1.00 copies"
    assert cells["restart to the end of the first step"].startswith("25.5 s: ")


def test_it_comes_to_its_table() -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--saves", "1", "--strategies", "ddp"]
    command += ["--vocab-size", "400", "--hidden-size", "64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = {name.strip(): value.strip() for name, value in rows}
    stages = cells["restart to the end of the first step"]
    assert all(stage in stages for stage in ("built", "brought", "taken in", "stepped"))
