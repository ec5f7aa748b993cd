"""Check before the workers start that each node can connect to the next one.

Being able to reach node 0 is not enough: a firewall may allow only the rendezvous port. The workers would then wait for
minutes and fail with a traceback. So each node listens on the interface that its workers will use, and the node before
it connects. Node 0 follows the last node, so every node connects once and accepts one connection.
"""

import socket
from contextlib import suppress
from dataclasses import dataclass

from job.launcher import interface
from job.launcher.interface import Interface

_BACKLOG = 2048
"""Connections that may wait to be accepted. If the system allows fewer, the other nodes try again."""
_MOST_LISTED = 8
_CONNECT_SECONDS = 15.0
"""Timeout of a connection. The kernel answers even on a busy node, so only blocked or lost packets take this long."""


@dataclass(frozen=True)
class NodeAddress:
    """Address at which other nodes reach the workers of a node."""

    host: str
    node: int
    address: str
    """Address of the interface that Gloo uses; empty if it is not known."""
    port: int
    """Port on which the node listens for the node before it; 0 if it cannot listen."""
    first: str
    """Address at which this node reached node 0."""
    network: str
    """Interfaces that Gloo and NCCL use, and the reason, for the log."""

    def __str__(self) -> str:
        return f"{self.host} (node {self.node}, {self.address or 'address unknown'})"


class NodeUnreachable(Exception):
    """The nodes have met at the rendezvous, but the workers of one node cannot connect to those of another."""


def listen_at(address: str) -> socket.socket | None:
    """Return a socket that listens on a free port of an address of this node; None if it cannot be opened."""
    with suppress(OSError):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, 0), family=family)
    return None


def listen_on_all_addresses(port: int) -> socket.socket | None:
    """Return a socket that listens on a port of all addresses of this node; None if the port is in use."""
    dualstack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dualstack else socket.AF_INET
    with suppress(OSError):
        return socket.create_server(("", port), family=family, backlog=_BACKLOG, dualstack_ipv6=dualstack)
    return None


def check_connection(own: NodeAddress, other: NodeAddress) -> None:
    """Connect to another node as a worker would.

    Raises:
        NodeUnreachable: the connection failed.
    """
    if not other.port:
        return
    try:
        socket.create_connection((other.address, other.port), _CONNECT_SECONDS).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise NodeUnreachable(
            f"{own} cannot connect to {other} at that address, although both joined the rendezvous: "
            f"{reason}; {interface.REMEDY}"
        ) from None


def interface_of_node_0(others: list[NodeAddress]) -> Interface | None:
    """Return the interface of this node, node 0, over which it communicates with the other nodes.

    It is the one at whose address they reached node 0; if no interface has that address, the one that leads to them.
    The host name of node 0 is not used: on node 0 itself, it may mean the loopback interface.
    """
    for other in others:
        found = interface.find_by_address(other.first) or interface.leading_to(other.address)
        if found is not None:
            return found
    return None


def describe_networks(addresses: list[NodeAddress]) -> str:
    """Return one line with the interfaces of all nodes; nodes with the same interfaces are listed together."""
    nodes_by_network: dict[str, list[int]] = {}
    for node, address in enumerate(addresses):
        nodes_by_network.setdefault(address.network, []).append(node)
    if len(nodes_by_network) == 1:
        return f"network: {addresses[0].network}, on all {len(addresses)} nodes"
    parts = [f"{network}, on nodes {list_nodes(nodes)}" for network, nodes in nodes_by_network.items()]
    return f"network: {'; '.join(parts)}"


def list_nodes(nodes: list[int]) -> str:
    """Return node numbers as text; a long list is shortened."""
    more = f" and {len(nodes) - _MOST_LISTED} more" if len(nodes) > _MOST_LISTED else ""
    return f"{nodes[:_MOST_LISTED]}{more}"
