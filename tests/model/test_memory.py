"""Tests of the memory estimate: it equals what autograd and the optimizer of the built model take."""

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import pytest
import torch

from job.model import gpu
from job.model.architecture import ARCHITECTURES, tensor_shapes
from job.model.flops import parameter_counts
from job.model.language_model import LanguageModel, build_model
from job.model.loss import default_chunk_tokens
from job.model.memory import ProcessMemory, process_memory, saved_bytes_per_token
from job.model.spec import ModelSpec

SMALL = ModelSpec(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
)
TUTORIAL = ModelSpec(
    hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=2048
)
VOCAB_SIZE, CONTEXT_LENGTH = 300, 32


def _saved_bytes(spec: ModelSpec, batch: int, strategy: str, precision: str) -> int:
    """Return the bytes that autograd keeps of a forward pass, without parameters, counting each storage once."""
    model = LanguageModel(build_model(spec, VOCAB_SIZE, 0, CONTEXT_LENGTH, seed=0), loss_chunk_tokens=8)
    if strategy == "zero2" and precision == "bf16":
        model = model.bfloat16()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.zeros(batch, CONTEXT_LENGTH, dtype=torch.long)
    autocast = strategy == "ddp" and precision == "bf16"
    precise = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with precise, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", [SMALL, replace(SMALL, num_hidden_layers=3, num_key_value_heads=4)])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_saved_bytes_equal_what_autograd_keeps(
    spec: ModelSpec, architecture: str, strategy: Literal["zero2", "ddp"], precision: Literal["bf16", "fp32"]
) -> None:
    spec = replace(spec, architecture=architecture)
    tokens = 4 * CONTEXT_LENGTH
    difference = _saved_bytes(spec, 8, strategy, precision) - _saved_bytes(spec, 4, strategy, precision)
    ids = 8 * tokens
    assert difference == tokens * saved_bytes_per_token(spec, strategy, precision) + ids


@pytest.mark.parametrize("vocab_size", [257, 16_384, 151_646])
def test_estimate_uses_the_chunk_of_the_loss(vocab_size: int) -> None:
    chunk, head = default_chunk_tokens(vocab_size, torch.device(gpu.KIND)), vocab_size * SMALL.hidden_size
    gpu_bytes = gpu.memory_bytes() if gpu.is_available() else None
    found = process_memory(
        SMALL, vocab_size, optimizer="adamw", strategy="ddp", precision="fp32", micro_batch_size=chunk,
        context_length=2, loss_chunk_tokens=None, world_size=1, gpu_bytes=gpu_bytes,
    )  # fmt: skip
    assert found.loss == 4 * (chunk * vocab_size + head), "the logits of a chunk, and the gradient of the head"


def _tutorial(
    strategy: Literal["zero2", "ddp"] = "zero2",
    world_size: int = 1,
    micro_batch_size: int = 32,
    optimizer: str = "adamw",
) -> ProcessMemory:
    return process_memory(
        TUTORIAL,
        151_646,
        optimizer=optimizer,
        strategy=strategy,
        precision="bf16",
        micro_batch_size=micro_batch_size,
        context_length=512,
        loss_chunk_tokens=None,
        world_size=world_size,
    )


@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_muon_keeps_less_and_needs_copies_only_during_its_step(strategy: Literal["zero2", "ddp"]) -> None:
    matrices = sum(math.prod(one) for name, one in tensor_shapes(TUTORIAL, 151_646).items() if len(one) == 2)
    body = matrices - 151_646 * TUTORIAL.hidden_size
    adamw, muon = (_tutorial(strategy, optimizer=name) for name in ("adamw", "muon"))
    assert adamw.optimizer - muon.optimizer == 4 * body, "one state of the matrices less"
    assert (adamw.step, adamw.total > muon.total) == (0, True), "the copies are gone before the next forward pass"
    small = replace(_tutorial(strategy, optimizer="muon", micro_batch_size=1), step=0)
    larger_step = replace(small, step=small.activations + small.loss + 2**30)
    assert larger_step.total - small.total == pytest.approx(1.1 * 2**30, rel=1e-6)


def test_ddp_estimate_equals_real_weights_gradients_and_state() -> None:
    model = build_model(SMALL, VOCAB_SIZE, 0, CONTEXT_LENGTH, seed=0)
    adamw = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    adamw.step()
    kept = process_memory(
        SMALL, VOCAB_SIZE, optimizer="adamw", strategy="ddp", precision="fp32", micro_batch_size=1, context_length=8,
        loss_chunk_tokens=None, world_size=4,
    )  # fmt: skip
    assert kept.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert kept.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    moments = (state[key] for state in adamw.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert kept.optimizer == sum(moment.nbytes for moment in moments)


def test_zero2_divides_gradients_and_state_and_ddp_does_not() -> None:
    parameters = parameter_counts(TUTORIAL, 151_646).total
    alone, of_eight = _tutorial(world_size=1), _tutorial(world_size=8)
    assert alone.weights == of_eight.weights == 2 * parameters
    assert (alone.optimizer, of_eight.optimizer) == (12 * parameters, 12 * parameters // 8)
    assert of_eight.gradients < alone.gradients
    assert _tutorial("ddp", 1).total == _tutorial("ddp", 8).total


def test_tutorials_batch_fits_24_gib_and_four_times_it_does_not() -> None:
    assert _tutorial().total < 24 * 2**30
    assert _tutorial(micro_batch_size=128).total > 24 * 2**30
