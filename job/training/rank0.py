"""Duties of rank 0: it saves the run, watches the time limit, and notices when a newer attempt has taken the run over.

The life of a checkpoint, all of it decided in `Rank0Duties`:

1. Due. `wants_save` says yes at every `checkpoint.every` steps and every `checkpoint.every_minutes` minutes, unless an
   upload is still under way: then as soon as that has ended. The checkpoint before the decay of a `wsd` schedule is due
   at its step exactly: training stands still until an upload that is under way has ended. All ranks hear of it in the
   round of `StepSync` before the next step.
2. Copied. In `save`, on all ranks, training stands still while weights and optimizer state are copied into rank 0's
   memory; then `BackgroundSaver` uploads them while training goes on.
3. Failed. An upload that fails costs a warning. A checkpoint is due again after 10 s, then 20 s, up to 5 minutes, with
   the state of a later step. It never ends the run.
4. Last. After the last step, or when the run is asked to stop, `finish_save` repeats the upload every second until the
   deadline. Only if that is missed does the start fail, in `end`.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from typing_extensions import override

from job import clock, storage
from job.errors import UserError
from job.runs.attempts import Attempts
from job.runs.background_saver import BackgroundSaver
from job.runs.checkpoint import TrainingState
from job.runs.launch_context import LaunchContext
from job.runs.metrics_file import metrics_url
from job.runs.resume import OpenedRun
from job.runs.run_status import RunStatus
from job.runs.run_watcher import RunWatcher
from job.runs.time_limit import TimeLimit
from job.setting_kinds import Duration
from job.training.model_state import ModelState

_RETRY_SECONDS = 10.0
"""Wait after the first failed save; it doubles with each further failure."""
_LONGEST_RETRY_SECONDS = 300.0
_LAST_RETRY_SECONDS = 1.0
"""Wait between the tries of the last save of all."""
_END_RECORD_SECONDS = 15
"""Longest time for writing how the start ended."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavePolicy:
    """When the run is saved and when it stops, from the sections `checkpoint` and `train` of the settings."""

    every: int
    """Steps between two checkpoints."""
    every_minutes: float | None
    """Most minutes between two checkpoints as well; None: no such limit."""
    keep: int
    """Number of the newest checkpoints that are kept."""
    keep_every: int | None
    """Of every this many steps, one checkpoint is kept for ever; None: none is."""
    stop_file: str | None
    """Stop the run when this file exists; None: there is no such file."""
    max_time: Duration | None
    """Longest time of this start; None: no limit."""
    decay_after: int | None
    """Step after which the decay begins, and at which the run is saved in any case; None: at none."""


class OtherRanks:
    """The part of every other rank: it copies its share of the state for a save, and leaves the rest to rank 0.

    Args:
        context: what the launcher asks for.
        state: weights and optimizer state, for saving.
    """

    def __init__(self, context: LaunchContext, state: ModelState) -> None:
        self._context, self._state = context, state

    def stop_requested(self) -> bool:
        """Return True if this process knows of a reason to stop."""
        return self._context.stop_requested()

    def wants_save(self, step: int) -> bool:
        """Return True if the run should be saved when `step` steps are done."""
        return False

    def seconds_to_save(self, step: int, step_seconds: float) -> float:
        """Return the estimated seconds from the end of `step` to the next checkpoint; infinite if it is not known."""
        return math.inf

    def check(self) -> None:
        """Raise `Superseded` if a newer attempt is known to have the run."""

    def check_is_ours(self) -> None:
        """Ask the store, and raise `Superseded` if a newer attempt has the run; called before files are overwritten."""

    def cancel_save(self) -> None:
        """Cancel the upload that is under way, so that the last save can use all the time that is left."""

    def can_save(self, seconds: float) -> bool:
        """Return True if no upload is under way, after waiting for that at most so many seconds."""
        return True

    def save(self, state: TrainingState, metrics: bytes) -> None:
        """Copy weights and optimizer state, and begin to upload them with the run's log.

        A collective: all ranks call it, and training stands still until it returns.
        """
        self._state.copy_to(None)

    def finish_save(self, step: int, deadline_seconds: float) -> Callable[[float], bool]:
        """Return a function that waits at most so many seconds for the save of `step`, and tells if that has ended."""
        return lambda seconds: True

    def end(self, status: RunStatus, step: int, metrics: bytes) -> None:
        """Record how this start ended, after `step` steps, and write the log.

        Raises:
            StoreError: the last save has failed.
            UserError: the same, and a person can correct it.
        """

    def close(self) -> None:
        """End the threads."""


