"""Tests of the engine: processes, strategies and micro-batches do not change the results of training."""

import math
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
    MUON,
    MUON_RATE,
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
from toy_entries import MOMENTUM_STATE, OPTIMIZER

from job.model.architecture import EMBEDDING
from job.model.optimizer_state import OPTIMIZER_STATES
from job.runs.checkpoint import CheckpointFiles, download_checkpoint, open_checkpoint

SeenIn = Callable[[int, str], dict[str, Any]]

pytestmark = pytest.mark.timeout(900)  # One test may launch all worlds.
in_each_world = pytest.mark.parametrize(
    ("processes", "strategy"),
    [pytest.param(*world, marks=() if world in QUICK_WORLDS else pytest.mark.recovery) for world in WORLDS],
)


@cache
def plain_training(steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train in plain PyTorch on whole global batches and return the losses, gradient norms and weights."""
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
def test_losses_and_norms_equal_plain_pytorch(seen_in: SeenIn, processes: int, strategy: str, case: str) -> None:
    losses, norms, _ = plain_training(LAST_STEP)
    seen = seen_in(processes, strategy)[case]
    assert seen["losses"] == pytest.approx(losses, rel=1e-5)
    assert seen["norms"] == pytest.approx(norms, rel=1e-4)
    assert min(norms) < GRADIENT_CLIPPING < max(norms)


@in_each_world
def test_weights_equal_plain_pytorch(seen_in: SeenIn, processes: int, strategy: str, tmp_path: Path) -> None:
    *_, weights = plain_training(LAST_STEP)
    download_checkpoint(open_checkpoint(seen_in(processes, strategy)["fp32"]["checkpoint"]), tmp_path)
    saved = CheckpointFiles(tmp_path)
    assert saved.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name]["param"], weight, rtol=1e-4, atol=1e-5, msg=name)


@in_each_world
def test_changed_micro_batch_equals_one_of_that_size(seen_in: SeenIn, processes: int, strategy: str) -> None:
    seen = seen_in(processes, strategy)
    for key in ("losses", "norms", "engines"):
        assert seen["fp32, changed to 4 accumulated"][key] == seen["fp32, 4 accumulated"][key], key


def test_zero2_sums_gradients_in_fp32(seen_in: SeenIn, tmp_path: Path) -> None:
    def first_gradient(steps: int, gradient_sum: str) -> Tensor:
        """Return the first moment after one step, which is the clipped gradient times a constant."""
        checkpoint = open_checkpoint(
            seen_in(2, "zero2")[f"first gradient, {steps} summed in {gradient_sum}"]["checkpoint"]
        )
        folder = tmp_path / f"{steps}-{gradient_sum}"
        folder.mkdir()
        download_checkpoint(checkpoint, folder)
        moments = [tensors["exp_avg"].flatten() for tensors in CheckpointFiles(folder).values()]
        return torch.cat(moments) / torch.cat(moments).norm()

    # The products of one large micro-batch are summed in fp32 too.
    whole = first_gradient(1, "fp32")
    error, narrow_error = (float((first_gradient(12, name) - whole).norm()) for name in ("fp32", "bf16"))
    assert error < 2**-8, "two roundings to bf16"
    assert narrow_error > 1.2 * error, "one more rounding for each micro-batch"


@in_each_world
@pytest.mark.parametrize("case", ["bf16", "bf16, 4 accumulated"])
def test_bf16_stays_near_fp32(seen_in: SeenIn, processes: int, strategy: str, case: str) -> None:
    losses, norms, _ = plain_training(LAST_STEP)
    seen = seen_in(processes, strategy)[case]
    assert seen["losses"] == pytest.approx(losses, rel=1e-3)
    assert seen["norms"] == pytest.approx(norms, rel=1e-2)
    assert seen["losses"] != pytest.approx(losses, rel=1e-7), "this is fp32"


@in_each_world
def test_packed_documents_give_the_losses_of_a_mask(seen_in: SeenIn, processes: int, strategy: str) -> None:
    seen = seen_in(processes, strategy)
    mask, no_mask = seen["documents apart by a mask"], seen["documents apart without a mask"]
    assert (mask["kernels"], no_mask["kernels"]) == (0, SAVED_STEP * 2 * SPEC.num_hidden_layers)  # forward and backward
    assert no_mask["losses"] == pytest.approx(mask["losses"], rel=1e-3)
    assert no_mask["norms"] == pytest.approx(mask["norms"], rel=1e-2)


@in_each_world
@pytest.mark.parametrize("case", ["fp32", "bf16"])
def test_snapshot_equals_the_full_state_each_time(seen_in: SeenIn, processes: int, strategy: str, case: str) -> None:
    assert seen_in(processes, strategy)[case]["snapshot"]


@in_each_world
def test_wrong_world_or_strategy_is_refused(seen_in: SeenIn, processes: int, strategy: str) -> None:
    another_world, by_variable = seen_in(processes, strategy)["refusals"]
    assert another_world.startswith(f"{processes + 1} processes were asked for")
    if strategy == "zero2":
        assert by_variable.startswith("strategy zero2 was asked for")
    else:
        assert by_variable.startswith("gradient_accumulation_steps ")
        assert by_variable.endswith(" was asked for, but accelerate set up 7")


# ---- Checkpoints: each loads in every world ----


@pytest.fixture
def toy_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process read the checkpoints of the toy optimizer."""
    monkeypatch.setitem(OPTIMIZER_STATES, OPTIMIZER, MOMENTUM_STATE)


@pytest.mark.usefixtures("toy_optimizer")
@in_each_world
@pytest.mark.parametrize(
    ("case", "state_files"),
    [
        ("fp32", {"exp_avg.safetensors", "exp_avg_sq.safetensors"}),
        ("bf16", {"exp_avg.safetensors", "exp_avg_sq.safetensors"}),
        ("momentum", {"momentum_buffer.safetensors"}),
        ("muon fp32", {"momentum_buffer.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"}),
        ("muon bf16", {"momentum_buffer.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"}),
    ],
)
def test_engine_resumes_bit_for_bit_in_the_same_world(
    seen_in: SeenIn, processes: int, strategy: str, case: str, state_files: set[str]
) -> None:
    seen = seen_in(processes, strategy)
    straight, resumed = seen[case], seen[f"{case} resumed"]
    assert resumed["losses"] == straight["losses"][SAVED_STEP:]
    assert resumed["norms"] == straight["norms"][SAVED_STEP:]
    files = tensor_files(resumed["checkpoint"])
    assert files.keys() == {"model.safetensors"} | state_files
    assert files == tensor_files(straight["checkpoint"])


@pytest.mark.parametrize("case", ["fp32", "momentum", "muon fp32"])
@pytest.mark.parametrize(
    ("world", "source"),
    [
        pytest.param(world, source, marks=() if world in QUICK_WORLDS else pytest.mark.recovery)
        for world in WORLDS
        for source in RESUMES_FROM[world]
    ],
)
def test_engine_resumes_with_equal_losses_in_another_world(
    seen_in: SeenIn, world: tuple[int, str], source: tuple[int, str], case: str
) -> None:
    straight = seen_in(*source)[case]
    resumed = seen_in(*world)[f"{case} resumed from {source[0]} x {source[1]}"]
    assert resumed["losses"] == pytest.approx(straight["losses"][SAVED_STEP:], rel=1e-5)
    assert resumed["norms"] == pytest.approx(straight["norms"][SAVED_STEP:], rel=1e-4)


# ---- An optimizer that the engine does not know ----


@cache
def plain_momentum(steps: int) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Train with a plain implementation of the toy optimizer; return losses, gradient norms and weights.

    It skips the second step, which is the bad one.
    """
    model = new_model()
    momenta = {name: torch.zeros_like(one) for name, one in model.named_parameters() if one.ndim >= 2}
    losses, norms = [], []
    for step in range(steps):
        input_ids, labels = global_batch(step)
        loss = F.cross_entropy(model(input_ids=input_ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIPPING)
        if step == 1:
            losses.append(0.0)
            norms.append(math.inf)
            continue
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                update = parameter.grad
                assert update is not None
                if name in momenta:
                    momenta[name] = update = ADAMW.beta1 * momenta[name] + update
                parameter.sub_(learning_rate_of(step) * update)
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.usefixtures("toy_optimizer")
@in_each_world
def test_any_optimizer_is_clipped_and_guarded(seen_in: SeenIn, processes: int, strategy: str, tmp_path: Path) -> None:
    losses, norms, weights = plain_momentum(LAST_STEP)
    seen = seen_in(processes, strategy)["momentum"]
    assert seen["losses"] == pytest.approx(losses, rel=1e-5)
    assert seen["norms"] == pytest.approx(norms, rel=1e-4)
    assert max(norm for norm in norms if math.isfinite(norm)) > GRADIENT_CLIPPING
    assert seen["engines"][1] == seen["engines"][0], "the bad step changes nothing"
    assert seen["snapshot"]
    download_checkpoint(open_checkpoint(seen["checkpoint"]), tmp_path)
    saved = CheckpointFiles(tmp_path)
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name]["param"], weight, rtol=1e-4, atol=1e-6, msg=name)
        assert saved[name].keys() == ({"param", "momentum_buffer"} if weight.ndim >= 2 else {"param"})


# ---- Muon ----


@cache
def plain_muon(steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Train in plain PyTorch, with Muon and AdamW written out; return the gradient norms and the weights."""
    model = new_model()
    weights = dict(model.named_parameters())
    momentum = {name: torch.zeros_like(one) for name, one in weights.items()}
    square = {name: torch.zeros_like(one) for name, one in weights.items()}
    norms: list[float] = []
    for step in range(steps):
        input_ids, labels = global_batch(step)
        logits = model(input_ids=input_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = float(torch.stack([one.square().sum() for one in gradients.values()]).sum().sqrt())
        norms.append(norm)
        with torch.no_grad():
            for name, weight in weights.items():
                gradient = gradients[name] / max(1.0, norm / GRADIENT_CLIPPING)
                if weight.ndim == 2 and name != EMBEDDING:
                    beta = MUON.muon_momentum
                    momentum[name] = beta * momentum[name] + (1 - beta) * gradient
                    x = (1 - beta) * gradient + beta * momentum[name]
                    x = x / x.norm()
                    if x.shape[0] > x.shape[1]:
                        x = x.T
                    for _ in range(5):
                        y = x @ x.T
                        x = 3.4445 * x + (-4.7750 * y + 2.0315 * y @ y) @ x
                    if weight.shape[0] > weight.shape[1]:
                        x = x.T
                    weight.mul_(1 - MUON_RATE * MUON.weight_decay)
                    weight.sub_(MUON_RATE * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5 * x)
                else:
                    momentum[name] = MUON.beta1 * momentum[name] + (1 - MUON.beta1) * gradient
                    square[name] = MUON.beta2 * square[name] + (1 - MUON.beta2) * gradient**2
                    mean = momentum[name] / (1 - MUON.beta1 ** (step + 1))
                    variance = square[name] / (1 - MUON.beta2 ** (step + 1))
                    rate = MUON_RATE / MUON.muon_rate_ratio
                    weight.mul_(1 - rate * (MUON.weight_decay if weight.ndim == 2 else 0))
                    weight.sub_(rate * mean / (variance.sqrt() + MUON.epsilon))
    return norms, {name: one.detach() for name, one in weights.items()}


def weights_of(url: str, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint by parameter."""
    folder.mkdir()
    download_checkpoint(open_checkpoint(url), folder)
    return {name: dict(tensors) for name, tensors in CheckpointFiles(folder).items()}


def largest_difference(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max(float((one - others[name]).detach().abs().max()) for name, one in weights.items())


@in_each_world
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 1.5e-2)])
def test_six_steps_equal_plain_pytorch(
    seen_in: SeenIn, processes: int, strategy: str, precision: str, bound: float, tmp_path: Path
) -> None:
    norms, weights = plain_muon(LAST_STEP)
    seen = seen_in(processes, strategy)[f"muon {precision}"]
    assert seen["norms"] == pytest.approx(norms, rel=1e-3 if precision == "fp32" else 3e-2)
    assert min(norms) < GRADIENT_CLIPPING < max(norms)
    found = {name: tensors["param"] for name, tensors in weights_of(seen["checkpoint"], tmp_path / "c").items()}
    assert found.keys() == weights.keys()
    assert largest_difference(found, weights) < bound
    assert seen["snapshot"]
    assert largest_difference(weights, dict(new_model().named_parameters())) > 2 * bound, "the weights have moved"


@in_each_world
def test_checkpoint_holds_one_state_for_matrices_and_two_for_the_rest(
    seen_in: SeenIn, processes: int, strategy: str, tmp_path: Path
) -> None:
    stored = weights_of(seen_in(processes, strategy)["muon fp32"]["checkpoint"], tmp_path / "c")
    for name, tensors in stored.items():
        is_body = tensors["param"].ndim == 2 and name != EMBEDDING
        assert tensors.keys() - {"param"} == ({"momentum_buffer"} if is_body else {"exp_avg", "exp_avg_sq"}), name


@in_each_world
def test_bad_step_changes_neither_weights_nor_momentum(seen_in: SeenIn, processes: int, strategy: str) -> None:
    seen = seen_in(processes, strategy)["muon with a bad step"]
    assert seen["skipped"][1] == [1.0] * processes
    assert seen["engines"][1] == seen["engines"][0]
    assert seen["engines"][2] != seen["engines"][1]
    ranks = [set(step) for step in seen["engines"]]
    assert strategy == "zero2" or all(len(step) == 1 for step in ranks), "all ranks have the same weights"


# ---- Validation ----


def test_validation_loss_is_the_same_for_one_and_two_processes(
    seen_in: SeenIn, data_set: DataSet, tmp_path: Path
) -> None:
    alone, together = seen_in(1, "ddp")["validation"], seen_in(2, "zero2")["validation"]
    assert alone == together
    expected = exact(data_set, 7, tmp_path)
    assert alone["nats"] == pytest.approx(expected.nats, rel=1e-6)
    counts = ("targets", "utf8_bytes", "characters")
    assert [alone[name] for name in counts] == [getattr(expected, name) for name in counts]
