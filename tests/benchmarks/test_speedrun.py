"""Tests of `benchmarks.speedrun`: its rows are measured, and its search and its bars are right."""

import json
from pathlib import Path

import pytest

from benchmarks import speedrun
from benchmarks.speedrun import Row
from benchmarks.speedrun_runs import CPU, CUDA, NEW, Trained, next_length, rate_at_width, tutorial_recipe

pytestmark = pytest.mark.benchmarks


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measurements of row 4 at tiny sizes."""
    folder = tmp_path_factory.mktemp("speedrun")
    words = ["--tiny", "--only", "4", "--precision", "fp32"]
    speedrun.main([*words, "--json", str(folder / "all.json"), "--plot", str(folder / "all.png")])
    return json.loads((folder / "all.json").read_text()) | {"plot": (folder / "all.png").read_bytes()}


def test_opponents_and_recipe_are_measured_on_the_same_text(measured):
    by_recipe = {}
    for run in measured["runs"]:
        by_recipe.setdefault(run["recipe"].split()[0], []).append(run)
    assert by_recipe.keys() == {"AdamW", "new", "tutorial"}
    for run in measured["runs"]:
        assert 2 < run["bits_per_byte"] < 10
        assert run["seconds"] > 0
        assert run["other_seconds"] > 0, "start-up and evaluation are not in the time of the steps"
        assert run["flops"] > 0
    (tutorial,) = by_recipe["tutorial"]
    assert tutorial["tokens"] == 512
    # The same recipe in this program reaches about the same quality on the same held-out text.
    same = next(run for run in by_recipe["AdamW"] if run["vocab_size"] == tutorial["vocab_size"])
    assert tutorial["bits_per_byte"] == pytest.approx(same["bits_per_byte"], rel=0.1)
    assert measured["plot"].startswith(b"\x89PNG")


BPB = {
    "new": 2.7,
    "without Muon": 3.0,
    "without zero projections": 2.75,
    "cosine": 2.72,
    "tutorial's vocabulary": 2.9,
}


class PaperLab:
    """A laboratory whose runs take no time: each seed adds 0.01 BPB, each rate of the opponent has its own BPB."""

    size = CPU

    def __init__(self):
        self.runs = []

    def own_tokenizer(self, entries):
        return Path(f"own-{entries}")

    def tutorial_tokenizer(self):
        return Path("qwen2-151646")

    def train_tokens(self, tokenizer):
        return 300_000 if tokenizer.name.startswith("own") else 200_000

    def train(self, recipe, tokenizer, tokens, seed=0):
        entries = int(tokenizer.name.split("-")[1])
        rate = recipe.train.get("learning_rate")
        bpb = BPB.get(recipe.name) or {"0.00133": 3.1, "0.00267": 3.0, "0.00533": 3.2}[f"{float(rate):.3g}"]
        run = Trained(recipe.name, entries, seed, tokens, CPU.flops(entries, tokens), bpb + 0.01 * seed, 1, 1, 1, 1)
        self.runs.append(run)
        return run


def test_opponent_has_the_best_of_its_rates_and_all_seeds():
    (row,) = speedrun.same_vocabulary(PaperLab(), seeds=3)
    assert row.opponent.startswith("AdamW 2.7e-03, 2,048 entries, 250,000 tokens")
    assert (row.theirs_value, row.our_value) == (pytest.approx(3.01), pytest.approx(2.71))
    assert row.is_met


def test_rows_with_own_vocabulary_have_the_flops_they_say():
    lab = PaperLab()
    (same_ratio,) = speedrun.preset_ratio(lab, seeds=1)
    assert f"{round(150_000 * 758.5 / 343.1):,}"[:3] in same_ratio.ours, "as many more tokens as in the presets"
    (half,) = speedrun.half_the_flops(lab, seeds=1)
    opponent, ours = (next(run for run in reversed(lab.runs) if run.recipe.startswith(who)) for who in ("AdamW", "new"))
    assert 0.49 < ours.flops / opponent.flops <= 0.5
    assert half.theirs_value == 3.0


def test_each_lever_is_left_out_alone():
    rows = list(speedrun.levers(PaperLab(), seeds=2))
    assert [row.name for row in rows] == [
        f"lever: {name}" for name in ("Muon", "zero projections", "linear decay", "vocabulary")
    ]
    assert [round(row.theirs_value - row.our_value, 2) for row in rows] == [0.3, 0.05, 0.02, 0.2]


@pytest.mark.parametrize(
    ("is_time", "theirs", "ours", "bar", "is_met"),
    [
        (False, 3.0, 2.7, -10.1, False),
        (False, 3.0, 2.7, -9.9, True),
        (True, 60.0, 10.0, 5.9, True),
        (True, 60.0, 10.0, 6.1, False),
    ],
)
def test_bars(is_time, theirs, ours, bar, is_met):
    row = Row("", "", "", theirs, ours, "", is_time, bar)
    assert row.is_met == is_met
    assert str(row).count("|") == 11


@pytest.mark.parametrize("needed", [1_100, 3_000, 9_000, 30_000])
def test_search_finds_the_shortest_length(needed):
    tried = {}
    while (length := next_length(tried, 8_000, 100)) is not None:
        assert length not in tried
        tried[length] = length >= needed
        assert len(tried) < 12
    shortest = min(length for length, reached in tried.items() if reached)
    assert needed <= shortest <= 1.15 * needed + 100


def test_opponents_rates_surround_the_scaled_one():
    assert rate_at_width(512) == 5e-4
    for size in (CPU, CUDA):
        scaled = rate_at_width(size.spec.hidden_size)
        assert len(size.adamw_rates) == 3
        assert min(size.adamw_rates) < scaled < max(size.adamw_rates)
        assert scaled in size.adamw_rates


def test_a_lever_changes_one_thing():
    changed = NEW.without("cosine", schedule="cosine")
    assert {key for key in NEW.train if NEW.train[key] != changed.train[key]} == {"schedule"}
    assert changed.init == NEW.init
    assert NEW.without("x", "default").train == NEW.train
    assert tutorial_recipe(2.5e-3).train["schedule"] == "cosine"
