"""Tests of `benchmarks.prepare` and `benchmarks.identify`: the text has the requested size, and both print tables."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.prepare import SAMPLE, Peaks, new_articles, write_corpus
from job.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.benchmarks

REPOSITORY = Path(__file__).parents[2]
TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def test_corpus_has_the_requested_bytes_in_numbered_records(tmp_path: Path) -> None:
    written = write_corpus(tmp_path / "corpus.jsonl", SAMPLE, 300_000)
    records = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum(len(record["text"].encode()) for record in records) == written
    assert 300_000 <= written < 310_000
    assert [record["id"] for record in records] == [str(number + 1) for number in range(len(records))]


def test_articles_are_new_with_the_characters_of_the_corpus() -> None:
    articles = new_articles(TEXTS, seed=1)
    made = [next(articles) for _ in range(200)]
    assert len(set(made)) == 200 and not set(made) & set(TEXTS)
    ours, theirs = Counter("".join(made)), Counter("".join(TEXTS))
    assert set(ours) <= set(theirs)
    for character, count in theirs.most_common(20):
        assert 0.7 < ours[character] / ours.total() / (count / theirs.total()) < 1.4
    again = new_articles(TEXTS, seed=1)
    assert [next(again) for _ in range(200)] == made


def test_memory_of_an_ended_child_process_is_counted() -> None:
    peaks = Peaks()
    fill = "import sys; held = b'x' * 2**26; print(len(held), flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", fill], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        peaks.look()
        process.stdin.close()
    here, *others = peaks.stop()
    assert here > 0
    assert max(others) > 2**26


@pytest.mark.parametrize("only", [["compare", "scale"], ["memory"]])
def test_benchmark_prints_its_tables(only: list[str], tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 1000, tmp_path / "tokenizer")
    command = [sys.executable, "-m", "benchmarks.prepare", "--tokenizer", str(tmp_path / "tokenizer"), "--times", "1"]
    command += ["--megabytes", "0.3", "--processes", "1", "2", "--sizes", "0.0003", "--only", *only]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr
    tables = run.stdout.split("medians of 1")[1]
    rows = [[float(cell.replace(",", "")) for cell in line.strip("|").split("|")] for line in tables.splitlines()
            if line.startswith("| ") and line[2].isdigit()]  # fmt: skip
    if only == ["memory"]:
        assert [row[:2] for row in rows] == [[0.0003, 1], [0.0003, 2]]
        assert all(summed >= largest > 30 for _, _, summed, largest, _ in rows)
    else:
        (one, two), (single, double) = rows[:2], rows[2:]
        for row in (one, two):
            assert abs(row[5] - row[4] / row[1]) < 0.2 + 0.02 * row[5]
            assert row[2] < row[1]  # Reading the JSON file takes time, so the rate with it is lower.
        assert (single[0], single[2], double[0]) == (1, 1, 2)
        assert abs(double[2] - double[1] / single[1]) < 0.1


def test_identifying_a_corpus_is_measured_against_reading_it() -> None:
    command = [sys.executable, "-m", "benchmarks.identify", "--gigabytes", "0.02", "--latency", "0.01"]
    table = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("| ")][1:]
    assert [row[1] for row in rows] == ["4.2", "4.2"], "64 blocks of 64 KiB"
    assert all(float(cell) > 0 for row in rows for cell in row[2:4])
