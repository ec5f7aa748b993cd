"""The supervisor of one node: start the agent, and turn the ends of all workers into one message and one exit code."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED, UserError
from job.launcher import processes, signals, worker_status
from job.launcher.device import Device, choose_device, probe_gpus
from job.launcher.environment import Environment
from job.launcher.foreign_environment import without_foreign
from job.launcher.worker import work_under_torchrun
from job.launcher.worker_job import WorkerJob
from job.launcher.worker_status import WorkerStatus
from job.runs.attempts import note_failure
from job.runs.run_status import RunStatus


def launch(
    command: str, config: Config, environment: Environment, device: Device, requests: signals.StopRequests
) -> int:
    """Run a command with all workers of this node, and return the exit code, which is the same on all nodes.

    If torchrun started this process, it is a worker itself: it runs its part of the command and exits here.

    Args:
        command: ``train`` or ``evaluate``.
        config: all settings.
        environment: environment of this process.
        device: device of the workers.
        requests: listener for requests to stop. The first one asks the workers to stop, the second one kills them.
    """
    if environment.world is not None:
        _set_worker_variables(device, environment.world.local_world_size, config)
        status = work_under_torchrun(command, config, environment, device, requests)
        processes.leave(EXIT_STOPPED if status == RunStatus.STOPPED else EXIT_DONE)
    worker_job = WorkerJob(
        command=command,
        config=config,
        start=secrets.token_hex(8),
        began_at=time.time(),
        ends_at=environment.ends_at,
        job_id=environment.job_id,
        node_rank=environment.node_rank,
        nodes=environment.nodes,
        workers_per_node=workers_per_node(config, environment, device),
        rendezvous=environment.rendezvous,
        device=device,
    )
    # A worker that is exiting may still write to the folder while it is deleted.
    with tempfile.TemporaryDirectory(prefix="wikillm-", ignore_cleanup_errors=True) as temporary_folder:
        return _supervise(worker_job, Path(temporary_folder), requests)


def _set_worker_variables(device: Device, local_world_size: int, config: Config) -> None:
    """Change the environment variables of this process to those of a worker."""
    kept = without_foreign(os.environ, is_worker=True)
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]
    os.environ |= worker_environment(device, local_world_size, config)


def _supervise(worker_job: WorkerJob, folder: Path, requests: signals.StopRequests) -> int:
    """Run the agent of this node until it exits, report why the workers ended, and return the exit code."""
    worker_job.write(folder)
    variables = without_foreign(os.environ)
    variables |= worker_environment(worker_job.device, worker_job.workers_per_node, worker_job.config, variables)
    variables |= {processes.FOLDER_VARIABLE: str(folder), processes.PARENT_VARIABLE: str(os.getpid())}
    agent = subprocess.Popen(
        [sys.executable, "-m", "job.launcher.agent"],
        env=variables,
        start_new_session=True,  # A terminal's Ctrl-C reaches this process only.
    )
    killed_by: list[int] = []

    def stop_at_once(number: int) -> None:
        killed_by.append(number)
        agent.kill()  # The kernel kills the workers with it.

    requests.pass_on((folder / processes.STOP_FILE).touch, stop_at_once)
    agent_code = agent.wait()
    requests.pass_on(lambda: None, lambda number: None)  # The folder is about to be deleted.
    if killed_by:
        sys.stderr.write(f"stopped at once by a second {signal.Signals(killed_by[0]).name}: nothing was saved\n")
        return signals.exit_code_of(killed_by[0])
    result = _combine(worker_status.read_all(folder), worker_job.world_size, agent_code)
    if result.error:
        sys.stderr.write(f"{_error_for_this_node(result, worker_job).rstrip()}\n")
    is_failed_training = worker_job.command == "train" and result.code not in (EXIT_DONE, EXIT_STOPPED)
    if is_failed_training and worker_job.node_rank == 0:
        note_failure(worker_job.config.run.output, worker_job.start, result.error)
    return result.code


def find_device(config: Config, environment: Environment) -> Device:
    """Return the device of the workers of this node; errors are those of `choose_device`."""
    if environment.world is None:
        return choose_device(config.train.device, environment.gpus)
    own_gpu = environment.world.local_rank
    return choose_device(config.train.device, environment.gpus, lambda: probe_gpus(own_gpu))


def workers_wanted(config: Config, environment: Environment, gpus: int) -> int:
    """Return the number of workers for a node with `gpus` GPUs: from the setting, the launcher, or one per GPU."""
    return config.train.processes or environment.processes or max(1, gpus)


def workers_per_node(config: Config, environment: Environment, device: Device) -> int:
    """Return the number of workers of each node.

    Raises:
        UserError: there are more workers than GPUs.
    """
    gpus = len(device.gpus)
    workers = workers_wanted(config, environment, gpus)
    if device.kind == "cuda" and workers > gpus:
        expected = f"expected at most {gpus}, the number of GPUs: each process needs its own GPU"
        raise UserError("train.processes", workers, expected, f"set it to {gpus}, or to null for one process per GPU")
    return workers


def world_size(config: Config, environment: Environment, device: Device) -> int:
    """Return the number of workers on all nodes."""
    if environment.world is not None:
        return environment.world.world_size
    return environment.nodes * workers_per_node(config, environment, device)


def worker_environment(
    device: Device, workers: int, config: Config, given: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Return variables that libraries in a worker read when they are imported, without those that the user has set.

    The choice of the device overrides the user's variables: on a CPU, no library may see a GPU.

    Args:
        device: device of the workers.
        workers: number of workers on this node.
        config: all settings.
        given: variables that the user has set, as far as they can be used.
    """
    on_gpu = device.kind == "cuda"
    wanted = {"TOKENIZERS_PARALLELISM": "false", "DS_IGNORE_CUDA_DETECTION": "1"}
    # torch's C++ code prints a stack trace for every lost connection; the launcher's own message is enough.
    wanted |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    if not config.train.compiles(on_gpu):
        # DeepSpeed would still import torch's compiler for an optimizer, which takes seconds and 50 MiB.
        wanted |= {"TORCHDYNAMO_DISABLE": "1"}
    if on_gpu:
        # Expandable segments reduce memory fragmentation.
        wanted |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        # NCCL's hang detection takes a long pause for a hang, and ours does not. A week is near the longest timeout
        # that NCCL allows: it counts milliseconds in 31 bits.
        wanted |= {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(7 * 24 * 3600)}
    else:
        wanted |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(max(1, _cpus() // workers)),
        }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    unset = {name: value for name, value in wanted.items() if name not in given}
    return unset | {"PATH": path} | device.environment()


def _cpus() -> int:
    """Return the number of CPUs that this process may use, which a scheduler may limit."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Result(NamedTuple):
    """How a start ended, over all workers."""

    code: int
    """Exit code of the entrypoint."""
    error: str = ""
    """The first cause; the failures that follow from it are left out. Empty without a failure."""
    rank: int = 0
    """Rank of the worker that the error comes from."""


def _combine(workers: list[WorkerStatus], expected: int, agent_code: int) -> _Result:
    """Combine the statuses of all workers into one result.

    Args:
        workers: recorded statuses, the earliest first.
        expected: number of workers on all nodes.
        agent_code: exit code of this node's agent.
    """
    first = {worker.status: worker for worker in reversed(workers)}
    if (worker := first.get(RunStatus.REFUSED)) is not None:
        return _Result(EXIT_REFUSED, worker.message, worker.rank)
    if (worker := first.get(RunStatus.NO_PROGRESS)) is not None:
        return _Result(EXIT_NO_PROGRESS, worker.message, worker.rank)
    if RunStatus.HUNG in first:
        # The worker that is stuck records where it is stuck, so its message is the longest.
        hung = [worker for worker in workers if worker.status == RunStatus.HUNG]
        worker = max(hung, key=lambda worker: len(worker.message))
        return _Result(EXIT_FAILED, worker.message, worker.rank)
    if (worker := first.get(RunStatus.KILLED)) is not None:
        reason = " (out of memory? try a smaller train.micro_batch_size)" if worker.message == "SIGKILL" else ""
        return _Result(EXIT_FAILED, f"rank {worker.rank} was killed by {worker.message}{reason}", worker.rank)
    if (worker := first.get(RunStatus.LOST)) is not None:
        return _Result(EXIT_FAILED, worker.message, worker.rank)
    if (worker := first.get(RunStatus.CRASHED)) is not None:
        return _Result(EXIT_FAILED, f"rank {worker.rank} failed first:\n{worker.message}", worker.rank)
    if len(workers) < expected:
        missing = sorted(set(range(expected)) - {worker.rank for worker in workers})
        code = EXIT_FAILED if agent_code >= 0 else signals.exit_code_of(-agent_code)
        ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}"
        return _Result(code, f"{ranks} exited without reporting a status (killed? out of memory?)", missing[0])
    return _Result(EXIT_STOPPED if RunStatus.STOPPED in first else EXIT_DONE)


def _error_for_this_node(result: _Result, worker_job: WorkerJob) -> str:
    """Return the error to print on this node: a traceback is printed only on the node where it was raised."""
    if result.rank in worker_job.ranks or "\n" not in result.error.strip():
        return result.error
    first_line, node = result.error.split("\n")[0].rstrip(":"), result.rank // worker_job.workers_per_node
    return f"{first_line}; see the log of node {node}"
