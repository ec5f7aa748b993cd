"""The settings that every optimizer gets, and the type of the function that judges each step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Verdict = Callable[[], tuple[Tensor, Tensor]]
"""Function that returns two scalars of the current step: the divisor of its gradients (at least 1), and 1.0 if it is
skipped, else 0.0."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The settings of all optimizers; each takes those that it knows."""

    name: str
    """`train.optimizer`: an entry of `job.training.optimizer.BUILDERS`."""
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    muon_momentum: float = 0.95
    muon_rate_ratio: float = 1.0
    """Muon's learning rate divided by that of the other parameters."""
