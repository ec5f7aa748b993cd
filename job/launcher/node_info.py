"""The description of a node, which is compared with those of the others before the workers start."""

from dataclasses import dataclass
from typing import Any

from job.errors import UserError


@dataclass(frozen=True)
class Card:
    """Description of a node. The fields after `token` must be equal on all nodes."""

    host: str
    token: str
    """Identifies this start of the node: a node that replaces it has another token."""
    processes: int
    """Number of workers on the node."""
    versions: dict[str, str]
    """Versions of the packages that affect the results, by package name."""
    settings: dict[str, Any]
    """Settings by dotted name, without those that may differ between nodes."""


def misfit(cards: list[Card]) -> UserError | None:
    """Return an error that names the first difference of a node from node 0; None if there is none."""
    first, remedy = cards[0], "start the same command, with the same image and settings, on all nodes"
    for node, card in enumerate(cards):
        where = f"on {card.host} (node {node}), but {{!r}} on {first.host} (node 0)"
        if card.processes != first.processes:
            few = "are all GPUs there? or set train.processes"
            return UserError("train.processes", card.processes, where.format(first.processes), few)
        for what, mine, theirs in (("version of ", card.versions, first.versions), ("", card.settings, first.settings)):
            for name in sorted(mine.keys() | theirs.keys()):
                if mine.get(name) != theirs.get(name):
                    return UserError(f"{what}{name}", mine.get(name), where.format(theirs.get(name)), remedy)
    return None
