"""Opening a run: decide which checkpoint to continue from, claim the run, and download the checkpoint; rank 0 only."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.data.tokenizer import TextTokenizer, store_tokenizer
from job.errors import NoProgress, UserError
from job.redaction import redacted
from job.runs.attempts import Attempt, Attempts
from job.runs.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    check_compatibility,
    checkpoints_url,
    download_checkpoint,
    open_checkpoint,
)
from job.runs.checkpoint_list import good_checkpoints, list_checkpoints
from job.runs.choices import Choices
from job.runs.launch_context import LaunchContext
from job.runs.run import RUN_RECORD, RunRecord, begin_run, new_record, read_run, replace_run
from job.runs.run_status import RunStatus
from job.runs.run_tokenizer import run_tokenizer_url
from job.runs.setting_changes import changes

AUTO, NEVER = "auto", "never"
"""Values of `train.resume`; any other value is the folder or URL of a checkpoint."""
_START_OVER = "start over with --train.resume never"


@dataclass(frozen=True)
class OpenedRun:
    """A run that this start owns, and the state that training begins with."""

    record: RunRecord
    attempt: Attempt
    checkpoint: Checkpoint | None
    """The checkpoint to continue from, downloaded; None: training begins with random weights."""
    metrics: bytes
    """The content of metrics.jsonl up to the step of the checkpoint."""
    choices: Choices
    """Strategy, precision, device and micro-batch of this start."""
    settings_before: dict[str, Any] | None = None
    """Settings of the attempt before, or of the checkpoint if it comes from another run; None for a new run."""
    was_done: bool = False
    """True if the attempt before has recorded that it was done."""


def open_run(
    output: str,
    *,
    name: str | None,
    resume: str,
    start: LaunchContext,
    tokenizer: TextTokenizer,
    compatibility_key: Mapping[str, Any],
    config: dict[str, Any],
    choose: Callable[[Attempt | None], Choices],
    max_attempts: int,
    folder: Path,
    say: Callable[[str], None],
    environment: dict[str, str] | None = None,
) -> OpenedRun:
    """Begin or continue the run at `output`: claim it, and download the checkpoint to continue from.

    Every check comes before the claim, the one for progress too, so that a start that is refused does not take the run
    away from an attempt that may still be training.

    Args:
        output: folder or URL of the run.
        name: display name of a new run.
        resume: the value of `train.resume`.
        start: this start.
        tokenizer: the tokenizer of the data set, which is stored with the run.
        compatibility_key: what must not change within a run, from `job.runs.compatibility`.
        config: all settings, for the records of the run and the attempt.
        choose: returns the choices of this start; its argument is the attempt before (`attempt_before`), or None if
            there is no checkpoint to continue from.
        max_attempts: the value of `train.max_attempts_without_progress`.
        folder: local folder that receives the tensor files of the checkpoint.
        say: prints a line.
        environment: hardware and versions of this start, for the record of the attempt.

    Raises:
        UserError: no checkpoint can be used although there are some, or the settings do not fit the run.
        NoProgress: too many attempts have made no progress.
    """
    # ---- Find the run ----
    attempts = Attempts(output)
    found = _find_run(output, attempts, resume, start)

    # ---- Choose the checkpoint, and refuse what cannot work ----
    checkpoint = _choose(
        found.candidates(found.run),
        output,
        accept=lambda candidate: check_compatibility(candidate.state, compatibility_key, candidate.url),
    )
    if found.run is not None:
        _check_progress(attempts, found.run, checkpoint, max_attempts)
    _say_what_is_continued(found, resume, say)
    settings_before, source = _settings_before(found, checkpoint)
    changed = changes(settings_before or {}, config)
    for change in changed:
        say(f"changed since {source}: {change}")
    # Without a checkpoint nothing of what was computed is left, so the record of an attempt before does not count.
    before = None if found.run is None or checkpoint is None else attempt_before(attempts, checkpoint)
    choices = choose(before)

    # ---- Claim the run ----
    store_tokenizer(tokenizer, run_tokenizer_url(output), "run.output")
    if found.recorded is None:
        run = recorded = begin_run(output, name, config)
    else:
        run = new_record(output, name, config) if found.run is None else found.run
        recorded = found.recorded
    micro_batch_size = choices.cut.micro_batch_size
    attempt = attempts.claim(
        run.id, start.name, start.job_id, resume, config, changed, micro_batch_size, choices.record(), environment
    )
    if run != recorded:
        # Do not overwrite run.json if yet another start has claimed the run since.
        attempts.raise_if_superseded(attempt)
        replace_run(output, run)

    # ---- Download the newest checkpoint that is not damaged ----
    checkpoint, metrics = _download(found.candidates(run), output, run, folder, say)
    attempt = attempts.update(replace(attempt, from_step=0 if checkpoint is None else checkpoint.state.step))
    was_done = checkpoint is not None and before is not None and before.ended == RunStatus.DONE
    return OpenedRun(run, attempt, checkpoint, metrics, choices, settings_before, was_done)


_Candidates = Callable[[Callable[[UserError], None]], Iterator[Checkpoint]]
"""Yields the checkpoints to try, the best first; calls its argument with the reason for each one that it skips."""


@dataclass(frozen=True)
class _FoundRun:
    """What is stored at `output` when this start begins, and what `train.resume` makes of it."""

    output: str
    recorded: RunRecord | None
    """The content of run.json; None if there is none."""
    run: RunRecord | None
    """The run to continue; None if a new run begins."""
    newest: Attempt | None
    """The newest attempt; None if there is none or its record is damaged."""
    starts_over: bool
    """True if a new run begins because `train.resume` is ``never``."""
    origin: Checkpoint | None
    """The checkpoint that `train.resume` names; None if it is ``auto`` or ``never``."""
    resumed_since: int | None
    """The attempt that first started as `train.resume` says (see `_resumed_since`); None: this start is the first."""

    def candidates(self, run: RunRecord | None) -> _Candidates:
        """Return the checkpoints that this start may continue from, as the run `run`.

        If `train.resume` names a checkpoint, the first attempt with that value begins there. The later ones continue
        with the newest checkpoint since then, and use the named one only if there is no other.
        """

        def generate(on_refusal: Callable[[UserError], None]) -> Iterator[Checkpoint]:
            is_continued = self.origin is None or self.resumed_since is not None
            if run is not None and not self.starts_over and is_continued:
                yield from good_checkpoints(self.output, on_refusal, self.resumed_since or 0, run.id)
            if self.origin is not None:
                yield self.origin

        return generate


def _find_run(output: str, attempts: Attempts, resume: str, start: LaunchContext) -> _FoundRun:
    """Read what is stored at `output`, and the checkpoint that `resume` names.

    Raises:
        UserError: run.json is damaged or missing, or the named checkpoint cannot be used.
    """
    recorded, newest = read_run(output), attempts.newest()
    run = recorded
    if run is not None and newest is not None:
        # An attempt that starts over claims the run before it replaces run.json, so the attempt has the valid id.
        run = replace(run, id=newest.run_id)
    resumed_since = None if run is None else _resumed_since(attempts, resume, start)
    starts_over = resume == NEVER and resumed_since is None
    origin = None if resume in (AUTO, NEVER) else open_checkpoint(resume)
    if run is None and not starts_over and list_checkpoints(output):
        raise missing_run_record(output)
    return _FoundRun(output, recorded, None if starts_over else run, newest, starts_over, origin, resumed_since)


def _resumed_since(attempts: Attempts, resume: str, start: LaunchContext) -> int | None:
    """Return the first of the latest attempts that already started as `resume` says; None if this start is the first.

    ``auto`` continues whatever is there, so the result is 0. A named checkpoint is where a run begins only once: the
    next start with the same value continues that run. ``never`` starts over once in a scheduler's job: when the
    scheduler starts the job again, it continues.
    """
    if resume == AUTO:
        return 0
    first = None
    for number in reversed(attempts.numbers()):
        attempt = attempts.read(number)
        if attempt is None or redacted(attempt.resume) != redacted(resume):
            break
        if resume == NEVER and (start.job_id is None or attempt.job_id != start.job_id):
            break
        if attempt.from_step is not None:
            first = number
    return first


def _choose(
    candidates: _Candidates,
    output: str,
    accept: Callable[[Checkpoint], None],
    say: Callable[[str], None] = lambda line: None,
) -> Checkpoint | None:
    """Return the first candidate that `accept` does not find damaged; None if there are no candidates.

    `accept` raises `DamagedCheckpoint` to try the next one. Any other error of it ends the search.

    Raises:
        UserError: there are candidates, but none can be used: starting over silently would lose a run.
    """
    refusals: list[UserError] = []

    def refuse(error: UserError) -> None:
        refusals.append(error)
        say(f"skipped checkpoint {error.value}: {error.expected}")

    for candidate in candidates(refuse):
        try:
            accept(candidate)
        except DamagedCheckpoint as error:
            refuse(error)
        else:
            return candidate
    if refusals:
        raise no_usable_checkpoint(output, refusals)
    return None


def _check_progress(attempts: Attempts, run: RunRecord, checkpoint: Checkpoint | None, max_attempts: int) -> None:
    """Raise NoProgress, and record it, if too many attempts started from the same step without a new checkpoint."""
    try:
        attempts.check_progress(run.id, 0 if checkpoint is None else checkpoint.state.step, max_attempts)
    except NoProgress as error:
        attempts.give_up(str(error))
        raise


def attempt_before(attempts: Attempts, checkpoint: Checkpoint) -> Attempt:
    """Return the newest attempt of the checkpoint's run whose record can be read.

    If no record can be read, return a record with what the checkpoint knows: its attempt's number and settings.
    """
    state = checkpoint.state
    for number in reversed(attempts.numbers()):
        if (attempt := attempts.read(number)) is not None and attempt.run_id == state.run_id:
            return attempt
    return Attempt(state.attempt, state.run_id, "", None, "", 0, "", "", state.step, config=state.config)


def _say_what_is_continued(found: _FoundRun, resume: str, say: Callable[[str], None]) -> None:
    if found.newest is not None and found.newest.ended is None:
        say(f"taking over the run from {found.newest.label}, which has not recorded its end")
    if resume != AUTO and found.resumed_since is not None:
        say(f"train.resume is {resume}, which attempt {found.resumed_since} has already done: continuing that run")


def _settings_before(found: _FoundRun, checkpoint: Checkpoint | None) -> tuple[dict[str, Any] | None, str]:
    """Return the settings of the start before and where they come from.

    They come from the newest attempt of the same run. Records of earlier versions have no settings: then, and in a new
    run that begins with a checkpoint of another one, they come from the checkpoint.
    """
    if found.run is not None and found.newest is not None and found.newest.config:
        return found.newest.config, f"attempt {found.newest.number}"
    if checkpoint is not None and checkpoint.state.config:
        return checkpoint.state.config, checkpoint.url.rpartition("/")[2]
    return None, ""


def _download(
    candidates: _Candidates, output: str, run: RunRecord, folder: Path, say: Callable[[str], None]
) -> tuple[Checkpoint | None, bytes]:
    """Download the first candidate that is not damaged.

    Return it, or None without candidates, and the metrics that `run` recorded up to its step.
    """
    metrics = b""

    def download(candidate: Checkpoint) -> None:
        nonlocal metrics
        metrics = candidate.metrics() if candidate.state.run_id == run.id else b""
        download_checkpoint(candidate, folder)

    checkpoint = _choose(candidates, output, download, say)
    return checkpoint, metrics


def missing_run_record(output: str) -> UserError:
    """Return the error for a folder with checkpoints but without run.json."""
    expected = f"there are checkpoints but no {RUN_RECORD}, so it is unknown which run they belong to"
    return UserError(
        "run.output", output, expected, f"restore {RUN_RECORD}, choose another run.output, or {_START_OVER}"
    )


def no_usable_checkpoint(output: str, refusals: list[UserError]) -> UserError:
    """Return the error for a run with checkpoints that are all refused; starting over silently would lose the run."""
    reasons = "; ".join(f"{str(refusal.value).rpartition('/')[2]}: {refusal.expected}" for refusal in refusals)
    remedy = f"put back an undamaged copy of one of them, set train.resume to another checkpoint, or {_START_OVER}"
    return UserError("train.resume", checkpoints_url(output), f"no checkpoint can be used: {reasons}", remedy)
