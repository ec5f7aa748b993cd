"""The workers of this node under torchrun, without its closing report: that is for the process that started this one.

On several nodes there is an agent on each; they meet before the workers start, and part when all have ended.
"""

import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from job import config as settings
from job.errors import UserError
from job.launcher import interface, loopback
from job.launcher import node_rendezvous as nodes
from job.launcher import processes as family
from job.launcher import worker_status as outcome
from job.launcher.node_info import Card
from job.launcher.node_wait import NodesMissing, NodesStopped
from job.launcher.ring_check import NodesApart
from job.launcher.worker_job import Task
from job.launcher.worker_status import Outcome
from job.version import code_version

_ABORT = signal.SIGVTALRM
"""Signal that this process sends to itself when another node has failed, so that torchrun ends its workers. It is not
sent by any person, terminal or scheduler, and ends a process that does not handle it."""
_HEARD = f"{_ABORT.name},SIGQUIT"
"""Signals by which torchrun ends its workers at once; requests to stop are not among them."""
_TAKE_DOWN_SECONDS = 3
"""What a worker gets between SIGTERM and SIGKILL when another one has failed; it leaves at once if it can."""
_COMPARED = ("torch", "transformers", "deepspeed", "accelerate")
_OF_A_NODE = ("data.cache_dir", "checkpoint.scratch_dir", "tracking.log_dir", "train.processes")
"""Settings that may differ from node to node; that of the processes is compared by what came of it."""


def run_workers(task: Task, folder: Path) -> int:
    """Runs the workers of this node through torchrun; returns 0 if they have ended as they should.

    Args:
        task: what they are to do.
        folder: of this start (`family.FOLDER_VARIABLE`).
    """
    logging.disable(logging.CRITICAL)
    signal.signal(_ABORT, _abort)
    if task.rendezvous is None:
        os.environ |= loopback.interface_environment()
        _store, port = loopback.open_store()  # kept: torchrun finds it in this process, and opens none of its own
        return _torchrun(folder, _node(0, 1, task.processes, loopback.ADDRESS, port))
    group = nodes.Nodes(task.node_rank, task.nodes, task.job_id or "no job", task.rendezvous, _card(task))
    code = 1
    with suppress(SignalException):  # from another node, before torchrun could take it
        code = _run_among(group, task, folder)
    signal.signal(_ABORT, signal.SIG_IGN)
    group.part(folder, failed=code != 0)
    return code


def _run_among(group: nodes.Nodes, task: Task, folder: Path) -> int:
    """Runs the workers of this node when all nodes are there; returns 0 if they have ended as they should."""
    try:
        group.meet(task.config.train.node_timeout.seconds, (folder / family.STOP_FILE).exists, _warn)
        if group.network:
            sys.stdout.write(f"{group.network}\n")
            sys.stdout.flush()
        if group.interface is not None:
            os.environ |= interface.variables(group.interface)
        group.watch(lambda: os.kill(os.getpid(), _ABORT))
        group.reach()
        return _torchrun(folder, _node(task.node_rank, task.nodes, task.processes, *group.first))
    except UserError as error:
        outcome.record(folder, Outcome(task.ranks[0], outcome.REFUSED, str(error)))
    except (NodesMissing, NodesApart) as error:
        outcome.record(folder, Outcome(task.ranks[0], outcome.LOST, str(error)))
    except NodesStopped:
        for rank in range(task.world_size):  # none of them has begun
            outcome.record(folder, Outcome(rank, outcome.STOPPED))
        return 0
    return 1


def _node(rank: int, count: int, processes: int, address: str, port: int) -> list[str]:
    """torchrun's options for one node of `count`."""
    return [
        *(f"--nnodes={count}", f"--node-rank={rank}", f"--nproc-per-node={processes}"),
        *(f"--master-addr={address}", f"--master-port={port}"),
    ]


def _torchrun(folder: Path, where: list[str]) -> int:
    """Runs torchrun, and records which of its workers were killed: they could not do it themselves."""
    try:
        run(
            parse_args(
                [
                    *where,
                    *("--max-restarts=0", f"--log-dir={folder}"),
                    *(f"--signals-to-handle={_HEARD}", f"--shutdown-timeout={_TAKE_DOWN_SECONDS}"),
                    *("-m", "job.launcher.worker"),
                ]
            )
        )
    except ChildFailedError as error:
        silent = error.failures.keys() - {one.rank for one in outcome.read_all(folder)}
        for rank in silent:
            if (code := error.failures[rank].exitcode) < 0:
                outcome.record(folder, Outcome(rank, outcome.KILLED, signal.Signals(-code).name))
        return 1
    except SignalException:
        return 1
    return 0


def _abort(number: int, frame: object) -> None:
    raise SignalException("another node has failed", signal.Signals(number))


def _warn(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _card(task: Task) -> Card:
    versions = {name: version(name) for name in _COMPARED} | {"wikillm": code_version()}
    shared = {
        f"{section}.{key}": value
        for section, values in settings.to_dict(task.config).items()
        for key, value in values.items()
        if f"{section}.{key}" not in _OF_A_NODE
    }
    shared["train.device"] = task.device.kind  # what `auto` has come to must be the same on all nodes
    return Card(socket.gethostname(), task.start, task.processes, versions, shared)
