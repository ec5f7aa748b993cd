"""How the global batch is cut into processes, accumulation steps and micro-batches."""

import math

from job.errors import UserError


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that each process adds up in one optimizer step.

    Raises:
        UserError: the batch cannot be cut evenly; the nearest sizes that can are named.
    """
    unit = micro_batch_size * world_size
    steps, rest = divmod(global_batch_size, unit)
    if not rest:
        return steps
    nearest = sorted({max(1, steps) * unit, (steps + 1) * unit})
    expected = (
        f"expected a multiple of train.micro_batch_size x processes ({micro_batch_size} x {world_size} = {unit}): "
        f"the nearest are {' and '.join(map(str, nearest))}"
    )
    fitting = [micro for micro in range(1, micro_batch_size) if global_batch_size % (micro * world_size) == 0]
    remedy = f"or set train.micro_batch_size to {fitting[-1]}" if fitting else ""
    raise UserError("train.global_batch_size", global_batch_size, expected, remedy)


def optimizer_steps(windows: int, global_batch_size: int, max_steps: int | None) -> tuple[int, int]:
    """How many optimizer steps a run has, and how many all of its epochs would have.

    Args:
        windows: of all epochs.
        global_batch_size: windows of a step; the last one may have fewer.
        max_steps: where it ends at the latest; None: after its epochs.
    """
    of_epochs = math.ceil(windows / global_batch_size)
    return min(of_epochs, max_steps or of_epochs), of_epochs
