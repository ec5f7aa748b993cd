"""Starts the workers of this node through torchrun, and turns how all of them ended into one exit code."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED, UserError
from job.launcher import processes as family
from job.launcher import signals as stop
from job.launcher import worker
from job.launcher import worker_status as outcome
from job.launcher.device import Device, ask_torch, choose_device
from job.launcher.environment import Place
from job.launcher.foreign_environment import without_foreign
from job.launcher.worker_job import Task
from job.launcher.worker_status import Outcome
from job.runs.attempts import note_failure


def launch(command: str, config: Config, place: Place, device: Device, requests: stop.Requests) -> int:
    """Runs `command` (``train`` or ``evaluate``) over the processes of this node; returns the exit code.

    The code is that of all nodes. A process that torchrun has started is a worker itself, and does not return.

    Args:
        command: what to run.
        config: all settings.
        place: where this is.
        device: what the workers compute on.
        requests: the first asks the workers to stop, and they are waited for; the second kills them.
    """
    if place.world is not None:
        own = without_foreign(os.environ, is_worker=True)
        for name in os.environ.keys() - own.keys():
            del os.environ[name]
        os.environ |= worker_environment(device, place.world.local_world_size, config)
        status = worker.work_alone(command, config, place, device, requests)
        family.leave(EXIT_STOPPED if status == outcome.STOPPED else EXIT_DONE)
    task = Task(
        command=command,
        config=config,
        start=secrets.token_hex(8),
        began_at=time.time(),
        ends_at=place.ends_at,
        job_id=place.job_id,
        node_rank=place.node_rank,
        nodes=place.nodes,
        processes=processes(config, place, device),
        rendezvous=place.rendezvous,
        device=device,
    )
    # A worker that is dying may still write into it.
    with tempfile.TemporaryDirectory(prefix="wikillm-", ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch)
        killed_by: list[int] = []
        task.write(folder)
        environment = without_foreign(os.environ) | worker_environment(device, task.processes, config)
        environment |= {family.FOLDER_VARIABLE: str(folder), family.PARENT_VARIABLE: str(os.getpid())}
        agent = subprocess.Popen(
            [sys.executable, "-m", "job.launcher.agent"],
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C comes to this process alone
        )

        def stop_at_once(number: int) -> None:
            killed_by.append(number)
            agent.kill()  # and the workers die with it

        requests.pass_on((folder / family.STOP_FILE).touch, stop_at_once)
        agent_code = agent.wait()
        requests.pass_on(lambda: None, lambda number: None)  # too late: the folder goes away
        if killed_by:
            sys.stderr.write(f"stopped at once by a second {signal.Signals(killed_by[0]).name}: nothing was saved\n")
            return stop.exit_code_of(killed_by[0])
        ending = _ending(outcome.read_all(folder), task.world_size, agent_code)
        if ending.said:
            sys.stderr.write(f"{_told_on(ending, task).rstrip()}\n")
        if command == "train" and task.node_rank == 0 and ending.code not in (EXIT_DONE, EXIT_STOPPED):
            note_failure(config.run.output, task.start, ending.said)
        return ending.code


def find_device(config: Config, place: Place) -> Device:
    """What the workers of this node compute on; errors as `choose_device`."""
    if place.world is None:
        return choose_device(config.train.device, place.gpus)
    own = place.world.local_rank
    return choose_device(config.train.device, place.gpus, lambda: ask_torch(own))


def workers_wanted(config: Config, place: Place, gpus: int) -> int:
    """Return the number of workers of a node with so many GPUs: the setting's, the launcher's, or one per GPU."""
    return config.train.processes or place.processes or max(1, gpus)


def processes(config: Config, place: Place, device: Device) -> int:
    """Return the number of workers of each node.

    Raises:
        UserError: they are more than its GPUs, of which each takes one.
    """
    gpus = len(device.gpus)
    wanted = workers_wanted(config, place, gpus)
    if device.kind == "cuda" and wanted > gpus:
        expected = f"expected at most {gpus}: each process takes a GPU of its own"
        raise UserError("train.processes", wanted, expected, f"set it to {gpus}, or to null")
    return wanted


def world_size(config: Config, place: Place, device: Device) -> int:
    """How many workers there are on all nodes."""
    return place.world.world_size if place.world else place.nodes * processes(config, place, device)


def worker_environment(device: Device, processes: int, config: Config) -> dict[str, str]:
    """What the libraries in a worker have to be told before they are imported; a user's own settings win.

    Only the choice of the device is above them: on a CPU, no library sees a GPU.
    """
    on_gpu = device.kind == "cuda"
    wanted = {"TOKENIZERS_PARALLELISM": "false", "DS_IGNORE_CUDA_DETECTION": "1"}
    # torch's C++ side tells of every lost connection with a stack of its own; what it means is said by ours.
    wanted |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}
    if not config.train.compiles(on_gpu):
        # DeepSpeed would still load torch's compiler, for seconds and 50 MiB, to offer an optimizer.
        wanted |= {"TORCHDYNAMO_DISABLE": "1"}
    if on_gpu:
        wanted |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # blocks of all sizes share what is free
        # NCCL's own search for a hang takes a pause for one; ours does not. A week, as milliseconds have 31 bits there.
        wanted |= {"TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(7 * 24 * 3600)}
    else:
        wanted |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(max(1, _cpus() // processes)),
        }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    unset = {name: value for name, value in wanted.items() if name not in os.environ}
    return unset | {"PATH": path} | device.environment()


def _cpus() -> int:
    """CPUs that this process may use: a scheduler may have given it a part of the machine's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Ending(NamedTuple):
    """How a start has ended."""

    code: int
    """The entrypoint's exit code."""
    said: str = ""
    """What went wrong: the cause alone, since one failure makes others."""
    rank: int = 0
    """Of the worker whose words these are."""


