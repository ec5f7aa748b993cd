"""What a run will come to before it begins: steps, tokens, hours and price."""

from dataclasses import dataclass

from job.data.batching import optimizer_steps
from job.data.manifest import Manifest
from job.data.order import WindowOrder
from job.model import flops as counts

TYPICAL_MFU = 0.3
"""Of eager PyTorch with 100 to 400 M parameters in bf16: nanoGPT's 124 M reach 30 % on A100s, llm-foundry's MPT-125M
40 %, the tutorial 11 %. An assumption, until a run of one's own was measured."""
PRICES_AS_OF = "typical on-demand prices in the first half of 2026"


@dataclass(frozen=True)
class Gpu:
    """A GPU that one may rent."""

    name: str
    cuda_name: str
    """As CUDA calls it, for `counts.peak_flops`."""
    memory_bytes: int
    dollars_per_hour: float | None
    """As of `PRICES_AS_OF`: an assumption; None: none is made."""


GPUS = (
    Gpu("A100 80GB", "NVIDIA A100-SXM4-80GB", 80 * 2**30, 1.50),
    Gpu("H100", "NVIDIA H100 80GB HBM3", 80 * 2**30, 3.00),
    Gpu("RTX 3090", "NVIDIA GeForce RTX 3090", 24 * 2**30, 0.35),
    Gpu("RTX 4090", "NVIDIA GeForce RTX 4090", 24 * 2**30, 0.60),
)


@dataclass(frozen=True)
class Workload:
    """What a run computes, from its first step to its last."""

    steps: int
    epochs: float
    windows_per_epoch: int
    tokens: int
    """Targets trained on."""
    evaluated_tokens: int
    """Held-out targets, each time that they are evaluated."""
    flops_per_token: int
    """Forward and backward."""
    steps_of_epochs: int
    """Steps that all of its epochs would have."""

    @property
    def flops(self) -> float:
        """Of all steps and evaluations; an evaluation has the forward pass alone, a third."""
        return self.flops_per_token * (self.tokens + self.evaluated_tokens / 3)

    @property
    def evaluation_share(self) -> float:
        """Evaluation's part of it, 0 to 1."""
        return self.flops_per_token * self.evaluated_tokens / 3 / self.flops

    def hours(self, gpu_flops: float, mfu: float, gpus: int) -> float:
        """How long it takes `gpus` of so many peak FLOP/s; without starts, checkpoints and samples."""
        return self.flops / (gpu_flops * mfu * gpus) / 3600

    def seconds_per_step(self, gpu_flops: float, mfu: float, gpus: int) -> float:
        """How long an optimizer step takes."""
        return self.flops_per_token * self.tokens / self.steps / (gpu_flops * mfu * gpus)


def plan(
    manifest: Manifest,
    flops: counts.TokenFlops,
    *,
    context_length: int,
    global_batch_size: int,
    epochs: int,
    max_steps: int | None,
    evaluate_every: int,
    evaluate_max_windows: int | None,
) -> Workload:
    """The work of a run over the data set.

    Args:
        manifest: of the data set.
        flops: of a token.
        context_length: targets of a window, at most.
        global_batch_size: windows of a step.
        epochs: passes over the data.
        max_steps: where it ends at the latest; None: after the epochs.
        evaluate_every: steps between evaluations; after the last step all is evaluated.
        evaluate_max_windows: windows of an evaluation; None: all.

    Raises:
        UserError: the data set holds nothing to predict.
    """
    order = WindowOrder([one.tokens for one in manifest.train], [one.size for one in manifest.train],
                        context_length, 0, buffer_bytes=2**62)  # fmt: skip
    steps, steps_of_epochs = optimizer_steps(order.position_limit(epochs), global_batch_size, max_steps)
    share = steps / steps_of_epochs * epochs
    targets = sum(max(0, one.tokens - 1) for one in manifest.train)
    held_out = sum(max(0, one.tokens - 1) for one in manifest.validation)
    evaluations = max(0, (steps - 1) // evaluate_every)
    of_each = held_out if evaluate_max_windows is None else min(held_out, evaluate_max_windows * context_length)
    return Workload(
        steps=steps,
        epochs=share,
        windows_per_epoch=order.windows_per_epoch,
        tokens=round(targets * share),
        evaluated_tokens=evaluations * of_each + held_out,
        flops_per_token=flops.total,
        steps_of_epochs=steps_of_epochs,
    )
