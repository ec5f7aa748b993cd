"""Saving while training goes on: one checkpoint at a time on its way to the store, from memory, in a thread."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from job import storage
from job.errors import UserError, one_line
from job.runs.attempts import Attempt, Attempts, Superseded
from job.runs.checkpoint import (
    Name,
    TrainingState,
    delete_old_checkpoints,
    discard_checkpoint,
    save_checkpoint,
)
from job.runs.metrics_file import metrics_url

_TRY_AGAIN_SECONDS = 10.0
"""After the first failure; the wait doubles with each further one, and so does that for the next line of the log."""
_LONGEST_TRY_AGAIN_SECONDS = 300.0
_LAST_TRY_AGAIN_SECONDS = 1.0
"""Between the tries of the last save of all."""
_PRUNE_SECONDS = 60.0

logger = logging.getLogger(__name__)


class Saver:
    """Decides when the run is saved, and uploads what is given to it; in the first process of the run.

    A save that is due while the one before is still on its way waits for it: nothing piles up. One that fails, for
    whatever reason, costs a warning, and is tried again with the state of a later step. Only a newer attempt ends the
    run (`raise_if_superseded`). The caller of the last save of all looks at `failure`.

    Args:
        output: the run's prefix.
        attempt: the start that writes.
        every: interval in steps.
        every_minutes: longest time between two saves as well.
        keep: the newest so many are kept.
        keep_every: besides, one of every so many steps.
        saved_step: of the checkpoint that the run went on from, if there was one.
        save_seconds: what that took to save.
        say: takes a line for the log.
    """

    def __init__(
        self,
        output: str,
        attempt: Attempt,
        *,
        every: int,
        every_minutes: float | None,
        keep: int,
        keep_every: int | None,
        saved_step: int | None,
        save_seconds: float | None,
        say: Callable[[str], None],
    ) -> None:
        self._output, self._attempt, self._say = output, attempt, say
        self._every, self._every_seconds = every, every_minutes and every_minutes * 60
        self._keep, self._keep_every = keep, keep_every
        self.save_seconds = save_seconds
        """The longest that a save took, standstill and upload; None: there was none yet."""
        self.saved_step = saved_step
        """Of the last checkpoint that is in the store."""
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self.failure: Exception | None = None
        """What ended the last upload, if it failed."""
        self._work: Callable[[], None] = lambda: None
        self._is_overdue = False
        self._not_before = 0.0
        self._failures = 0
        """Since the last checkpoint that is in the store."""
        self._failed_at = 0.0
        self._last_began = time.monotonic()

    # ---- When ----

    def is_due(self, step: int) -> bool:
        """Whether the run is to be saved when `step` steps are done."""
        now = time.monotonic()
        self._is_overdue |= step % self._every == 0
        self._is_overdue |= self._every_seconds is not None and now - self._last_began >= self._every_seconds
        return self._is_overdue and now >= self._not_before and self.poll(0)

    # ---- The upload ----

    def begin(
        self,
        state: TrainingState,
        snapshot: Mapping[str, Mapping[str, Tensor]],
        metrics: bytes,
        stalled_seconds: float,
    ) -> None:
        """Begins to upload a checkpoint; the one before has ended.

        Args:
            state: where the run is.
            snapshot: weights and moments; they stay as they are until `poll` says that it has ended.
            metrics: the run's log.
            stalled_seconds: how long training stood still for it.
        """
        self._is_overdue, self._last_began = False, time.monotonic()
        self._work = lambda: self._save(state, snapshot, metrics, stalled_seconds)
        self._start()

    def try_again(self, seconds: float) -> None:
        """Begins the last upload anew; if the last failure is recent, only waits, at most so long."""
        wait_seconds = self._failed_at + _LAST_TRY_AGAIN_SECONDS - time.monotonic()
        if wait_seconds > 0:
            time.sleep(min(wait_seconds, seconds))
        else:
            self._start()

    def _start(self) -> None:
        if not self.poll(0):
            raise RuntimeError("the upload before is still on its way")
        self._cancelled.clear()
        self.failure = None
        self._thread = threading.Thread(target=self._work, name="saver", daemon=True)
        self._thread.start()

    def poll(self, seconds: float) -> bool:
        """Whether nothing is on its way, after waiting for that at most so long."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def cancel(self) -> None:
        """Gives up what is on its way; `poll` tells when it has ended."""
        self._cancelled.set()

    @property
    def is_superseded(self) -> bool:
        """Whether a newer attempt has the run: no later save will fare better."""
        return isinstance(self.failure, Superseded)

    def raise_if_superseded(self) -> None:
        """Raises the UserError that says so."""
        if isinstance(self.failure, Superseded):
            raise self.failure

    def _save(
        self, state: TrainingState, snapshot: Mapping[str, Mapping[str, Tensor]], metrics: bytes, stalled_seconds: float
    ) -> None:
        began, attempts, name = time.monotonic(), Attempts(self._output), Name(state.step, state.attempt)

        def seconds() -> float:
            return stalled_seconds + time.monotonic() - began

        try:
            with storage.limits(cancelled=self._cancelled):
                saved = save_checkpoint(
                    self._output, state, snapshot, metrics, lambda: attempts.check_is_ours(self._attempt), seconds
                )
                self.saved_step, self._failures = state.step, 0
                self.save_seconds = max(seconds(), self.save_seconds or 0)
                self._say(
                    f"step {state.step} | saved {saved.url}: training stood still for {stalled_seconds:.2f} s, "
                    f"the upload took {seconds() - stalled_seconds:.1f} s"
                )
                attempts.check_is_ours(self._attempt)
                with _a_failure_is_a_warning("the log is written with the next checkpoint"):
                    storage.write_bytes(metrics_url(self._output), metrics)
                with _a_failure_is_a_warning("old checkpoints are deleted another time"):
                    self._prune(name)
        except (storage.Cancelled, Superseded) as error:
            self.failure = error
        except Exception as error:
            if self.saved_step != state.step:
                self._failed(state.step, error)
                if isinstance(error, UserError):  # the disk may be full of it; after an outage, pruning deletes it
                    with _a_failure_is_a_warning("the rest of a failed save is deleted another time"):
                        discard_checkpoint(self._output, name)

    def _failed(self, step: int, error: Exception) -> None:
        wait_seconds = min(_TRY_AGAIN_SECONDS * 2**self._failures, _LONGEST_TRY_AGAIN_SECONDS)
        self._failed_at = time.monotonic()
        self._is_overdue, self._not_before = True, self._failed_at + wait_seconds
        self._failures += 1
        self.failure = error
        self._say(f"step {step} | not saved, and tried again later: {one_line(str(error) or repr(error))}")

    def _prune(self, newest: Name) -> None:
        with storage.limits(deadline_seconds=_PRUNE_SECONDS):
            delete_old_checkpoints(self._output, self._keep, self._keep_every, newest)


@contextmanager
def _a_failure_is_a_warning(consequence: str) -> Iterator[None]:
    """Within it, what goes wrong is only said: the checkpoint itself is not touched by it."""
    try:
        yield
    except (OSError, UserError) as error:
        logger.warning("%s: %s", consequence, one_line(str(error)))
