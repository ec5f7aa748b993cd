"""The estimate of memory is what autograd and the optimizer take, of the model that is built from the same shape."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

import pytest
import torch

from job.model.architecture import LanguageModel, build_model
from job.model.flops import parameter_counts
from job.model.loss import default_chunk_tokens
from job.model.memory import _default_chunk_tokens, process_memory, saved_bytes_per_token
from job.model.spec import ModelSpec

SMALL = ModelSpec(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
)
TUTORIAL = ModelSpec(
    hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=2048
)
VOCAB_SIZE, CONTEXT_LENGTH = 300, 32


def _saved_bytes(spec: ModelSpec, batch: int, strategy: str, precision: str) -> int:
    """What autograd keeps of a forward pass, each piece of memory once, but for the parameters."""
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


@pytest.mark.parametrize("spec", [SMALL, replace(SMALL, num_hidden_layers=3, num_key_value_heads=4)])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_a_token_costs_what_autograd_keeps_for_it(
    spec: ModelSpec, strategy: Literal["zero2", "ddp"], precision: Literal["bf16", "fp32"]
) -> None:
    tokens = 4 * CONTEXT_LENGTH
    difference = _saved_bytes(spec, 8, strategy, precision) - _saved_bytes(spec, 4, strategy, precision)
    ids = 8 * tokens
    assert difference == tokens * saved_bytes_per_token(spec, strategy, precision) + ids


@pytest.mark.parametrize("vocab_size", [257, 16_384, 151_646, 10**9])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_chunk_of_logits_is_the_one_of_the_loss(vocab_size: int, device: Literal["cuda", "cpu"]) -> None:
    assert _default_chunk_tokens(vocab_size, device) == default_chunk_tokens(vocab_size, torch.device(device))


def _tutorial(strategy: Literal["zero2", "ddp"] = "zero2", world_size: int = 1, micro_batch_size: int = 32):
    return process_memory(
        TUTORIAL,
        151_646,
        strategy=strategy,
        precision="bf16",
        micro_batch_size=micro_batch_size,
        context_length=512,
        loss_chunk_tokens=None,
        world_size=world_size,
    )


def test_ddp_keeps_the_weights_gradients_and_moments_of_fp32_adamw() -> None:
    model = build_model(SMALL, VOCAB_SIZE, 0, CONTEXT_LENGTH, seed=0)
    adamw = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    adamw.step()
    kept = process_memory(
        SMALL, VOCAB_SIZE, strategy="ddp", precision="fp32", micro_batch_size=1, context_length=8,
        loss_chunk_tokens=None, world_size=4,
    )  # fmt: skip
    assert kept.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert kept.gradients == sum(parameter.grad.nbytes for parameter in model.parameters())
    moments = (state[key] for state in adamw.state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert kept.optimizer == sum(moment.nbytes for moment in moments)


def test_zero2_shares_gradients_and_moments_among_the_processes_and_ddp_does_not() -> None:
    parameters = parameter_counts(TUTORIAL, 151_646).total
    alone, of_eight = _tutorial(world_size=1), _tutorial(world_size=8)
    assert alone.weights == of_eight.weights == 2 * parameters
    assert (alone.optimizer, of_eight.optimizer) == (12 * parameters, 12 * parameters // 8)
    assert of_eight.gradients < alone.gradients
    assert _tutorial("ddp", 1).total == _tutorial("ddp", 8).total


def test_the_tutorials_batch_fits_a_gpu_of_24_gib_and_four_times_as_much_does_not() -> None:
    assert _tutorial().total < 24 * 2**30
    assert _tutorial(micro_batch_size=128).total > 24 * 2**30
