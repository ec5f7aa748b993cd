"""Names and files that the processes of one start share, such as the stop file, and the way each process exits."""

import ctypes
import os
import signal
import sys
from typing import NoReturn

from job import console
from job.errors import EXIT_FAILED

FOLDER_VARIABLE = "WIKILLM_WORKER_DIR"
"""Environment variable with the local folder of this start: it contains the worker job and the worker statuses."""
PARENT_VARIABLE = "WIKILLM_PARENT_PID"
"""Environment variable with the process id of the parent, which this process must not outlive."""
STOP_FILE = "stop"
"""Name of a file in the folder of this start. Once it exists, the workers stop, also those that are still starting."""
ANY_PORT = "0"
"""MASTER_PORT of a single worker, which opens a free port itself: no other process needs to know the number."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Make the kernel kill this process as soon as its parent exits, so that no worker keeps training unnoticed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT_VARIABLE]):  # The parent exited before the call above.
        leave(EXIT_FAILED)


def leave(code: int) -> NoReturn:
    """Exit at once, without the interpreter's cleanup: communication threads may abort a process during cleanup."""
    console.close()
    os._exit(code)
