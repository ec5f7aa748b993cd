"""Detection of the environment of this process, from environment variables: scheduler, nodes, GPUs, time limit.

One process per node calls `detect_environment`, and later starts the workers of its node. All nodes have to meet at the
address of node 0. A run on several nodes must never start as several runs on one node each, so a variable that is
missing or contradicts another one is an error that names it.
"""

import os
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from job.errors import UserError
from job.launcher.environment_variables import first_defined, read_integer, read_required
from job.launcher.gpus import Gpus, find_gpus, requested_processes
from job.local_dirs import scratch_folder
from job.runs.world import World
from job.setting_kinds import Duration

_WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_JOB_IDS = ("WIKILLM_JOB_ID", "SKYPILOT_TASK_ID", "SLURM_JOB_ID")
"""Variables with the job's name, by priority. SkyPilot comes before Slurm because SkyPilot on a Slurm cluster restarts
a job under a new Slurm job id."""
SWANLAB_MAX_TIME = Duration("3h50m")
"""Longest time that a SwanLab task may train. The task ends 4 hours after it starts, and installing packages counts."""
_NOTEBOOKS = {"KAGGLE_KERNEL_RUN_TYPE": "Kaggle", "COLAB_RELEASE_TAG": "Colab"}
"""Notebook platforms by a variable that each sets in its sessions. A session ends at most 12 hours after it began (see
launch/kaggle and launch/colab.ipynb), but no variable says when it began."""
_FIRST_PORT, _PORTS = 20000, 10000
"""Rendezvous ports. The kernel takes those from 32768 on for outgoing connections."""
_FIRST_SPECIAL_STEP = 4294967290
"""Slurm's step ids from this one on are not `srun` steps but interactive, batch and extern shells."""
_SLURM_NO_TIME = 4294967294
"""Slurm writes "not set" as this number and "infinite" as the next one; as times, both would be in the year 2106."""


class Rendezvous(NamedTuple):
    """Address and port of node 0, at which the nodes meet."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Fact(NamedTuple):
    """One detected property of the environment, for the output of `check`."""

    what: str
    """Name of the property."""
    value: str
    source: str
    """Environment variables that gave the value, or the reason for the default."""


@dataclass(frozen=True)
class Environment:
    """Environment in which this process runs."""

    kind: str
    """`this machine`, `several nodes`, `torchrun`, or the scheduler: `SkyPilot`, `Slurm`, `Kubernetes`, `Kaggle`, …"""
    node_rank: int
    nodes: int
    rendezvous: Rendezvous | None
    """Address at which the nodes meet; None for one node."""
    processes: int | None
    """Number of workers that the launcher requests for this node; None: one for each GPU, or one without GPUs."""
    gpus: Gpus
    world: World | None
    """Ranks of this process if torchrun started it, so that it is a worker itself; otherwise None."""
    job_id: str | None
    """The scheduler's name for the job, which does not change when it restarts the job; None without a scheduler."""
    ends_at: float | None
    """Time at which the scheduler ends the job, in seconds since 1970; None if it is not known."""
    scratch: Path
    """Folder on a local disk of this node, for files that may be lost."""
    facts: tuple[Fact, ...]
    """All of the above in words, with the sources."""


