"""The place of this process among all processes of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Ranks and process counts, as the launcher set them."""

    rank: int
    """Number of this process among all processes of the run, from 0."""
    local_rank: int
    """Number of this process among the processes of its node, from 0."""
    world_size: int
    """Number of processes of the run."""
    local_world_size: int
    """Number of processes of this node."""
