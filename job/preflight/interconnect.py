"""Check of the network between nodes: does NCCL send gradients over InfiniBand, RoCE, Amazon's EFA, or TCP?

NCCL (2.29) first looks for a plugin, libnccl-net.so, then for InfiniBand devices (verbs). It uses TCP if neither finds
a device, and says so only with NCCL_DEBUG=INFO. A container often sees the cards in /sys but cannot open them.
"""

import ctypes
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from job.preflight.findings import Findings

_ROW = "between nodes"
_AMAZON = "0x1d0f"
"""PCI vendor id of EFA devices, which have no verbs that NCCL itself could use."""
_LEAST_LOCKABLE_BYTES = 2**30
"""NCCL locks its InfiniBand buffers in memory; container engines allow 64 KiB or 8 MiB by default."""
_SIOCGIFADDR = 0x8915
"""The ioctl of Linux that reads the IPv4 address of a network interface."""
_MAX_NAMES = 4
"""Ports or interfaces that a row lists at most."""


@dataclass(frozen=True)
class Port:
    """A port of a network card in /sys/class/infiniband."""

    card: str
    number: str
    is_active: bool
    kind: str
    """`InfiniBand`, `RoCE` (which is Ethernet) or `EFA`."""
    rate: str
    """Link rate, such as ``400 Gb/sec``; empty if not known."""

    def __str__(self) -> str:
        return f"{self.card} ({self.rate})" if self.rate else self.card


def check_interconnect(
    findings: Findings,
    environment: Mapping[str, str] = os.environ,
    system: Path = Path("/sys"),
    devices: Path = Path("/dev"),
    can_load: Callable[[str], bool] | None = None,
    has_address: Callable[[str], bool] | None = None,
    lockable_bytes: Callable[[], int | None] | None = None,
) -> None:
    """Add a row that says what NCCL will use between the nodes of this run.

    Args:
        findings: takes the row.
        environment: NCCL_NET, NCCL_NET_PLUGIN, NCCL_IB_DISABLE, NCCL_IB_HCA and NCCL_SOCKET_IFNAME are read.
        system: path of /sys.
        devices: path of /dev.
        can_load: returns True if a library of this name can be loaded; None to try it.
        has_address: returns True if a network interface has an IPv4 address; None to ask the kernel.
        lockable_bytes: returns how much memory this process may lock, or None for no limit; None to ask the kernel.
    """
    can_load, has_address = can_load or _can_load, has_address or _has_address
    wanted = environment.get("NCCL_NET", "").lower()
    named_plugin = environment.get("NCCL_NET_PLUGIN", "")
    has_plugin = named_plugin != "none" and (bool(named_plugin) or can_load("libnccl-net.so"))
    ports = find_ports(system)
    active = [port for port in ports if port.is_active]
    efa = [port for port in active if port.kind == "EFA"]
    verbs = [port for port in active if port.kind != "EFA"]
    usable = [port for port in verbs if _is_selected(environment.get("NCCL_IB_HCA", ""), port.card, port.number)]
    is_disabled = environment.get("NCCL_IB_DISABLE", "0") not in ("", "0")

    if wanted == "socket":
        _add_tcp(findings, environment, system, has_address, "NCCL_NET says so", "")
    elif wanted not in ("", "ib") and not has_plugin:
        found = f"NCCL_NET is {environment['NCCL_NET']}, but there is no plugin libnccl-net.so: NCCL would not start"
        findings.wrong(_ROW, found, "unset NCCL_NET, or build the image with EFA_VERSION: docs/image.md")
    elif efa and has_plugin and wanted != "ib":
        findings.right(_ROW, f"NCCL uses EFA: {_some(efa)}")
    elif wanted not in ("", "ib") or named_plugin not in ("", "none"):
        found = (
            "an NCCL plugin decides "
            f"(NCCL_NET {wanted or 'is not set'}, NCCL_NET_PLUGIN {named_plugin or 'is not set'})"
        )
        findings.unsure(_ROW, found, "run with NCCL_DEBUG=INFO to see what it chooses")
    elif is_disabled and wanted != "ib":
        remedy = "unset NCCL_IB_DISABLE" if verbs else ""
        _add_tcp(findings, environment, system, has_address, "NCCL_IB_DISABLE says so", remedy)
    elif usable and not is_disabled:
        ports_found = _described(usable)
        if obstacle := _obstacle(devices, can_load):
            reason, remedy = obstacle
            if wanted == "ib":
                found = f"NCCL_NET is IB, and there is {ports_found}, but {reason}: NCCL would not start"
                findings.wrong(_ROW, found, remedy)
            else:
                reason = f"there is {ports_found}, but {reason}"
                _add_tcp(findings, environment, system, has_address, reason, remedy)
        else:
            _add_verbs(findings, ports_found, (lockable_bytes or _lockable_bytes)())
    elif wanted == "ib":
        reason = "NCCL_IB_DISABLE is set" if is_disabled else _why_tcp(ports, verbs, environment)
        found = f"NCCL_NET is IB, but {reason}: NCCL would not start"
        findings.wrong(_ROW, found, "unset one of these variables, or bring the port up")
    else:
        remedy = "build the image with EFA_VERSION: docs/image.md" if efa else "use nodes with InfiniBand, RoCE or EFA"
        if ports and not efa:
            remedy = "bring the port up, or correct NCCL_IB_HCA"
        _add_tcp(findings, environment, system, has_address, _why_tcp(ports, verbs, environment), remedy)


