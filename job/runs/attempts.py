"""Records of a run's attempts: which attempt owns the run, where each one started, and how it ended.

    attempts/00000007.json

An attempt is one start of a run. Its record is created with a conditional write under the next free number. The number
is a fencing token: the attempt with the highest number owns the run. There is no lease that has to expire. A new
attempt takes over at once, and the older attempt finds the higher number before it publishes anything more.

    attempts/gave-up-after-00000007.json

Written by a start that refused to go on after attempt 7, because too many attempts had made no progress. That start
checks the progress before it claims a number, so it does not take the run over from another attempt. Attempts up to
the number in the file name are not counted again.
"""

import math
import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from job import storage
from job.errors import NoProgress, UserError
from job.json_record import record_bytes
from job.redaction import redacted
from job.runs.run_status import RunStatus
from job.runs.setting_changes import Change

_NAME = re.compile(r"(\d{8,})\.json")
_GIVE_UP_NAME = re.compile(r"gave-up-after-(\d{8,})\.json")
_RECORD_FAILURE_SECONDS = 15
_MAX_ERROR_CHARACTERS = 2000
_STARTED_TOGETHER_SECONDS = 30
"""If the next attempt began within this time, several starts probably raced: losing the race is not a failure."""


class Superseded(UserError):
    """A newer attempt owns the run, so this one must stop writing."""


@dataclass(frozen=True)
class Attempt:
    """The record of one start of a run."""

    number: int
    run_id: str
    start: str
    """Name of this start, chosen by its entrypoint."""
    job_id: str | None
    """The scheduler's id of the job, which stays the same when the job is requeued; None without a scheduler."""
    host: str
    pid: int
    began: str
    """Time at which the run was claimed, in ISO 8601."""
    resume: str
    """The value of `train.resume`; secrets are removed when the record is written."""
    from_step: int | None = None
    """The step that training started from; None if the attempt ended before that was decided."""
    ended: str | None = None
    """``done``, ``stopped``, ``failed``, ``superseded`` or ``gave up``; None while it is running or if unrecorded."""
    error: str | None = None
    """Why the attempt failed, or why it stopped without a single step."""
    ended_at: str | None = None
    """Time at which `ended` was recorded, in ISO 8601; None in a record of an earlier version."""
    stop_reason: str | None = None
    """Why the attempt was asked to stop, as far as rank 0 knows it."""
    environment: dict[str, str] | None = None
    """Hardware and versions (`run_environment`); None in a record of an earlier version."""
    config: dict[str, Any] | None = None
    """All settings; None in a record of an earlier version."""
    changed: dict[str, list[Any]] | None = None
    """Settings that differ from the attempt before: dotted name to ``[old value, new value]``."""
    micro_batch_size: int | None = None
    """Sequences per micro-batch; None in a record of an earlier version."""
    choices: dict[str, str] | None = None
    """Values of the settings that may be ``auto`` (`Choices.record`); None in a record of an earlier version."""

    @property
    def label(self) -> str:
        """A description for messages: number, process, host, job and start time."""
        job = f", job {self.job_id}" if self.job_id else ""
        return f"attempt {self.number} (process {self.pid} on {self.host}{job}, since {self.began})"


@dataclass(frozen=True)
class GiveUp:
    """The record of a start that gave up because of too little progress."""

    after: int
    """Number of the newest attempt at that time."""
    at: str
    error: str


