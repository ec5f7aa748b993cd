"""Starts the workers of a run on this machine through torchrun, and turns how they ended into one exit code."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from job.cluster import outcome, worker
from job.cluster.place import world_from_environment
from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from job.report import Report


def launch(command: str, config: Config) -> int:
    """Runs `command` (``train`` or ``evaluate``) over the processes of this machine; returns the exit code.

    SIGTERM and SIGINT ask the workers to stop, and they are waited for; afterwards both are ignored. Where torchrun
    has already started this process, it is a worker itself, and does not return.

    Raises:
        UserError: the environment tells half of what a launcher tells.
    """
    world = world_from_environment()
    if world is not None:
        os.environ |= _worker_environment(world.local_world_size)
        worker.leave(EXIT_STOPPED if worker.work(command, config, world) == outcome.STOPPED else EXIT_DONE)
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(config.model_dump_json())
        (folder / "command").write_text(command)
        environment = os.environ | _worker_environment(processes(config)) | {worker.FOLDER_VARIABLE: str(folder)}
        extensions = environment.get("TORCH_EXTENSIONS_DIR")
        if config.train.strategy == "zero2" and not _gpus() and extensions and not Path(extensions).exists():
            Report().say(f"DeepSpeed compiles its library for CPUs, once, into {extensions}: about a minute")
        stop_file = folder / worker.STOP_FILE
        for number in worker.STOP_SIGNALS:
            signal.signal(number, lambda *_: stop_file.touch())
        agent = subprocess.run(
            [
                *(sys.executable, "-m", "job.cluster.agent"),
                *("--standalone", "--max-restarts=0", f"--nproc-per-node={processes(config)}"),
                *("-m", "job.cluster.worker"),
            ],
            check=False,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C comes to this process alone
        )
        for number in worker.STOP_SIGNALS:  # how it ended is all that is left to say, and one more must not prevent it
            signal.signal(number, signal.SIG_IGN)
        return _exit_code(folder, processes(config), agent.returncode)


def processes(config: Config) -> int:
    """How many workers this machine runs."""
    return config.train.processes or max(1, _gpus())


def _gpus() -> int:
    """GPUs of this machine, asked of the driver: torch takes seconds to import."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _worker_environment(processes: int) -> dict[str, str]:
    """What the libraries in a worker have to be told before they are imported; a user's own settings win."""
    wanted = {"TOKENIZERS_PARALLELISM": "false", "DS_IGNORE_CUDA_DETECTION": "1"}
    if not _gpus():
        wanted |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
            # DeepSpeed compiles a small C++ library at its first start on a CPU; it stays with this Python.
            "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {name: value for name, value in wanted.items() if name not in os.environ} | {"PATH": path}


def _exit_code(folder: Path, expected: int, agent_code: int) -> int:
    """Says what went wrong, once, and returns the entrypoint's exit code."""
    found = outcome.read_all(folder)
    for one in found:
        if one.status == outcome.REFUSED:
            sys.stderr.write(f"{one.message}\n")
            return EXIT_REFUSED
    for one in found:
        if one.status == outcome.KILLED:
            reason = " (out of memory?)" if one.message == "SIGKILL" else ""
            sys.stderr.write(f"rank {one.rank} was killed by {one.message}{reason}\n")
            return EXIT_FAILED
    for one in found:
        if one.status == outcome.CRASHED:
            sys.stderr.write(f"rank {one.rank} failed first:\n{one.message}\n")
            return EXIT_FAILED
    if len(found) < expected:
        missing = sorted(set(range(expected)) - {one.rank for one in found})
        sys.stderr.write(f"ranks {missing} ended without a word (killed? out of memory?)\n")
        return EXIT_FAILED if agent_code >= 0 else 128 - agent_code
    return EXIT_STOPPED if any(one.status == outcome.STOPPED for one in found) else EXIT_DONE
