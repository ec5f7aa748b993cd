"""Start task after task until the run is complete; the run's own store tells how far each task got.

The service reports that a task has ended, but not its exit code. The run's checkpoints and attempt records tell whether
the task was cut off after four hours, stopped in time, or failed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from job.errors import NoProgress, UserError
from job.runs.attempts import Attempts
from job.runs.run_status import RunStatus
from launch.swanlab.cos import UploadFailed
from launch.swanlab.service import Service, ServiceDown, TaskState, TooManyTasks

POLL_SECONDS = 30.0
PATIENCE_SECONDS = 3600.0
"""Longest time for which calls to a failing service are repeated."""
STOPPED_BY_USER = "stopped by python -m launch.swanlab stop"
"""Reason that the `stop` command records. A task with this reason is not started again."""


@dataclass(frozen=True)
class Progress:
    """Progress of the run, as its store shows it."""

    step: int
    """Step of the newest checkpoint; -1 without a checkpoint."""
    ended: str | None
    """How the newest attempt ended, from its record; None if it recorded nothing."""
    error: str | None
    """Error of the newest attempt, from its record."""

    @property
    def is_complete(self) -> bool:
        """Return True if the newest attempt finished the run."""
        return self.ended == RunStatus.DONE


def read_progress(output: str) -> Progress:
    """Return the progress of the run at `output`.

    Raises:
        UserError, StoreError: the store cannot be reached from here, or refuses.
    """
    from job.runs.checkpoint_list import list_checkpoints

    attempts = Attempts(output)
    newest, given_up = attempts.newest(), attempts.last_give_up()
    step = max((name.step for name in list_checkpoints(output)), default=-1)
    if given_up is not None:
        return Progress(step, RunStatus.GAVE_UP, given_up.error)
    return Progress(step, newest.ended if newest else None, newest.error if newest else None)


def run_until_done(
    service: Service,
    start: Callable[[], str],
    clean_up: Callable[[], None],
    output: str,
    max_tasks_without_progress: int,
    write_line: Callable[[str], None],
) -> None:
    """Start tasks, one after the other, until the run is complete.

    Args:
        service: runs the tasks.
        start: starts a task and returns its id.
        clean_up: called after each task has ended, to remove its bundle.
        output: the run's prefix. This machine must be able to read it too.
        max_tasks_without_progress: number of tasks in a row without a new checkpoint after which it gives up.
        write_line: receives one line for each event.

    Raises:
        NoProgress: too many tasks in a row made no new checkpoint, or the run itself has given up.
        UserError: a user stopped a task, or the service refuses a request.
    """
    before = read_progress(output)
    if before.is_complete:
        write_line(
            f"{output} is complete: nothing to do (to continue it with other settings, submit without --until-done)"
        )
        return
    tasks_without_progress = 0
    while True:
        cuid = _start_when_possible(start, write_line)
        task = _wait_for_end(service, cuid, write_line)
        clean_up()
        now = read_progress(output)
        if now.is_complete:
            write_line(f"{output} is complete")
            return
        if task.status == "STOPPED" and task.message == STOPPED_BY_USER:
            raise UserError("task", cuid, STOPPED_BY_USER, "submit again to continue from the newest checkpoint")
        tasks_without_progress = 0 if now.step > before.step else tasks_without_progress + 1
        reason = now.error or task.message or task.status
        if now.ended == RunStatus.GAVE_UP or tasks_without_progress >= max_tasks_without_progress:
            problem = f"{tasks_without_progress} tasks in a row without a new checkpoint"
            raise NoProgress(f"{output}: {problem}; the last task, {cuid}: {reason}")
        reached = f"at step {now.step}" if now.step >= 0 else "without a checkpoint"
        write_line(f"task {cuid} ended ({task.status}) {reached}; starting the next task")
        before = now


def _start_when_possible(start: Callable[[], str], write_line: Callable[[str], None]) -> str:
    """Start a task, and wait while there are too many tasks or the service fails; return the id of the task."""
    failing_since, last_reason = time.monotonic(), ""
    while True:
        try:
            return start()
        except TooManyTasks as error:
            failing_since, reason = time.monotonic(), str(error)
        except (ServiceDown, UploadFailed) as error:
            if time.monotonic() - failing_since > PATIENCE_SECONDS:
                raise
            reason = str(error)
        if reason != last_reason:
            write_line(f"{reason}; waiting")
        last_reason = reason
        time.sleep(POLL_SECONDS)


def _wait_for_end(service: Service, cuid: str, write_line: Callable[[str], None]) -> TaskState:
    """Wait until the task has ended and return its state; write a line whenever its state changes."""
    last, answered_at = ("", ""), time.monotonic()
    while True:
        try:
            task = service.task(cuid)
        except ServiceDown:
            if time.monotonic() - answered_at > PATIENCE_SECONDS:
                raise
        else:
            answered_at = time.monotonic()
            if (task.status, task.page) != last:
                write_line(f"task {cuid} {task.status}" + (f" {task.page}" if task.page else ""))
                last = task.status, task.page
            if task.has_ended:
                return task
        time.sleep(POLL_SECONDS)
