"""One process of a run, as torchrun starts it: joins the others, does its part, and records how it ended."""

import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from job import storage
from job.cluster import outcome
from job.cluster.outcome import Outcome
from job.config import Config
from job.errors import EXIT_DONE, UserError
from job.quiet import silence_libraries

FOLDER_VARIABLE = "WIKILLM_WORKER_DIR"
"""Names the local folder that holds the command, the settings (config.json), and takes the outcomes."""


def main() -> int:
    """Runs ``train`` or ``evaluate`` in this process; the outcome says what the exit code cannot."""
    folder = Path(os.environ[FOLDER_VARIABLE])
    rank = int(os.environ["RANK"])
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        config = Config.model_validate_json((folder / "config.json").read_bytes())
        status = _work((folder / "command").read_text(), config, stop)
        outcome.record(folder, Outcome(rank, status))
    except UserError as error:
        outcome.record(folder, Outcome(rank, outcome.REFUSED, str(error)))
        return 1
    except Exception:
        outcome.record(folder, Outcome(rank, outcome.CRASHED, traceback.format_exc()))
        return 1
    return EXIT_DONE


def _work(command: str, config: Config, stop: threading.Event) -> str:
    silence_libraries()
    storage.configure(storage.StoreOptions(**config.store.model_dump()))
    from job.training.held_out import evaluate_trained
    from job.training.loop import train
    from job.training.world import World

    world = World(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    return {"train": train, "evaluate": evaluate_trained}[command](config, world, stop.is_set)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Communication threads may abort an interpreter that shuts down in the usual way, after all is done.
    os._exit(code)
