"""A test of the connection from each node to the next one, before the workers start.

That all nodes reach node 0 says little: a firewall may let one port through, and the workers would wait for minutes and
then end with a traceback. So each node listens where its workers will, and the node before it connects. With the ring
closed, every node has connected to another one and been connected to.
"""

import socket
from contextlib import suppress
from dataclasses import dataclass

from job.launcher import interface
from job.launcher.interface import Interface

_MOST_AT_ONCE = 2048
"""Connections that may wait to be accepted. The system may allow fewer; the other nodes then try again."""
_MOST_NAMED = 8
_REACHED_SECONDS = 15.0
"""Timeout of a connection. The kernel answers even on a busy node, so only blocked or lost packets take this long."""


@dataclass(frozen=True)
class Link:
    """How the workers of a node are reached."""

    host: str
    node: int
    address: str
    """Address of the interface that Gloo uses."""
    port: int
    """Port at which the node listens for the node before it; 0 if it cannot listen."""
    first: str
    """Address of node 0, as this node has reached it."""
    network: str
    """Interfaces for Gloo and NCCL, and why these, in words."""

    def __str__(self) -> str:
        return f"{self.host} (node {self.node}, {self.address or 'whose address is not known'})"


class NodesApart(Exception):
    """The nodes have met, but the workers of one cannot reach those of another."""


def listen_at(address: str) -> socket.socket | None:
    """Return a socket that listens at an address of this node; None if it cannot."""
    with suppress(OSError):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family)
    return None


def reach(ours: Link, theirs: Link) -> None:
    """Connect to another node as a worker would.

    Raises:
        NodesApart: it cannot be reached.
    """
    if not theirs.port:
        return
    try:
        socket.create_connection((theirs.address, theirs.port), _REACHED_SECONDS).close()
    except OSError as error:
        raise NodesApart(
            f"{ours} has met {theirs}, but cannot connect to it at that address, as workers do: "
            f"{(error.strerror or str(error)).lower()}; {interface.REMEDY}"
        ) from None


def interface_towards(links: list[Link]) -> Interface | None:
    """Node 0's interface: the one by whose address the others have reached it, or else the one that leads to them.

    The name of node 0 may stand for its loopback interface here, and for another one everywhere else.
    """
    found = (interface.with_address(one.first) or interface.leading_to(one.address) for one in links)
    return next((one for one in found if one is not None), None)


def described(links: list[Link]) -> str:
    """Describe the interfaces of all nodes in one line; nodes with equal interfaces are named together."""
    nodes: dict[str, list[int]] = {}
    for node, one in enumerate(links):
        nodes.setdefault(one.network, []).append(node)
    if len(nodes) == 1:
        return f"network: {links[0].network}, on all {len(links)} nodes"
    return f"network: {'; '.join(f'{words}, on nodes {listed(these)}' for words, these in nodes.items())}"


def listed(nodes: list[int]) -> str:
    """Format a list of node numbers, shortened if it is long."""
    return f"{nodes[:_MOST_NAMED]}" + (f" and {len(nodes) - _MOST_NAMED} more" if len(nodes) > _MOST_NAMED else "")


def listen_everywhere(port: int, opened: list[socket.socket]) -> bool:
    """Adds to `opened` a socket that listens at a port of all addresses of this node; False if the port is taken."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    with suppress(OSError):
        opened.append(socket.create_server(("", port), family=family, backlog=_MOST_AT_ONCE, dualstack_ipv6=both))
        return True
    return False
