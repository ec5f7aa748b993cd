"""How a worker or an attempt ended: one name for each way, shared by the launcher and the attempt records."""

from enum import StrEnum


class RunStatus(StrEnum):
    """How a worker or an attempt of a run ended. The values are stored in attempt records."""

    DONE = "done"
    """The work is finished."""
    STOPPED = "stopped"
    """Stopped on request after writing a checkpoint; the work is not finished."""
    FAILED = "failed"
    """The attempt failed for a reason that its record contains."""
    SUPERSEDED = "superseded"
    """A newer attempt has taken over the run."""
    GAVE_UP = "gave up"
    """Too many attempts made no progress. Only an earlier version of the program wrote this to attempt records."""
    REFUSED = "refused"
    """The worker found a mistake that the user can correct (a `UserError`)."""
    NO_PROGRESS = "no progress"
    """The worker raised `NoProgress`: starting again will not help."""
    HUNG = "hung"
    """The worker waited too long for another one."""
    CRASHED = "crashed"
    """The worker raised an exception."""
    KILLED = "killed"
    """A signal ended the worker."""
    LOST = "lost"
    """The worker's node stopped responding, or could not connect to the other nodes."""
