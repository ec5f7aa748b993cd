"""Running the workers of this node through torchrun, without torchrun's error report: the entrypoint reports errors.

On several nodes, the agents of all nodes meet before the workers start, and exit when the workers of all have ended.
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
from job.launcher import interface, loopback, processes, worker_status
from job.launcher.node_info import NodeInfo
from job.launcher.node_rendezvous import NodeRendezvous
from job.launcher.node_wait import NodesMissing, NodesStopped
from job.launcher.ring_check import NodeUnreachable
from job.launcher.worker_job import WorkerJob
from job.launcher.worker_status import WorkerStatus
from job.runs.run_status import RunStatus
from job.version import code_version

_ABORT = signal.SIGVTALRM
"""Signal that this process sends to itself when another node has failed, so that torchrun ends its workers. It is not
sent by any person, terminal or scheduler, and ends a process that does not handle it."""
_ENDING_SIGNALS = f"{_ABORT.name},SIGQUIT"
"""Signals at which torchrun ends its workers at once. Requests to stop are not among them."""
_SHUTDOWN_SECONDS = 3
"""Time between SIGTERM and SIGKILL for the other workers when one has failed. Workers exit at SIGTERM if they can."""
_COMPARED_PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")
_NODE_SETTINGS = ("data.cache_dir", "checkpoint.scratch_dir", "tracking.log_dir", "train.processes")
"""Settings that may differ between nodes. Of `train.processes`, the resulting number of workers is compared instead."""


def run_workers(worker_job: WorkerJob, folder: Path) -> int:
    """Run the workers of this node through torchrun.

    Args:
        worker_job: what the workers have to do.
        folder: folder of this start (`processes.FOLDER_VARIABLE`).

    Returns:
        0 if the workers finished or stopped as requested, else 1.
    """
    logging.disable(logging.CRITICAL)
    signal.signal(_ABORT, _abort)
    workers = worker_job.workers_per_node
    if worker_job.rendezvous is None:
        os.environ |= loopback.interface_environment()
        # The variable keeps the store open. torchrun finds it in this process and does not open its own.
        _store, port = loopback.open_store()
        return _torchrun(folder, _node_options(0, 1, workers, loopback.ADDRESS, port))
    job = worker_job.job_id or "no job"
    nodes = NodeRendezvous(worker_job.node_rank, worker_job.nodes, job, worker_job.rendezvous, _node_info(worker_job))
    code = 1
    with suppress(SignalException):  # Another node failed before torchrun started to handle the signal.
        code = _run_with_other_nodes(nodes, worker_job, folder)
    signal.signal(_ABORT, signal.SIG_IGN)
    nodes.part(folder, failed=code != 0)
    return code


def _run_with_other_nodes(nodes: NodeRendezvous, worker_job: WorkerJob, folder: Path) -> int:
    """Run the workers of this node once all nodes have joined; return 0 if they finished or stopped as requested."""
    first_rank = worker_job.ranks[0]
    try:
        nodes.meet(worker_job.config.train.node_timeout.seconds, (folder / processes.STOP_FILE).exists, _warn)
        if nodes.network:
            sys.stdout.write(f"{nodes.network}\n")
            sys.stdout.flush()
        if nodes.interface is not None:
            os.environ |= interface.variables(nodes.interface)
        nodes.watch(lambda: os.kill(os.getpid(), _ABORT))
        nodes.check_next()
        options = _node_options(
            worker_job.node_rank, worker_job.nodes, worker_job.workers_per_node, nodes.first.address, nodes.first.port
        )
        return _torchrun(folder, options)
    except UserError as error:
        worker_status.record(folder, WorkerStatus(first_rank, RunStatus.REFUSED, str(error)))
    except (NodesMissing, NodeUnreachable) as error:
        worker_status.record(folder, WorkerStatus(first_rank, RunStatus.LOST, str(error)))
    except NodesStopped:
        for rank in range(worker_job.world_size):  # No worker has started.
            worker_status.record(folder, WorkerStatus(rank, RunStatus.STOPPED))
        return 0
    return 1


def _node_options(rank: int, nodes: int, workers: int, address: str, port: int) -> list[str]:
    """Return torchrun's options for one node.

    Args:
        rank: rank of the node.
        nodes: number of nodes.
        workers: number of workers on each node.
        address: address of node 0.
        port: port of node 0.
    """
    return [
        *(f"--nnodes={nodes}", f"--node-rank={rank}", f"--nproc-per-node={workers}"),
        *(f"--master-addr={address}", f"--master-port={port}"),
    ]


def _torchrun(folder: Path, node_options: list[str]) -> int:
    """Run torchrun, and record which workers were killed; return 0 if all workers exited with 0, else 1."""
    try:
        run(
            parse_args(
                [
                    *node_options,
                    *("--max-restarts=0", f"--log-dir={folder}"),
                    *(f"--signals-to-handle={_ENDING_SIGNALS}", f"--shutdown-timeout={_SHUTDOWN_SECONDS}"),
                    *("-m", "job.launcher.worker"),
                ]
            )
        )
    except ChildFailedError as error:
        unrecorded = error.failures.keys() - {worker.rank for worker in worker_status.read_all(folder)}
        for rank in unrecorded:
            worker_status.record_if_killed(folder, rank, error.failures[rank].exitcode)
        return 1
    except SignalException:
        return 1
    return 0


def _abort(number: int, frame: object) -> None:
    raise SignalException("another node has failed", signal.Signals(number))


def _warn(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _node_info(worker_job: WorkerJob) -> NodeInfo:
    """Return the description of this node, for the comparison with the others."""
    versions = {name: version(name) for name in _COMPARED_PACKAGES} | {"wikillm": code_version()}
    shared_settings = {
        f"{section}.{key}": value
        for section, values in settings.to_dict(worker_job.config).items()
        for key, value in values.items()
        if f"{section}.{key}" not in _NODE_SETTINGS
    }
    # With `auto`, the device that was chosen must be the same on all nodes.
    shared_settings["train.device"] = worker_job.device.kind
    return NodeInfo(
        host=socket.gethostname(),
        token=worker_job.start,
        workers=worker_job.workers_per_node,
        versions=versions,
        settings=shared_settings,
    )
