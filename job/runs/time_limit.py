"""Deciding when to stop so that the last checkpoint is saved before a time limit."""

import time

_SLOWDOWN = 1.25
"""Allowance for a save that is slower than the slowest one so far, since others use the store as well."""
_SHUTDOWN_SECONDS = 5.0
"""Time for the tracker and the processes to end after the last save."""
_ASSUMED_BYTES_PER_SECOND = 20e6


class TimeLimit:
    """The time limit of one attempt.

    Args:
        ends_at: time by which the last checkpoint must be saved, in seconds since 1970.
        checkpoint_bytes: size of a checkpoint, from which the time to save it is estimated before one was measured.
    """

    def __init__(self, ends_at: float, checkpoint_bytes: int) -> None:
        self._ends_at = ends_at
        self._estimated_save_seconds = checkpoint_bytes / _ASSUMED_BYTES_PER_SECOND
        self._longest_step_seconds = 0.0

    def step_took(self, seconds: float) -> None:
        """Record the duration of a step; the longest one counts."""
        self._longest_step_seconds = max(self._longest_step_seconds, seconds)

    def needed_seconds(self, save_seconds: float | None) -> float:
        """Return the time needed to stop: two steps, the last save and the shutdown.

        One step is already running. The ranks agree to stop during the one after it.

        Args:
            save_seconds: duration of the longest save so far; None before the first save.
        """
        save = self._estimated_save_seconds if save_seconds is None else save_seconds * _SLOWDOWN
        return 2 * self._longest_step_seconds + save + _SHUTDOWN_SECONDS

    def is_over(self, save_seconds: float | None) -> bool:
        """Return True if the attempt must stop now to be saved in time; `save_seconds` as in `needed_seconds`."""
        return time.time() + self.needed_seconds(save_seconds) >= self._ends_at
