"""A limit of time: when to stop so that everything is saved by then."""

import time

_SLOWER = 1.25
"""A save may take so much longer than the longest before: the store is not ours alone."""
_LEAVING_SECONDS = 5.0
"""For the tracker, and for the processes to end."""
_GUESSED_BYTES_PER_SECOND = 20e6


class TimeBudget:
    """How long this start may still train.

    Args:
        ends_at: by when everything must be saved, in seconds since 1970.
        checkpoint_bytes: size of a checkpoint, from which its time is guessed until one was measured.
    """

    def __init__(self, ends_at: float, checkpoint_bytes: int) -> None:
        self._ends_at = ends_at
        self._guess_seconds = checkpoint_bytes / _GUESSED_BYTES_PER_SECOND
        self._step_seconds = 0.0

    def step_took(self, seconds: float) -> None:
        """Takes notice of a step's time: the longest one counts."""
        self._step_seconds = max(self._step_seconds, seconds)

    def needed_seconds(self, save_seconds: float | None) -> float:
        """What it takes to stop: the step that has begun and the one in which all hear of it, the save, the end.

        Args:
            save_seconds: of the longest save so far; None: there was none yet.
        """
        save = self._guess_seconds if save_seconds is None else save_seconds * _SLOWER
        return 2 * self._step_seconds + save + _LEAVING_SECONDS

    def is_over(self, save_seconds: float | None) -> bool:
        """Whether it is time to stop."""
        return time.time() + self.needed_seconds(save_seconds) >= self._ends_at
