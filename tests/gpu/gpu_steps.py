"""The tiny model of the tests on a GPU, its batches, and the same steps in plain PyTorch on the CPU in fp32."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from job.model.language_model import build_model
from job.model.spec import ModelSpec

SPEC = ModelSpec(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
)
VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, GLOBAL_BATCH_SIZE = 301, 0, 32, 8
GRADIENT_CLIPPING = 1.0
"""A limit between the gradient norms of even steps and the larger ones of odd steps, which are clipped."""
WEIGHT_DECAY, BETAS, EPSILON = 0.1, (0.9, 0.95), 1e-5
"""AdamW, with an epsilon so large that a gradient of rounding errors only does not change a weight."""
STEPS, SAVED_STEP = 6, 3
BAD_STEP = 1
"""The step whose loss is not a number in the case ``bad step``."""

PRECISIONS = {"ddp": ("fp32", "tf32", "bf16", "fp16"), "zero2": ("fp32", "tf32", "bf16")}
"""Values of `train.precision` that the tests train with, by strategy."""
COMPILED = ("fp32", "bf16")
"""Precisions whose steps are also compiled, which takes longest."""
TOLERANCES = {"fp32": (1e-5, 1e-4), "tf32": (1e-3, 1e-2), "fp16": (1e-3, 1e-2), "bf16": (3e-3, 3e-2)}
"""Largest relative differences of losses and of gradient norms from fp32 on the CPU.

In fp32 only the order of sums differs. tf32 and fp16 have mantissas of 10 bits and bf16 of 7, so one rounding changes a
number by up to 2^-11 and 2^-8. A loss is a mean over hundreds of targets, and a norm sums over all weights.
"""


def new_model() -> PreTrainedModel:
    return build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=1)


def learning_rate_of(step: int) -> float:
    return 1e-3 * (step + 1)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Return input ids and labels of a step, each `[GLOBAL_BATCH_SIZE, CONTEXT_LENGTH]`.

    Sequences have different numbers of targets, so a mean over micro-batches is not the mean over targets. Odd steps
    have few targets, and so large gradients.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, VOCAB_SIZE, (GLOBAL_BATCH_SIZE, CONTEXT_LENGTH + 1), generator=generator)
    tokens[:, CONTEXT_LENGTH // 3] = EOD_ID
    targets = torch.tensor([0, 1, 3, 8, 16, 24, 32, 32]).unsqueeze(-1) // (8 if step % 2 else 1)
    labels = tokens[:, 1:].masked_fill(torch.arange(CONTEXT_LENGTH) >= targets, -100)
    return tokens[:, :-1], labels


@dataclass(frozen=True)
class PlainTraining:
    """What plain PyTorch computes on the CPU in fp32."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    """Weights after the last step, by name."""


def train_plainly() -> PlainTraining:
    """Train with full logits, on whole global batches."""
    model = new_model()
    groups = [{"params": [one for one in model.parameters() if one.ndim == 2]}]
    groups.append({"params": [one for one in model.parameters() if one.ndim == 1], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY)
    losses, norms = [], []
    for step in range(STEPS):
        input_ids, labels = global_batch(step)
        loss = F.cross_entropy(model(input_ids=input_ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIPPING).item())
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_of(step)
        optimizer.step()
    return PlainTraining(losses, norms, {name: one.detach() for name, one in model.named_parameters()})
