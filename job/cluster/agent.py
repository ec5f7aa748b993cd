"""torchrun, deaf to requests to stop and without its closing report: both are for the process that started this one."""

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from job.cluster import family, outcome, stop
from job.cluster.outcome import Outcome

_HEARD = "SIGHUP,SIGQUIT"
_TAKE_DOWN_SECONDS = 3
"""What a worker gets between SIGTERM and SIGKILL when another one has failed; it leaves at once if it can."""


def main() -> int:
    """Runs the workers, and records which of them were killed: they could not do it themselves."""
    folder = Path(os.environ[family.FOLDER_VARIABLE])
    # torchrun would pass a signal on and then kill the workers in the middle of their checkpoint, at once if it comes
    # twice: the workers hear of it by the file.
    stop.listen(lambda number, sender: (folder / family.STOP_FILE).touch())
    family.die_with_parent()
    os.environ[family.PARENT_VARIABLE] = str(os.getpid())
    try:
        run(parse_args([f"--signals-to-handle={_HEARD}", f"--shutdown-timeout={_TAKE_DOWN_SECONDS}", *sys.argv[1:]]))
    except ChildFailedError as error:
        silent = error.failures.keys() - {one.rank for one in outcome.read_all(folder)}
        for rank in silent:
            if (code := error.failures[rank].exitcode) < 0:
                outcome.record(folder, Outcome(rank, outcome.KILLED, signal.Signals(-code).name))
        return 1
    except SignalException:
        return 1
    return 0


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    family.leave(main())  # taking torch apart in order takes a second
