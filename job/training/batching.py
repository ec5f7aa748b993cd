"""How the global batch is cut into processes, accumulation steps and micro-batches."""

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
