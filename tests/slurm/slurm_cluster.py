"""A real two-node Slurm on this machine: Debian's daemons with their own files, ports, hostnames and addresses.

`python -m tests.slurm.slurm_cluster` (as root) starts one, prints how to reach it, and stops it at Ctrl-C.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.image.stand_in import install

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "launch" / "slurm.sh"
CRASHED = REPOSITORY / "build" / "slurmd-crashed"
"""File that is there if a daemon has crashed, for the Makefile: jobs that it was starting have failed."""
CPUS, GPUS, MEMORY_MB = 32, 8, 256_000
"""Resources that each node reports."""
KILL_WAIT_SECONDS = 30
"""Time between SIGTERM and SIGKILL, as at most sites."""
NODE_LOST_SECONDS = 20
"""Slurm marks a node as down after this time without an answer."""
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
)
"""States of a job that has ended. There are many passing states; a busy Slurm shows even SIGNALING."""
_PACKAGES = ("slurm-wlm", "munge", "charliecloud", "hostname")
_READY_SECONDS = 60
_AS_HOST = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class SlurmCluster:
    """A cluster that runs inside a `with` block. At its end all processes of the daemons and jobs are gone."""

    def __init__(self, nodes: int = 2) -> None:
        install(*_PACKAGES)
        os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        # Any loopback address can be used. The names must be unique, because all clusters share the cgroups.
        network = [random.SystemRandom().randrange(1, 250) for _ in range(2)]
        self.addresses = {
            "n{}-{}-{}".format(*network, index): "127.{}.{}.{}".format(*network, index) for index in range(1, nodes + 1)
        }
        self.nodes = list(self.addresses)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which Slurm's commands find this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    # ---- Start and end ----

    def __enter__(self) -> "SlurmCluster":
        try:
            self._write_files()
            folder, munge = self.folder, self.folder / "munge"
            keys = [f"--{name}={munge / name}" for name in ("key-file", "socket", "pid-file", "seed-file", "log-file")]
            self._start("munged", ["munged", "--foreground", *keys])
            await_true((munge / "socket").exists, "munged")
            self._start("control", [*self._as_host("control"), "slurmctld", "-D", "-c"])
            for node in self.nodes:
                (folder / "spool" / node).mkdir()
                self.start_node(node)
            self.await_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._daemons):
            self.kill_node(name)
        for cgroup in (folder for node in self.nodes for folder in Path("/sys/fs/cgroup").glob(f"*/slurm_{node}")):
            for inner in sorted(cgroup.glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    inner.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start(node, [*self._as_host(node), "slurmd", "-D", "-N", node])

    def restart_crashed_nodes(self) -> None:
        """Start the daemons again that ended by themselves, as systemd does: slurmd 22.05 now and then crashes."""
        for node in self.nodes:
            daemon = self._daemons.get(node)
            if daemon is not None and daemon.poll() is not None:
                CRASHED.parent.mkdir(exist_ok=True)
                CRASHED.touch()
                del self._daemons[node]
                self.start_node(node)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node and all processes on the node at once, as a power failure does."""
        daemon = self._daemons.pop(node)
        host = _host_of(daemon.pid)
        processes = [psutil.Process(daemon.pid)]
        if host not in (None, _host_of(os.getpid())):
            processes += [
                process
                for process in psutil.process_iter()
                if process.pid != daemon.pid and _host_of(process.pid) == host
            ]
        for action in (psutil.Process.suspend, psutil.Process.kill):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    action(process)
        daemon.wait()
        psutil.wait_procs(processes, timeout=5)

    def await_ready(self) -> None:
        """Wait until all nodes accept jobs."""

        def ready() -> bool:
            states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False).split()
            return len(states) == len(self.nodes) and all(
                state in ("idle", "mixed", "allocated", "completing") for state in states
            )

        await_true(ready, "all nodes", _READY_SECONDS, self.logs)

    # ---- Jobs ----

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Run one of Slurm's commands with additional environment variables and return its output."""
        ended = subprocess.run(
            command, env=os.environ | self.environment | environment, capture_output=True, text=True, timeout=60
        )
        assert not check or ended.returncode == 0, f"{command}: {ended.stderr}"
        return ended.stdout if ended.returncode == 0 else ended.stderr

    def submit(self, *arguments: str | Path, **environment: str) -> str:
        """Submit a job with `sbatch` and return its id."""
        self.restart_crashed_nodes()
        return self.run("sbatch", "--parsable", *map(str, arguments), **environment).strip()

    def show_job(self, job: str) -> dict[str, str]:
        """Return Slurm's fields of a job, such as ``{"JobState": "RUNNING", ...}``."""
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_end(self, job: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job has ended and will not be restarted, and return Slurm's fields of the job."""

        def ended() -> bool:
            self.restart_crashed_nodes()
            return self.show_job(job)["JobState"] in ENDED

        await_true(ended, f"the end of job {job}", seconds, self.logs)
        return self.show_job(job)

    def logs(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))

    # ---- Private parts ----

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _as_host(self, name: str) -> list[str]:
        """Return the words to put before a command so that it has this hostname and can resolve the nodes' names."""
        hosts = self.folder / "hosts"
        return ["unshare", "--uts", "--mount", "--propagation=slave", "bash", "-c", _AS_HOST, "_", name, str(hosts)]

    def _write_files(self) -> None:
        folder = self.folder
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir()
        (folder / "munge" / "key-file").write_bytes(os.urandom(1024))
        (folder / "munge" / "key-file").chmod(0o600)
        names = "".join(f"{address} {name}\n" for name, address in self.addresses.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost control\n{names}")
        for index in range(GPUS):  # Device numbers for experiments. Slurm only checks that the files exist.
            os.mknod(folder / f"gpu{index}", stat.S_IFCHR | 0o600, os.makedev(60, index))
        (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu Type=h100 File={folder}/gpu[0-{GPUS - 1}]\n")
        # Use cgroups version 1 if available, because it finds child processes that a job has left behind.
        freezer = os.access("/sys/fs/cgroup/freezer/cgroup.procs", os.W_OK)
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        ports = _free_ports(len(self.nodes) + 1)
        lines = f"""
ClusterName=test
SlurmctldHost=control(127.0.0.1)
SlurmctldPort={ports.pop()}
# The rendezvous port of a run is derived from its job id, and all clusters on this machine share the ports.
FirstJobId={random.SystemRandom().randrange(1, 60_000)}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# Credentials expire soon, because a requeued job waits until those of its last start have expired.
AuthInfo=socket={folder}/munge/socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/{"cgroup" if freezer else "linuxproc"}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CommunicationParameters=NoCtldInAddrAny
ReturnToService=2
KillWait={KILL_WAIT_SECONDS}
SlurmdTimeout={NODE_LOST_SECONDS}
# Ended jobs can be queried for an hour.
MinJobAge=3600
MailProg=/bin/true
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:h100:{GPUS} State=UNKNOWN
{"".join(f"NodeName={n} NodeAddr={a} Port={ports.pop()}" + chr(10) for n, a in self.addresses.items())}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 MaxTime=INFINITE State=UP
PartitionName=low Nodes=ALL PriorityTier=1 MaxTime=INFINITE State=UP
"""
        (folder / "slurm.conf").write_text(lines)


def _host_of(pid: int) -> Path | None:
    """Return the namespace that processes with the same hostname share; None if the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/ns/uts").readlink()
    return None


def await_true(
    condition: Callable[[], bool], event: str, seconds: float = 30, explain: Callable[[], str] = lambda: ""
) -> None:
    """Wait until `condition` returns True; fail after `seconds` with the text of `explain`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{event} did not happen within {seconds} s\n{explain()}"
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    """Return unused ports below those that the kernel gives to outgoing connections."""
    free = []
    for port in random.SystemRandom().sample(range(10_000, 20_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            free.append(port)
        if len(free) == count:
            break
    return free


def main() -> None:
    with SlurmCluster() as cluster:
        (setting,) = cluster.environment.items()
        print(f"export {'='.join(setting)}\nnodes {', '.join(cluster.nodes)}; Ctrl-C ends them", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
