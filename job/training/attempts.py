"""The starts of a run, one record each: who writes the run now, where each went on from, and how it ended.

    attempts/00000007.json

A record is made by conditional creation, under the next free number: the fencing token. The highest number has the
run. Nobody waits for a lease to run out: a start takes the run over, and whoever had it finds a higher number before
it publishes anything more.
"""

import os
import re
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import orjson

from job import storage
from job.errors import NoProgress, UserError

_NAME = re.compile(r"(\d{8,})\.json")
_LAST_WORDS_SECONDS = 15
_LONGEST_ERROR = 2000

DONE, STOPPED, FAILED, GAVE_UP = "done", "stopped", "failed", "gave up"


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
    """`train.resume`, as it was set."""
    from_step: int | None = None
    """The step that it went on from; None: it did not get so far."""
    ended: str | None = None
    """``done``, ``stopped``, ``failed`` or ``gave up``; None: it lives, or ended without a word."""
    error: str | None = None

    @property
    def who(self) -> str:
        """It, to a person."""
        job = f", job {self.job_id}" if self.job_id else ""
        return f"attempt {self.number} (process {self.pid} on {self.host}{job}, since {self.began})"


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
        """Of all of them, the lowest first."""
        names = (entry.url.rpartition("/")[2] for entry in storage.list_files(self._folder))
        return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))

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

    def claim(self, run_id: str, start: str, job_id: str | None, resume: str) -> Attempt:
        """Takes the run over: from now on nobody else writes it."""
        attempt = Attempt(
            number=(self.numbers() or [0])[-1] + 1,
            run_id=run_id,
            start=start,
            job_id=job_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            began=datetime.now(UTC).isoformat(timespec="seconds"),
            resume=resume,
        )
        while not storage.create_bytes(self._url(attempt.number), _content(attempt)):
            attempt = replace(attempt, number=attempt.number + 1)
        return attempt

    def update(self, attempt: Attempt) -> Attempt:
        """Writes one's own record anew."""
        storage.write_bytes(self._url(attempt.number), _content(attempt))
        return attempt

    def check_is_ours(self, attempt: Attempt) -> None:
        """Raises Superseded, which says who has the run, if `attempt` has it no more."""
        if (numbers := self.numbers()) and numbers[-1] > attempt.number:
            newer = self.read(numbers[-1])
            who = newer.who if newer is not None else f"attempt {numbers[-1]}"
            expected = f"{who} has taken this run over from attempt {attempt.number}"
            raise Superseded("run.output", self._output, expected, "let it, or give each its own run.output")

    def limit(self, number: int) -> Callable[[int], bool]:
        """Which steps of the attempt `number` belong to the run: those up to where a later attempt went on.

        A later one may have gone back, or have begun while this one still wrote.
        """
        later = (self.read(one) for one in self.numbers() if one > number)
        steps = [one.from_step for one in later if one is not None and one.from_step is not None]
        return lambda step: not steps or step <= min(steps)

    def check_progress(self, attempt: Attempt, limit: int) -> None:
        """Raises NoProgress if as many as `limit` starts before `attempt` began at the same step and left it there."""
        starts = 0
        error = "they ended without a word"
        for number in reversed([one for one in self.numbers() if one < attempt.number]):
            before = self.read(number)
            if before is None or before.run_id != attempt.run_id or before.ended in (DONE, GAVE_UP):
                break
            if before.from_step not in (None, attempt.from_step):
                break
            if starts == 0 and (before.error or before.ended):
                error = f"the last one: {before.error or before.ended}"
            starts += 1
        if starts >= limit:
            raise NoProgress(
                f"{self._output}: {starts} starts from step {attempt.from_step} without one new checkpoint "
                f"(train.max_attempts_without_progress is {limit}); {error}"
            )

    def _url(self, number: int) -> str:
        return storage.join(self._folder, f"{number:08d}.json")


def note_failure(output: str, start: str, error: str) -> None:
    """Adds to the record of the start named so what it failed of, for those who come later; without it they do too."""
    attempts = Attempts(output)
    try:
        with storage.limits(deadline_seconds=_LAST_WORDS_SECONDS):
            attempt = attempts.newest()
            if attempt is not None and attempt.start == start and attempt.ended is None:
                attempts.update(replace(attempt, ended=FAILED, error=error[-_LONGEST_ERROR:]))
    except (OSError, UserError):
        return


def _content(attempt: Attempt) -> bytes:
    return orjson.dumps(asdict(attempt), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
