"""Test that `job train` equals plain PyTorch, with the optimizer, schedule and clipping implemented here."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import ALONE, CONTEXT_LENGTH, MODEL, DataSet, checkpoint_urls, run, write_settings
from torch import Tensor
from torch.nn import functional as F

from job.data.loader import BatchLoader
from job.data.order import SequenceOrder
from job.model.language_model import build_model
from job.model.spec import ModelSpec
from job.runs.checkpoint import CheckpointFiles, download_checkpoint, open_checkpoint
from job.runs.metrics_file import read_metrics

STEPS, WARMUP_STEPS, BATCH = 5, 2, 8
PEAK, MINIMUM = 0.01, 0.002
BETA1, BETA2, EPSILON, DECAY, CLIPPING = 0.8, 0.9, 1e-6, 0.3, 0.9
SEED = 7
TRAIN = {
    "max_steps": STEPS,
    "warmup_steps": WARMUP_STEPS,
    "global_batch_size": BATCH,
    "micro_batch_size": 2,
    "learning_rate": PEAK,
    "min_learning_rate": MINIMUM,
    "beta1": BETA1,
    "beta2": BETA2,
    "epsilon": EPSILON,
    "weight_decay": DECAY,
    "gradient_clipping": CLIPPING,
    "seed": SEED,
}


def global_batches(data: DataSet, cache: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Generate the input ids and labels of each step, both `[BATCH, CONTEXT_LENGTH]`."""
    shards = data.manifest.train
    order = SequenceOrder(
        [one.tokens for one in shards], [one.size for one in shards], CONTEXT_LENGTH, 2333, buffer_bytes=2**30
    )
    with BatchLoader(
        data.shards,
        data.manifest,
        order,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        rank=0,
        world_size=1,
        start_position=0,
        end_position=BATCH * STEPS,
        cache_dir=cache,
        cache_bytes=2**30,
        prefetch_steps=1,
        workers=1,
    ) as loader:
        for batch in loader:
            yield batch.micro_batches[0]


def learning_rate(step: int) -> float:
    """Return the learning rate of a step, counted from 0: a linear warm-up, then half a cosine."""
    if step < WARMUP_STEPS:
        return PEAK * (step + 1) / (WARMUP_STEPS + 1)
    done = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return MINIMUM + (PEAK - MINIMUM) * (1 + math.cos(math.pi * done)) / 2


def plain_training(data: DataSet, cache: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train in plain PyTorch; return the metrics of each step and the weights after the last one."""
    model = build_model(ModelSpec(**MODEL), data.manifest.vocab_size, data.manifest.eod_id, CONTEXT_LENGTH, seed=SEED)
    weights = dict(model.named_parameters())
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    rows: list[dict[str, float]] = []
    for step, (input_ids, labels) in enumerate(global_batches(data, cache)):
        logits = model(input_ids=input_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients.values()))
        rate = learning_rate(step)
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] * min(1.0, CLIPPING / norm)
                first[name] = BETA1 * first[name] + (1 - BETA1) * gradient
                second[name] = BETA2 * second[name] + (1 - BETA2) * gradient**2
                mean = first[name] / (1 - BETA1 ** (step + 1))
                variance = second[name] / (1 - BETA2 ** (step + 1))
                weight.mul_(1 - rate * (DECAY if weight.ndim >= 2 else 0.0))
                weight.sub_(rate * mean / (variance.sqrt() + EPSILON))
        rows.append({"train/loss": loss.item(), "train/gradient_norm": norm, "train/learning_rate": rate})
    return rows, {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize(
    "spread",
    [
        pytest.param(ALONE, id="alone"),
        pytest.param({"processes": 2, "strategy": "zero2"}, id="zero2", marks=pytest.mark.recovery),
    ],
)
def test_five_steps_of_job_train_equal_plain_pytorch(
    data_set: DataSet, output: str, tmp_path: Path, spread: dict[str, Any]
) -> None:
    settings = write_settings(tmp_path, data_set, output, train=TRAIN | spread)
    code, out, err = run("train", settings)
    assert (code, err) == (0, ""), out + err
    rows, weights = plain_training(data_set, tmp_path / "plain")
    norms = [row["train/gradient_norm"] for row in rows]
    assert min(norms) < CLIPPING < max(norms), f"some gradients are clipped and some are not: {norms}"
    measured = [row for row in read_metrics(output) if "train/loss" in row]
    assert len(measured) == len(rows) == STEPS
    for found, expected in zip(measured, rows, strict=True):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    (tmp_path / "checkpoint").mkdir()
    download_checkpoint(open_checkpoint(checkpoint_urls(output)[-1]), tmp_path / "checkpoint")
    saved = CheckpointFiles(tmp_path / "checkpoint")
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name]["param"], weight, rtol=1e-3, atol=1e-5, msg=name)
