"""Checks of the settings against each other, and against the length of the run."""

from collections.abc import Iterable

from job import storage
from job.config_data import Data
from job.config_training import Checkpoint, Model, Tracking, Train
from job.data.manifest import Manifest
from job.errors import UserError
from job.model.optimizer_state import optimizer_state
from job.model.spec import ModelSpec
from job.preflight.findings import Findings
from job.preflight.workload import Workload
from job.tracking import TRACKERS, make_tracker
from job.training.rules import Length, Remark, about_data, about_initialisation, about_schedule, check_schedule


def check_settings(
    findings: Findings, model: Model, train: Train, tracking: Tracking, is_here: bool
) -> ModelSpec | None:
    """Check the settings that need neither data nor store; return the model, or None if its settings are wrong.

    Args:
        findings: takes the rows.
        model: shape of the model.
        train: settings of the training.
        tracking: settings of the trackers.
        is_here: True if the run will be on this machine, whose keys and packages it then uses.
    """
    findings.right("config", "all settings are known and within their ranges")
    with findings.guard("learning rate"):
        check_schedule(train)
    for tracker in tracking.to:
        with findings.guard("tracking"):
            _check_tracker(findings, tracker, tracking, is_here)
    if train.stop_file is not None:
        with findings.guard("stop file"):
            exists = storage.exists(train.stop_file)
            found = f"{train.stop_file} {'exists' if exists else 'does not exist'} (train.stop_file)"
            remedy = "delete it: while this file exists, every attempt stops at once"
            findings.judge("stop file", not exists, found, remedy)
    show_remarks(findings, about_initialisation(model, train))
    with findings.guard("model"):
        optimizer_state(train.optimizer)  # raises UserError for an unknown optimizer
        return ModelSpec(**model.model_dump())
    return None


def _check_tracker(findings: Findings, name: str, tracking: Tracking, is_here: bool) -> None:
    """Check one entry of `tracking.to`; a tracker that is missing on this machine may exist where the run will be."""
    if name == "swanlab" and tracking.mode == "cloud" and not is_here:
        found = "tracking.mode is cloud, which needs an API key on the nodes"
        findings.unsure("tracking", found, "set SWANLAB_API_KEY on the nodes")
        return
    try:
        tracker = make_tracker(name, tracking)
    except UserError as error:
        if is_here or name not in TRACKERS:
            raise
        found = f"{name} on this machine: {error.expected}"
        findings.unsure("tracking", found, "make sure that it is installed on the nodes")
        return
    findings.right("tracking", f"{name}, {tracker.description}" + ("" if is_here else " (on this machine)"))


def check_run_rules(
    findings: Findings, train: Train, checkpoint: Checkpoint, data: Data, manifest: Manifest, work: Workload
) -> None:
    """Show the number of steps, and the remarks that `train` makes as well."""
    found = (
        f"{work.steps:,} steps of {train.global_batch_size} sequences x {train.context_length} tokens, "
        f"{work.epochs:.2f} epochs"
    )
    findings.right("schedule", found)
    length = Length(work.steps, work.steps_of_epochs, work.sequences_per_epoch)
    show_remarks(findings, [*about_schedule(train, checkpoint, length), *about_data(train, data, manifest, length)])


def show_remarks(findings: Findings, remarks: Iterable[Remark]) -> None:
    """Add a row for each remark."""
    for remark in remarks:
        add_row = findings.wrong if remark.is_wrong else findings.unsure
        add_row(remark.name, remark.found, remark.remedy)
