"""The description of a node, which it sends before the workers start, and the comparison of all nodes."""

from dataclasses import dataclass
from typing import Any

from job.errors import UserError


@dataclass(frozen=True)
class NodeInfo:
    """Description of a node. The fields after `token` must be equal on all nodes."""

    host: str
    token: str
    """Identifies this start of the node: a node that replaces it has another token."""
    workers: int
    """Number of workers on the node."""
    versions: dict[str, str]
    """Versions of the packages that affect the results, by package name."""
    settings: dict[str, Any]
    """Settings by dotted name, without those that may differ between nodes."""


def find_difference(nodes: list[NodeInfo]) -> UserError | None:
    """Return an error that names the first difference between a node and node 0; None if all nodes are equal."""
    first = nodes[0]
    remedy = "start the same command, with the same image and settings, on all nodes"
    for node, info in enumerate(nodes):
        expected = f"is the value on {info.host} (node {node}), but {first.host} (node 0) has {{!r}}"
        if info.workers != first.workers:
            workers_remedy = "check that every node has all its GPUs, or set train.processes"
            return UserError("train.processes", info.workers, expected.format(first.workers), workers_remedy)
        for prefix, values, first_values in (
            ("version of ", info.versions, first.versions),
            ("", info.settings, first.settings),
        ):
            for name in sorted(values.keys() | first_values.keys()):
                if values.get(name) != first_values.get(name):
                    return UserError(
                        f"{prefix}{name}", values.get(name), expected.format(first_values.get(name)), remedy
                    )
    return None
