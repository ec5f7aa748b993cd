"""Task after task, until the run is complete: what a task has come to is read in the run's own store.

The service tells when a task has ended, and not what it ended with: whether it was cut off after four hours, has
stopped in time, or has failed, the run's checkpoints and the record of its starts say.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from job.errors import NoProgress, UserError
from job.runs.attempts import DONE, GAVE_UP, Attempts
from launch.swanlab.cos import UploadFailed
from launch.swanlab.service import Service, ServiceDown, TaskState, TooManyTasks

POLL_SECONDS = 30.0
PATIENCE_SECONDS = 3600.0
"""How long a service that does not answer is asked on."""
BY_HAND = "stopped by python -m launch.swanlab stop"
"""What `stop` leaves as the reason: a task that was stopped so is not started again."""


@dataclass(frozen=True)
class Progress:
    """How far the run in the store is."""

    step: int
    """Of its newest checkpoint; -1 without one."""
    ended: str | None
    """How its newest start ended, as its record says."""
    error: str | None

    @property
    def is_complete(self) -> bool:
        """Whether the last start has done all there was to do."""
        return self.ended == DONE


def read_progress(output: str) -> Progress:
    """How far the run at `output` is.

    Raises:
        UserError, StoreError: the store is not reached from here, or refuses.
    """
    from job.runs.checkpoint import list_checkpoints  # with torch behind it

    attempts = Attempts(output)
    newest, given_up = attempts.newest(), attempts.last_give_up()
    step = max((name.step for name in list_checkpoints(output)), default=-1)
    if given_up is not None:
        return Progress(step, GAVE_UP, given_up.error)
    return Progress(step, newest.ended if newest else None, newest.error if newest else None)


def run_until_done(
    service: Service,
    start: Callable[[], str],
    clear_away: Callable[[], None],
    output: str,
    limit: int,
    say: Callable[[str], None],
) -> None:
    """Starts tasks, one after the other, until the run is complete.

    Args:
        service: that runs them.
        start: starts one; returns its id.
        clear_away: removes what one has left, when it has ended.
        output: the run's prefix, which this machine can read too.
        limit: tasks in a row without one new checkpoint, after which it gives up.
        say: takes a line about what happens.

    Raises:
        NoProgress: `limit` tasks, or the run itself, have given up.
        UserError: a task was stopped by a person, or the service refuses.
    """
    before = read_progress(output)
    if before.is_complete:
        say(f"{output} is complete: nothing to do (to go on with it by other settings, submit without --until-done)")
        return
    idle = 0
    while True:
        cuid = _start_when_there_is_room(start, say)
        task = _await_end(service, cuid, say)
        clear_away()
        now = read_progress(output)
        if now.is_complete:
            say(f"{output} is complete")
            return
        if task.status == "STOPPED" and task.message == BY_HAND:
            raise UserError("task", cuid, BY_HAND, "submit again to go on from the newest checkpoint")
        idle = 0 if now.step > before.step else idle + 1
        reason = now.error or task.message or task.status
        if now.ended == GAVE_UP or idle >= limit:
            raise NoProgress(f"{output}: {idle} tasks without one new checkpoint; the last one, {cuid}: {reason}")
        where = f"step {now.step}" if now.step >= 0 else "no checkpoint"
        say(f"task {cuid} ended ({task.status}) with {where}; starting another one")
        before = now


def _start_when_there_is_room(start: Callable[[], str], say: Callable[[str], None]) -> str:
    began, said = time.monotonic(), ""
    while True:
        try:
            return start()
        except TooManyTasks as error:
            began, reason = time.monotonic(), str(error)
        except (ServiceDown, UploadFailed) as error:
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise
            reason = str(error)
        if reason != said:
            say(f"{reason}; waiting")
        said = reason
        time.sleep(POLL_SECONDS)


def _await_end(service: Service, cuid: str, say: Callable[[str], None]) -> TaskState:
    last, answered = ("", ""), time.monotonic()
    while True:
        try:
            task = service.task(cuid)
        except ServiceDown:
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise
        else:
            answered = time.monotonic()
            if (task.status, task.page) != last:
                say(f"task {cuid} {task.status}" + (f" {task.page}" if task.page else ""))
                last = task.status, task.page
            if task.has_ended:
                return task
        time.sleep(POLL_SECONDS)
