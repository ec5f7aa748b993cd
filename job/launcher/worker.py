"""One process of a run, as torchrun starts it: joins the others, does its part, and records how it ended."""

import os
import sys
import threading
import time
import traceback
from pathlib import Path

from job import console, storage
from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, NoProgress, UserError, disk_error
from job.launcher import interface
from job.launcher import signals as stop
from job.launcher import worker_status as outcome
from job.launcher.device import Device
from job.launcher.environment import Place, world_from_environment
from job.launcher.processes import ANY_PORT, FOLDER_VARIABLE, PARENT_VARIABLE, STOP_FILE, die_with_parent, leave
from job.launcher.worker_job import Task
from job.launcher.worker_status import Outcome
from job.log_setup import silence_libraries
from job.runs.launch_context import Start
from job.runs.world import World
from job.setting_origin import name_setting


def work(command: str, config: Config, world: World, start: Start) -> str:
    """Runs `command` (``train`` or ``evaluate``) in this process and its part of the run; returns how it ended.

    Raises:
        UserError, NoProgress, StoreError: as the command.
    """
    console.wait_at_most(config.train.hang_timeout.seconds / 2)  # what nobody reads would hold up all processes
    storage.configure(storage.StoreOptions(**config.store.model_dump()))
    silence_libraries()
    from job.launcher import loopback
    from job.training.train import train
    from job.training.validation import evaluate_trained

    if os.environ.get("MASTER_PORT") == ANY_PORT:
        os.environ |= loopback.interface_environment()
        _store, port = loopback.open_store()  # kept: torch finds it in this process, and opens none of its own
        os.environ["MASTER_PORT"] = str(port)
    return {"train": train, "evaluate": evaluate_trained}[command](config, world, start)


def work_alone(command: str, config: Config, place: Place, device: Device, requests: stop.Requests) -> str:
    """`work` in a process that torchrun has started itself: there is nobody but this process to hear a signal."""
    if place.world is None:
        raise RuntimeError("torchrun has not started this process")
    requested = threading.Event()
    requests.pass_on(requested.set, lambda number: os._exit(stop.exit_code_of(number)))

    def on_hang(message: str) -> None:
        sys.stderr.write(f"{message}\n")
        os._exit(EXIT_FAILED)

    start = Start("", time.time(), place.ends_at, place.job_id, requested.is_set, on_hang, device.kind, device.reason)
    return work(command, config, place.world, start)


def main() -> int:
    """What torchrun starts: the outcome says what the exit code cannot, since torchrun makes a 1 of every failure."""
    folder, world = Path(os.environ[FOLDER_VARIABLE]), world_from_environment()
    if world is None:
        raise RuntimeError("no launcher has started this process")
    torchrun, requested = int(os.environ[PARENT_VARIABLE]), threading.Event()

    def heard(number: int, sender: int) -> None:
        if sender == torchrun:  # it passes no requests on: another worker has failed, and nothing can be saved any more
            os._exit(EXIT_FAILED)
        requested.set()
        (folder / STOP_FILE).touch()

    def on_hang(message: str) -> None:
        outcome.record(folder, Outcome(world.rank, outcome.HUNG, message))
        os._exit(EXIT_FAILED)

    stop.listen(heard)
    die_with_parent()
    task = Task.read(folder)
    start = Start(
        task.start,
        task.began_at,
        task.ends_at,
        task.job_id,
        lambda: requested.is_set() or (folder / STOP_FILE).exists(),
        on_hang,
        task.device.kind,
        task.device.reason,
    )
    try:
        if world.world_size != task.world_size:
            raise RuntimeError(f"{task.world_size} workers were to come together, and there are {world.world_size}")
        status = work(task.command, task.config, world, start)
        outcome.record(folder, Outcome(world.rank, status))
    except UserError as error:
        outcome.record(folder, Outcome(world.rank, outcome.REFUSED, str(name_setting(task.config, error))))
    except NoProgress as error:
        outcome.record(folder, Outcome(world.rank, outcome.NO_PROGRESS, str(error)))
    except storage.StoreError as error:
        outcome.record(folder, Outcome(world.rank, outcome.CRASHED, str(error)))
    except Exception as error:
        if (mendable := disk_error(error)) is not None:
            outcome.record(folder, Outcome(world.rank, outcome.REFUSED, str(name_setting(task.config, mendable))))
            return EXIT_FAILED
        if (apart := interface.join_error(error)) is not None:
            outcome.record(folder, Outcome(world.rank, outcome.LOST, apart))
            return EXIT_FAILED
        outcome.record(folder, Outcome(world.rank, outcome.CRASHED, traceback.format_exc()))
    else:
        return EXIT_DONE
    return EXIT_FAILED


if __name__ == "__main__":
    console.install()
    leave(main())
