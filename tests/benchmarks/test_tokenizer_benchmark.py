"""Tests of `benchmarks.tokenizer`: its articles do not repeat, and it prints its tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tokenizer
from benchmarks.prepare import SAMPLE

pytestmark = pytest.mark.benchmarks


def test_written_corpus_has_the_size_and_never_repeats(tmp_path: Path) -> None:
    tokenizer.write_corpus(tmp_path / "corpus.jsonl", SAMPLE, 500_000)
    texts = [json.loads(line)["text"] for line in (tmp_path / "corpus.jsonl").read_text("utf-8").splitlines()]
    assert 500_000 <= sum(len(text.encode()) for text in texts) < 600_000
    assert len(set(texts)) == len(texts)


def test_tokenizer_benchmark_prints_both_tables() -> None:
    command = [sys.executable, "-m", "benchmarks.tokenizer", "--train", "1", "--read", "1", "2", "--vocab-size", "400"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith(("| 1 MiB", "| 2 MiB"))]
    assert [len(row) for row in rows] == [4, 4, 7]
    _, _, cpu_seconds, reading, training, per_byte, bytes_per_token = rows[2]
    assert float(cpu_seconds) > 0 and float(bytes_per_token) > 1
    assert float(training.split()[0]) > 0.01 < float(reading.split()[0])
    assert float(per_byte) == pytest.approx(float(training.split()[0]) * 1024, abs=10)
