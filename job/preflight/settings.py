"""The settings against each other, and against the length of the run."""

from collections.abc import Iterable

from job import storage
from job.config import Config
from job.data.manifest import Manifest
from job.model.spec import ModelSpec
from job.preflight.findings import Findings
from job.preflight.workload import Workload
from job.tracking.swanlab import choose_mode
from job.training.rules import Length, Remark, about_data, about_schedule, check_learning_rates


def check_settings(findings: Findings, config: Config, is_here: bool) -> ModelSpec | None:
    """The model's shape; None if there is no such model.

    Args:
        findings: takes the rows.
        config: all settings.
        is_here: whether the run will be on this machine, and has its keys and packages.
    """
    findings.right("config", "every setting is known and in its range")
    train = config.train
    with findings.guard("learning rate"):
        check_learning_rates(train)
    with findings.guard("tracking"):
        if is_here or config.tracking.mode != "cloud":
            mode, why = choose_mode(config.tracking.mode)
            findings.right("tracking", f"{mode}: {why}" + ("" if is_here else ", on this machine"))
        else:
            findings.unsure("tracking", "the cloud, with a key that has to be there", "give the nodes SWANLAB_API_KEY")
    if train.stop_file is not None:
        with findings.guard("stop file"):
            there = storage.exists(train.stop_file)
            found = f"{train.stop_file} is {'there' if there else 'not there'} (train.stop_file)"
            findings.judge("stop file", not there, found, "remove it: while it is there, every start stops at once")
    with findings.guard("model"):
        return ModelSpec(**config.model.model_dump())
    return None


def check_run_rules(findings: Findings, config: Config, manifest: Manifest, work: Workload) -> None:
    """The rules that `train` goes by as well, and the number of steps."""
    train = config.train
    found = (
        f"{work.steps:,} steps of {train.global_batch_size} x {train.context_length} tokens, {work.epochs:.2f} epochs"
    )
    findings.right("schedule", found)
    length = Length(work.steps, work.steps_of_epochs, work.windows_per_epoch)
    show_remarks(findings, [*about_schedule(config, length), *about_data(config, manifest, length)])


def show_remarks(findings: Findings, remarks: Iterable[Remark]) -> None:
    """A row for each."""
    for one in remarks:
        (findings.wrong if one.is_wrong else findings.unsure)(one.name, one.found, one.remedy)
