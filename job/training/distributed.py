"""What the processes of a run decide together."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from job.errors import NoProgress, UserError
from job.runs.world import World
from job.training.hang_detector import NO_LIMIT

Value = TypeVar("Value")
_POLL_SECONDS = 0.2
"""Longest that a process waits for itself before it hears the others again."""


def agree(world: World, decide: Callable[[], Value]) -> Value:
    """What rank 0 decides, on every rank; its UserError or NoProgress is raised on all of them."""
    decision: list[Any] = [None]
    if world.rank == 0:
        try:
            decision = [decide()]
        except (UserError, NoProgress) as error:
            decision = [error]
    if world.world_size > 1:
        dist.broadcast_object_list(decision)
    if isinstance(decision[0], UserError | NoProgress):
        raise decision[0]
    value: Value = decision[0]
    return value


class Round(NamedTuple):
    """What all processes know after a round."""

    stop: bool
    """Any of them was asked to stop."""
    ready: bool
    """All of them are ready for what comes next."""
    save: bool
    """The first of them wants the run saved."""


class Lockstep:
    """Has all processes go on together or stop together, however long one of them waits for something of its own.

    They meet in rounds, each a small all-reduce on the CPU, so that no GPU waits for it. The round before a training
    step runs in the background of the step before (`post`): when every process then had its next batch already, it
    costs no time.

    Args:
        world: this process among the others.
        stop_requested: whether this process was asked to stop.
        beat: called after every round: a sign of life.
    """

    def __init__(self, world: World, stop_requested: Callable[[], bool], beat: Callable[[], None]) -> None:
        self._group = dist.new_group(backend="gloo", timeout=NO_LIMIT) if world.world_size > 1 else None
        self._stop_requested, self._beat = stop_requested, beat
        self._flags = torch.zeros(3, dtype=torch.uint8)
        self._posted: Any = None
        self._wants_save = False
        self.stopped = False
        """Whether all have agreed to stop; there are no further rounds but those of `wait`."""

    def post(self, ready: bool, save: bool) -> None:
        """Begins the next round; the first process may ask for a save in it, which `takes_save` then tells all."""
        self._flags = torch.tensor([self._stop_requested(), not ready, save], dtype=torch.uint8)
        self._posted = True
        if self._group is not None:
            self._posted = dist.all_reduce(self._flags, dist.ReduceOp.MAX, self._group, async_op=True)

    def round(self, ready: bool) -> Round:
        """Meets the others, or ends the round that has been posted."""
        if self._posted is None:
            self.post(ready, save=False)
        if self._group is not None:
            self._posted.wait()
        self._posted = None
        stop, waiting, save = self._flags.bool().tolist()
        self._wants_save |= save
        self._beat()
        return Round(stop, not waiting, save)

    def go_on(self, poll: Callable[[float], bool] = lambda seconds: True) -> bool:
        """Waits until all processes are ready; False as soon as any was asked to stop.

        Args:
            poll: whether this process is ready, after waiting for that at most so many seconds.
        """
        while not self.stopped:
            found = self.round(self._posted is not None or poll(_POLL_SECONDS))
            self.stopped = found.stop
            if found.ready:
                break
        return not self.stopped

    def hold_up(self) -> bool:
        """Has the others wait a while longer, in `go_on`; true if they need not, as all are to stop."""
        if not self.stopped:
            self.stopped = self.round(ready=False).stop
        return self.stopped

    def wait(self, poll: Callable[[float], bool]) -> None:
        """Waits until all processes are ready, stopped or not."""
        if self._posted is not None:
            raise RuntimeError("what was posted before has not been taken")
        while not self.round(poll(_POLL_SECONDS)).ready:
            pass

    def takes_save(self) -> bool:
        """Whether the first process has asked for a save since this was called last."""
        wanted, self._wants_save = self._wants_save, False
        return wanted
