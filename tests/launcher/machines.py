"""Machines on this one, each with a network, a host name and an ``/etc/hosts`` of its own, joined by a cable.

A process holds each of them together, and ends with the test, whatever happens to that: the kernel then takes the
network, the cable and the file back.
"""

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from small_run import REPOSITORY

MISSING = [name for name in ("ip", "iptables", "unshare", "nsenter") if shutil.which(name) is None]
WHY_NOT = "needs root" if os.geteuid() else f"needs {', '.join(MISSING)} (apt-get install iproute2 iptables)"
CANNOT = bool(os.geteuid() or MISSING)
"""Whether there can be no such machines here; `WHY_NOT` says why."""
_READY = "ready"


class Machine:
    """A machine with a network interface, ``cable``."""

    def __init__(self, name: str, pid: int) -> None:
        self.name, self._pid = name, pid

    @property
    def under(self) -> list[str]:
        """What a command is to be started under to run on it."""
        return ["nsenter", f"--target={self._pid}", "--net", "--uts", "--mount", f"--wd={REPOSITORY}"]

    def run(self, *command: str) -> None:
        subprocess.run([*self.under, *command], check=True)

    def block_all_ports_but(self, port: int, verdict: str, spared: int = 0) -> None:
        """As a firewall that lets connections to one port in, and answers the others with ``DROP`` or ``REJECT``.

        The first `spared` connections to other ports come through.
        """
        new = ("--append", "INPUT", "--in-interface", "cable", "--protocol", "tcp", "--syn", "!", "--dport", str(port))
        if spared:
            few = ("--match", "limit", "--limit", "1/day", "--limit-burst", str(spared))
            self.run("iptables", *new, *few, "--jump", "ACCEPT")
        self.run("iptables", *new, "--jump", verdict)

    def cut(self) -> None:
        """As pulling the cable."""
        self.run("ip", "link", "set", "cable", "down")


@contextmanager
def joined(folder: Path, hosts: Sequence[str], addresses: Sequence[str]) -> Iterator[list[Machine]]:
    """Two machines, with these hosts files and addresses (``10.0.0.1/24``)."""
    with ExitStack() as stack:
        machines = []
        for number, text in enumerate(hosts):
            name = f"machine{number}"
            (folder / f"hosts-{number}").write_text(text.format(name=name))
            machines.append(stack.enter_context(_held(name, folder / f"hosts-{number}")))
        first, second = machines
        ends = [("netns", str(one._pid)) for one in machines]
        cable = ["ip", "link", "add", "cable", *ends[0], "type", "veth", "peer", "name", "cable", *ends[1]]
        subprocess.run(cable, check=True)
        for machine, address in zip((first, second), addresses, strict=True):
            machine.run("ip", "link", "set", "lo", "up")
            machine.run("ip", "link", "set", "cable", "up")
            machine.run("ip", "address", "add", address, "dev", "cable", *(["nodad"] if ":" in address else []))
        yield machines


@contextmanager
def _held(name: str, hosts: Path) -> Iterator[Machine]:
    """A machine without a cable."""
    script = f'hostname {name} && mount --bind "$0" /etc/hosts && echo {_READY} && exec cat'
    command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", script, str(hosts)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        timer = threading.Timer(30, holder.kill)
        timer.start()
        assert holder.stdout.readline().decode().strip() == _READY
        timer.cancel()
        yield Machine(name, holder.pid)
        holder.stdin.close()
