"""What a run is told by whoever started it this time."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """One start of a run, in one of its processes."""

    name: str
    """Which no other start has; empty where nobody looks after it."""
    began_at: float
    """When the entrypoint was started, in seconds since 1970: from then on `train.max_time` counts."""
    ends_at: float | None
    """When whoever started it ends it, in seconds since 1970; None if that is not known."""
    job_id: str | None
    """The scheduler's name for the job, which it keeps when it starts the job again; None without a scheduler."""
    stop_requested: Callable[[], bool]
    """Whether this process was asked to stop; what one of them knows, all agree on."""
    on_hang: Callable[[str], None]
    """Called, from a thread, with a line that says which process does not come; it does not return."""
    device: str
    """Device of all processes of this node: ``cuda`` or ``cpu``."""
    device_reason: str
    """Why this device was chosen."""
