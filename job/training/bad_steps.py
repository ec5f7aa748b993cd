"""Bad steps, whose gradient is not finite or a spike: they are skipped, counted and reported; too many end the run.

`BadSteps` judges and counts on the device, so that the host never waits for the verdict. `BadStepReport` reads the
verdict one step later, when it has long been on its way to the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from job.data.loader import Batch
from job.data.order import SequenceOrder
from job.errors import NoProgress
from job.model import gpu
from job.training.loss_scale import LossScale

REMEMBERED_NORMS = 128
"""Gradient norms of accepted steps, of which the median is the usual norm."""
NEEDED_NORMS = 16
"""With fewer norms no step is called a spike."""
_MOST_SEQUENCES_SHOWN = 8


@dataclass(frozen=True)
class StepResult:
    """The numbers of a step: scalars that are still on the device."""

    nats: Tensor
    """Loss summed over this rank's targets; 0 if the step was skipped, so that it counts in no mean."""
    computed_nats: Tensor
    """The same, also if the step was skipped."""
    gradient_norm: Tensor
    """Norm of the global gradient before clipping; infinite if a number on any rank was not finite."""
    skipped: Tensor
    """1.0 if all ranks left weights and optimizer state as they were, else 0.0."""
    skipped_steps: Tensor
    """Skipped steps of the whole run, with this one."""
    skipped_in_a_row: Tensor
    """Skipped steps up to this one without one between; 0 if this one was taken. Overflows are not counted."""
    overflowed: Tensor
    """True if the step was skipped because its loss scale was too large for fp16."""
    loss_scale: Tensor | None
    """Loss scale of the step; None in other formats than fp16."""


