"""Where this process is and what it is part of, from the environment alone.

One process of each node asks: it starts the workers of its node, and all nodes have to meet at the first one's address.
What should be many is never taken for one: a variable that is missing or contradicts another is an error that names it.
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
from job.launcher.environment_variables import first_set, number
from job.launcher.gpus import Gpus, find_gpus, processes_asked
from job.local_dirs import scratch_folder
from job.runs.world import World

_WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
_JOB_IDS = ("WIKILLM_JOB_ID", "SKYPILOT_TASK_ID", "SLURM_JOB_ID")
"""SkyPilot on a Slurm cluster starts a job again under a new number of Slurm's, so its own name comes first."""
_SWANLAB_SECONDS = 4 * 3600
_SWANLAB_SET_UP_SECONDS = 600
"""The four hours of a task have begun before its packages were installed."""
_FIRST_PORT, _PORTS = 20000, 10000
"""Rendezvous ports: below those that the kernel gives to outgoing connections, from 32768 on."""
_FIRST_SPECIAL_STEP = 4294967290
"""Slurm's steps from here on are shells: interactive, batch, extern."""
_SLURM_NO_TIME = 4294967294
"""Slurm writes "not set" and "infinite" as this number and the next one, which would be in the year 2106."""


class Rendezvous(NamedTuple):
    """Where the nodes meet: an address and a port of the first of them."""

    address: str
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


class Fact(NamedTuple):
    """One thing that was found out."""

    what: str
    value: str
    source: str
    """The environment variables that say so, or what it is without them."""


@dataclass(frozen=True)
class Place:
    """Where this process runs."""

    kind: str
    """`this machine`, `several nodes`, `torchrun`, or the scheduler: `SkyPilot`, `Slurm`, `Kubernetes`, …"""
    node_rank: int
    nodes: int
    rendezvous: Rendezvous | None
    """None for one node."""
    processes: int | None
    """Workers of this node that its launcher asks for; None: one for each GPU, or 1 where there is none."""
    gpus: Gpus
    world: World | None
    """Of a process that torchrun has started: it is a worker itself."""
    job_id: str | None
    """The scheduler's name for the job, which it keeps when it starts the job again; None without a scheduler."""
    ends_at: float | None
    """When this place ends it, in seconds since 1970; None if it does not say."""
    scratch: Path
    """A folder on a disk of this node, for what can be lost."""
    facts: tuple[Fact, ...]
    """How all that was found out."""


