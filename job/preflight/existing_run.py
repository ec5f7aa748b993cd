"""Checks of the run that already exists at `run.output`: would this start continue it, or be refused?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job import storage
from job.config import Train
from job.data.tokenizer import load_tokenizer
from job.errors import NoProgress, UserError
from job.preflight.findings import Findings
from job.runs.attempts import Attempt, Attempts
from job.runs.checkpoint import Checkpoint, check_compatibility, open_checkpoint
from job.runs.checkpoint_list import good_checkpoints, list_checkpoints
from job.runs.metrics_file import parse_rows
from job.runs.resume import AUTO, NEVER, attempt_before, missing_run_record, no_usable_checkpoint
from job.runs.run import read_run
from job.runs.run_status import RunStatus
from job.runs.run_tokenizer import check_tokenizer, run_tokenizer_url


@dataclass(frozen=True)
class ExistingRun:
    """How far a run is already."""

    step: int = 0
    """Step of the checkpoint from which the run continues; 0 for a new run."""
    tokens_per_second: float | None = None
    """Last measured rate of all processes together; None if none was logged."""
    attempt_before: Attempt | None = None
    """The attempt whose choices the run keeps; None without a checkpoint to continue from."""


def check_existing_run(
    findings: Findings, output: str, train: Train, identity: Mapping[str, Any], scratch_folder: str
) -> ExistingRun:
    """Return how far the run at `output` is; a row says how this start would continue it.

    Args:
        findings: takes the row.
        output: where the run is stored, `run.output`.
        train: settings of the training.
        identity: what must not change within a run, from `job.runs.compatibility.compatibility_key`.
        scratch_folder: folder for temporary files.
    """
    with findings.guard("run"):
        return _check_existing_run(findings, output, train, identity, scratch_folder)
    return ExistingRun()


def _check_existing_run(
    findings: Findings, output: str, train: Train, identity: Mapping[str, Any], scratch_folder: str
) -> ExistingRun:
    run, checkpoint_names, attempts = read_run(output), list_checkpoints(output), Attempts(output)
    if train.resume not in (AUTO, NEVER):
        origin = open_checkpoint(train.resume)
        check_compatibility(origin.state, identity, train.resume)
        findings.right("run", f"starts from checkpoint {train.resume} (step {origin.state.step})")
        return ExistingRun()
    if run is None:
        if checkpoint_names and train.resume == AUTO:
            raise missing_run_record(output)
        findings.right("run", "a new run")
        return ExistingRun()
    if train.resume == NEVER:
        found = (
            f"train.resume is never: run {run.name} ({run.id}) has {len(checkpoint_names)} checkpoints and starts over"
        )
        findings.unsure("run", found, "set train.resume to auto to continue the run")
        return ExistingRun()
    _check_tokenizer(output, identity["tokenizer"], scratch_folder)
    newest = attempts.newest()
    if newest is not None and newest.ended == RunStatus.DONE:
        found = f"run {run.name} ({run.id}) is already done"
        findings.unsure("run", found, "set run.output to another place to start a new run")
        return ExistingRun()
    refused: list[UserError] = []
    checkpoint = next(good_checkpoints(output, refused.append, 0, run.id), None)
    if checkpoint is None and refused:
        raise no_usable_checkpoint(output, refused)
    if checkpoint is not None:
        check_compatibility(checkpoint.state, identity, checkpoint.url)
    step = 0 if checkpoint is None else checkpoint.state.step
    if not _check_progress(findings, attempts, newest, step, train.max_attempts_without_progress):
        return ExistingRun(step)
    found = f"run {run.name} ({run.id}) continues from step {step}"
    if refused:
        remedy = "check the store or the disk: something damaged them"
        findings.unsure("run", f"{found}; {len(refused)} newer checkpoints are damaged", remedy)
    elif newest is not None and newest.ended is None:
        found += f" and takes it over from {newest.label}, which has not recorded its end"
        findings.unsure("run", found, "make sure that this attempt has ended")
    else:
        findings.right("run", found)
    if checkpoint is None:
        return ExistingRun()
    return ExistingRun(step, _last_tokens_per_second(checkpoint), attempt_before(attempts, checkpoint))


def _check_tokenizer(output: str, data_set_fingerprint: str, scratch_folder: str) -> None:
    """Raise UserError if the run was trained with another tokenizer than the data set's."""
    url = run_tokenizer_url(output)
    if not storage.exists(storage.join(url, "tokenizer.json")):
        return
    check_tokenizer(
        load_tokenizer(url, scratch_folder),
        data_set_fingerprint,
        found_in=url,
        product="the data set",
        setting="run.output",
        value=output,
        remedy="choose another run.output, or set data.shards to the data set with which the run started",
    )


def _check_progress(findings: Findings, attempts: Attempts, newest: Attempt | None, step: int, limit: int) -> bool:
    """Return False, and add a row, if the next attempt would give up because earlier ones made no progress."""
    if newest is None:
        return True
    try:
        attempts.check_progress(newest.run_id, step, limit)
    except NoProgress as error:
        remedy = "fix the cause, then raise train.max_attempts_without_progress for one start"
        findings.wrong("run", str(error), remedy)
        return False
    return True


def _last_tokens_per_second(checkpoint: Checkpoint) -> float | None:
    """Return the last rate in the metrics of a checkpoint; None if there is none, or the metrics are damaged."""
    try:
        rows = parse_rows(checkpoint.metrics())
    except UserError:
        return None
    rates = [row.get("speed/tokens_per_second") for row in rows]
    measured = [rate for rate in rates if isinstance(rate, int | float) and rate > 0]
    return measured[-1] if measured else None