class Rank0Duties(OtherRanks):
    """The part of rank 0.

    Args:
        policy: when to save and when to stop.
        context: what the launcher asks for.
        output: the run's prefix.
        opened: the run.
        state: weights and optimizer state, for saving.
        checkpoint_bytes: size of a checkpoint.
        say: prints a line of the log.
    """

    def __init__(
        self,
        policy: SavePolicy,
        context: LaunchContext,
        output: str,
        opened: OpenedRun,
        state: ModelState,
        checkpoint_bytes: int,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(context, state)
        self._policy, self._output, self._say = policy, output, say
        self._attempt, self._attempts = opened.attempt, Attempts(output)
        self._from_step = 0 if opened.checkpoint is None else opened.checkpoint.state.step
        self._saver = BackgroundSaver(
            output,
            opened.attempt,
            keep=policy.keep,
            keep_every=policy.keep_every,
            saved_step=None if opened.checkpoint is None else opened.checkpoint.state.step,
            save_seconds=None if opened.checkpoint is None else opened.checkpoint.save_seconds,
            say=say,
        )
        self._snapshot = state.empty_snapshot()
        self._is_due = False
        self._saved_at = time.monotonic()
        self._watcher = RunWatcher(output, opened.attempt, policy.stop_file)
        self._time_limit, self._limit_name = _time_limit(policy.max_time, context, checkpoint_bytes)
        self._stop_reason: str | None = None
        self._is_out_of_time = False
        self._stepped_at: float | None = None

    # ---- Stopping ----

    @override
    def stop_requested(self) -> bool:
        """Return True after a signal, with the stop file there, or near the time limit; print the reason once."""
        if self._stop_reason is None and (reason := self._reason_to_stop()) is not None:
            self._stop_reason = reason
            self._say(f"stopping: {reason}")
        return self._stop_reason is not None

    def _reason_to_stop(self) -> str | None:
        if self._context.stop_requested():
            return "a signal asked for it"
        if self._watcher.stop_requested:
            return f"{self._policy.stop_file} exists (train.stop_file); as long as it does, every start stops"
        if self._time_limit is not None and self._time_limit.is_over(self._saver.save_seconds):
            self._is_out_of_time = True
            needed_seconds = self._time_limit.needed_seconds(self._saver.save_seconds)
            return f"{self._limit_name}, and {needed_seconds:.0f} s of it are for the last checkpoint"
        return None

    @override
    def check(self) -> None:
        self._watcher.raise_if_superseded()
        self._saver.raise_if_superseded()

    @override
    def check_is_ours(self) -> None:
        self._attempts.raise_if_superseded(self._attempt)

    # ---- Saving ----

    @override
    def wants_save(self, step: int) -> bool:
        now = time.monotonic()
        if self._time_limit is not None and self._stepped_at is not None:
            self._time_limit.step_took(now - self._stepped_at)
        self._stepped_at = now
        if step == self._policy.decay_after:
            return True
        minutes = self._policy.every_minutes
        self._is_due |= step % self._policy.every == 0
        self._is_due |= minutes is not None and now - self._saved_at >= minutes * 60
        failures = self._saver.failures
        if failures:
            retry_seconds = min(_RETRY_SECONDS * 2 ** (failures - 1), _LONGEST_RETRY_SECONDS)
            return now >= self._saver.failed_at + retry_seconds and self._saver.poll(0)
        return self._is_due and self._saver.poll(0)

    @override
    def seconds_to_save(self, step: int, step_seconds: float) -> float:
        every, minutes, decay_after = self._policy.every, self._policy.every_minutes, self._policy.decay_after
        steps = every - step % every
        if decay_after is not None and decay_after > step:
            steps = min(steps, decay_after - step)
        seconds = steps * step_seconds
        if minutes is not None:
            seconds = min(seconds, max(0.0, self._saved_at + minutes * 60 - time.monotonic()))
        return seconds

    @override
    def can_save(self, seconds: float) -> bool:
        return self._saver.poll(seconds)

    @override
    def cancel_save(self) -> None:
        self._saver.cancel()

    @override
    def save(self, state: TrainingState, metrics: bytes) -> None:
        began = time.monotonic()
        self._state.copy_to(self._snapshot)
        self._saver.begin(state, self._snapshot.tensors, metrics, time.monotonic() - began)
        self._is_due, self._saved_at = False, time.monotonic()
        self._stepped_at = None

    @override
    def finish_save(self, step: int, deadline_seconds: float) -> Callable[[float], bool]:
        end = clock.seconds() + deadline_seconds

        def is_finished(seconds: float) -> bool:
            is_late = clock.seconds() > end
            if not self._saver.poll(seconds):
                if is_late:
                    self._saver.cancel()
                return False
            if self._saver.saved_step == step or self._saver.is_superseded or is_late:
                return True
            wait_seconds = self._saver.failed_at + _LAST_RETRY_SECONDS - time.monotonic()
            if wait_seconds > 0:
                time.sleep(min(wait_seconds, seconds))
            else:
                self._saver.begin_again()
            return False

        return is_finished

    @override
    def end(self, status: RunStatus, step: int, metrics: bytes) -> None:
        self._saver.raise_if_superseded()
        if self._saver.saved_step != step:
            if isinstance(self._saver.failure, UserError):
                raise self._saver.failure
            last = "no step is" if self._saver.saved_step is None else f"step {self._saver.saved_step} is"
            raise storage.StoreError(f"step {step} could not be saved in time, {last}: {self._saver.failure}")
        try:
            with storage.limits(deadline_seconds=_END_RECORD_SECONDS):
                if status == RunStatus.DONE:  # an evaluation of the last step may have come after its checkpoint
                    storage.write_bytes(metrics_url(self._output), metrics)
                # Started again with the same limit it would stop here again and again: this is no progress.
                is_fruitless = self._is_out_of_time and step == self._from_step
                error = f"there was no time for a single step: {self._limit_name}" if is_fruitless else None
                self._attempts.end(self._attempt, status, error, self._stop_reason)
        except (OSError, UserError) as error:
            logger.warning("attempt %d is %s, but this could not be recorded: %s", self._attempt.number, status, error)

    @override
    def close(self) -> None:
        self._watcher.close()
        self._saver.cancel()


def _time_limit(
    max_time: Duration | None, context: LaunchContext, checkpoint_bytes: int
) -> tuple[TimeLimit | None, str]:
    """Return the earlier of `train.max_time` and the scheduler's limit, and what to call it; None without either."""
    limits = []
    if max_time is not None:
        limits.append((context.began_at + max_time.seconds, f"train.max_time is {max_time}"))
    if context.ends_at is not None:
        limits.append((context.ends_at, f"the job's limit is {time.strftime('%X', time.localtime(context.ends_at))}"))
    if not limits:
        return None, ""
    ends_at, name = min(limits)
    return TimeLimit(ends_at, checkpoint_bytes), name
