"""The processes of one start: what they have in common, and that none of them outlives the one that started it."""

import ctypes
import os
import signal
import sys
from typing import NoReturn

from job import console
from job.errors import EXIT_FAILED

FOLDER_VARIABLE = "WIKILLM_WORKER_DIR"
"""Names the local folder that holds the task and takes the outcomes."""
PARENT_VARIABLE = "WIKILLM_PARENT_PID"
"""The process that this one must not outlive."""
STOP_FILE = "stop"
"""Where there is this file in the folder, the run is to stop; a worker that is still starting finds it later."""
ANY_PORT = "0"
"""MASTER_PORT of a single worker: it opens a free port itself, and no other process has to know the number."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Has the kernel kill this process as soon as its parent is gone, however that ended: none trains on in secret."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):  # it was gone before
        leave(EXIT_FAILED)


def leave(code: int) -> NoReturn:
    """Ends this process; communication threads may abort one that shuts down in the usual way, after all is done."""
    console.close()
    os._exit(code)
