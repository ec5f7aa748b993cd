"""Where a start of a run goes on from: decided once, by the first process, before anything is overwritten."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job import storage
from job.config import Train
from job.data.batching import BatchCut, cut_batch
from job.data.tokenizer import TextTokenizer, store_tokenizer
from job.errors import NoProgress, UserError
from job.redaction import redacted
from job.runs.attempts import Attempt, Attempts
from job.runs.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    check_identity,
    checkpoints_url,
    download_checkpoint,
    good_checkpoints,
    list_checkpoints,
    open_checkpoint,
)
from job.runs.compatibility import TOKENIZER_FOLDER
from job.runs.launch_context import Start
from job.runs.run import RunRecord, begin_run, new_record, read_run, replace_run
from job.runs.setting_changes import changes

AUTO, NEVER = "auto", "never"


@dataclass(frozen=True)
class OpenedRun:
    """A run that this start has taken over."""

    record: RunRecord
    attempt: Attempt
    checkpoint: Checkpoint | None
    """Where it goes on from; None: from the beginning."""
    metrics: bytes
    """The run's log up to there."""
    batch_cut: BatchCut
    """How its batches are cut over the processes of this start."""
    settings_before: dict[str, Any] | None = None
    """Those of the attempt before, or of the checkpoint of another run; None: this one begins."""


def open_run(
    output: str,
    *,
    name: str | None,
    resume: str,
    start: Start,
    tokenizer: TextTokenizer,
    identity: Mapping[str, Any],
    config: dict[str, Any],
    cut: Callable[[Attempt | None], BatchCut],
    max_attempts: int,
    folder: Path,
    say: Callable[[str], None],
) -> OpenedRun:
    """Takes the run at `output` over, or begins it, and brings the checkpoint to go on from to `folder`.

    Everything that is known to be wrong, a lack of progress too, is refused before the run is taken from an attempt
    that may be training. The tokenizer is kept with the run, so that a checkpoint is usable without its shards.

    Args:
        output: the run's prefix.
        name: of a new run.
        resume: `train.resume`.
        start: this one.
        tokenizer: of the data.
        identity: what the run is made of.
        config: all settings, for its record and that of the attempt.
        cut: cuts the global batch, given the attempt of this run before, if any.
        max_attempts: starts without a new checkpoint after which to give up.
        folder: local, takes the checkpoint's tensors.
        say: takes a line for the log.

    Raises:
        UserError: there is nothing to go on from though there should be, or it does not fit.
        NoProgress: too many starts have come no further.
    """
    attempts, recorded = Attempts(output), read_run(output)
    run, newest = recorded, attempts.newest()
    if run is not None and newest is not None:
        # An attempt that begins the run anew has claimed it before it replaces run.json.
        run = replace(run, id=newest.run_id)
    begun_at = None if run is None else _begun_at(attempts, resume, start)
    starts_over = resume == NEVER and begun_at is None
    origin = None if resume in (AUTO, NEVER) else open_checkpoint(resume)
    if run is None and not starts_over and list_checkpoints(output):
        raise without_record(output)

    def candidates(refused: Callable[[UserError], None]) -> Iterator[Checkpoint]:
        if run is not None and not starts_over and (origin is None or begun_at is not None):
            yield from good_checkpoints(output, refused, begun_at or 0, run.id)
        if origin is not None:
            yield origin

    first = _choose(candidates, output, lambda candidate: check_identity(candidate.state, identity, candidate.url))
    if run is not None and not starts_over:
        try:
            attempts.check_progress(run.id, 0 if first is None else first.state.step, max_attempts)
        except NoProgress as error:
            attempts.give_up(str(error))
            raise
    if newest is not None and newest.ended is None:
        say(f"taking the run over from {newest.who}, which has not said that it ended")
    if resume != AUTO and begun_at is not None:
        say(f"train.resume is {resume}, and attempt {begun_at} has begun from there: going on")

    before, since = (None, "") if starts_over else _settings_before(newest, run, first)
    changed = changes(before or {}, config)
    for one in changed:
        say(f"changed since {since}: {one}")

    is_continued = run is not None and newest is not None and newest.run_id == run.id and not starts_over
    batch_cut = cut(newest if is_continued else None)

    store_tokenizer(tokenizer, storage.join(output, TOKENIZER_FOLDER), "run.output")
    if run is None:
        run = recorded = begin_run(output, name, config)
    elif starts_over:
        run = new_record(output, name, config)
    attempt = attempts.claim(run.id, start.name, start.job_id, resume, config, changed, batch_cut.micro_batch_size)
    if run != recorded:
        attempts.check_is_ours(attempt)
        replace_run(output, run)
    metrics = b""

    def fetch(candidate: Checkpoint) -> None:
        nonlocal metrics
        metrics = candidate.metrics() if candidate.state.run_id == run.id else b""
        download_checkpoint(candidate, folder)

    checkpoint = _choose(candidates, output, fetch, say)
    attempt = attempts.update(replace(attempt, from_step=0 if checkpoint is None else checkpoint.state.step))
    return OpenedRun(run, attempt, checkpoint, metrics, batch_cut, before)


