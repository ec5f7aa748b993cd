"""What the processes of a run decide together."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from job.errors import UserError
from job.training.world import World

Value = TypeVar("Value")


def agree(world: World, decide: Callable[[], Value]) -> Value:
    """What rank 0 decides, on every rank; its UserError is raised on all of them."""
    decision: list[Any] = [None]
    if world.rank == 0:
        try:
            decision = [decide()]
        except UserError as error:
            decision = [error]
    if world.world_size > 1:
        dist.broadcast_object_list(decision)
    if isinstance(decision[0], UserError):
        raise decision[0]
    value: Value = decision[0]
    return value


class StopAgreement:
    """Turns "this process was asked to stop" into "all stop after the same step".

    The processes tell each other in the background while a step runs, on the CPU, so that no GPU waits for it; a
    request therefore takes effect one step later.
    """

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo") if world.world_size > 1 else None
        self._flag = torch.zeros(1)
        self._pending: Any = None

    def agreed(self, requested: bool) -> bool:
        """Whether any process had been asked to stop when this was called last; each calls it before every step."""
        if self._group is None:
            return requested
        is_agreed = False
        if self._pending is not None:
            self._pending.wait()
            is_agreed = bool(self._flag.item())
        self._flag = torch.tensor([float(requested)])
        self._pending = (
            None if is_agreed else dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
        )
        return is_agreed
