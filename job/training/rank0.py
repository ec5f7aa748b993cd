"""What the first process of a run does for all of them: saves it, sees that it is still ours, and minds the time."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from typing_extensions import override

from job import clock as awake
from job import storage
from job.config import Config
from job.errors import UserError
from job.report import Report
from job.runs.attempts import DONE, Attempts
from job.runs.background_saver import Saver
from job.runs.checkpoint import TrainingState
from job.runs.launch_context import Start
from job.runs.metrics_file import metrics_url
from job.runs.resume import OpenedRun
from job.runs.run_watcher import Watch
from job.runs.time_limit import TimeBudget
from job.training.engine import Engine

_BYTES_PER_PARAMETER = 12
"""Of a checkpoint: weight and two moments, fp32."""
_LAST_WORDS_SECONDS = 15

logger = logging.getLogger(__name__)


class Follower:
    """Every other process: it takes its part in a save, and leaves the rest to the first.

    Args:
        start: what was asked for.
        engine: whose state is saved.
    """

    def __init__(self, start: Start, engine: Engine) -> None:
        self._start, self._engine = start, engine

    def stop_requested(self) -> bool:
        """Whether this process knows of a reason to stop."""
        return self._start.stop_requested()

    def wants_save(self, step: int) -> bool:
        """Whether the run is to be saved when `step` steps are done."""
        return False

    def check(self) -> None:
        """Raise `Superseded` if a newer attempt is known to have the run."""

    def check_is_ours(self) -> None:
        """Ask the store, and raise `Superseded` if a newer attempt has the run: before something is overwritten."""

    def give_up_save(self) -> None:
        """Gives up the save that is on its way, for a last one to have all the time."""

    def is_free(self, seconds: float) -> bool:
        """Whether a save can begin, after waiting for that at most so long."""
        return True

    def save(self, state: TrainingState, metrics: bytes) -> None:
        """Begins a save; a collective, for as long as training stands still."""
        self._engine.copy_state(None)

    def finish_save(self, step: int, deadline_seconds: float) -> Callable[[float], bool]:
        """A function that waits at most so many seconds for the save of `step`, and tells whether that has ended."""
        return lambda seconds: True

    def end(self, status: str, step: int, metrics: bytes) -> None:
        """Notes how this start of the run has ended, after `step` steps, with this log.

        Raises:
            StoreError: the last save has failed.
            UserError: the same, and a person can mend it.
        """

    def close(self) -> None:
        """Ends its threads."""


class Keeper(Follower):
    """The first process.

    Args:
        config: all settings.
        start: what was asked for.
        opened: the run.
        engine: whose state is saved.
        parameters: of the model.
        report: where lines go.
    """

    def __init__(
        self, config: Config, start: Start, opened: OpenedRun, engine: Engine, parameters: int, report: Report
    ) -> None:
        super().__init__(start, engine)
        self._report, self._output = report, config.run.output
        self._attempt, self._attempts = opened.attempt, Attempts(config.run.output)
        self._saver = Saver(
            config.run.output,
            opened.attempt,
            every=config.checkpoint.every,
            every_minutes=config.checkpoint.every_minutes,
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            saved_step=None if opened.checkpoint is None else opened.checkpoint.state.step,
            save_seconds=None if opened.checkpoint is None else opened.checkpoint.save_seconds,
            say=report.say,
        )
        self._snapshot = engine.empty_snapshot()
        self._watch = Watch(config.run.output, opened.attempt, config.train.stop_file)
        self._stop_file = config.train.stop_file
        limits = []
        if (max_time := config.train.max_time) is not None:
            limits.append((start.began_at + max_time.seconds, f"train.max_time is {max_time}"))
        if start.ends_at is not None:
            limits.append((start.ends_at, f"the job's limit is {time.strftime('%X', time.localtime(start.ends_at))}"))
        self._budget = None
        if limits:
            ends_at, self._limit = min(limits)
            self._budget = TimeBudget(ends_at, parameters * _BYTES_PER_PARAMETER)
        self._from_step = 0 if opened.checkpoint is None else opened.checkpoint.state.step
        self._is_stopping = False
        self._is_out_of_time = False
        self._stepped_at: float | None = None

    @override
    def stop_requested(self) -> bool:
        """Asked by a signal, the stop file is there, or the time is nearly over; the reason is said once."""
        if not self._is_stopping and (reason := self._reason_to_stop()) is not None:
            self._is_stopping = True
            self._report.say(f"stopping: {reason}")
        return self._is_stopping

    def _reason_to_stop(self) -> str | None:
        if self._start.stop_requested():
            return "asked to by a signal"
        if self._watch.stop_requested:
            return f"{self._stop_file} is there (train.stop_file); while it is, every start stops"
        if self._budget is not None and self._budget.is_over(self._saver.save_seconds):
            self._is_out_of_time = True
            needed = self._budget.needed_seconds(self._saver.save_seconds)
            return f"{self._limit}, and {needed:.0f} s of it are for the last checkpoint"
        return None

    @override
    def wants_save(self, step: int) -> bool:
        now = time.monotonic()
        if self._budget is not None and self._stepped_at is not None:
            self._budget.step_took(now - self._stepped_at)
        self._stepped_at = now
        return self._saver.is_due(step)

    @override
    def check(self) -> None:
        self._watch.raise_if_lost()
        self._saver.raise_if_superseded()

    @override
    def check_is_ours(self) -> None:
        self._attempts.check_is_ours(self._attempt)

    @override
    def give_up_save(self) -> None:
        self._saver.cancel()

    @override
    def is_free(self, seconds: float) -> bool:
        return self._saver.poll(seconds)

    @override
    def save(self, state: TrainingState, metrics: bytes) -> None:
        began = time.monotonic()
        self._engine.copy_state(self._snapshot)
        self._saver.begin(state, self._snapshot.tensors, metrics, time.monotonic() - began)
        self._stepped_at = None

    @override
    def finish_save(self, step: int, deadline_seconds: float) -> Callable[[float], bool]:
        end = awake.seconds() + deadline_seconds

        def is_finished(seconds: float) -> bool:
            is_late = awake.seconds() > end
            if not self._saver.poll(seconds):
                if is_late:
                    self._saver.cancel()
                return False
            if self._saver.saved_step == step or self._saver.is_superseded or is_late:
                return True
            self._saver.try_again(seconds)
            return False

        return is_finished

    @override
    def end(self, status: str, step: int, metrics: bytes) -> None:
        self._saver.raise_if_superseded()
        if self._saver.saved_step != step:
            if isinstance(self._saver.failure, UserError):
                raise self._saver.failure
            last = "no step is" if self._saver.saved_step is None else f"step {self._saver.saved_step} is"
            raise storage.StoreError(f"step {step} could not be saved in time, {last}: {self._saver.failure}")
        try:
            with storage.limits(deadline_seconds=_LAST_WORDS_SECONDS):
                if status == DONE:  # an evaluation of the last step may have come after its checkpoint
                    storage.write_bytes(metrics_url(self._output), metrics)
                # Started again with the same limit, it would stop here for ever: that is no progress.
                is_fruitless = self._is_out_of_time and step == self._from_step
                error = f"there was no time for a single step: {self._limit}" if is_fruitless else None
                self._attempts.update(replace(self._attempt, ended=status, error=error))
        except (OSError, UserError) as error:
            logger.warning("that attempt %d is %s is not noted: %s", self._attempt.number, status, error)

    @override
    def close(self) -> None:
        self._watch.close()
        self._saver.cancel()
