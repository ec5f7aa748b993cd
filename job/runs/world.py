"""This process among the others."""

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The processes of a run, as the launcher placed them."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
