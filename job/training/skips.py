"""Steps that were left out because their numbers blew up: counted, said, and too many in a row end the run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from job.data.loader import Batch
from job.data.order import WindowOrder
from job.errors import NoProgress
from job.training.engine import StepResult

_MOST_WINDOWS_SHOWN = 8


@dataclass(frozen=True)
class _Step:
    number: int
    result: StepResult
    batch: Batch


class Skips:
    """Looks at each step one step later, so that no GPU waits; all ranks see the same.

    Args:
        limit: steps in a row after which the run is given up.
        total: skipped before, in the whole run.
        in_a_row: skipped before without one between.
        order: which windows a batch holds.
        shard_names: of the training shards.
        add_up: sum of a scalar over all ranks.
        say: takes a line for the log.
    """

    def __init__(
        self,
        limit: int,
        total: int,
        in_a_row: int,
        order: WindowOrder,
        shard_names: list[str],
        add_up: Callable[[torch.Tensor], torch.Tensor],
        say: Callable[[str], None],
    ) -> None:
        self._limit, self.total, self._in_a_row = limit, total, in_a_row
        self._order, self._shard_names, self._add_up, self._say = order, shard_names, add_up, say
        self._last: _Step | None = None

    def take(self, step: int, result: StepResult, batch: Batch) -> None:
        """Takes the step that has just been begun, and looks at the one before.

        Raises:
            NoProgress: too many in a row were skipped.
        """
        self.look()
        self._last = _Step(step, result, batch)

    def look(self) -> None:
        """Looks at the last step now; raises as `take`."""
        last, self._last = self._last, None
        if last is None:
            return
        if not last.result.skipped.item():
            self._in_a_row = 0
            return
        self.total, self._in_a_row = self.total + 1, self._in_a_row + 1
        loss = self._add_up(last.result.computed_nats.clone()).item() / last.batch.global_targets
        line = (
            f"step {last.number} skipped: loss {loss:.4g}, gradient norm {last.result.gradient_norm.item():.4g}, "
            f"windows {self._windows(last.batch)}"
        )
        self._say(line)
        if self._in_a_row >= self._limit:
            raise NoProgress(
                f"{self._in_a_row} steps in a row were skipped (train.max_skipped_steps is {self._limit}), the last "
                f"checkpoint is as it was; {line}; a lower train.learning_rate or a longer train.warmup_steps may help"
            )

    def _windows(self, batch: Batch) -> str:
        shards, windows = self._order.window_ids(batch.position, batch.next_position - batch.position, None)
        shown = [f"{self._shard_names[s]}:{w}" for s, w in zip(shards.tolist(), windows.tolist(), strict=True)]
        more = f" and {len(shown) - _MOST_WINDOWS_SHOWN} more" if len(shown) > _MOST_WINDOWS_SHOWN else ""
        return ", ".join(shown[:_MOST_WINDOWS_SHOWN]) + more
