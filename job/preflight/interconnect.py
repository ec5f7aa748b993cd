"""What NCCL will send gradients over between nodes: InfiniBand or RoCE, Amazon's EFA, or TCP.

NCCL (2.29) asks a plugin first, libnccl-net.so, then the verbs of InfiniBand, and takes TCP where neither has a device.
It says so only with NCCL_DEBUG=INFO, and a container often sees the cards in /sys but cannot open them.
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
"""PCI's number of the maker of EFA devices, which have no verbs that NCCL itself could use."""
_LEAST_LOCKED_BYTES = 2**30
"""NCCL locks its buffers in memory for InfiniBand; container engines allow 64 KiB or 8 MiB unless told otherwise."""
_SIOCGIFADDR = 0x8915
_SHOWN = 4


@dataclass(frozen=True)
class Port:
    """A port of a card below /sys/class/infiniband."""

    card: str
    number: str
    is_active: bool
    kind: str
    """`InfiniBand`; `RoCE`, which is Ethernet; `EFA`."""
    rate: str
    """As ``400 Gb/sec``."""

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
    """Say what NCCL will take between the nodes of this run.

    Args:
        findings: takes the row.
        environment: NCCL_NET, NCCL_NET_PLUGIN, NCCL_IB_DISABLE, NCCL_IB_HCA and NCCL_SOCKET_IFNAME are honoured.
        system: where /sys is.
        devices: where /dev is.
        can_load: whether a library can be loaded by its name; None: it is tried.
        has_address: whether a network interface has an address of IPv4; None: the kernel is asked.
        lockable_bytes: how much memory this process may lock, None without a limit; None: the kernel is asked.
    """
    can_load, has_address = can_load or _can_load, has_address or _has_address
    wanted = environment.get("NCCL_NET", "").lower()
    named_plugin = environment.get("NCCL_NET_PLUGIN", "")
    has_plugin = named_plugin != "none" and (bool(named_plugin) or can_load("libnccl-net.so"))
    ports = find_ports(system)
    active = [port for port in ports if port.is_active]
    efa = [port for port in active if port.kind == "EFA"]
    verbs = [port for port in active if port.kind != "EFA"]
    usable = [port for port in verbs if _is_named(environment.get("NCCL_IB_HCA", ""), port.card, port.number)]
    is_disabled = environment.get("NCCL_IB_DISABLE", "0") not in ("", "0")

    if wanted == "socket":
        _tcp(findings, environment, system, has_address, "NCCL_NET says so", "")
    elif wanted not in ("", "ib") and not has_plugin:
        found = f"NCCL_NET is {environment['NCCL_NET']}, but there is no plugin libnccl-net.so: NCCL would not start"
        findings.wrong(_ROW, found, "unset NCCL_NET, or build the image with EFA_VERSION: docs/image.md")
    elif efa and has_plugin and wanted != "ib":
        findings.right(_ROW, f"NCCL takes EFA: {_some(efa)}")
    elif wanted not in ("", "ib") or named_plugin not in ("", "none"):
        found = (
            f"a plugin of NCCL decides (NCCL_NET {wanted or 'is not set'}, NCCL_NET_PLUGIN {named_plugin or 'neither'})"
        )
        findings.unsure(_ROW, found, "see what it says with NCCL_DEBUG=INFO")
    elif is_disabled and wanted != "ib":
        _tcp(
            findings,
            environment,
            system,
            has_address,
            "NCCL_IB_DISABLE says so",
            "unset NCCL_IB_DISABLE" if verbs else "",
        )
    elif usable and not is_disabled:
        if lack := _lack(devices, can_load):
            what, (reason, remedy) = _what(usable), lack
            if wanted == "ib":
                findings.wrong(_ROW, f"NCCL_NET is IB, and there is {what}, but {reason}: NCCL would not start", remedy)
            else:
                _tcp(findings, environment, system, has_address, f"there is {what}, but {reason}", remedy)
        else:
            _verbs(findings, _what(usable), (lockable_bytes or _lockable_bytes)())
    elif wanted == "ib":
        reason = "NCCL_IB_DISABLE is set" if is_disabled else _reason(ports, verbs, environment)
        findings.wrong(
            _ROW, f"NCCL_NET is IB, but {reason}: NCCL would not start", "unset one of them, or see to the port"
        )
    else:
        remedy = "build the image with EFA_VERSION: docs/image.md" if efa else "take nodes with InfiniBand, RoCE or EFA"
        remedy = "bring the port up, or see to NCCL_IB_HCA" if ports and not efa else remedy
        _tcp(findings, environment, system, has_address, _reason(ports, verbs, environment), remedy)


