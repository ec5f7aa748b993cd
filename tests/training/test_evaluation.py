"""Tests of the validation loss: each target counts once, and every way to compute it gives the same number."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worker import CONTEXT_LENGTH
from exact_evaluation import exact, new_model, validation_shards
from small_run import STEPS, DataSet, FinishedRun, run
from torch.nn import functional as F
from transformers import AutoTokenizer, Qwen2ForCausalLM

from job.data.split import is_validation
from job.demo.walk import SAMPLE
from job.report import Report
from job.runs.evaluation_result import Evaluation
from job.runs.metrics_file import read_metrics
from job.training import validation

SeenIn = Callable[[int, str], dict[str, Any]]


def validation_texts(data: DataSet) -> list[str]:
    records = [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    rule = data.recipe.seed, data.recipe.validation_fraction
    return [record["text"] for record in records if is_validation(record["id"], record["text"], *rule)]


@torch.no_grad()
def plain_nats(model: Qwen2ForCausalLM, shards: list[torch.Tensor]) -> float:
    """Return the loss in nats, summed over all sequences of the shards, computed with full logits."""
    nats = 0.0
    for tokens in shards:
        for first in range(0, len(tokens) - 1, CONTEXT_LENGTH):
            sequence = tokens[first : first + CONTEXT_LENGTH + 1]
            logits = model(input_ids=sequence[None, :-1]).logits[0]
            nats += F.cross_entropy(logits, sequence[1:], reduction="sum").item()
    return nats


def test_validation_loss_equals_that_of_full_logits(data_set: DataSet, tmp_path: Path) -> None:
    nats = plain_nats(new_model(data_set).double(), validation_shards(data_set, tmp_path))
    for batch_size in (1, 7, 500):
        assert exact(data_set, batch_size, tmp_path).nats == pytest.approx(nats, rel=1e-9)


def test_every_token_but_a_shards_first_is_counted_once(data_set: DataSet, tmp_path: Path) -> None:
    found, shards = exact(data_set, 7, tmp_path), data_set.manifest.validation
    assert len(shards) > 1
    assert found.targets == sum(shard.tokens for shard in shards) - len(shards)
    assert found.nats_per_token == found.nats / found.targets


def test_bytes_and_characters_are_those_of_predicted_text(data_set: DataSet, tmp_path: Path) -> None:
    found, text = exact(data_set, 7, tmp_path), "".join(validation_texts(data_set))
    firsts = [int(tokens[0]) for tokens in validation_shards(data_set, tmp_path)]
    # A byte-level vocabulary spells each byte as one character. An incomplete character at the end of a token is
    # decoded as one character.
    spelled = AutoTokenizer.from_pretrained(data_set.tokenizer.folder).convert_ids_to_tokens(firsts)
    assert found.utf8_bytes == len(text.encode()) - len("".join(spelled))
    assert found.characters == len(text) - sum(len(data_set.tokenizer.decode([first])) for first in firsts)
    assert found.bits_per_byte == pytest.approx(found.nats / math.log(2) / found.utf8_bytes)
    assert found.bits_per_character == pytest.approx(found.nats / math.log(2) / found.characters)


def test_evaluation_of_no_text_is_zero() -> None:
    assert Evaluation(0.0, 0, 0, 0).as_dict() == dict.fromkeys(Evaluation(1.0, 1, 1, 1).as_dict(), 0.0)


@pytest.mark.parametrize(("source", "processes"), [("", 2), ("final", 1)], ids=str)
def test_evaluate_agrees_with_the_run_for_all_it_left(finished_run: FinishedRun, source: str, processes: int) -> None:
    words = ["--train.processes", str(processes), "--evaluate.batch_size", "5"]
    words += ["--evaluate.model", f"{finished_run.output}/{source}"] if source else []
    code, out, err = run("evaluate", finished_run.settings, *words)
    assert (code, err) == (0, ""), out + err
    assert re.search(rf"^evaluating {finished_run.output}\S* on [\d,]+ validation tokens$", out, re.M), out
    printed = dict(re.findall(r"│ ([\w -]+?) +│ +([\d.,]+) │", out))
    (row,) = [row for row in read_metrics(finished_run.output) if row["step"] == STEPS]
    for name, key in (
        ("nats per token", "validation/loss"),
        ("bits per byte", "validation/bits_per_byte"),
        ("bits per character", "validation/bits_per_character"),
    ):
        assert float(printed[name]) == pytest.approx(row[key], rel=1e-6), name


def test_progress_in_a_log_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    show = validation.Progress(Report())
    for done in range(4):
        show(done, 4)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(validation, "PROGRESS_SECONDS", 0)
    show(3, 4)
    assert capsys.readouterr().out == "evaluated 75% of the validation text\n"
