"""One process of a run, as torchrun starts it: joins the others, does its part, and records how it ended."""

import ctypes
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from job import storage
from job.cluster import outcome
from job.cluster.outcome import Outcome
from job.cluster.place import world_from_environment
from job.config import Config, name_setting
from job.errors import EXIT_DONE, UserError
from job.quiet import silence_libraries
from job.training.world import World

FOLDER_VARIABLE = "WIKILLM_WORKER_DIR"
"""Names the local folder that holds the command, the settings (config.json), and takes the outcomes."""
STOP_FILE = "stop"
"""Where there is this file in the folder, the run is to stop; a worker that is still starting finds it later."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


def work(command: str, config: Config, world: World, stop_file: Path | None = None) -> str:
    """Runs `command` (``train`` or ``evaluate``) in this process and its part of the run; returns how it ended.

    `STOP_SIGNALS` ask it to stop, as does the file `stop_file` as soon as it is there.

    Raises:
        UserError: as the command.
    """
    stop = threading.Event()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: stop.set())

    def stop_requested() -> bool:
        return stop.is_set() or (stop_file is not None and stop_file.exists())

    storage.configure(storage.StoreOptions(**config.store.model_dump()))
    silence_libraries()
    from job.training.held_out import evaluate_trained
    from job.training.loop import train

    return {"train": train, "evaluate": evaluate_trained}[command](config, world, stop_requested)


def main() -> int:
    """What torchrun starts: the outcome says what the exit code cannot, since torchrun makes a 1 of every failure."""
    die_with_parent()
    folder, world = Path(os.environ[FOLDER_VARIABLE]), world_from_environment()
    assert world is not None
    config = Config.model_validate_json((folder / "config.json").read_bytes())
    try:
        status = work((folder / "command").read_text(), config, world, folder / STOP_FILE)
        outcome.record(folder, Outcome(world.rank, status))
    except UserError as error:
        outcome.record(folder, Outcome(world.rank, outcome.REFUSED, str(name_setting(config, error))))
        return 1
    except Exception:
        outcome.record(folder, Outcome(world.rank, outcome.CRASHED, traceback.format_exc()))
        return 1
    return EXIT_DONE


def die_with_parent() -> None:
    """Has the kernel kill this process as soon as its parent is gone, however that ended: none trains on in secret."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def leave(code: int) -> NoReturn:
    """Ends this process; communication threads may abort one that shuts down in the usual way, after all is done."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
