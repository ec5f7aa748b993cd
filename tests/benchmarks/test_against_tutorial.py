"""Tests of `benchmarks.against_tutorial`: it measures both sides and judges each bar correctly."""

import itertools
import json
import re
import sys

import pytest

from benchmarks import against_tutorial
from benchmarks.against_tutorial import Row
from benchmarks.articles import MEAN_TOKENS, TOKENS_PER_CHARACTER, articles
from benchmarks.watched import run
from job.data.tokenizer import train_tokenizer
from job.demo.walk import SAMPLE

pytestmark = pytest.mark.benchmarks

TINY = "--repeats 1 --steps 2 --batch 2 --context-length 16 --hidden-size 32 --layers 1 --precision fp32 --strategy ddp"
TINY += " --train-bytes 100000 --prepare-bytes 50000 --evaluated-sequences 4"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """JSON rows of a run of some benchmarks at tiny sizes, by measure."""
    folder = tmp_path_factory.mktemp("against")
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    vocabulary = train_tokenizer(texts, 400, folder).folder
    words = [*TINY.split(), "--vocabulary", str(vocabulary), "--json", str(folder / "rows.json")]
    against_tutorial.main(["--only", "training", "evaluation", "kept", "help", *words])
    return {row["measure"]: row for row in json.loads((folder / "rows.json").read_text())["rows"]}


def test_both_sides_are_measured(whole_run):
    assert list(whole_run) == [
        *("training", "training, peak memory", "evaluation", "evaluation, peak memory"),
        *("corpus trained on", "`python -m job --help`"),
    ]
    for row in whole_run.values():
        assert row["ours"] > 0
        assert row["theirs"] is None or row["theirs"] > 0


def test_share_of_the_corpus_is_counted_for_both_sides(whole_run):
    row = whole_run["corpus trained on"]
    tokens, documents = (int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", row["note"]))
    # Ours: only the first token of each of the two shards is not a target. The tutorial's: the first token of each
    # sequence of 16 is not a target, and the last tokens of an article that do not fill a sequence are lost.
    assert row["ours"] == pytest.approx(100 * (1 - 2 / (tokens + documents)))
    assert 100 * 15 / 16 - 100 * 15 * documents / tokens < row["theirs"] < 100 * 15 / 16


@pytest.mark.parametrize(
    ("ours", "theirs", "settings", "is_met"),
    [
        (5, 4, {"bar": 1.25}, True),
        (5, 4, {"bar": 1.26}, False),
        (1, 3, {"bar": 0.35, "is_at_most": True}, True),
        (2, 3, {"bar": 0.35, "is_at_most": True}, False),
        (14, None, {"bar": 15, "is_at_most": True, "is_of_ours": True}, True),
        (16, None, {"bar": 15, "is_at_most": True, "is_of_ours": True}, False),
        (99, 50, {"bar": 99.9, "is_of_ours": True}, False),
    ],
)
def test_bar_is_met_or_missed(ours, theirs, settings, is_met):
    row = Row("something", ours, theirs, "s", **settings)
    assert row.is_met == is_met
    assert ("**no**" in str(row)) != is_met


def test_articles_have_wikipedias_lengths_and_are_reproducible():
    texts = list(articles(3_000_000))
    assert texts[:20] == list(itertools.islice(articles(3_000_000), 20))
    assert sum(len(text.encode()) for text in texts) == pytest.approx(3e6, rel=0.02)
    tokens = [TOKENS_PER_CHARACTER * len(text) for text in texts]
    assert sum(tokens) / len(tokens) == pytest.approx(MEAN_TOKENS, rel=0.1)
    share_in_full_sequences = sum(length // 512 * 512 for length in tokens) / sum(tokens)
    assert share_in_full_sequences == pytest.approx(230.4 / 400, abs=0.06)


def test_clauses_are_almost_never_repeated():
    """Tokenizers cache the words they have seen, so text that repeats itself would be faster than real text."""
    clauses = [clause for text in articles(200_000) for clause in re.split("[，。；、！？]", text) if len(clause) > 3]
    assert len(set(clauses)) > 0.8 * len(clauses)


def test_all_processes_of_a_command_are_measured(tmp_path):
    grandchild = "block = bytearray(150_000_000); print('made', flush=True); import time; time.sleep(0.3)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    finished = run(
        [sys.executable, "-c", child], tmp_path, {}, tmp_path / "log", {"made": lambda log, _: "made" in log}
    )
    assert finished.peak_bytes > 150_000_000
    assert 0 < finished.seen["made"] < finished.seconds - 0.2


def test_failed_or_partial_command_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError, match="exit 3"):
        run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, {}, tmp_path / "log")
    with pytest.raises(RuntimeError, match="never"):
        run([sys.executable, "-c", ""], tmp_path, {}, tmp_path / "log", {"never": lambda log, words: False})
