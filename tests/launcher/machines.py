"""Two virtual machines for tests: namespaces of this machine with their own network, host name and ``/etc/hosts``.

A process holds each machine's namespaces. It exits when the test ends, even if the test fails, and the kernel then
removes the network, the cable and the mounted file.
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
"""True if such machines cannot be created here; `WHY_NOT` is the reason."""
_READY = "ready"


class Machine:
    """A virtual machine whose only network interface, except for loopback, is ``cable``."""

    def __init__(self, name: str, pid: int) -> None:
        self.name, self._pid = name, pid

    @property
    def under(self) -> list[str]:
        """Return the prefix of a command line that runs the command on this machine."""
        return ["nsenter", f"--target={self._pid}", "--net", "--uts", "--mount", f"--wd={REPOSITORY}"]

    def run(self, *command: str) -> None:
        """Run a command on this machine.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        subprocess.run([*self.under, *command], check=True)

    def block_all_ports_but(self, port: int, verdict: str, spared: int = 0) -> None:
        """Add a firewall rule that blocks new connections to all ports except one.

        Args:
            port: port to which connections are allowed.
            verdict: ``DROP`` or ``REJECT``, for all other connections.
            spared: number of connections to other ports that are allowed before the rule blocks them.
        """
        rule = ("--append", "INPUT", "--in-interface", "cable", "--protocol", "tcp", "--syn", "!", "--dport", str(port))
        if spared:
            first_few = ("--match", "limit", "--limit", "1/day", "--limit-burst", str(spared))
            self.run("iptables", *rule, *first_few, "--jump", "ACCEPT")
        self.run("iptables", *rule, "--jump", verdict)

    def cut(self) -> None:
        """Take the network interface down, as if the cable was pulled out."""
        self.run("ip", "link", "set", "cable", "down")


@contextmanager
def joined(folder: Path, hosts: Sequence[str], addresses: Sequence[str]) -> Iterator[list[Machine]]:
    """Start two machines that are connected with each other.

    Args:
        folder: temporary folder for their hosts files.
        hosts: content of each hosts file; ``{name}`` becomes the machine's host name.
        addresses: address and prefix length of each machine, such as ``10.0.0.1/24``.
    """
    with ExitStack() as stack:
        machines = []
        for number, text in enumerate(hosts):
            name = f"machine{number}"
            (folder / f"hosts-{number}").write_text(text.format(name=name))
            machines.append(stack.enter_context(_held(name, folder / f"hosts-{number}")))
        first, second = machines
        ends = [("netns", str(machine._pid)) for machine in machines]
        cable = ["ip", "link", "add", "cable", *ends[0], "type", "veth", "peer", "name", "cable", *ends[1]]
        subprocess.run(cable, check=True)
        for machine, address in zip((first, second), addresses, strict=True):
            machine.run("ip", "link", "set", "lo", "up")
            machine.run("ip", "link", "set", "cable", "up")
            machine.run("ip", "address", "add", address, "dev", "cable", *(["nodad"] if ":" in address else []))
        yield machines


@contextmanager
def _held(name: str, hosts: Path) -> Iterator[Machine]:
    """Start a machine without a cable."""
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
