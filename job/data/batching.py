"""How the global batch is cut into processes, accumulation steps and micro-batches."""

import math
from dataclasses import dataclass

from job.errors import UserError


@dataclass(frozen=True)
class BatchCut:
    """How the global batch is cut: `world_size` x `gradient_accumulation_steps` x `micro_batch_size` sequences."""

    world_size: int
    gradient_accumulation_steps: int
    micro_batch_size: int
    reason: str = ""
    """Why the micro-batch differs from `train.micro_batch_size`; empty if it does not."""

    def __str__(self) -> str:
        because = f" ({self.reason})" if self.reason else ""
        return f"{self.gradient_accumulation_steps} x {self.micro_batch_size} sequences{because}"


def cut_batch(global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchCut:
    """Cut the global batch evenly, with the largest micro-batch that divides the share of a process.

    A smaller micro-batch changes neither the batch nor the gradient, but for the order in which numbers are added.

    Args:
        global_batch_size: sequences of an optimizer step.
        micro_batch_size: most sequences in one forward pass of one process.
        world_size: processes.

    Raises:
        UserError: the processes do not divide the batch; the nearest numbers of processes that do are named.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        dividing = _divisors(global_batch_size)
        fewer = max(count for count in dividing if count < world_size)
        more = min((count for count in dividing if count > world_size), default=None)
        expected = (
            f"cannot be divided by the {world_size} processes; the nearest numbers of processes that divide it are "
            f"{fewer}{f' and {more}' if more else ''}"
        )
        batches = sorted({max(1, share) * world_size, (share + 1) * world_size})
        remedy = f"start so many, or set train.global_batch_size to {' or '.join(map(str, batches))}"
        raise UserError("train.global_batch_size", global_batch_size, expected, remedy)
    largest = max(size for size in _divisors(share) if size <= micro_batch_size)
    reason = ""
    if largest < micro_batch_size:
        reason = f"train.micro_batch_size is {micro_batch_size}, which does not divide the {share} of a process"
    return BatchCut(world_size, share // largest, largest, reason)


def _divisors(number: int) -> list[int]:
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def optimizer_steps(windows: int, global_batch_size: int, max_steps: int | None) -> tuple[int, int]:
    """How many optimizer steps a run has, and how many all of its epochs would have.

    Args:
        windows: of all epochs.
        global_batch_size: windows of a step; the last one may have fewer.
        max_steps: where it ends at the latest; None: after its epochs.
    """
    of_epochs = math.ceil(windows / global_batch_size)
    return min(of_epochs, max_steps or of_epochs), of_epochs
