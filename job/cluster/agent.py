"""torchrun, deaf to requests to stop and without its closing report: both are for the process that started this one."""

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from job.cluster import outcome, worker
from job.cluster.outcome import Outcome

_HEARD = "SIGHUP,SIGQUIT"


def main() -> int:
    """Runs the workers, and records which of them were killed: they could not do it themselves."""
    # torchrun would pass a signal on and then kill the workers in the middle of their checkpoint, at once if it comes
    # twice. The workers inherit the deafness for as long as they are too young to listen.
    for number in worker.STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    worker.die_with_parent()
    try:
        run(parse_args([f"--signals-to-handle={_HEARD}", *sys.argv[1:]]))
    except ChildFailedError as error:
        folder = Path(os.environ[worker.FOLDER_VARIABLE])
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
    sys.exit(main())
