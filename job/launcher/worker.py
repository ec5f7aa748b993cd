"""One worker process of a run, started by the agent or torchrun: run the command and record how it ended."""

import os
import sys
import threading
import time
import traceback
from pathlib import Path

from job import console, storage
from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, NoProgress, UserError, disk_error
from job.launcher import interface, signals, worker_status
from job.launcher.device import Device
from job.launcher.environment import Environment, world_from_environment
from job.launcher.processes import ANY_PORT, FOLDER_VARIABLE, PARENT_VARIABLE, STOP_FILE, die_with_parent, leave
from job.launcher.worker_job import WorkerJob
from job.launcher.worker_status import WorkerStatus
from job.log_setup import silence_libraries
from job.runs.launch_context import LaunchContext
from job.runs.run_status import RunStatus
from job.runs.world import World
from job.setting_origin import name_setting


def work(command: str, config: Config, world: World, context: LaunchContext) -> RunStatus:
    """Run one rank's part of a command and return how it ended.

    Args:
        command: ``train`` or ``evaluate``.
        config: all settings.
        world: rank of this process.
        context: what the launcher knows about this start.

    Raises:
        UserError, NoProgress, StoreError: as the command raises them.
    """
    console.wait_at_most(config.train.hang_timeout.seconds / 2)  # A reader that is too slow would delay all ranks.
    storage.configure(storage.StoreOptions(**config.store.model_dump()))
    silence_libraries()
    from job.launcher import loopback
    from job.training.train import train
    from job.training.validation import evaluate_model

    if os.environ.get("MASTER_PORT") == ANY_PORT:
        os.environ |= loopback.interface_environment()
        # The variable keeps the store open. torch finds it in this process and does not open its own.
        _store, port = loopback.open_store()
        os.environ["MASTER_PORT"] = str(port)
    return {"train": train, "evaluate": evaluate_model}[command](config, world, context)


def work_under_torchrun(
    command: str, config: Config, environment: Environment, device: Device, requests: signals.StopRequests
) -> RunStatus:
    """Run `work` in a process that the user started with torchrun, without an agent. It handles stop signals itself.

    Args:
        command: ``train`` or ``evaluate``.
        config: all settings.
        environment: environment of this process, with its rank.
        device: device of this process.
        requests: listener for requests to stop.
    """
    if environment.world is None:
        raise RuntimeError("torchrun has not started this process")
    requested = threading.Event()
    requests.pass_on(requested.set, lambda number: os._exit(signals.exit_code_of(number)))

    def on_hang(message: str) -> None:
        sys.stderr.write(f"{message}\n")
        os._exit(EXIT_FAILED)

    context = LaunchContext(
        "", time.time(), environment.ends_at, environment.job_id, requested.is_set, on_hang, device.kind, device.reason
    )
    return work(command, config, environment.world, context)


def main() -> int:
    """Run the worker job of this node, and record how it ended: torchrun reports every failure as exit code 1."""
    folder, world = Path(os.environ[FOLDER_VARIABLE]), world_from_environment()
    if world is None:
        raise RuntimeError("no launcher has started this process: RANK and WORLD_SIZE are not set")
    parent, requested = int(os.environ[PARENT_VARIABLE]), threading.Event()

    def record(status: RunStatus, message: str = "") -> None:
        worker_status.record(folder, WorkerStatus(world.rank, status, message))

    def on_signal(number: int, sender: int) -> None:
        # torchrun passes on no request to stop. Its signal means that another worker failed, so saving is impossible.
        if sender == parent:
            os._exit(EXIT_FAILED)
        requested.set()
        (folder / STOP_FILE).touch()

    def on_hang(message: str) -> None:
        record(RunStatus.HUNG, message)
        os._exit(EXIT_FAILED)

    signals.listen(on_signal)
    die_with_parent()
    worker_job = WorkerJob.read(folder)
    context = LaunchContext(
        worker_job.start,
        worker_job.began_at,
        worker_job.ends_at,
        worker_job.job_id,
        lambda: requested.is_set() or (folder / STOP_FILE).exists(),
        on_hang,
        worker_job.device.kind,
        worker_job.device.reason,
    )
    try:
        if world.world_size != worker_job.world_size:
            raise RuntimeError(f"expected {worker_job.world_size} workers, but WORLD_SIZE is {world.world_size}")
        record(work(worker_job.command, worker_job.config, world, context))
    except Exception as error:
        record(*_status_of_error(error, worker_job.config))
        return EXIT_FAILED
    return EXIT_DONE


def _status_of_error(error: Exception, config: Config) -> tuple[RunStatus, str]:
    """Return the status and the message for a worker that raised `error`."""
    if isinstance(error, UserError):
        return RunStatus.REFUSED, str(name_setting(config, error))
    if isinstance(error, NoProgress):
        return RunStatus.NO_PROGRESS, str(error)
    if isinstance(error, storage.StoreError):
        return RunStatus.CRASHED, str(error)
    if (user_error := disk_error(error)) is not None:
        return RunStatus.REFUSED, str(name_setting(config, user_error))
    if (message := interface.connection_error(error)) is not None:
        return RunStatus.LOST, message
    return RunStatus.CRASHED, "".join(traceback.format_exception(error))


if __name__ == "__main__":
    console.install()
    leave(main())