class BadSteps:
    """Decides which steps are skipped, by the norm of the global gradient alone.

    All ranks have the same norm, so they skip a step together without another message between them.

    Args:
        spike_factor: a norm of more than this many times the usual norm is a spike; None: no norm is.
        device: where the norms are.
        loss_scale: the loss scale of fp16, which this judge keeps up to date; None in other formats. An infinite norm
            of a finite loss is an overflow of the scale until the scale is at its floor.
    """

    def __init__(self, spike_factor: float | None, device: torch.device, loss_scale: LossScale | None = None) -> None:
        self._spike_factor = spike_factor
        self._loss_scale = loss_scale
        self._norms = torch.full((REMEMBERED_NORMS,), torch.nan, device=device)  # the newest last
        self.skipped_steps = torch.zeros((), dtype=torch.int64, device=device)
        """Skipped steps of the whole run."""
        self.skipped_in_a_row = torch.zeros_like(self.skipped_steps)
        """Skipped steps up to the last one without one between; 0 if the last one was taken. Overflows of the loss
        scale neither count nor end the row."""
        self.overflowed = torch.zeros((), dtype=torch.bool, device=device)
        """True if the last step was skipped because of an overflow of the loss scale."""

    def judge(self, norm: Tensor, loss_is_finite: Tensor | None = None) -> Tensor:
        """Return 1.0 if the step is skipped, else 0.0; called once a step.

        Args:
            norm: gradient norm of the step, a scalar.
            loss_is_finite: scalar that is True if the loss is finite on all ranks; None: it is. In fp16 an infinite
                gradient of a finite loss is an overflow, which a smaller scale avoids.
        """
        is_infinite = ~norm.isfinite()
        is_skipped = is_infinite
        if self._spike_factor is not None:
            there_are_enough = self._norms[-NEEDED_NORMS].isfinite()
            is_skipped = is_skipped | there_are_enough & (norm > self._spike_factor * self._median())
        newer = torch.cat([self._norms[1:], norm.reshape(1)])
        self._norms = torch.where(is_skipped, self._norms, newer)
        self.skipped_steps = self.skipped_steps + is_skipped
        in_a_row = (self.skipped_in_a_row + 1) * is_skipped
        if self._loss_scale is not None:
            is_overflow = is_infinite if loss_is_finite is None else is_infinite & loss_is_finite
            self.overflowed = is_overflow & self._loss_scale.is_above_floor
            self._loss_scale.update(is_overflow)
            in_a_row = torch.where(self.overflowed, self.skipped_in_a_row, in_a_row)
        self.skipped_in_a_row = in_a_row
        return is_skipped.float()

    def _median(self) -> Tensor:
        """Return the median of the remembered norms, the upper one of an even number.

        `torch.median` would have the host wait for the index.
        """
        middle = self._norms.isfinite().sum(0, keepdim=True) // 2
        return self._norms.sort().values.index_select(0, middle).squeeze(0)  # NaNs come last

    def state(self) -> dict[str, Any]:
        """Return all that is remembered, for JSON: an fp32 norm is exact as a float."""
        state: dict[str, Any] = {
            "norms": self._norms[self._norms.isfinite()].tolist(),
            "skipped_steps": int(self.skipped_steps),
            "skipped_in_a_row": int(self.skipped_in_a_row),
        }
        return state if self._loss_scale is None else state | {"loss_scale": self._loss_scale.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        norms = torch.tensor(state["norms"][-REMEMBERED_NORMS:], dtype=torch.float32)
        self._norms.fill_(torch.nan)[REMEMBERED_NORMS - len(norms) :] = norms
        self.skipped_steps = torch.full_like(self.skipped_steps, state["skipped_steps"])
        self.skipped_in_a_row = torch.full_like(self.skipped_in_a_row, state["skipped_in_a_row"])
        if self._loss_scale is not None and "loss_scale" in state:  # a run may change to fp16
            self._loss_scale.load_state(state["loss_scale"])


class _OnItsWay:
    """Scalars on their way from the device to the host."""

    def __init__(self, scalars: list[Tensor]) -> None:
        stacked = torch.stack([scalar.double() for scalar in scalars])
        self._values = stacked.to("cpu", non_blocking=True)
        self._arrived = gpu.recorded_event() if gpu.is_gpu(stacked.device) else None

    def values(self) -> list[float]:
        """Return the scalars, after waiting for them to arrive, and for nothing that was queued later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._values.tolist()
        return values


@dataclass(frozen=True)
class _Step:
    number: int
    result: StepResult
    batch: Batch
    numbers: _OnItsWay


class BadStepReport:
    """Reports skipped steps and ends the run after too many; looks at each step one step later.

    All ranks see the same.

    Args:
        limit: `train.max_skipped_steps`: skipped steps in a row after which the run ends.
        skipped_steps: skipped steps of the run before this start.
        order: tells which sequences a batch holds.
        shard_names: names of the training shards.
        sum_over_ranks: returns the sum of a scalar over all ranks.
        say: prints a line of the log.
    """

    def __init__(
        self,
        limit: int,
        skipped_steps: int,
        order: SequenceOrder,
        shard_names: list[str],
        sum_over_ranks: Callable[[Tensor], Tensor],
        say: Callable[[str], None],
    ) -> None:
        self._limit, self._order, self._shard_names = limit, order, shard_names
        self._sum_over_ranks, self._say = sum_over_ranks, say
        self.skipped_steps = skipped_steps
        """Skipped steps of the whole run, as far as they have been looked at."""
        self._last: _Step | None = None

    def add(self, step: int, result: StepResult, batch: Batch) -> None:
        """Take the step that was just queued, and look at the one before.

        Raises:
            NoProgress: too many steps in a row were skipped.
        """
        scalars = [result.skipped, result.skipped_steps, result.skipped_in_a_row, result.gradient_norm]
        if result.loss_scale is not None:
            scalars += [result.overflowed, result.loss_scale]
        numbers = _OnItsWay(scalars)
        self.look()
        self._last = _Step(step, result, batch, numbers)

    def look(self) -> None:
        """Look at the last step now.

        Raises:
            NoProgress: too many steps in a row were skipped.
        """
        last, self._last = self._last, None
        if last is None:
            return
        skipped, skipped_steps, in_a_row, norm, *of_fp16 = last.numbers.values()
        self.skipped_steps = int(skipped_steps)
        if of_fp16 and of_fp16[0]:
            scales = f"{of_fp16[1]:g} → {of_fp16[1] / 2:g}"
            self._say(f"step {last.number} skipped: its gradient overflows in fp16; loss scale {scales}")
            return
        if not skipped:
            return
        loss = self._sum_over_ranks(last.result.computed_nats.clone()).item() / last.batch.global_targets
        line = (
            f"step {last.number} skipped: loss {loss:.4g}, gradient norm {norm:.4g}, "
            f"sequences {self._sequences(last.batch)}"
        )
        self._say(line)
        if in_a_row >= self._limit:
            raise NoProgress(
                f"{int(in_a_row)} steps in a row were skipped (train.max_skipped_steps is {self._limit}), the last "
                f"checkpoint is as it was; {line}; a lower train.learning_rate or a longer train.warmup_steps may help"
            )

    def _sequences(self, batch: Batch) -> str:
        shards, sequences = self._order.sequence_ids(batch.position, batch.next_position - batch.position, None)
        shown = [f"{self._shard_names[s]}:{i}" for s, i in zip(shards.tolist(), sequences.tolist(), strict=True)]
        more = f" and {len(shown) - _MOST_SEQUENCES_SHOWN} more" if len(shown) > _MOST_SEQUENCES_SHOWN else ""
        return ", ".join(shown[:_MOST_SEQUENCES_SHOWN]) + more
