"""Starts the workers of this node, waits for them, and is deaf to requests to stop: those are for the workers.

Many workers are torchrun's, which needs torch: seconds, and 150 MiB, that a single worker does without.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from job import console
from job.launcher import processes as family
from job.launcher import signals as stop
from job.launcher import worker_status as outcome
from job.launcher.worker_job import Task
from job.launcher.worker_status import Outcome


def main() -> int:
    """Runs the workers of this node; returns 0 if they have ended as they should."""
    folder = Path(os.environ[family.FOLDER_VARIABLE])
    task = Task.read(folder)
    # A signal passed on would end the workers in the middle of their checkpoint: they hear of it by the file.
    stop.listen(lambda number, sender: (folder / family.STOP_FILE).touch())
    family.die_with_parent()
    os.environ[family.PARENT_VARIABLE] = str(os.getpid())
    if task.world_size == 1:
        return _run_alone(folder)
    from job.launcher import torchrun

    return torchrun.run_workers(task, folder)


def _run_alone(folder: Path) -> int:
    """Runs a world of one, and records if its worker was killed: it could not do it itself."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": family.ANY_PORT}
    code = subprocess.call([sys.executable, "-u", "-m", "job.launcher.worker"], env=os.environ | world)
    if code < 0:
        outcome.record(folder, Outcome(0, outcome.KILLED, signal.Signals(-code).name))
    return int(code != 0)


if __name__ == "__main__":
    console.install()
    family.leave(main())  # taking torch apart in order takes a second
