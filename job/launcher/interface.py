"""The network interface over which the workers of several nodes communicate.

By default, Gloo uses the interface of the host name. On Debian and Ubuntu that is the loopback interface (``127.0.1.1``
in ``/etc/hosts``), and some host names have no address at all. The nodes have met over an interface that works, so the
workers use that one, unless the user has set another one.
"""

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from job.errors import UserError, one_line

GLOO, NCCL, _NCCL_FAMILY = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY"
_NCCL_FILES = ("/etc/nccl.conf", "~/.nccl.conf")
"""Files in which a site or a user may set NCCL's variables; environment variables have priority."""
REMEDY = (
    "workers connect to each other on any port: allow all ports between the nodes (firewall, security group, "
    f"network policy), or set another interface in {GLOO} and {NCCL}"
)
_ANY_PORT_NUMBER = 9
"""Port for connecting a datagram socket, which sends no packet."""
_CONNECTION_ERRORS = (
    re.compile(r"Gloo connectFullMesh failed.*SO_ERROR: (?P<reason>[^,]+), remote=\[(?P<remote>[^\]]+)\]:\d+", re.S),
    # Gloo's message on the worker that waits for the connection: it does not name the other one.
    re.compile(r"Gloo connectFullMesh failed.*Connect (?P<reason>timeout)(?P<remote>)", re.S),
    re.compile(r"NCCL error.*connect to (?P<remote>\S+)<\d+> returned (?P<reason>[^,]+), exceeded", re.S),
)
"""Error messages of Gloo and NCCL for a worker that cannot connect to another one."""


class Interface(NamedTuple):
    """A network interface of this machine."""

    name: str
    address: str
    """Address of the interface at which other nodes reach it."""

    def __str__(self) -> str:
        return f"{self.address} ({self.name})"


def find_by_address(address: str) -> Interface | None:
    """Return the interface of this machine that has this address; None if there is none."""
    plain_address = address.partition("%")[0]
    for name, addresses in _addresses().items():
        if plain_address in addresses:
            return Interface(name, address)
    return None


def leading_to(host: str) -> Interface | None:
    """Return the interface over which this machine would send to `host`; None if there is no route or no such host.

    For an address of this machine, that is the interface that has the address.
    """
    with suppress(OSError):
        for family, kind, protocol, _, target in socket.getaddrinfo(host, _ANY_PORT_NUMBER, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as connection:
                connection.connect(target)
                return find_by_address(connection.getsockname()[0])
    return None


def variables(interface: Interface, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return environment variables that make Gloo and NCCL use `interface`, without those that the user has set."""
    wanted = {}
    if not environment.get(GLOO):
        wanted[GLOO] = interface.name
    if not environment.get(NCCL) and _nccl_file() is None:
        # Without the "=", NCCL would take the name as a prefix.
        wanted[NCCL] = f"={interface.name}"
        if ":" in interface.address and not environment.get(_NCCL_FAMILY):
            # The interface may also have an IPv4 address, over which the other nodes cannot be reached.
            wanted[_NCCL_FAMILY] = "AF_INET6"
    return wanted


def describe_choice(interface: Interface | None, target: object, environment: Mapping[str, str] = os.environ) -> str:
    """Return which interfaces Gloo and NCCL use, and why, for messages.

    Args:
        interface: interface that leads to `target`; None if there is none.
        target: address at which the nodes meet.
        environment: variables in which the user may have set other interfaces.
    """
    set_by_user = [f"{environment[name]} ({name})" for name in (GLOO, NCCL) if environment.get(name)]
    if not environment.get(NCCL) and (file := _nccl_file()) is not None:
        set_by_user.append(f"the one that {file} sets for NCCL")
    if len(set_by_user) == 2:
        return " and ".join(set_by_user)
    default = (
        f"{interface.name} (leads to {target})"
        if interface
        else f"the interface of the host name (no interface leads to {target})"
    )
    return " and ".join([default, *set_by_user])


def gloo_interface(interface: Interface | None, environment: Mapping[str, str] = os.environ) -> Interface | None:
    """Return the interface that Gloo will use, with the address of it that Gloo will use.

    Args:
        interface: the interface that is used if the user has not set one; None if it is not known.
        environment: variables in which the user may have set an interface.

    Raises:
        UserError: the user has set an interface that this machine does not have.
    """
    addresses = _addresses()
    set_by_user = environment.get(GLOO, "").split(",") if environment.get(GLOO) else []
    for name in set_by_user:
        if name not in addresses:
            expected = f"{socket.gethostname()} has no such interface; it has {', '.join(addresses)}"
            raise UserError(GLOO, environment[GLOO], expected, "set it to one of them, or unset it")
    name = set_by_user[0] if set_by_user else interface.name if interface else ""
    return Interface(name, addresses[name][0]) if addresses.get(name) else interface


def connection_error(error: Exception) -> str | None:
    """Return one line for an error of Gloo or NCCL that means that workers cannot connect; None for other errors."""
    if not isinstance(error, RuntimeError):
        return None
    match = next((found for pattern in _CONNECTION_ERRORS if (found := pattern.search(str(error)))), None)
    if match is None:
        return None
    own_address = gloo_interface(None) or "the address of its host name"
    worker = f"a worker on {socket.gethostname()}, at {own_address},"
    if not match["remote"]:
        return f"{worker} received no connection from a worker of another node; {REMEDY}"
    return one_line(f"{worker} cannot connect to a worker at {match['remote']}: {match['reason']}; {REMEDY}")


def _addresses() -> dict[str, list[str]]:
    """Return the interfaces of this machine by name, each with its addresses in the system's order: IPv4 first."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def _nccl_file() -> str | None:
    """Return the configuration file that sets NCCL's interface; None if no file does."""
    for path in _NCCL_FILES:
        with suppress(OSError, RuntimeError):
            if re.search(rf"^\s*{NCCL}\s*=", Path(path).expanduser().read_text(errors="replace"), re.M):
                return path
    return None
