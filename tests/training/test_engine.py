"""The engine: one mathematics, however the work is spread over processes, strategies and micro-batches."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worker import (
    ADAMW,
    GRADIENT_CLIPPING,
    LAST_STEP,
    QUICK_WORLDS,
    RESUMES_FROM,
    SAVED_STEP,
    SPEC,
    WORLDS,
    global_batch,
    learning_rate_of,
    new_model,
)
from exact_evaluation import exact
from small_run import DataSet, tensor_files
from torch import Tensor, nn
from torch.nn import functional as F

from job.runs.checkpoint import CheckpointFiles, download_checkpoint, open_checkpoint

SeenIn = Callable[[int, str], dict[str, Any]]

pytestmark = pytest.mark.timeout(900)  # one test may launch all worlds
in_each_world = pytest.mark.parametrize(
    ("processes", "strategy"),
    [pytest.param(*world, marks=() if world in QUICK_WORLDS else pytest.mark.recovery) for world in WORLDS],
)


@cache
def plain_training(steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and weights of plain PyTorch on the whole global batch at once."""
    model = new_model()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
        betas=(ADAMW.beta1, ADAMW.beta2),
        eps=ADAMW.epsilon,
        weight_decay=ADAMW.weight_decay,
    )
    losses, norms = [], []
    for step in range(steps):
        input_ids, labels = global_batch(step)
        loss = F.cross_entropy(model(input_ids=input_ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIPPING)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(step)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


@in_each_world
@pytest.mark.parametrize("case", ["fp32", "fp32, 4 accumulated", "fp32, compiled, 4 accumulated"])
def test_losses_and_gradient_norms_are_those_of_plain_pytorch_on_the_whole_batch(
    seen_in: SeenIn, processes: int, strategy: str, case: str
) -> None:
    losses, norms, _ = plain_training(LAST_STEP)
    seen = seen_in(processes, strategy)[case]
    assert seen["losses"] == pytest.approx(losses, rel=1e-5)
    assert seen["norms"] == pytest.approx(norms, rel=1e-4)
    assert min(norms) < GRADIENT_CLIPPING < max(norms)


@in_each_world
def test_weights_are_those_of_plain_pytorch(seen_in: SeenIn, processes: int, strategy: str, tmp_path: Path) -> None:
    *_, weights = plain_training(LAST_STEP)
    download_checkpoint(open_checkpoint(seen_in(processes, strategy)["fp32"]["checkpoint"]), tmp_path)
    saved = CheckpointFiles(tmp_path)
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name]["param"], weight, rtol=1e-4, atol=1e-5, msg=name)


@in_each_world
@pytest.mark.parametrize("case", ["bf16", "bf16, 4 accumulated"])
def test_bf16_stays_near_fp32(seen_in: SeenIn, processes: int, strategy: str, case: str) -> None:
    losses, norms, _ = plain_training(LAST_STEP)
    seen = seen_in(processes, strategy)[case]
    assert seen["losses"] == pytest.approx(losses, rel=1e-3)
    assert seen["norms"] == pytest.approx(norms, rel=1e-2)
    assert seen["losses"] != pytest.approx(losses, rel=1e-7), "this is fp32"


@in_each_world
def test_documents_are_kept_apart_without_a_mask_as_with_one(seen_in: SeenIn, processes: int, strategy: str) -> None:
    seen = seen_in(processes, strategy)
    mask, no_mask = seen["documents apart by a mask"], seen["documents apart without a mask"]
    assert (mask["kernels"], no_mask["kernels"]) == (0, SAVED_STEP * 2 * SPEC.num_hidden_layers)  # there and back
    assert no_mask["losses"] == pytest.approx(mask["losses"], rel=1e-3)
    assert no_mask["norms"] == pytest.approx(mask["norms"], rel=1e-2)


@in_each_world
@pytest.mark.parametrize("case", ["fp32", "bf16"])
def test_a_snapshot_is_the_full_state_each_time_it_is_filled(
    seen_in: SeenIn, processes: int, strategy: str, case: str
) -> None:
    assert seen_in(processes, strategy)[case]["snapshot"]


@in_each_world
def test_another_world_or_strategy_than_the_one_asked_for_is_refused(
    seen_in: SeenIn, processes: int, strategy: str
) -> None:
    another_world, by_variable = seen_in(processes, strategy)["refusals"]
    assert another_world.startswith(f"{processes + 1} processes were asked for")
    if strategy == "zero2":
        assert by_variable.startswith("strategy zero2 was asked for")
    else:
        assert by_variable.startswith("gradient_accumulation_steps ")
        assert by_variable.endswith(" was asked for, but accelerate set up 7")


# ---- Checkpoints: each fits every world ----


@in_each_world
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_goes_on_to_the_bit_in_the_same_world(
    seen_in: SeenIn, processes: int, strategy: str, precision: str
) -> None:
    seen = seen_in(processes, strategy)
    straight, resumed = seen[precision], seen[f"{precision} resumed"]
    assert resumed["losses"] == straight["losses"][SAVED_STEP:]
    assert resumed["norms"] == straight["norms"][SAVED_STEP:]
    files = tensor_files(resumed["checkpoint"])
    assert files.keys() == {"model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"}
    assert files == tensor_files(straight["checkpoint"])


@pytest.mark.parametrize(
    ("world", "source"),
    [
        pytest.param(world, source, marks=() if world in QUICK_WORLDS else pytest.mark.recovery)
        for world in WORLDS
        for source in RESUMES_FROM[world]
    ],
)
def test_an_engine_goes_on_with_the_same_losses_in_another_world(
    seen_in: SeenIn, world: tuple[int, str], source: tuple[int, str]
) -> None:
    straight = seen_in(*source)["fp32"]
    resumed = seen_in(*world)[f"fp32 resumed from {source[0]} x {source[1]}"]
    assert resumed["losses"] == pytest.approx(straight["losses"][SAVED_STEP:], rel=1e-5)
    assert resumed["norms"] == pytest.approx(straight["norms"][SAVED_STEP:], rel=1e-4)


# ---- Validation ----


def test_one_process_and_two_find_the_same_validation_loss(seen_in: SeenIn, data_set: DataSet, tmp_path: Path) -> None:
    alone, together = seen_in(1, "ddp")["held out"], seen_in(2, "zero2")["held out"]
    assert alone == together
    expected = exact(data_set, 7, tmp_path)
    assert alone["nats"] == pytest.approx(expected.nats, rel=1e-6)
    counts = ("targets", "utf8_bytes", "characters")
    assert [alone[name] for name in counts] == [getattr(expected, name) for name in counts]
