"""The optimizers, and the hooks by which every one of them clips its gradients and skips bad steps.

To add an optimizer, add its builder here and its state in `job.model.optimizer_state`.

The host never waits for the device here: the divisor of a step's gradients and the decision to skip the step are
scalars that stay on the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from job.training.model_state import GroupState
from job.training.muon import build_muon, skip_bad_steps_of_muon
from job.training.optimizer_settings import OptimizerSettings, Verdict

Build = Callable[[OptimizerSettings, list[tuple[str, nn.Parameter]]], Optimizer]
"""Function that returns an optimizer for named parameters, with a learning rate of 0.

All parameters of one of its groups must have the same state (`OptimizerState.tensors_of`). A group's ``rate_ratio``, if
it has one, is its learning rate divided by that of the schedule.
"""


def skip_bad_steps(optimizer: Optimizer, verdict: Verdict) -> None:
    """Clip the gradients of each step, and undo the step if it is bad; works with every optimizer.

    To undo a step, a copy of the weights and of the optimizer's state is kept during the step. An optimizer that can
    skip a step by itself needs no copy: see `skip_bad_steps_of_adamw`.
    """
    before: list[tuple[Tensor, Tensor]] = []

    def clip(optimizer: Optimizer, *_: object) -> None:
        divisor, _skipped = verdict()
        tensors = [tensor for tensor in _parameters(optimizer) if tensor.grad is not None]
        for tensor in tensors:
            assert tensor.grad is not None
            tensor.grad.div_(divisor.to(tensor.grad.dtype))
        before[:] = [
            (kept, kept.detach().clone())
            for tensor in tensors
            for kept in (tensor, *(one for one in optimizer.state[tensor].values() if isinstance(one, Tensor)))
        ]

    @torch.no_grad()
    def undo(optimizer: Optimizer, *_: object) -> None:
        _divisor, skipped = verdict()
        for tensor, was in before:
            tensor.copy_(torch.where(skipped.bool(), was, tensor))
        before.clear()

    optimizer.register_step_pre_hook(clip)
    optimizer.register_step_post_hook(undo)


def skip_bad_steps_of_adamw(optimizer: Optimizer, verdict: Verdict) -> None:
    """Let the kernel of torch's fused AdamW clip and skip, through the attributes that `torch.amp.GradScaler` sets.

    Under ZeRO-2 the hook is called for each parameter group, and not at all if DeepSpeed itself has skipped the step.
    """

    def tell(adamw: Optimizer, *_: object) -> None:
        adamw.grad_scale, adamw.found_inf = verdict()  # type: ignore[attr-defined]

    optimizer.register_step_pre_hook(tell)


def build_adamw(settings: OptimizerSettings, parameters: list[tuple[str, nn.Parameter]]) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with weight decay for matrices only.

    The embedding is a matrix and is decayed; norms and biases are not.
    """
    matrices = [parameter for _, parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for _, parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True)


@dataclass(frozen=True)
class Builder:
    """An optimizer of the table: how it is made, and how its bad steps are skipped."""

    build: Build
    skip_bad_steps: Callable[[Optimizer, Verdict], None] = skip_bad_steps
    """Register hooks that clip the gradients of every step, and that leave weights and state unchanged in a bad one."""


BUILDERS = {
    "adamw": Builder(build_adamw, skip_bad_steps_of_adamw),
    "muon": Builder(build_muon, skip_bad_steps_of_muon),
}
"""By the value of `train.optimizer`, with the same names as `job.model.optimizer_state.OPTIMIZER_STATES`."""


def start_state(optimizer: Optimizer, states: list[GroupState]) -> None:
    """Give the optimizer the state that its first step would make: zeros.

    DeepSpeed links the state to the model's parameters after the first group's step, when later groups have none yet.
    With all of it there beforehand, everything is linked.

    Args:
        optimizer: after `Accelerator.prepare`: under ZeRO-2 its parameters are flat partitions.
        states: what the optimizer keeps, by parameter group.
    """
    for group, kept in zip(optimizer.param_groups, states, strict=True):
        for parameter in group["params"]:
            state: dict[str, Tensor] = {key: torch.zeros((), device=parameter.device) for key in kept.counters}
            state |= {key: torch.zeros_like(parameter) for key in kept.tensors}
            optimizer.state[parameter] = state


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
