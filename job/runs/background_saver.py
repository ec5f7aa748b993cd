"""Saving checkpoints in the background: a thread uploads one checkpoint from memory while training continues."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from job import storage
from job.errors import UserError, one_line
from job.runs.attempts import Attempt, Attempts, Superseded
from job.runs.checkpoint import CheckpointName, TrainingState
from job.runs.checkpoint_writer import save_checkpoint
from job.runs.metrics_file import metrics_url
from job.runs.retention import delete_old_checkpoints, discard_checkpoint

_PRUNE_SECONDS = 60.0
"""Time limit for deleting old checkpoints after a save."""

logger = logging.getLogger(__name__)


class BackgroundSaver:
    """Uploads one checkpoint at a time from memory, in a thread, while training continues; used by rank 0 only.

    `job.training.rank0.Rank0Duties` decides when a checkpoint is due and what follows a failed upload.

    Args:
        output: folder or URL of the run.
        attempt: the attempt that writes the checkpoints.
        keep: number of newest checkpoints to keep.
        keep_every: also keep the first checkpoint of each interval of this many steps; None: keep none of them.
        saved_step: step of the checkpoint that training continued from; None if there was none.
        save_seconds: seconds that saving that checkpoint took; None if there was none.
        say: prints a line.
    """

    def __init__(
        self,
        output: str,
        attempt: Attempt,
        *,
        keep: int,
        keep_every: int | None,
        saved_step: int | None,
        save_seconds: float | None,
        say: Callable[[str], None],
    ) -> None:
        self._output, self._attempt, self._say = output, attempt, say
        self._keep, self._keep_every = keep, keep_every
        self.save_seconds = save_seconds
        """Longest time that a save took, including the time for which training stood still; None before the first."""
        self.saved_step = saved_step
        """Step of the newest checkpoint that is in the store; None if there is none."""
        self._thread: threading.Thread | None = None
        self._cancelled = threading.Event()
        self.failure: Exception | None = None
        """The error that ended the last upload; None if it succeeded or is still running."""
        self._upload: Callable[[], None] = lambda: None
        self.failures = 0
        """Failed uploads since the last one that succeeded."""
        self.failed_at = 0.0
        """Time of the last failure, by `time.monotonic`."""

    def begin(
        self,
        state: TrainingState,
        snapshot: Mapping[str, Mapping[str, Tensor]],
        metrics: bytes,
        stalled_seconds: float,
    ) -> None:
        """Start to upload a checkpoint. The upload before must have ended.

        Args:
            state: the content of state.json.
            snapshot: weights and moments; they must not change until `poll` returns True.
            metrics: the content of metrics.jsonl up to this step.
            stalled_seconds: seconds for which training stood still to copy the snapshot.
        """
        self._upload = lambda: self._save(state, snapshot, metrics, stalled_seconds)
        self._start()

    def begin_again(self) -> None:
        """Start the last upload again. It must have ended."""
        self._start()

    def _start(self) -> None:
        if not self.poll(0):
            raise RuntimeError("the upload before this one is still running")
        self._cancelled.clear()
        self.failure = None
        self._thread = threading.Thread(target=self._upload, name="saver", daemon=True)
        self._thread.start()

    def poll(self, seconds: float) -> bool:
        """Wait for at most `seconds`; return True if no upload is running."""
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def cancel(self) -> None:
        """Cancel the running upload; `poll` tells when it has ended."""
        self._cancelled.set()

    @property
    def is_superseded(self) -> bool:
        """Return True if the last upload found that a newer attempt owns the run: trying again is useless."""
        return isinstance(self.failure, Superseded)

    def raise_if_superseded(self) -> None:
        """Raise `Superseded` if the last upload found that a newer attempt owns the run."""
        if isinstance(self.failure, Superseded):
            raise self.failure

    def _save(
        self, state: TrainingState, snapshot: Mapping[str, Mapping[str, Tensor]], metrics: bytes, stalled_seconds: float
    ) -> None:
        began, attempts = time.monotonic(), Attempts(self._output)
        name = CheckpointName(state.step, state.attempt)

        def elapsed_seconds() -> float:
            return stalled_seconds + time.monotonic() - began

        try:
            with storage.limits(cancelled=self._cancelled):
                saved = save_checkpoint(
                    self._output,
                    state,
                    snapshot,
                    metrics,
                    check=lambda: attempts.raise_if_superseded(self._attempt),
                    clock=elapsed_seconds,
                )
                self.saved_step, self.failures = state.step, 0
                self.save_seconds = max(elapsed_seconds(), self.save_seconds or 0)
                self._say(
                    f"step {state.step} | saved {saved.url}: training stood still for {stalled_seconds:.2f} s, "
                    f"the upload took {elapsed_seconds() - stalled_seconds:.1f} s"
                )
                attempts.raise_if_superseded(self._attempt)
                with _failures_as_warnings("metrics.jsonl was not written, the next save tries again"):
                    storage.write_bytes(metrics_url(self._output), metrics)
                with _failures_as_warnings("old checkpoints were not deleted, the next save tries again"):
                    self._prune(name, state.decays_after)
        except (storage.Cancelled, Superseded) as error:
            self.failure = error
        except Exception as error:
            if self.saved_step != state.step:
                self._note_failure(state.step, error)
                # A UserError may mean that the disk is full, and the partial files may be what fills it: delete them
                # now. After an outage of the store, the next successful save deletes them.
                if isinstance(error, UserError):
                    with _failures_as_warnings("files of a failed save were not deleted, the next save tries again"):
                        discard_checkpoint(self._output, name)

    def _note_failure(self, step: int, error: Exception) -> None:
        self.failed_at = time.monotonic()
        self.failures += 1
        self.failure = error
        self._say(f"step {step} | save failed, trying again later: {one_line(str(error) or repr(error))}")

    def _prune(self, newest: CheckpointName, decays_after: list[int]) -> None:
        with storage.limits(deadline_seconds=_PRUNE_SECONDS):
            delete_old_checkpoints(self._output, self._keep, self._keep_every, newest, decays_after)


@contextmanager
def _failures_as_warnings(consequence: str) -> Iterator[None]:
    """Log an error of the store inside the block as a warning; by then, the save itself has succeeded or failed."""
    try:
        yield
    except (OSError, UserError) as error:
        logger.warning("%s: %s", consequence, one_line(str(error)))
