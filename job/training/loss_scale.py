"""The dynamic loss scale of fp16: without it, most gradients would be smaller than fp16's smallest number.

The method is that of Micikevicius et al. 2018, Mixed Precision Training (arXiv:1710.03740), section 3.2.
`torch.amp.GradScaler` scales the loss after the forward pass, but this project's loss makes its gradient in the forward
pass. So the engine gives the scale to the loss.
"""

from typing import Any

import torch
from torch import Tensor

_FIRST = 2.0**16
"""Scale of the first step."""
GROWTH_STEPS = 2000
"""Steps without an overflow after which the scale is doubled; this and `_FIRST` are those of `torch.amp.GradScaler`."""
FLOOR = 1.0
"""Least scale. A gradient that overflows with it is really infinite."""
_CEILING = 2.0**40


class LossScale:
    """The number by which the gradients of a step are scaled; it stays on the device.

    It is halved by a step whose gradient overflows, and doubled after many steps without an overflow.

    Args:
        device: where the gradients are.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), _FIRST, device=device)
        """Scale of the next step."""
        self._steps_without_overflow = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def is_above_floor(self) -> Tensor:
        """A scalar that is True if a smaller scale could avoid an overflow."""
        return self.value > FLOOR

    def update(self, overflowed: Tensor) -> None:
        """Set the scale of the next step. `overflowed` is a scalar: True if the gradient of this step overflowed."""
        steps = (self._steps_without_overflow + 1) * ~overflowed
        grows = steps >= GROWTH_STEPS
        factor = torch.where(overflowed, 0.5, torch.where(grows, 2.0, 1.0))
        self.value = (self.value * factor).clamp(FLOOR, _CEILING)
        self._steps_without_overflow = steps * ~grows

    def state(self) -> dict[str, Any]:
        """Return all that is remembered, for JSON."""
        return {"value": float(self.value), "steps_without_overflow": int(self._steps_without_overflow)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        self.value = torch.full_like(self.value, state["value"])
        self._steps_without_overflow = torch.full_like(self._steps_without_overflow, state["steps_without_overflow"])
