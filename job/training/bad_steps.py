"""Which optimizer steps are taken: none whose numbers are not finite, and none whose gradient is a spike.

The norm of the global gradient alone decides. All ranks have the same, so they skip a step together without a word
between them; and everything here stays on the device, so the host never waits for the verdict.
"""

from typing import Any

import torch
from torch import Tensor

REMEMBERED_NORMS = 128
"""Gradient norms of accepted steps whose median is what is usual."""
NEEDED_NORMS = 16
"""With fewer of them nothing is called a spike."""


class Guard:
    """Judges each step by its gradient norm, and remembers what it needs for the next.

    Args:
        spike_factor: a norm of more than so many times the usual is a spike; None: no norm is.
        device: where the norms are.
    """

    def __init__(self, spike_factor: float | None, device: torch.device) -> None:
        self._spike_factor = spike_factor
        self._norms = torch.full((REMEMBERED_NORMS,), torch.nan, device=device)  # the newest last
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        """Of the whole run."""
        self.skipped_in_a_row = torch.zeros_like(self.skipped_steps)
        """Up to and with the last step; 0 if that was taken."""

    def judge(self, norm: Tensor) -> Tensor:
        """Whether the step is skipped that has this gradient norm, a scalar: 1.0 or 0.0; called once a step."""
        is_skipped = ~norm.isfinite()
        if self._spike_factor is not None:
            there_are_enough = self._norms[-NEEDED_NORMS].isfinite()
            is_skipped |= there_are_enough & (norm > self._spike_factor * self._median())
        newer = torch.cat([self._norms[1:], norm.reshape(1)])
        self._norms = torch.where(is_skipped, self._norms, newer)
        self.skipped_steps += is_skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * is_skipped
        return is_skipped.float()

    def _median(self) -> Tensor:
        """The upper one, of an even number; torch's own would have the host wait for the index."""
        middle = self._norms.isfinite().sum(0, keepdim=True) // 2
        return self._norms.sort().values.index_select(0, middle).squeeze(0)  # NaNs come last

    def state(self) -> dict[str, Any]:
        """All it remembers, for JSON: an fp32 norm is exact as a float."""
        return {
            "norms": self._norms[self._norms.isfinite()].tolist(),
            "skipped_steps": int(self.skipped_steps),
            "skipped_in_a_row": int(self.skipped_in_a_row),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        norms = torch.tensor(state["norms"][-REMEMBERED_NORMS:], dtype=torch.float32)
        self._norms.fill_(torch.nan)[REMEMBERED_NORMS - len(norms) :] = norms
        self.skipped_steps.fill_(state["skipped_steps"])
        self.skipped_in_a_row.fill_(state["skipped_in_a_row"])
