"""Starts the workers of a run on this machine through torchrun, and turns how they ended into one exit code."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from job.cluster import family, outcome, stop, worker
from job.cluster.outcome import Outcome
from job.cluster.place import world_from_environment
from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED
from job.training.attempts import note_failure


def launch(command: str, config: Config, requests: stop.Requests) -> int:
    """Runs `command` (``train`` or ``evaluate``) over the processes of this machine; returns the exit code.

    Where torchrun has already started this process, it is a worker itself, and does not return.

    Args:
        command: what to run.
        config: all settings.
        requests: the first asks the workers to stop, and they are waited for; the second kills them.

    Raises:
        UserError: the environment tells half of what a launcher tells.
    """
    world = world_from_environment()
    if world is not None:
        os.environ |= _worker_environment(world.local_world_size)
        status = worker.work_alone(command, config, world, requests)
        family.leave(EXIT_STOPPED if status == outcome.STOPPED else EXIT_DONE)
    # A worker that is dying may still write into it.
    with tempfile.TemporaryDirectory(prefix="wikillm-", ignore_cleanup_errors=True) as scratch:
        folder, name = Path(scratch), secrets.token_hex(8)
        killed_by: list[int] = []
        (folder / "config.json").write_text(config.model_dump_json())
        (folder / "command").write_text(command)
        environment = os.environ | _worker_environment(processes(config))
        environment |= {
            family.FOLDER_VARIABLE: str(folder),
            family.PARENT_VARIABLE: str(os.getpid()),
            family.START_VARIABLE: f"{time.time()} {name}",
        }
        agent = subprocess.Popen(
            [
                *(sys.executable, "-m", "job.cluster.agent"),
                *("--standalone", "--max-restarts=0", f"--nproc-per-node={processes(config)}"),
                f"--log-dir={folder}",
                *("-m", "job.cluster.worker"),
            ],
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
        code, said = _exit_code(outcome.read_all(folder), processes(config), agent_code)
        if said:
            sys.stderr.write(f"{said.rstrip()}\n")
        if command == "train" and code not in (EXIT_DONE, EXIT_STOPPED):
            note_failure(config.run.output, name, said)
        return code


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
    # Nothing is compiled; DeepSpeed would still load torch's compiler, for seconds and 50 MiB, to offer an optimizer.
    wanted |= {"TORCHDYNAMO_DISABLE": "1"}
    if not _gpus():
        wanted |= {
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {name: value for name, value in wanted.items() if name not in os.environ} | {"PATH": path}


def _exit_code(found: list[Outcome], expected: int, agent_code: int) -> tuple[int, str]:
    """The entrypoint's exit code, and what went wrong: the cause alone, since one failure makes others.

    Args:
        found: the outcomes that the workers have left, the earliest first.
        expected: workers that there were.
        agent_code: how torchrun ended.
    """
    first = {one.status: one for one in reversed(found)}
    if (one := first.get(outcome.REFUSED)) is not None:
        return EXIT_REFUSED, one.message
    if (one := first.get(outcome.NO_PROGRESS)) is not None:
        return EXIT_NO_PROGRESS, one.message
    if outcome.HUNG in first:  # the process that stands still can tell where
        return EXIT_FAILED, max((one.message for one in found if one.status == outcome.HUNG), key=len)
    if (one := first.get(outcome.KILLED)) is not None:
        reason = " (out of memory? a smaller train.micro_batch_size takes less)" if one.message == "SIGKILL" else ""
        return EXIT_FAILED, f"rank {one.rank} was killed by {one.message}{reason}"
    if (one := first.get(outcome.CRASHED)) is not None:
        return EXIT_FAILED, f"rank {one.rank} failed first:\n{one.message}"
    if len(found) < expected:
        missing = sorted(set(range(expected)) - {one.rank for one in found})
        code = EXIT_FAILED if agent_code >= 0 else stop.exit_code_of(-agent_code)
        return code, f"ranks {missing} ended without a word (killed? out of memory?)"
    return (EXIT_STOPPED if outcome.STOPPED in first else EXIT_DONE), ""
