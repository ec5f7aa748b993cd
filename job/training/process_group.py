"""The process group of a run, on the device that was chosen before the processes started."""

import torch
import torch.distributed as dist

from job.runs.world import World


def join(world: World, device: str) -> None:
    """Join the other processes; from then on `agree` works. A single process needs no group.

    Args:
        world: this process among the others.
        device: ``cuda`` or ``cpu``, as the process that started this one has decided.

    Raises:
        RuntimeError: this process' torch has another device; it would train on the wrong one silently.
    """
    if (found := "cuda" if torch.cuda.is_available() else "cpu") != device:
        raise RuntimeError(f"rank {world.rank} was started for {device}, but torch has {found} in this process")
    if device == "cuda":
        torch.cuda.set_device(world.local_rank)
    if world.world_size > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
