"""Process that starts the workers of this node and waits for them; the entrypoint starts it as a module.

It ignores requests to stop, except that it creates the stop file, which the workers read. It runs several workers
through torchrun. It runs a single worker itself, because torchrun needs torch: seconds of import and 150 MiB.
"""

import os
import subprocess
import sys
from pathlib import Path

from job import console
from job.launcher import processes, signals, worker_status
from job.launcher.worker_job import WorkerJob


def main() -> int:
    """Run the workers of this node; return 0 if they finished or stopped as requested."""
    folder = Path(os.environ[processes.FOLDER_VARIABLE])
    worker_job = WorkerJob.read(folder)
    # A signal to the workers would end them in the middle of their checkpoint, so the stop file tells them instead.
    signals.listen(lambda number, sender: (folder / processes.STOP_FILE).touch())
    processes.die_with_parent()
    os.environ[processes.PARENT_VARIABLE] = str(os.getpid())
    if worker_job.world_size == 1:
        return _run_single_worker(folder)
    from job.launcher import torchrun

    return torchrun.run_workers(worker_job, folder)


def _run_single_worker(folder: Path) -> int:
    """Run the only worker of the run, and record its status if a signal killed it."""
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": processes.ANY_PORT}
    code = subprocess.call([sys.executable, "-u", "-m", "job.launcher.worker"], env=os.environ | world)
    worker_status.record_if_killed(folder, 0, code)
    return int(code != 0)


if __name__ == "__main__":
    console.install()
    processes.leave(main())  # Without cleanup: the cleanup of torch takes a second.