def find_place(environment: Mapping[str, str] = os.environ) -> Place:
    """Where this process is.

    Raises:
        UserError: an environment variable is missing, is not a number, or contradicts another; it is named.
    """
    facts: list[Fact] = []
    world = world_from_environment(environment)
    kind, nodes = "torchrun", _Nodes(0, 1, None)
    if world is not None:
        facts.append(Fact("process", f"{world.rank} of {world.world_size}", "RANK, WORLD_SIZE"))
    else:
        kind, nodes, sources = _find_nodes(environment)
        facts.append(Fact("nodes", f"this is {nodes.rank} of {nodes.nodes} (counted from 0)", sources))
        if nodes.rendezvous is not None:
            facts.append(Fact("rendezvous", str(nodes.rendezvous), sources))
    gpus = find_gpus(environment)
    facts.append(Fact("GPUs of this node", str(gpus.number), gpus.source))
    processes, source = processes_asked(environment, gpus)
    facts.append(Fact("processes of a node", str(processes or max(1, gpus.number)), source))
    job_id = job_id_from_environment(environment)
    facts.append(Fact("job", job_id or "none", first_set(environment, _JOB_IDS) or f"none of {', '.join(_JOB_IDS)}"))
    ends_at, source = _find_end(environment)
    left = "no limit is known" if ends_at is None else f"{(ends_at - time.time()) / 60:.0f} minutes"
    facts.append(Fact("time left", left, source))
    scratch, source = scratch_folder(environment)
    facts.append(Fact("scratch folder", str(scratch), source))
    return Place(
        kind=kind,
        node_rank=nodes.rank,
        nodes=nodes.nodes,
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
    """This process' place as torchrun tells it; None where no launcher has set one.

    Half of it is never taken for none of it: a job that should be many would train many times alone.

    Raises:
        UserError: a variable is missing, is not a number, or contradicts another; it is named.
    """
    if not any(name in environment for name in ("RANK", "WORLD_SIZE")):
        return None
    remedy = "start it with torchrun, which sets all of them, or unset them all to start it alone"
    for name in (*_WORLD, "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(name, None, "is not set, but other variables of a launcher are", remedy)
    numbers = {name: number(environment, name, remedy=remedy) for name in (*_WORLD, "MASTER_PORT")}
    for name, below in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers[name] >= numbers[below]:
            raise UserError(name, numbers[name], f"expected less than {below}, which is {numbers[below]}", remedy)
    if numbers["LOCAL_WORLD_SIZE"] > numbers["WORLD_SIZE"]:
        expected = f"expected at most WORLD_SIZE, which is {numbers['WORLD_SIZE']}"
        raise UserError("LOCAL_WORLD_SIZE", numbers["LOCAL_WORLD_SIZE"], expected, remedy)
    return World(*(numbers[name] for name in _WORLD))


def job_id_from_environment(environment: Mapping[str, str] = os.environ) -> str | None:
    """The name of the job that its scheduler keeps when it starts the job again; None without a scheduler.

    Slurm and SkyPilot set one; elsewhere WIKILLM_JOB_ID can.
    """
    name = first_set(environment, _JOB_IDS)
    return environment[name] if name else None


def part_of_array(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process' part (i, n) of what an array of them prepares, 0 <= i < n: (0, 1) where it is alone.

    Slurm's array tasks and the tasks of a step, the pods of an Indexed Job, or the nodes of a SkyPilot task.

    Raises:
        UserError: the numbers of the array leave it open which part is this one's.
    """
    if "SLURM_JOB_ID" in environment and not _in_skypilot(environment):
        index, count = 0, 1
        if "SLURM_ARRAY_TASK_ID" in environment:
            names = ("ID", "MIN", "MAX", "STEP", "COUNT")
            task, least, most, step, count = (number(environment, f"SLURM_ARRAY_TASK_{name}") for name in names)
            if count > 1 and most - least != step * (count - 1):
                raise UserError(
                    "SLURM_ARRAY_TASK_ID",
                    task,
                    "the tasks of this array are not a range",
                    "use --array=0-15, or data.worker",
                )
            index = (task - least) // max(1, step)
        if _in_step(environment):
            tasks = number(environment, "SLURM_STEP_NUM_TASKS", least=1)
            index, count = index * tasks + number(environment, "SLURM_PROCID", below=tasks), count * tasks
        return index, count
    if any(name in environment for name in ("JOB_COMPLETION_INDEX", "WIKILLM_NODES")) or _in_skypilot(environment):
        _, nodes, _ = _find_nodes(environment, meets=False)
        return nodes.rank, nodes.nodes
    return 0, 1


# ---- Which nodes ----


class _Nodes(NamedTuple):
    rank: int
    nodes: int
    rendezvous: Rendezvous | None


def _find_nodes(environment: Mapping[str, str], meets: bool = True) -> tuple[str, _Nodes, str]:
    """The place's name, its nodes, and which variables say so; they have no rendezvous where none `meets` another."""
    if "OMPI_COMM_WORLD_SIZE" in environment and number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        size = environment["OMPI_COMM_WORLD_SIZE"]
        raise UserError("OMPI_COMM_WORLD_SIZE", size, "processes started by mpirun do not meet", "use srun or torchrun")
    if "WIKILLM_NODE_RANK" in environment:
        return (
            "several nodes",
            _counted(environment, "WIKILLM_NODE_RANK", "WIKILLM_NODES", meets),
            ("WIKILLM_NODE_RANK, WIKILLM_NODES, MASTER_ADDR, MASTER_PORT"),
        )
    if "PET_NODE_RANK" in environment or "PET_NNODES" in environment:
        nodes = _counted(environment, "PET_NODE_RANK", "PET_NNODES", meets, "PET_MASTER_ADDR", "PET_MASTER_PORT")
        return "Kubeflow Trainer", nodes, "PET_NODE_RANK, PET_NNODES, PET_MASTER_ADDR, PET_MASTER_PORT"
    if _in_skypilot(environment):  # whose nodes may be pods or belong to a job of Slurm's
        return "SkyPilot", *_skypilot_nodes(environment, meets)
    if "JOB_COMPLETION_INDEX" in environment:
        nodes = _counted(environment, "JOB_COMPLETION_INDEX", "WIKILLM_NODES", meets)
        return "Kubernetes", nodes, "JOB_COMPLETION_INDEX, WIKILLM_NODES, MASTER_ADDR"
    if "SLURM_JOB_ID" in environment:
        return "Slurm", *_slurm_nodes(environment)
    if "WIKILLM_NODES" in environment and number(environment, "WIKILLM_NODES", least=1) > 1:
        raise UserError(
            "WIKILLM_NODE_RANK",
            None,
            f"is not set, but WIKILLM_NODES is {environment['WIKILLM_NODES']}",
            "number the nodes from 0, and set MASTER_ADDR and MASTER_PORT to those of the first",
        )
    if environment.get("SWANLAB_RUNTIME") == "task":
        return "SwanLab", _Nodes(0, 1, None), "SWANLAB_RUNTIME"
    if "KUBERNETES_SERVICE_HOST" in environment:
        return "Kubernetes", _Nodes(0, 1, None), "KUBERNETES_SERVICE_HOST, no JOB_COMPLETION_INDEX"
    return "this machine", _Nodes(0, 1, None), "no variable of a launcher is set"


def _counted(
    environment: Mapping[str, str],
    rank: str,
    count: str,
    meets: bool,
    address: str = "MASTER_ADDR",
    port: str = "MASTER_PORT",
) -> _Nodes:
    """Nodes whose rank, count, address and port are in variables of these names."""
    for name, other in ((rank, count), (count, rank)):
        if not environment.get(name):
            raise UserError(
                name, None, f"is not set, but {other} is", "set both: the nodes, counted from 0, and how many"
            )
    nodes = number(environment, count, least=1)
    this = number(environment, rank, below=nodes, limit=count)
    if nodes == 1 or not meets:
        return _Nodes(this, nodes, None)
    if not environment.get(address):
        raise UserError(address, None, f"is not set, but {count} is {nodes}", "set it to the address of the first node")
    if environment.get(port):
        chosen = number(environment, port, least=1, below=65536)
        return _Nodes(this, nodes, Rendezvous(_host(environment, address), chosen))
    job = job_id_from_environment(environment)
    if job is None:
        remedy = "set it to a free port of the first node, or WIKILLM_JOB_ID, which gives one"
        raise UserError(port, None, f"is not set, but {count} is {nodes}", remedy)
    return _Nodes(this, nodes, Rendezvous(_host(environment, address), port_of(job)))


def _host(environment: Mapping[str, str], name: str) -> str:
    """The host in a variable: a name, an IPv4 address, or an IPv6 address with or without brackets."""
    text = environment[name]
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if "%" in host:
        expected = "this address is valid on one link of this node only"
        raise UserError(name, text, expected, "set it to an address of the first node that all nodes reach")
    if not re.fullmatch(r"[\w.:-]+", host):
        raise UserError(name, text, "expected a host name or an IP address", "the port is in a variable of its own")
    if host.count(":") == 1:
        raise UserError(name, text, "expected an address without a port", "the port is in a variable of its own")
    return host


def _in_skypilot(environment: Mapping[str, str]) -> bool:
    return any(f"SKYPILOT_{name}" in environment for name in ("NODE_RANK", "NUM_NODES", "NODE_IPS"))


def _skypilot_nodes(environment: Mapping[str, str], meets: bool) -> tuple[_Nodes, str]:
    """The nodes of a SkyPilot task, whose addresses it lists in the order of their ranks, one a line."""
    rank, count, addresses = "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_IPS"
    listed = environment.get(addresses, "").split()
    nodes = number(environment, count, least=1)
    if len(listed) != nodes:
        expected = f"expected one address a line for each of the {nodes} nodes of {count}, found {len(listed)}"
        raise UserError(addresses, ", ".join(listed) or None, expected, "leave both as SkyPilot sets them")
    # MASTER_ADDR may name another network of the first node.
    address = environment.get("MASTER_ADDR") or listed[0]
    found = _counted({**environment, "MASTER_ADDR": address}, rank, count, meets)
    return found, f"{rank}, {count}, {addresses}, SKYPILOT_TASK_ID"


def _slurm_nodes(environment: Mapping[str, str]) -> tuple[_Nodes, str]:
    """The nodes of a step, one task on each; a batch or interactive shell is on one node alone."""
    if not _in_step(environment):
        nodes = number(environment, "SLURM_JOB_NUM_NODES", least=1) if "SLURM_JOB_NUM_NODES" in environment else 1
        if nodes > 1:
            expected = f"the job has {nodes} nodes, and this process is on one of them, outside of a step"
            raise UserError(
                "SLURM_STEP_ID", None, expected, "start it with srun --ntasks-per-node=1, as launch/slurm.sh does"
            )
        return _Nodes(0, 1, None), "SLURM_JOB_NUM_NODES, outside of a step"
    nodes = number(environment, "SLURM_STEP_NUM_NODES", least=1)
    tasks = number(environment, "SLURM_STEP_NUM_TASKS", least=1)
    if tasks != nodes:
        expected = f"expected one task on each node, of which there are {nodes}: a task starts the workers of its node"
        raise UserError("SLURM_STEP_NUM_TASKS", tasks, expected, f"use srun --nodes={nodes} --ntasks={nodes}")
    sources = "SLURM_NODEID, SLURM_STEP_NUM_NODES, SLURM_STEP_NODELIST, SLURM_JOB_ID"
    this = number(environment, "SLURM_NODEID", below=nodes, limit="SLURM_STEP_NUM_NODES")
    if nodes == 1:
        return _Nodes(0, 1, None), sources
    address = first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if environment.get("MASTER_ADDR"):
        address = _host(environment, "MASTER_ADDR")
    if not address:
        raise UserError("SLURM_STEP_NODELIST", None, f"is not set, but SLURM_STEP_NUM_NODES is {nodes}", "use srun")
    if environment.get("MASTER_PORT"):
        port = number(environment, "MASTER_PORT", least=1, below=65536)
    else:
        port = port_of(f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}")
    return _Nodes(this, nodes, Rendezvous(address, port)), sources


def _in_step(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def first_host(nodelist: str) -> str:
    """The first host of a list as Slurm writes it: ``n1`` of ``n[1-4,7],m3``."""
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodelist).split(",")[0]


def port_of(job_id: str) -> int:
    """The rendezvous port of a job: the same on all its nodes, and seldom that of another one."""
    return _FIRST_PORT + zlib.crc32(job_id.encode()) % _PORTS


# ---- What else ----


def _find_end(environment: Mapping[str, str]) -> tuple[float | None, str]:
    """Return when the place ends this job, and where that was found. Slurm's values for "no limit" are no end."""
    if (text := environment.get("SLURM_JOB_END_TIME")) is not None:
        if text.isdecimal() and time.time() < int(text) < _SLURM_NO_TIME:
            return float(text), "SLURM_JOB_END_TIME"
        return None, f"SLURM_JOB_END_TIME is {text or 'empty'}, not a time to come"
    if environment.get("SWANLAB_RUNTIME") == "task":
        return time.time() + _SWANLAB_SECONDS - _SWANLAB_SET_UP_SECONDS, "SWANLAB_RUNTIME: a task ends after 4 hours"
    return None, "train.max_time sets one"