def detect_environment(environment: Mapping[str, str] = os.environ) -> Environment:
    """Return the environment of this process.

    Raises:
        UserError: an environment variable is missing, is not a number, or contradicts another one; it is named.
    """
    facts: list[Fact] = []
    world = world_from_environment(environment)
    kind, nodes = "torchrun", _Nodes(0, 1, None)
    if world is not None:
        facts.append(Fact("process", f"{world.rank} of {world.world_size}", "RANK, WORLD_SIZE"))
    else:
        kind, nodes, sources = _find_nodes(environment)
        facts.append(Fact("nodes", f"this is node {nodes.rank} of {nodes.size} (counted from 0)", sources))
        if nodes.rendezvous is not None:
            facts.append(Fact("rendezvous", str(nodes.rendezvous), sources))
    gpus = find_gpus(environment)
    facts.append(Fact("GPUs of this node", str(gpus.number), gpus.source))
    processes, source = requested_processes(environment, gpus)
    facts.append(Fact("processes of a node", str(processes or max(1, gpus.number)), source))
    job_id = job_id_from_environment(environment)
    source = first_defined(environment, _JOB_IDS) or f"none of {', '.join(_JOB_IDS)} is set"
    facts.append(Fact("job", job_id or "none", source))
    ends_at, source = _find_end(environment)
    left = "no limit is known" if ends_at is None else f"{(ends_at - time.time()) / 60:.0f} minutes"
    facts.append(Fact("time left", left, source))
    scratch, source = scratch_folder(environment)
    facts.append(Fact("scratch folder", str(scratch), source))
    return Environment(
        kind=kind,
        node_rank=nodes.rank,
        nodes=nodes.size,
        rendezvous=nodes.rendezvous,
        processes=processes,
        gpus=gpus,
        world=world,
        job_id=job_id,
        ends_at=ends_at,
        scratch=scratch,
        facts=(Fact("place", kind, ""), *facts),
    )


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World | None:
    """Return the ranks that torchrun gave this process; None if no launcher set the variables.

    Raises:
        UserError: only a part of the variables is set, or one is not a number or contradicts another one. Without this
            error, each process of the job would train alone.
    """
    if not any(name in environment for name in ("RANK", "WORLD_SIZE")):
        return None
    remedy = "start it with torchrun, which sets all of them, or unset all of them to run a single process"
    for name in (*_WORLD, "MASTER_ADDR", "MASTER_PORT"):
        read_required(environment, name, remedy)
    values = {name: read_integer(environment, name, remedy=remedy) for name in (*_WORLD, "MASTER_PORT")}
    for name, size_name in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if values[name] >= values[size_name]:
            raise UserError(name, values[name], f"expected less than {size_name}, which is {values[size_name]}", remedy)
    if values["LOCAL_WORLD_SIZE"] > values["WORLD_SIZE"]:
        expected = f"expected at most WORLD_SIZE, which is {values['WORLD_SIZE']}"
        raise UserError("LOCAL_WORLD_SIZE", values["LOCAL_WORLD_SIZE"], expected, remedy)
    return World(*(values[name] for name in _WORLD))


