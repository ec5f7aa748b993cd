"""Division of the global batch among processes, accumulation steps and micro-batches."""

import math
from dataclasses import dataclass

from job.errors import UserError


@dataclass(frozen=True)
class BatchCut:
    """The division of a global batch: `world_size` x `gradient_accumulation_steps` x `micro_batch_size` sequences."""

    world_size: int
    gradient_accumulation_steps: int
    micro_batch_size: int
    reason: str = ""
    """Why the micro-batch has this size; empty if it is as set in `train.micro_batch_size`."""

    def __str__(self) -> str:
        reason = f" ({self.reason})" if self.reason else ""
        return f"{self.gradient_accumulation_steps} x {self.micro_batch_size} sequences{reason}"


def cut_batch(global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchCut:
    """Divide the global batch evenly, with the largest micro-batch that divides a process's share.

    A smaller micro-batch changes neither the batch nor the gradient, except for the order in which numbers are added.

    Args:
        global_batch_size: sequences of an optimizer step.
        micro_batch_size: most sequences in one forward pass of one process.
        world_size: number of processes.

    Raises:
        UserError: `world_size` does not divide the batch; the message names the nearest numbers of processes that do.
    """
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        dividing = divisors(global_batch_size)
        fewer = max(count for count in dividing if count < world_size)
        more = min((count for count in dividing if count > world_size), default=None)
        batches = sorted({max(1, share) * world_size, (share + 1) * world_size})
        expected = (
            f"cannot be divided by the {world_size} processes; the nearest numbers of processes that divide it are "
            f"{fewer}{f' and {more}' if more else ''}"
        )
        remedy = f"change the number of processes, or set train.global_batch_size to {' or '.join(map(str, batches))}"
        raise UserError("train.global_batch_size", global_batch_size, expected, remedy)
    largest = max(size for size in divisors(share) if size <= micro_batch_size)
    reason = ""
    if largest < micro_batch_size:
        reason = (
            f"train.micro_batch_size is {micro_batch_size}, which does not divide the {share} sequences of a process"
        )
    return BatchCut(world_size, share // largest, largest, reason)


def divisors(number: int) -> list[int]:
    """Return all divisors of a number in ascending order."""
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def optimizer_steps(sequences: int, global_batch_size: int, max_steps: int | None) -> tuple[int, int]:
    """Return the number of optimizer steps of a run, and the number that all of its epochs would have.

    Args:
        sequences: sequences of all epochs together.
        global_batch_size: sequences of a step; the last step may have fewer.
        max_steps: the most steps of the run; None: as many as its epochs have.
    """
    epoch_steps = math.ceil(sequences / global_batch_size)
    return min(epoch_steps, max_steps or epoch_steps), epoch_steps
