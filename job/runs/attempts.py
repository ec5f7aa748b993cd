"""The starts of a run, one record each: who writes the run now, where each went on from, and how it ended.

    attempts/00000007.json

A record is made by conditional creation, under the next free number: the fencing token. The highest number has the
run. Nobody waits for a lease to run out: a start takes the run over, and the attempt that had it finds a higher number
before it publishes anything more.

    attempts/gave-up-after-00000007.json

Left by a start that gave up after attempt 7, because too many attempts had made no progress. It judged that before it
claimed anything, so it has not taken the run from another attempt. Attempts up to that number are not counted again.
"""

import math
import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from job import storage
from job.errors import NoProgress, UserError
from job.json_record import record_bytes
from job.redaction import redacted
from job.runs.setting_changes import Change

_NAME = re.compile(r"(\d{8,})\.json")
_GIVE_UP_NAME = re.compile(r"gave-up-after-(\d{8,})\.json")
_LAST_WORDS_SECONDS = 15
_LONGEST_ERROR = 2000
_STARTED_TOGETHER_SECONDS = 30
"""An attempt whose successor began so soon may just have lost the run to it: several starts at the same time."""

DONE, STOPPED, FAILED, SUPERSEDED = "done", "stopped", "failed", "superseded"
GAVE_UP = "gave up"
"""End of an attempt of an earlier version, which claimed the run before it judged its progress."""