class Attempts:
    """The attempts of the run at `output`, in the order of their numbers.

    Args:
        output: folder or URL of the run.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._folder = storage.join(output, "attempts")
        self._known: dict[int, Attempt] = {}

    def numbers(self) -> list[int]:
        """Return the numbers of all attempts in ascending order."""
        return _numbers_in(self._names(), _NAME)

    def read(self, number: int) -> Attempt | None:
        """Return the record with this number, or None if it is damaged."""
        if number not in self._known:
            try:
                self._known[number] = storage.read_record(self._url(number), Attempt)
            except ValueError:
                return None
        return self._known[number]

    def newest(self) -> Attempt | None:
        """Read the newest record again from the store; None if there is none or it is damaged."""
        numbers = self.numbers()
        if not numbers:
            return None
        self._known.pop(numbers[-1], None)
        return self.read(numbers[-1])

    def claim(
        self,
        run_id: str,
        start: str,
        job_id: str | None,
        resume: str,
        config: dict[str, Any] | None = None,
        changed: Sequence[Change] = (),
        micro_batch_size: int | None = None,
        choices: dict[str, str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Attempt:
        """Create the record of a new attempt, which owns the run from then on.

        Args:
            run_id: id of the run.
            start: name of this start.
            job_id: the scheduler's id of the job.
            resume: the value of `train.resume`.
            config: all settings, without secrets.
            changed: settings that differ from the attempt before.
            micro_batch_size: sequences per micro-batch.
            choices: values of the settings that may be ``auto``.
            environment: hardware and versions.
        """
        attempt = Attempt(
            number=(self.numbers() or [0])[-1] + 1,
            run_id=run_id,
            start=start,
            job_id=job_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            began=_now(),
            resume=resume,
            config=config,
            changed={change.name: [change.before, change.now] for change in changed} or None,
            micro_batch_size=micro_batch_size,
            choices=choices,
            environment=environment,
        )
        while not storage.create_bytes(self._url(attempt.number), record_bytes(attempt)):
            attempt = replace(attempt, number=attempt.number + 1)
        return attempt

    def update(self, attempt: Attempt) -> Attempt:
        """Write the record of this process's own attempt again, with its current values."""
        storage.write_bytes(self._url(attempt.number), record_bytes(attempt))
        return attempt

    def end(
        self, attempt: Attempt, status: RunStatus, error: str | None = None, stop_reason: str | None = None
    ) -> None:
        """Record how this process's own attempt ended, or that of a process that is gone.

        Args:
            attempt: the record so far.
            status: how it ended.
            error: why it failed, or why it stopped without a single step.
            stop_reason: why it was asked to stop.
        """
        self.update(replace(attempt, ended=status, error=error, ended_at=_now(), stop_reason=stop_reason))

    def raise_if_superseded(self, attempt: Attempt) -> None:
        """Raise `Superseded`, naming the newer attempt, if `attempt` does not own the run any more.

        The record of `attempt` then says that it was superseded, so that it does not count as one without progress.
        """
        if (numbers := self.numbers()) and numbers[-1] > attempt.number:
            with suppress(OSError, UserError):
                self.end(attempt, RunStatus.SUPERSEDED)
            newer = self.read(numbers[-1])
            label = newer.label if newer is not None else f"attempt {numbers[-1]}"
            expected = f"{label} has taken over this run from attempt {attempt.number}"
            remedy = "let the newer attempt continue, or give each start its own run.output"
            raise Superseded("run.output", self._output, expected, remedy)

    def last_lineage_step(self, number: int) -> float:
        """Return the last step up to which the checkpoints of attempt `number` belong to the run as it is now.

        A later attempt may have gone back to an earlier step, or may have begun while this one was still writing: then
        only the steps up to the start of the later attempt count. The result is infinite if no later attempt limits
        it, and -infinity if a later attempt began another run in the same place (``train.resume never``).
        """
        numbers = self.numbers()
        attempt = self.read(number) if number in numbers else None
        later = [record for other in numbers if other > number and (record := self.read(other)) is not None]
        if attempt is not None and any(record.run_id != attempt.run_id for record in later):
            return -math.inf
        return min((record.from_step for record in later if record.from_step is not None), default=math.inf)

    def check_progress(self, run_id: str, from_step: int, limit: int) -> None:
        """Raise NoProgress if at least `limit` attempts started from `from_step` and saved no later checkpoint.

        Call this before `claim`. An attempt counts if it recorded a failure. It also counts if it recorded no end and
        the next attempt (for the newest one: this start) began more than `_STARTED_TOGETHER_SECONDS` after it. The
        count goes back to the first attempt that started from another step, belongs to another run or is done, and no
        further than the last start that gave up.

        Args:
            run_id: id of the run that is about to continue.
            from_step: step of the checkpoint that it would continue from; 0 without a checkpoint.
            limit: the value of `train.max_attempts_without_progress`.
        """
        without_progress, last = 0, "the last one recorded no error (killed? out of memory?)"
        next_began = _now()
        names = self._names()
        given_up_after = max(_numbers_in(names, _GIVE_UP_NAME), default=0)
        for number in reversed([number for number in _numbers_in(names, _NAME) if number > given_up_after]):
            attempt = self.read(number)
            if attempt is None or attempt.run_id != run_id or attempt.ended in (RunStatus.DONE, RunStatus.GAVE_UP):
                break
            if attempt.from_step not in (None, from_step):
                break
            was_alone = _seconds_between(attempt.began, next_began) > _STARTED_TOGETHER_SECONDS
            if attempt.error is not None or attempt.ended == RunStatus.FAILED or (attempt.ended is None and was_alone):
                if attempt.error is not None and without_progress == 0:
                    last = f"the last one: {attempt.error}"
                without_progress += 1
            next_began = attempt.began
        if without_progress >= limit:
            raise NoProgress(
                f"{self._output}: {without_progress} attempts from step {from_step} without a new checkpoint "
                f"(train.max_attempts_without_progress is {limit}); {last}; "
                "correct the cause before you start the run again"
            )

    def give_up(self, error: str) -> None:
        """Record that this start gave up, so that the next one is not refused because of the same attempts."""
        record = GiveUp((self.numbers() or [0])[-1], _now(), redacted(error)[-_MAX_ERROR_CHARACTERS:])
        storage.create_bytes(self._give_up_url(record.after), record_bytes(record))

    def last_give_up(self) -> GiveUp | None:
        """Return the record of a start that gave up after the newest attempt; None if there is none."""
        numbers = self.numbers()
        try:
            return storage.read_record(self._give_up_url(numbers[-1] if numbers else 0), GiveUp)
        except (FileNotFoundError, ValueError):
            return None

    def _names(self) -> list[str]:
        return [entry.url.rpartition("/")[2] for entry in storage.list_files(self._folder)]

    def _url(self, number: int) -> str:
        return storage.join(self._folder, f"{number:08d}.json")

    def _give_up_url(self, after: int) -> str:
        return storage.join(self._folder, f"gave-up-after-{after:08d}.json")


def note_failure(output: str, start: str, error: str) -> None:
    """Record why the newest attempt failed, if it belongs to the start named `start` and has recorded no end.

    The record helps later starts and readers, but is not required: an error of the store is ignored.
    """
    attempts = Attempts(output)
    try:
        with storage.limits(deadline_seconds=_RECORD_FAILURE_SECONDS):
            attempt = attempts.newest()
            if attempt is not None and attempt.start == start and attempt.ended is None:
                attempts.end(attempt, RunStatus.FAILED, redacted(error)[-_MAX_ERROR_CHARACTERS:])
    except (OSError, UserError):
        return


def _numbers_in(names: list[str], pattern: re.Pattern[str]) -> list[int]:
    """Return the numbers in the names that match `pattern`, in ascending order."""
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _seconds_between(earlier: str, later: str) -> float:
    """Return the seconds between two times in ISO 8601; infinite if one of them cannot be parsed."""
    try:
        return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
    except (ValueError, TypeError):
        return math.inf
