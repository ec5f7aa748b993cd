"""Functions that all ranks call together: to join, to hear rank 0's decisions, and to agree before each step."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from job.errors import NoProgress, UserError
from job.model import gpu
from job.runs.choices import Hardware
from job.runs.world import World
from job.training.hang_detector import NO_LIMIT

Value = TypeVar("Value")
_POLL_SECONDS = 0.2
"""Longest time that a rank waits for something of its own before it hears the others again."""


def join(world: World, device: str) -> None:
    """Join the other processes; from then on `broadcast_from_rank0` works. A single process needs no group.

    Args:
        world: this process among the others.
        device: type of torch's device, as the process that started this one has decided.

    Raises:
        RuntimeError: torch has another device in this process; it would silently train on the wrong one.
    """
    if (found := gpu.KIND if gpu.is_available() else "cpu") != device:
        raise RuntimeError(f"rank {world.rank} was started for {device}, but torch has {found} in this process")
    on_gpu = device == gpu.KIND
    if on_gpu:
        gpu.select(world.local_rank)
    if world.world_size > 1:
        dist.init_process_group(gpu.backend(on_gpu))


def weakest_hardware(world: World, device: str) -> Hardware:
    """Return the hardware of the ranks; if their GPUs differ, each field has the lowest value. A collective."""
    if device == "cpu":
        return Hardware(device)
    ranks: list[Any] = [(gpu.capability(), gpu.name(), gpu.free_bytes(), gpu.memory_bytes())]
    if world.world_size > 1:
        mine, ranks = ranks[0], [None] * world.world_size
        dist.all_gather_object(ranks, mine)
    capability, name, *_ = min(ranks)
    free_bytes, memory_bytes = (min(rank[position] for rank in ranks) for position in (2, 3))
    return Hardware(device, name, capability, free_bytes, memory_bytes)


def all_ranks(world: World, answer: bool, device: torch.device) -> bool:
    """Return True if the answer of every rank is True. A collective on `device`, which waits for it."""
    if world.world_size == 1:
        return answer
    answers = torch.tensor(int(answer), device=device)
    dist.all_reduce(answers, dist.ReduceOp.MIN)
    return bool(answers)


def broadcast_from_rank0(world: World, decide: Callable[[], Value]) -> Value:
    """Return what `decide` returns on rank 0, on every rank; its UserError or NoProgress is raised on all of them."""
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


class Decision(NamedTuple):
    """What all ranks do next."""

    goes_on: bool
    """False if any rank was asked to stop."""
    save: bool
    """True if rank 0 wants the run saved now."""


class _Round(NamedTuple):
    """What all ranks know after a round."""

    stop: bool
    """True if any rank was asked to stop."""
    ready: bool
    """True if all ranks are ready for what comes next."""
    save: bool
    """True if rank 0 wants the run saved."""


class StepSync:
    """Lets all ranks continue or stop together, however long one of them waits for something of its own.

    They meet in rounds, each a small all-reduce on the CPU, so that no GPU waits for it. The round before a training
    step runs in the background of the step before (`post`). If every rank had its next batch by then, it takes no time.

    Args:
        world: this process among the others.
        stop_requested: returns True if this process was asked to stop.
        heartbeat: called after every round.
    """

    def __init__(self, world: World, stop_requested: Callable[[], bool], heartbeat: Callable[[], None]) -> None:
        self._group = dist.new_group(backend="gloo", timeout=NO_LIMIT) if world.world_size > 1 else None
        self._stop_requested, self._heartbeat = stop_requested, heartbeat
        self._flags = torch.zeros(3, dtype=torch.uint8)
        self._posted: Any = None
        self.stopped = False
        """True once all ranks have agreed to stop; from then on there are only the rounds of `wait`."""

    def post(self, ready: bool, save: bool) -> None:
        """Send this rank's answers for the next step without waiting; the next `decide` waits for those of all ranks.

        Args:
            ready: this rank has what it needs for the next step.
            save: rank 0 wants to save the run before the next step.
        """
        self._flags = torch.tensor([self._stop_requested(), not ready, save], dtype=torch.uint8)
        self._posted = True
        if self._group is not None:
            self._posted = dist.all_reduce(self._flags, dist.ReduceOp.MAX, self._group, async_op=True)

    def decide(self, poll: Callable[[float], bool] = lambda seconds: True) -> Decision:
        """Wait until all ranks are ready, or any was asked to stop.

        Args:
            poll: returns True if this rank is ready, after waiting for that at most so many seconds.
        """
        save = False
        while not self.stopped:
            round_ = self._meet(self._posted is not None or poll(_POLL_SECONDS))
            self.stopped, save = round_.stop, save or round_.save
            if round_.ready:
                break
        return Decision(not self.stopped, save)

    def go_on(self, poll: Callable[[float], bool] = lambda seconds: True) -> bool:
        """Wait as `decide` does; return False if all ranks stop."""
        return self.decide(poll).goes_on

    def hold_up(self) -> bool:
        """Let the others wait a while longer in `go_on`; return True if all ranks stop."""
        if not self.stopped:
            self.stopped = self._meet(ready=False).stop
        return self.stopped

    def wait(self, poll: Callable[[float], bool]) -> None:
        """Wait until all ranks are ready, stopped or not; `poll` as in `decide`."""
        if self._posted is not None:
            raise RuntimeError("a posted round must be ended by `decide` first")
        while not self._meet(poll(_POLL_SECONDS)).ready:
            pass

    def _meet(self, ready: bool) -> _Round:
        """Meet the other ranks, or end the round that was posted."""
        if self._posted is None:
            self.post(ready, save=False)
        if self._group is not None:
            self._posted.wait()
        self._posted = None
        stop, waiting, save = self._flags.bool().tolist()
        self._heartbeat()
        return _Round(stop, not waiting, save)