def find_ports(system: Path = Path("/sys")) -> list[Port]:
    """The ports of all cards, in the order of their names."""
    found = []
    for folder in sorted((system / "class/infiniband").glob("*/ports/*")):
        card = folder.parent.parent
        layer = _text(folder / "link_layer")
        kind = "EFA" if _text(card / "device/vendor") == _AMAZON else "RoCE" if layer == "Ethernet" else "InfiniBand"
        rate = _text(folder / "rate").partition(" (")[0]
        found.append(Port(card.name, folder.name, _text(folder / "state").endswith("ACTIVE"), kind, rate))
    return found


def _lack(devices: Path, can_load: Callable[[str], bool]) -> tuple[str, str] | None:
    """What keeps this process from opening a port, and what to do about it; None if nothing does."""
    if not can_load("libibverbs.so.1"):
        return "libibverbs is missing", "install libibverbs1 and ibverbs-providers, which the image has"
    if not any((devices / "infiniband").glob("uverbs*")):
        remedy = "start it with --device /dev/infiniband; on Kubernetes ask for the resource of the RDMA device plugin"
        return f"{devices / 'infiniband'} is not in this container", remedy
    return None


def _verbs(findings: Findings, what: str, lockable: int | None) -> None:
    if lockable is not None and lockable < _LEAST_LOCKED_BYTES:
        found = f"NCCL takes {what}; but only {lockable / 2**10:,.0f} KiB of memory may be locked, and it needs more"
        findings.unsure(_ROW, found, "start the container with --ulimit memlock=-1, or raise `ulimit -l` of the node")
    else:
        findings.right(_ROW, f"NCCL takes {what}")


def _tcp(
    findings: Findings,
    environment: Mapping[str, str],
    system: Path,
    has_address: Callable[[str], bool],
    reason: str,
    remedy: str,
) -> None:
    named = environment.get("NCCL_SOCKET_IFNAME", "")
    names = _interfaces(system, named, has_address)
    if not names:
        lacking = f"NCCL_SOCKET_IFNAME={named} names no interface" if named else "no interface has an address"
        found = f"NCCL takes TCP ({reason}), but {lacking}"
        there = ", ".join(sorted(path.name for path in (system / "class/net").glob("*")))
        findings.wrong(_ROW, found, f"set NCCL_SOCKET_IFNAME to one of {there or 'those of this node'}")
        return
    over = ", ".join(name + _speed(system / "class/net" / name) for name in names[:_SHOWN])
    found = f"NCCL takes TCP over {over} ({reason}): slow on several nodes"
    findings.unsure(_ROW, found, remedy or "more train.micro_batch_size and gradient accumulation hide some of it")


def _interfaces(system: Path, named: str, has_address: Callable[[str], bool]) -> list[str]:
    """Those that NCCL would take: what NCCL_SOCKET_IFNAME names, or else its own order of preference."""
    paths = sorted((system / "class/net").glob("*"))
    up = [path.name for path in paths if _text(path / "operstate") in ("up", "unknown") and has_address(path.name)]
    if named:
        return [name for name in up if _is_named(named, name)]
    for preferred in ("ib", "^docker,lo,virbr", "docker", "lo", "virbr"):
        if found := [name for name in up if _is_named(preferred, name)]:
            return found
    return []


def _is_named(words: str, name: str, port: str = "") -> bool:
    """Whether NCCL takes this one: names are separated by commas; "^" excludes, "=" wants whole names, ":" a port."""
    excludes, words = words.startswith("^"), words.removeprefix("^")
    is_exact, words = words.startswith("="), words.removeprefix("=")
    if not words:
        return True
    for word in words.split(","):
        beginning, _, number = word.partition(":")
        if (name == beginning if is_exact else name.startswith(beginning)) and number in ("", port):
            return not excludes
    return excludes


def _reason(ports: list[Port], verbs: list[Port], environment: Mapping[str, str]) -> str:
    if verbs:
        return f"NCCL_IB_HCA={environment.get('NCCL_IB_HCA')} names none of {_some(verbs)}"
    if not ports:
        return "no InfiniBand, RoCE or EFA in /sys/class/infiniband"
    if any(port.is_active for port in ports):
        return f"there is EFA, {_some(ports)}, but no plugin for it"
    return f"no port of {_some(ports)} is active"


def _what(ports: list[Port]) -> str:
    return f"{' and '.join(sorted({port.kind for port in ports}))}: {_some(ports)}"


def _some(ports: list[Port]) -> str:
    more = f" and {len(ports) - _SHOWN} more" if len(ports) > _SHOWN else ""
    return ", ".join(map(str, ports[:_SHOWN])) + more


def _speed(interface: Path) -> str:
    speed = _text(interface / "speed")
    return f" ({int(speed) / 1000:g} Gb/s)" if speed.isdecimal() else ""


def _text(path: Path) -> str:
    """What a file says; nothing where the kernel does not tell, as the speed of an interface that is down."""
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
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", interface[:15].encode()))
        except OSError:
            return False
    return True


def _lockable_bytes() -> int | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if limit == resource.RLIM_INFINITY else limit
