"""docs/curves.md in both languages: the tables are those of the kept runs, and the kept runs those of the presets."""

import math
import re
from pathlib import Path

import pytest
from small_run import REPOSITORY, prepare_sample_at

from benchmarks import reference_curves
from job import config as settings
from job import storage
from job.runs.metrics_file import MetricsFile, metrics_url

PAGES = ("docs/curves.md", "docs/curves.zh.md")


def rows_of(text: str) -> list[str]:
    """Return the rows of all tables whose first cell is a number or a preset, without cells that have only words."""
    lines = re.findall(r"^\| (?:\d+|demo|laptop|wiki-\w+) \|.*\|$", text, flags=re.M)
    return [re.sub(r"\| [^|\d]*[^|\d\s][^|]*\|$", "|", line) for line in lines]


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_the_page_are_those_of_the_program(page: str) -> None:
    rows = [*reference_curves.preset_rows()]
    for name in reference_curves.RUNS:
        rows += reference_curves.run_rows(name)
    rows += reference_curves.published_rows()
    assert rows_of((REPOSITORY / page).read_text(encoding="utf-8")) == rows


@pytest.mark.parametrize("name", reference_curves.RUNS)
def test_kept_run_began_at_a_uniform_guess_and_ended_as_planned(name: str) -> None:
    kept = reference_curves.load(name)
    config = settings.load(str(REPOSITORY / "configs" / f"{name}.yaml"))
    first, last = kept["rows"][0], kept["rows"][-1]
    assert kept["vocab_size"] == config.tokenizer.vocab_size
    assert abs(first["train/loss"] - math.log(kept["vocab_size"])) < 0.1
    assert last["train/loss"] < kept["unigram_nats"] < first["train/loss"]
    assert {row["step"] % config.evaluate.every for row in kept["rows"][:-1] if "validation/loss" in row} == {0}
    assert last["step"] % config.train.log_every == 0 or "validation/loss" in last


@pytest.mark.parametrize("page", PAGES)
def test_uniform_guesses_on_the_page_are_logarithms(page: str) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    for entries in (151_646, 16_384, 4_096, 2_048):
        assert f"{entries:,}" in text
        assert f"{math.log(entries):.2f}" in text


def test_a_kept_run_has_the_rows_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare_sample_at(str(tmp_path / "shards"), tmp_path / "tokenizer")
    log = MetricsFile()
    for step, loss in ((1, 5.9), (10, 5.5)):
        log.add(step, {"train/loss": loss, "train/epoch": step / 10, "speed/mfu": 0.1})
    log.add(10, {"validation/loss": 5.6, "validation/bits_per_byte": 3.5})
    storage.write_bytes(metrics_url(str(tmp_path / "run")), log.content())
    monkeypatch.setattr(reference_curves, "KEPT", tmp_path)
    monkeypatch.setattr(reference_curves, "RUNS", {"demo": "a run"})
    monkeypatch.setattr(reference_curves, "_PRESETS", {"demo": 400})
    reference_curves.main(["--keep", "demo", str(tmp_path / "run"), data.shards, "--pictures", str(tmp_path)])
    kept = reference_curves.load("demo")
    assert [row["train/loss"] for row in kept["rows"]] == [5.9, 5.5]
    assert list(reference_curves.run_rows("demo")) == [
        "| 1 | 0.10 | 5.90 | | | | |",
        "| 10 | 1.00 | 5.50 | 5.60 | 3.500 | | |",
    ]
    assert 4 < kept["unigram_nats"] < math.log(400)
    assert (tmp_path / "curves-demo.png").read_bytes().startswith(b"\x89PNG")


def test_entropy_of_equal_and_of_certain_tokens() -> None:
    assert reference_curves.entropy([5, 5, 0, 5, 5]) == pytest.approx(math.log(4))
    assert reference_curves.entropy([0, 7]) == 0