def job_id_from_environment(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the job's name, which does not change when the scheduler restarts the job; None without a scheduler.

    Slurm and SkyPilot set one. With other schedulers, WIKILLM_JOB_ID can be set.
    """
    name = first_defined(environment, _JOB_IDS)
    return environment[name] if name else None


def part_of_array(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return which part of the work this process does if several processes prepare a data set together.

    These are the tasks of a Slurm array or step, the pods of an Indexed Job, or the nodes of a SkyPilot task.

    Returns:
        Index of the part, counted from 0, and number of parts; (0, 1) for a process on its own.

    Raises:
        UserError: the variables do not say which part it is.
    """
    if "SLURM_JOB_ID" in environment and not _is_in_skypilot(environment):
        return _part_of_slurm_array(environment)
    if any(name in environment for name in ("JOB_COMPLETION_INDEX", "WIKILLM_NODES")) or _is_in_skypilot(environment):
        _, nodes, _ = _find_nodes(environment, need_rendezvous=False)
        return nodes.rank, nodes.size
    return 0, 1


def _part_of_slurm_array(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return index and number of parts for the tasks of an array, each of which may have a step with several tasks."""
    index, count = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        names = ("ID", "MIN", "MAX", "STEP", "COUNT")
        task, first, last, step, count = (read_integer(environment, f"SLURM_ARRAY_TASK_{name}") for name in names)
        if count > 1 and last - first != step * (count - 1):
            expected = "expected the task ids of the array to be a range, without gaps"
            raise UserError("SLURM_ARRAY_TASK_ID", task, expected, "use --array=0-15, or set data.worker")
        index = (task - first) // max(1, step)
    if _is_in_slurm_step(environment):
        tasks = read_integer(environment, "SLURM_STEP_NUM_TASKS", minimum=1)
        index, count = index * tasks + read_integer(environment, "SLURM_PROCID", below=tasks), count * tasks
    return index, count


# ---- Nodes ----


class _Nodes(NamedTuple):
    """This node's rank, the number of nodes, and where they meet."""

    rank: int
    size: int
    rendezvous: Rendezvous | None


def _find_nodes(environment: Mapping[str, str], need_rendezvous: bool = True) -> tuple[str, _Nodes, str]:
    """Return the kind of environment, its nodes, and the variables that gave them.

    Args:
        environment: all variables.
        need_rendezvous: False if the nodes do not communicate; then no address is read.

    Raises:
        UserError: a variable is missing, is not a number, or contradicts another one; it is named.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment and read_integer(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        expected = "processes that mpirun starts are not supported: they would not find each other"
        raise UserError(
            "OMPI_COMM_WORLD_SIZE", environment["OMPI_COMM_WORLD_SIZE"], expected, "use srun or torchrun instead"
        )
    if "WIKILLM_NODE_RANK" in environment:
        nodes = _nodes_from_variables(environment, "WIKILLM_NODE_RANK", "WIKILLM_NODES", need_rendezvous)
        return "several nodes", nodes, "WIKILLM_NODE_RANK, WIKILLM_NODES, MASTER_ADDR, MASTER_PORT"
    if "PET_NODE_RANK" in environment or "PET_NNODES" in environment:
        names = ("PET_NODE_RANK", "PET_NNODES", "PET_MASTER_ADDR", "PET_MASTER_PORT")
        rank, count, address, port = names
        nodes = _nodes_from_variables(environment, rank, count, need_rendezvous, address, port)
        return "Kubeflow Trainer", nodes, ", ".join(names)
    # SkyPilot comes before Kubernetes and Slurm, because its nodes may be pods or belong to a Slurm job.
    if _is_in_skypilot(environment):
        return "SkyPilot", *_skypilot_nodes(environment, need_rendezvous)
    if "JOB_COMPLETION_INDEX" in environment:
        nodes = _nodes_from_variables(environment, "JOB_COMPLETION_INDEX", "WIKILLM_NODES", need_rendezvous)
        return "Kubernetes", nodes, "JOB_COMPLETION_INDEX, WIKILLM_NODES, MASTER_ADDR"
    if "SLURM_JOB_ID" in environment:
        return "Slurm", *_slurm_nodes(environment)
    if "WIKILLM_NODES" in environment and read_integer(environment, "WIKILLM_NODES", minimum=1) > 1:
        raise UserError(
            "WIKILLM_NODE_RANK",
            None,
            f"is not set, although WIKILLM_NODES is {environment['WIKILLM_NODES']}",
            "number the nodes from 0, and set MASTER_ADDR and MASTER_PORT to an address and port of node 0",
        )
    if environment.get("SWANLAB_RUNTIME") == "task":
        return "SwanLab", _Nodes(0, 1, None), "SWANLAB_RUNTIME"
    if (name := first_defined(environment, _NOTEBOOKS)) is not None:
        return _NOTEBOOKS[name], _Nodes(0, 1, None), name
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "Kubernetes", _Nodes(0, 1, None), "KUBERNETES_SERVICE_HOST, no JOB_COMPLETION_INDEX"
    return "this machine", _Nodes(0, 1, None), "no variable of a launcher is set"


def _nodes_from_variables(
    environment: Mapping[str, str],
    rank_name: str,
    count_name: str,
    need_rendezvous: bool,
    address_name: str = "MASTER_ADDR",
    port_name: str = "MASTER_PORT",
) -> _Nodes:
    """Return the nodes whose rank, count, address and port are in variables with these names."""
    for name, other in ((rank_name, count_name), (count_name, rank_name)):
        if not environment.get(name):
            remedy = f"set {rank_name} to the rank of this node (from 0), and {count_name} to the number of nodes"
            raise UserError(name, None, f"is not set, although {other} is", remedy)
    count = read_integer(environment, count_name, minimum=1)
    rank = read_integer(environment, rank_name, below=count, below_name=count_name)
    if count == 1 or not need_rendezvous:
        return _Nodes(rank, count, None)
    not_set = f"is not set, although {count_name} is {count}"
    if not environment.get(address_name):
        raise UserError(address_name, None, not_set, "set it to the address of node 0")
    if environment.get(port_name):
        port = read_integer(environment, port_name, minimum=1, below=65536)
    elif (job_id := job_id_from_environment(environment)) is not None:
        port = port_of(job_id)
    else:
        remedy = "set it to a free port of node 0, or set WIKILLM_JOB_ID, from which a port is derived"
        raise UserError(port_name, None, not_set, remedy)
    return _Nodes(rank, count, Rendezvous(_read_host(environment, address_name), port))


def _read_host(environment: Mapping[str, str], name: str) -> str:
    """Return the host in a variable: a name, an IPv4 address, or an IPv6 address with or without brackets."""
    text = environment[name]
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if "%" in host:
        expected = "this address is valid on this node only"
        raise UserError(name, text, expected, "set it to an address of node 0 that all nodes can reach")
    if not re.fullmatch(r"[\w.:-]+", host):
        raise UserError(name, text, "expected a host name or an IP address", "set the port in its own variable")
    if host.count(":") == 1:
        raise UserError(name, text, "expected an address without a port", "set the port in its own variable")
    return host


def _is_in_skypilot(environment: Mapping[str, str]) -> bool:
    return any(f"SKYPILOT_{name}" in environment for name in ("NODE_RANK", "NUM_NODES", "NODE_IPS"))


def _skypilot_nodes(environment: Mapping[str, str], need_rendezvous: bool) -> tuple[_Nodes, str]:
    """Return the nodes of a SkyPilot task, and the names of the environment variables that say so.

    One of them holds the addresses of the nodes in the order of their ranks, one per line.
    """
    rank_name, count_name, addresses_name = "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_IPS"
    addresses = environment.get(addresses_name, "").split()
    count = read_integer(environment, count_name, minimum=1)
    if len(addresses) != count:
        expected = f"expected {count} addresses, one per line, because {count_name} is {count}; found {len(addresses)}"
        raise UserError(addresses_name, ", ".join(addresses) or None, expected, "keep both as SkyPilot sets them")
    # The user may set MASTER_ADDR to an address of node 0 in another network.
    address = environment.get("MASTER_ADDR") or addresses[0]
    nodes = _nodes_from_variables({**environment, "MASTER_ADDR": address}, rank_name, count_name, need_rendezvous)
    return nodes, f"{rank_name}, {count_name}, {addresses_name}, SKYPILOT_TASK_ID"


def _slurm_nodes(environment: Mapping[str, str]) -> tuple[_Nodes, str]:
    """Return the nodes of a step with one task per node, or the single node of a batch or interactive shell."""
    if not _is_in_slurm_step(environment):
        is_set = "SLURM_JOB_NUM_NODES" in environment
        count = read_integer(environment, "SLURM_JOB_NUM_NODES", minimum=1) if is_set else 1
        if count > 1:
            expected = f"is not set: the job has {count} nodes, but srun did not start this process"
            remedy = "start it with srun --ntasks-per-node=1, as launch/slurm.sh does"
            raise UserError("SLURM_STEP_ID", None, expected, remedy)
        return _Nodes(0, 1, None), "SLURM_JOB_NUM_NODES, not started by srun"
    count = read_integer(environment, "SLURM_STEP_NUM_NODES", minimum=1)
    tasks = read_integer(environment, "SLURM_STEP_NUM_TASKS", minimum=1)
    if tasks != count:
        expected = f"expected one task on each of the {count} nodes, because a task starts all workers of its node"
        raise UserError("SLURM_STEP_NUM_TASKS", tasks, expected, f"use srun --nodes={count} --ntasks={count}")
    sources = "SLURM_NODEID, SLURM_STEP_NUM_NODES, SLURM_STEP_NODELIST, SLURM_JOB_ID"
    rank = read_integer(environment, "SLURM_NODEID", below=count, below_name="SLURM_STEP_NUM_NODES")
    if count == 1:
        return _Nodes(0, 1, None), sources
    address = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if environment.get("MASTER_ADDR"):
        address = _read_host(environment, "MASTER_ADDR")
    if not address:
        expected = f"is not set, although SLURM_STEP_NUM_NODES is {count}"
        raise UserError("SLURM_STEP_NODELIST", None, expected, "start the job with srun, which sets it")
    if environment.get("MASTER_PORT"):
        port = read_integer(environment, "MASTER_PORT", minimum=1, below=65536)
    else:
        port = port_of(f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}")
    return _Nodes(rank, count, Rendezvous(address, port)), sources


def _is_in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Return True if srun started this process."""
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm node list: ``n1`` for ``n[1-4,7],m3``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def port_of(job_id: str) -> int:
    """Return the rendezvous port of a job: the same on all its nodes, and rarely that of another job."""
    return _FIRST_PORT + zlib.crc32(job_id.encode()) % _PORTS


# ---- Time limit ----


def _find_end(environment: Mapping[str, str]) -> tuple[float | None, str]:
    """Return when the scheduler ends this job, in seconds since 1970, and the source; None if no limit is known."""
    if (text := environment.get("SLURM_JOB_END_TIME")) is not None:
        if text.isdecimal() and time.time() < int(text) < _SLURM_NO_TIME:
            return float(text), "SLURM_JOB_END_TIME"
        return None, f"SLURM_JOB_END_TIME is {text or 'empty'}, which is not a time in the future"
    if environment.get("SWANLAB_RUNTIME") == "task":
        return time.time() + SWANLAB_MAX_TIME.seconds, "SWANLAB_RUNTIME: a task ends after 4 hours"
    if (name := first_defined(environment, _NOTEBOOKS)) is not None:
        return None, f"{name}: a session of {_NOTEBOOKS[name]} ends after at most 12 hours; set train.max_time"
    return None, "train.max_time can set one"