def find_ports(system: Path = Path("/sys")) -> list[Port]:
    """Return the ports of all cards, sorted by name."""
    ports = []
    for folder in sorted((system / "class/infiniband").glob("*/ports/*")):
        card = folder.parent.parent
        layer = _text(folder / "link_layer")
        kind = "EFA" if _text(card / "device/vendor") == _AMAZON else "RoCE" if layer == "Ethernet" else "InfiniBand"
        rate = _text(folder / "rate").partition(" (")[0]
        ports.append(Port(card.name, folder.name, _text(folder / "state").endswith("ACTIVE"), kind, rate))
    return ports


def _obstacle(devices: Path, can_load: Callable[[str], bool]) -> tuple[str, str] | None:
    """Return why this process cannot open a port, and what to do about it; None if it can."""
    if not can_load("libibverbs.so.1"):
        return "libibverbs is missing", "install libibverbs1 and ibverbs-providers, which the image has"
    if not any((devices / "infiniband").glob("uverbs*")):
        remedy = (
            "start the container with --device /dev/infiniband; "
            "on Kubernetes request the resource of the RDMA device plugin"
        )
        return f"{devices / 'infiniband'} is not in this container", remedy
    return None


def _add_verbs(findings: Findings, ports: str, lockable_bytes: int | None) -> None:
    """Add the row for InfiniBand or RoCE."""
    if lockable_bytes is not None and lockable_bytes < _LEAST_LOCKABLE_BYTES:
        found = (
            f"NCCL uses {ports}, but this process may lock only {lockable_bytes / 2**10:,.0f} KiB of memory, "
            f"and NCCL needs about {_LEAST_LOCKABLE_BYTES / 2**30:.0f} GiB"
        )
        findings.unsure(_ROW, found, "start the container with --ulimit memlock=-1, or raise `ulimit -l` of the node")
    else:
        findings.right(_ROW, f"NCCL uses {ports}")


def _add_tcp(
    findings: Findings,
    environment: Mapping[str, str],
    system: Path,
    has_address: Callable[[str], bool],
    reason: str,
    remedy: str,
) -> None:
    """Add the row for TCP, with the interfaces that NCCL will use and the reason."""
    wanted = environment.get("NCCL_SOCKET_IFNAME", "")
    names = _interfaces(system, wanted, has_address)
    if not names:
        lacking = f"NCCL_SOCKET_IFNAME={wanted} names no interface" if wanted else "no interface has an address"
        existing = ", ".join(sorted(path.name for path in (system / "class/net").glob("*")))
        remedy = f"set NCCL_SOCKET_IFNAME to one of {existing or 'the interfaces of this node'}"
        findings.wrong(_ROW, f"NCCL uses TCP ({reason}), but {lacking}", remedy)
        return
    interfaces = ", ".join(name + _speed(system / "class/net" / name) for name in names[:_MAX_NAMES])
    found = f"NCCL uses TCP over {interfaces} ({reason}): slow on several nodes"
    default_remedy = "a larger train.micro_batch_size or train.global_batch_size needs fewer transfers per token"
    findings.unsure(_ROW, found, remedy or default_remedy)


def _interfaces(system: Path, wanted: str, has_address: Callable[[str], bool]) -> list[str]:
    """Return the interfaces that NCCL would use: those that NCCL_SOCKET_IFNAME selects, else by NCCL's own order."""
    paths = sorted((system / "class/net").glob("*"))
    up = [path.name for path in paths if _text(path / "operstate") in ("up", "unknown") and has_address(path.name)]
    if wanted:
        return [name for name in up if _is_selected(wanted, name)]
    for preferred in ("ib", "^docker,lo,virbr", "docker", "lo", "virbr"):
        if names := [name for name in up if _is_selected(preferred, name)]:
            return names
    return []


def _is_selected(selection: str, name: str, port: str = "") -> bool:
    """Return True if a variable of NCCL selects this name.

    A selection is a list of beginnings of names, separated by commas. "^" in front excludes them, "=" in front makes
    them whole names, and ":1" after a name selects one port.
    """
    excludes, selection = selection.startswith("^"), selection.removeprefix("^")
    is_exact, selection = selection.startswith("="), selection.removeprefix("=")
    if not selection:
        return True
    for entry in selection.split(","):
        beginning, _, number = entry.partition(":")
        if (name == beginning if is_exact else name.startswith(beginning)) and number in ("", port):
            return not excludes
    return excludes


def _why_tcp(ports: list[Port], verbs: list[Port], environment: Mapping[str, str]) -> str:
    """Return why NCCL uses none of these ports."""
    if verbs:
        return f"NCCL_IB_HCA={environment.get('NCCL_IB_HCA')} names none of {_some(verbs)}"
    if not ports:
        return "no InfiniBand, RoCE or EFA in /sys/class/infiniband"
    if any(port.is_active for port in ports):
        return f"there is EFA, {_some(ports)}, but no plugin for it"
    return f"no port of {_some(ports)} is active"


def _described(ports: list[Port]) -> str:
    return f"{' and '.join(sorted({port.kind for port in ports}))}: {_some(ports)}"


def _some(ports: list[Port]) -> str:
    more = f" and {len(ports) - _MAX_NAMES} more" if len(ports) > _MAX_NAMES else ""
    return ", ".join(map(str, ports[:_MAX_NAMES])) + more


def _speed(interface: Path) -> str:
    speed = _text(interface / "speed")
    return f" ({int(speed) / 1000:g} Gb/s)" if speed.isdecimal() else ""


def _text(path: Path) -> str:
    """Return the content of a file; empty if it cannot be read, as the speed of an interface that is down."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _has_address(interface: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
        except OSError:
            return False
    return True


def _lockable_bytes() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit
