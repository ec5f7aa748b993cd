"""What the launcher tells a worker about this start of the run."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchContext:
    """What one worker knows about this start of the run: its name, time limit, device and how to stop it."""

    name: str
    """Unique name of this start; empty if no supervisor watches it."""
    began_at: float
    """Time at which the entrypoint started, in seconds since 1970; `train.max_time` counts from here."""
    ends_at: float | None
    """Time at which the scheduler will end the job, in seconds since 1970; None if unknown."""
    job_id: str | None
    """The scheduler's id of the job, which stays the same when the job is requeued; None without a scheduler."""
    stop_requested: Callable[[], bool]
    """Returns True if this process was asked to stop. One rank that was asked is enough to stop all ranks."""
    on_hang: Callable[[str], None]
    """Called from a thread with a line that names the missing rank; does not return."""
    device: str
    """Device of all processes of this node: ``cuda`` or ``cpu``."""
    device_reason: str
    """Why this device was chosen."""
