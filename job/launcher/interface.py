"""The network interface over which the workers of several nodes talk to each other.

Left alone, Gloo takes the interface that the host's name stands for: under Debian and Ubuntu that is the loopback
interface (``127.0.1.1`` in ``/etc/hosts``), and some names stand for nothing. But the nodes have met over an interface
that works, and that is the one to use, unless the user names another one.
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
    "workers connect to each other at any port: let all of them through between the nodes (firewall, security group, "
    f"network policy), or name another interface in {GLOO} and {NCCL}"
)
_ANY_PORT_NUMBER = 9
"""A datagram socket can be connected to a port without a packet being sent."""
_JOIN_ERRORS = (
    re.compile(r"Gloo connectFullMesh failed.*SO_ERROR: (?P<why>[^,]+), remote=\[(?P<to>[^\]]+)\]:\d+", re.S),
    re.compile(r"Gloo connectFullMesh failed.*Connect (?P<why>timeout)(?P<to>)", re.S),  # the one that is connected to
    re.compile(r"NCCL error.*connect to (?P<to>\S+)<\d+> returned (?P<why>[^,]+), exceeded", re.S),
)
"""Error messages of Gloo and NCCL for a worker that cannot connect to another one."""


class Interface(NamedTuple):
    """A network interface of this machine."""

    name: str
    address: str
    """Its address by which the other nodes are reached."""

    def __str__(self) -> str:
        return f"{self.address} ({self.name})"


def with_address(address: str) -> Interface | None:
    """Return the interface of this machine that has this address; None if none has."""
    wanted = address.partition("%")[0]
    for name, addresses in _addresses().items():
        if wanted in addresses:
            return Interface(name, address)
    return None


def leading_to(host: str) -> Interface | None:
    """Return the interface over which this machine would send to a host; None if it has no way or no such name.

    For an address of this machine, that is the interface that has it.
    """
    with suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(host, _ANY_PORT_NUMBER, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as one:
                one.connect(place)
                return with_address(one.getsockname()[0])
    return None


def variables(interface: Interface, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that keep Gloo and NCCL on an interface, without those that the user has set."""
    wanted = {}
    if not environment.get(GLOO):
        wanted[GLOO] = interface.name
    if not environment.get(NCCL) and _nccl_file() is None:
        # NCCL takes a name for the beginning of one unless there is a "=" before it.
        wanted[NCCL] = f"={interface.name}"
        if ":" in interface.address and not environment.get(_NCCL_FAMILY):
            wanted[_NCCL_FAMILY] = "AF_INET6"  # the interface may also have an IPv4 address, which leads nowhere
    return wanted


def described(interface: Interface | None, goal: object, environment: Mapping[str, str] = os.environ) -> str:
    """Say which interfaces Gloo and NCCL take, and why: since one leads to `goal`, or as the user has set."""
    own, file = [f"{environment[name]} ({name})" for name in (GLOO, NCCL) if environment.get(name)], _nccl_file()
    if not environment.get(NCCL) and file is not None:
        own.append(f"what {file} says")
    chosen = (
        f"{interface.name} (leads to {goal})" if interface else f"the one of the host's name (none leads to {goal})"
    )
    return " and ".join(own if len(own) == 2 else [chosen, *own])


def of_gloo(interface: Interface | None, environment: Mapping[str, str] = os.environ) -> Interface | None:
    """Return the interface that Gloo will take, with the address that it will take of it.

    Raises:
        UserError: the user has named one that this machine does not have.
    """
    present = _addresses()
    named = environment.get(GLOO, "").split(",") if environment.get(GLOO) else []
    for name in named:
        if name not in present:
            expected = f"{socket.gethostname()} has no such interface; it has {', '.join(present)}"
            raise UserError(GLOO, environment[GLOO], expected, "name one of them, or unset it")
    name = named[0] if named else interface.name if interface else ""
    found = present.get(name, [])
    return Interface(name, found[0]) if found else interface


def join_error(error: Exception) -> str | None:
    """Return in one line that the workers cannot connect to each other, if the error says that; None otherwise."""
    if not isinstance(error, RuntimeError):
        return None
    found = next((match for one in _JOIN_ERRORS if (match := one.search(str(error))) is not None), None)
    if found is None:
        return None
    here = f"{socket.gethostname()}, at {of_gloo(None) or 'the address that its name stands for'}"
    if not found["to"]:
        return f"no worker of another node has connected to one of {here}; {REMEDY}"
    return one_line(f"a worker of {here} cannot connect to one at {found['to']}: {found['why']}; {REMEDY}")


def _addresses() -> dict[str, list[str]]:
    """The interfaces of this machine, each with its addresses, as the system lists them: IPv4 first."""
    return {
        name: [one.address.partition("%")[0] for one in found if one.family in (socket.AF_INET, socket.AF_INET6)]
        for name, found in psutil.net_if_addrs().items()
    }


def _nccl_file() -> str | None:
    """The file in which a site or the user has named NCCL's interface."""
    for path in _NCCL_FILES:
        with suppress(OSError, RuntimeError):
            if re.search(rf"^\s*{NCCL}\s*=", Path(path).expanduser().read_text(errors="replace"), re.M):
                return path
    return None