def _settings_before(
    newest: Attempt | None, run: RunRecord | None, checkpoint: Checkpoint | None
) -> tuple[dict[str, Any] | None, str]:
    """The settings of the start before, and what that is; records of earlier versions have none."""
    if newest is not None and run is not None and newest.run_id == run.id and newest.config:
        return newest.config, f"attempt {newest.number}"
    if checkpoint is not None and checkpoint.state.config:
        return checkpoint.state.config, checkpoint.url.rpartition("/")[2]
    return None, ""


def cut_as_before(train: Train, world_size: int, newest: Attempt | None) -> BatchCut:
    """Cut the global batch into micro-batches of the size of the attempt before, unless the setting is another one now.

    Args:
        train: the settings of this start.
        world_size: its processes.
        newest: the attempt before; None: there is none of this run.

    Raises:
        UserError: as `cut_batch`.
    """
    batch, asked = train.global_batch_size, train.micro_batch_size
    cut = cut_batch(batch, asked, world_size)
    if newest is None or newest.micro_batch_size is None or newest.config is None:
        return cut
    recorded, asked_before = newest.micro_batch_size, newest.config.get("train", {}).get("micro_batch_size")
    if asked_before != asked or recorded == cut.micro_batch_size or (batch // world_size) % recorded:
        return cut
    reason = f"as in attempt {newest.number}; train.micro_batch_size is {asked}"
    return replace(cut_batch(batch, recorded, world_size), reason=reason)


def _begun_at(attempts: Attempts, resume: str, start: Start) -> int | None:
    """The attempt by which this very order to begin somewhere was carried out before; None if it is a new one.

    ``auto`` is always carried out. A checkpoint that is named is where the run begins, and ``never`` begins it once in
    a job: whoever starts a job again means to go on.
    """
    if resume == AUTO:
        return 0
    found = None
    for number in reversed(attempts.numbers()):
        one = attempts.read(number)
        if one is None or redacted(one.resume) != redacted(resume):
            break
        if resume == NEVER and (start.job_id is None or one.job_id != start.job_id):
            break
        if one.from_step is not None:
            found = number
    return found


def _choose(
    candidates: Callable[[Callable[[UserError], None]], Iterator[Checkpoint]],
    output: str,
    accept: Callable[[Checkpoint], None],
    say: Callable[[str], None] = lambda line: None,
) -> Checkpoint | None:
    """The first candidate that is good; None if there are none at all.

    Raises:
        UserError: there are some, and none is good.
    """
    refusals: list[UserError] = []

    def refused(error: UserError) -> None:
        refusals.append(error)
        say(f"passed by: {error.value}: {error.expected}")

    for candidate in candidates(refused):
        try:
            accept(candidate)
        except DamagedCheckpoint as error:
            refused(error)
        else:
            return candidate
    if refusals:
        raise none_is_good(output, refusals)
    return None


def without_record(output: str) -> UserError:
    """The refusal of checkpoints of which nothing says whose they are."""
    expected = "checkpoints are there, but no run.json that says whose they are"
    return UserError("run.output", output, expected, "put it back, choose another place, or set train.resume never")


def none_is_good(output: str, refusals: list[UserError]) -> UserError:
    """The refusal to begin anew, in silence, what was a run."""
    said = "; ".join(f"{str(one.value).rpartition('/')[2]}: {one.expected}" for one in refusals)
    remedy = "put a good one there, name one with train.resume, or start over with --train.resume never"
    return UserError("train.resume", checkpoints_url(output), f"none of the checkpoints is good: {said}", remedy)