class Superseded(UserError):
    """A newer attempt has the run: this one must not write any more."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    number: int
    run_id: str
    start: str
    """The name that its entrypoint gave it."""
    job_id: str | None
    """Of the scheduler; the same when the job is started again."""
    host: str
    pid: int
    began: str
    resume: str
    """`train.resume`, as it was set; in a record without secrets."""
    from_step: int | None = None
    """The step that it went on from; None: it did not get so far."""
    ended: str | None = None
    """``done``, ``stopped``, ``failed``, ``superseded`` or ``gave up``; None: it runs, or could not record its end."""
    error: str | None = None
    """Why it failed, or stopped without having done anything."""
    config: dict[str, Any] | None = None
    """Its settings; None in a record of an earlier version."""
    changed: dict[str, list[Any]] | None = None
    """Settings that are not those of the attempt before, by name: what they were, and what they are."""
    micro_batch_size: int | None = None
    """Sequences of a micro-batch, `train.micro_batch_size` at most; None in a record of an earlier version."""

    @property
    def who(self) -> str:
        """It, to a person."""
        job = f", job {self.job_id}" if self.job_id else ""
        return f"attempt {self.number} (process {self.pid} on {self.host}{job}, since {self.began})"


@dataclass(frozen=True)
class GiveUp:
    """The record of a start that gave up."""

    after: int
    """Number of the newest attempt then."""
    at: str
    error: str


class Attempts:
    """The starts of the run at `output`, in the order of their numbers.

    Args:
        output: the run's prefix.
    """

    def __init__(self, output: str) -> None:
        self._output = output
        self._folder = storage.join(output, "attempts")
        self._known: dict[int, Attempt] = {}

    def numbers(self) -> list[int]:
        """Numbers of all attempts, the lowest first."""
        return _numbered(self._names(), _NAME)

    def read(self, number: int) -> Attempt | None:
        """A record; None if it is damaged."""
        if number not in self._known:
            try:
                self._known[number] = storage.read_record(self._url(number), Attempt)
            except ValueError:
                return None
        return self._known[number]

    def newest(self) -> Attempt | None:
        """The last one, as it is in the store now."""
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
    ) -> Attempt:
        """Takes the run over: from now on nobody else writes it.

        Args:
            run_id: of the run.
            start: name of this start.
            job_id: of the scheduler.
            resume: `train.resume`.
            config: all settings, without secrets.
            changed: those that differ from the attempt before.
            micro_batch_size: sequences of a micro-batch.
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
            changed={one.name: [one.before, one.now] for one in changed} or None,
            micro_batch_size=micro_batch_size,
        )
        while not storage.create_bytes(self._url(attempt.number), record_bytes(attempt)):
            attempt = replace(attempt, number=attempt.number + 1)
        return attempt

    def update(self, attempt: Attempt) -> Attempt:
        """Writes one's own record anew."""
        storage.write_bytes(self._url(attempt.number), record_bytes(attempt))
        return attempt

    def check_is_ours(self, attempt: Attempt) -> None:
        """Raise `Superseded`, which names the newer attempt, if `attempt` does not have the run any more.

        The attempt then records that it was superseded: it is no attempt without progress.
        """
        if (numbers := self.numbers()) and numbers[-1] > attempt.number:
            with suppress(OSError, UserError):
                self.update(replace(attempt, ended=SUPERSEDED))
            newer = self.read(numbers[-1])
            who = newer.who if newer is not None else f"attempt {numbers[-1]}"
            expected = f"{who} has taken this run over from attempt {attempt.number}"
            raise Superseded("run.output", self._output, expected, "let it, or give each its own run.output")

    def limit(self, number: int) -> Callable[[int], bool]:
        """Which steps of the attempt `number` belong to the run: those up to where a later attempt went on.

        A later attempt may have gone back, or have begun while this one still wrote. Where a later one began another
        run in the same place (``train.resume never``), none does.
        """
        numbers = self.numbers()
        own = self.read(number) if number in numbers else None
        later = [found for one in numbers if one > number and (found := self.read(one)) is not None]
        if own is not None and any(one.run_id != own.run_id for one in later):
            return lambda step: False
        steps = [one.from_step for one in later if one.from_step is not None]
        return lambda step: not steps or step <= min(steps)

    def check_progress(self, run_id: str, from_step: int, limit: int) -> None:
        """Raise NoProgress if `limit` attempts or more went on from `from_step` and left the run there.

        To be called before `claim`. An attempt counts if it recorded a failure, or if it recorded nothing and its
        successor (the start that asks, for the newest) began more than `_STARTED_TOGETHER_SECONDS` later. The count
        ends at an attempt from another step or of another run, and where an earlier start has given up.

        Args:
            run_id: of the run that is to go on.
            from_step: of the checkpoint from which it would go on; 0 without one.
            limit: `train.max_attempts_without_progress`.
        """
        fruitless, error = 0, "none of them recorded why it ended (killed? out of memory?)"
        successor_began = _now()
        names = self._names()
        given_up = max(_numbered(names, _GIVE_UP_NAME), default=0)
        for number in reversed([one for one in _numbered(names, _NAME) if one > given_up]):
            before = self.read(number)
            if before is None or before.run_id != run_id or before.ended in (DONE, GAVE_UP):
                break
            if before.from_step not in (None, from_step):
                break
            was_alone = _seconds_between(before.began, successor_began) > _STARTED_TOGETHER_SECONDS
            if before.error is not None or before.ended == FAILED or (before.ended is None and was_alone):
                if before.error is not None and fruitless == 0:
                    error = f"the last one: {before.error}"
                fruitless += 1
            successor_began = before.began
        if fruitless >= limit:
            raise NoProgress(
                f"{self._output}: {fruitless} attempts from step {from_step} without one new checkpoint "
                f"(train.max_attempts_without_progress is {limit}); {error}"
            )

    def give_up(self, error: str) -> None:
        """Record that a start has given up, so that the next one, which a person starts, is not refused as well."""
        note = GiveUp((self.numbers() or [0])[-1], _now(), redacted(error)[-_LONGEST_ERROR:])
        storage.create_bytes(storage.join(self._folder, f"gave-up-after-{note.after:08d}.json"), record_bytes(note))

    def last_give_up(self) -> GiveUp | None:
        """The record of the start that gave up after the newest attempt; None if none did."""
        numbers = self.numbers()
        try:
            name = f"gave-up-after-{numbers[-1] if numbers else 0:08d}.json"
            return storage.read_record(storage.join(self._folder, name), GiveUp)
        except (FileNotFoundError, ValueError):
            return None

    def _names(self) -> list[str]:
        return [entry.url.rpartition("/")[2] for entry in storage.list_files(self._folder)]

    def _url(self, number: int) -> str:
        return storage.join(self._folder, f"{number:08d}.json")


def note_failure(output: str, start: str, error: str) -> None:
    """Adds to the record of the start named so what it failed of, for those who come later; without it they do too."""
    attempts = Attempts(output)
    try:
        with storage.limits(deadline_seconds=_LAST_WORDS_SECONDS):
            attempt = attempts.newest()
            if attempt is not None and attempt.start == start and attempt.ended is None:
                attempts.update(replace(attempt, ended=FAILED, error=redacted(error)[-_LONGEST_ERROR:]))
    except (OSError, UserError):
        return


def _numbered(names: list[str], pattern: re.Pattern[str]) -> list[int]:
    """Return the numbers in the names that match, the lowest first."""
    return sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _seconds_between(earlier: str, later: str) -> float:
    """Seconds between two times in ISO 8601; infinite if one of them is not readable."""
    try:
        return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
    except (ValueError, TypeError):
        return math.inf