def _ending(found: list[Outcome], expected: int, agent_code: int) -> _Ending:
    """What the workers' outcomes come to.

    Args:
        found: the outcomes that the workers have left, the earliest first.
        expected: workers that there were, on all nodes.
        agent_code: how this node's torchrun ended.
    """
    first = {one.status: one for one in reversed(found)}
    if (one := first.get(outcome.REFUSED)) is not None:
        return _Ending(EXIT_REFUSED, one.message, one.rank)
    if (one := first.get(outcome.NO_PROGRESS)) is not None:
        return _Ending(EXIT_NO_PROGRESS, one.message, one.rank)
    if outcome.HUNG in first:  # the process that stands still can tell where
        one = max((one for one in found if one.status == outcome.HUNG), key=lambda one: len(one.message))
        return _Ending(EXIT_FAILED, one.message, one.rank)
    if (one := first.get(outcome.KILLED)) is not None:
        reason = " (out of memory? a smaller train.micro_batch_size takes less)" if one.message == "SIGKILL" else ""
        return _Ending(EXIT_FAILED, f"rank {one.rank} was killed by {one.message}{reason}", one.rank)
    if (one := first.get(outcome.LOST)) is not None:
        return _Ending(EXIT_FAILED, one.message, one.rank)
    if (one := first.get(outcome.CRASHED)) is not None:
        return _Ending(EXIT_FAILED, f"rank {one.rank} failed first:\n{one.message}", one.rank)
    if len(found) < expected:
        missing = sorted(set(range(expected)) - {one.rank for one in found})
        code = EXIT_FAILED if agent_code >= 0 else stop.exit_code_of(-agent_code)
        return _Ending(code, f"ranks {missing} ended without a word (killed? out of memory?)", missing[0])
    return _Ending(EXIT_STOPPED if outcome.STOPPED in first else EXIT_DONE)


def _told_on(ending: _Ending, task: Task) -> str:
    """What this node says of it: a traceback stands in the log of the node where it happened, and nowhere else."""
    if ending.rank in task.ranks or "\n" not in ending.said.strip():
        return ending.said
    heading, node = ending.said.split("\n")[0].rstrip(":"), ending.rank // task.processes
    return f"{heading}; see the log of node {node}"
