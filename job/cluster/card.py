"""What the nodes of a run compare before they start: what they bring, and that they are told the same."""

from dataclasses import dataclass
from typing import Any

from job.errors import UserError


@dataclass(frozen=True)
class Card:
    """What a node says of itself; what follows the token must be the same on all nodes."""

    host: str
    token: str
    """Of this start of it: whoever takes its place has another."""
    processes: int
    """Workers of the node."""
    versions: dict[str, str]
    """Of the packages that decide what is computed, by name."""
    settings: dict[str, Any]
    """By dotted name, without those that are a node's own."""


def misfit(cards: list[Card]) -> UserError | None:
    """In what a node differs from node 0, if any does."""
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
