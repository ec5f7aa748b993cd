"""The run that is at run.output already, if any: would this start go on with it, or be refused?"""

from dataclasses import dataclass

from job import storage
from job.config import Config
from job.data.manifest import Manifest
from job.data.tokenizer import load_tokenizer
from job.errors import NoProgress, UserError
from job.model.spec import ModelSpec
from job.preflight.findings import Findings
from job.runs.attempts import DONE, Attempt, Attempts
from job.runs.checkpoint import Checkpoint, check_identity, good_checkpoints, list_checkpoints, open_checkpoint
from job.runs.compatibility import TOKENIZER_FOLDER, identity_of
from job.runs.metrics_file import parse_rows
from job.runs.resume import AUTO, NEVER, none_is_good, without_record
from job.runs.run import read_run


@dataclass(frozen=True)
class Earlier:
    """What the run has come to before."""

    step: int = 0
    tokens_per_second: float | None = None
    """As its log has it last."""


def check_run(findings: Findings, config: Config, spec: ModelSpec, manifest: Manifest, scratch: str) -> Earlier:
    """How far the run is; a row says how this start takes it up."""
    with findings.guard("run"):
        return _check_run(findings, config, spec, manifest, scratch)
    return Earlier()


def _check_run(findings: Findings, config: Config, spec: ModelSpec, manifest: Manifest, scratch: str) -> Earlier:
    output, resume = config.run.output, config.train.resume
    run, names, attempts = read_run(output), list_checkpoints(output), Attempts(output)
    identity = identity_of(config, spec, manifest)
    if resume not in (AUTO, NEVER):
        origin = open_checkpoint(resume)
        check_identity(origin.state, identity, resume)
        findings.right("run", f"begins from {resume}, step {origin.state.step}")
        return Earlier()
    if run is None:
        if names and resume == AUTO:
            raise without_record(output)
        findings.right("run", "a new one")
        return Earlier()
    if resume == NEVER:
        found = f"train.resume is never: run {run.name} ({run.id}) with {len(names)} checkpoints begins anew"
        findings.unsure("run", found, "set train.resume auto to go on with it")
        return Earlier()
    _check_tokenizer(output, manifest, scratch)
    newest = attempts.newest()
    if newest is not None and newest.ended == DONE:
        findings.unsure("run", f"run {run.name} ({run.id}) is done already", "name another run.output for a new one")
        return Earlier()
    refused: list[UserError] = []
    checkpoint = next(good_checkpoints(output, refused.append, 0, run.id), None)
    if checkpoint is None and refused:
        raise none_is_good(output, refused)
    if checkpoint is not None:
        check_identity(checkpoint.state, identity, checkpoint.url)
    step = 0 if checkpoint is None else checkpoint.state.step
    found = f"run {run.name} ({run.id}) goes on from step {step}"
    if not _check_progress(findings, config, attempts, newest, step):
        return Earlier(step)
    if refused:
        findings.unsure("run", f"{found}; {len(refused)} newer checkpoints are damaged", "look why")
    elif newest is not None and newest.ended is None:
        findings.unsure("run", f"{found}, taken over from {newest.who}, which has not said that it ended",
                        "see that it has")  # fmt: skip
    else:
        findings.right("run", found)
    return Earlier(step, None if checkpoint is None else _measured(checkpoint))


def _check_tokenizer(output: str, manifest: Manifest, scratch: str) -> None:
    url = storage.join(output, TOKENIZER_FOLDER)
    if not storage.exists(storage.join(url, "tokenizer.json")):
        return
    if (found := load_tokenizer(url, scratch).fingerprint) != manifest.tokenizer_fingerprint:
        expected = f"the run's tokenizer is {found[:12]}, the data set's {manifest.tokenizer_fingerprint[:12]}"
        raise UserError("run.output", output, expected, "choose another run.output, or the data set that it began with")


def _check_progress(findings: Findings, config: Config, attempts: Attempts, newest: Attempt | None, step: int) -> bool:
    """Whether the next start would not give up at once for want of progress."""
    if newest is None:
        return True
    limit = config.train.max_attempts_without_progress
    try:
        attempts.check_progress(newest.run_id, step, limit)
    except NoProgress as error:
        findings.wrong("run", str(error), "mend what it says, then raise train.max_attempts_without_progress once")
        return False
    return True


def _measured(checkpoint: Checkpoint) -> float | None:
    try:
        rows = parse_rows(checkpoint.metrics())
    except UserError:
        return None
    rates = [row.get("speed/tokens_per_second") for row in rows]
    measured = [rate for rate in rates if isinstance(rate, int | float) and rate > 0]
    return measured[-1] if measured else None
