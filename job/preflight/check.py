"""`job check`: check settings, store, data, existing run and target, then print the plan and the command to run."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from job import storage
from job.config import Config, Train
from job.data.corpus import Listing, OnListed
from job.data.manifest import MANIFEST_NAME, Manifest
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError
from job.invocation import python
from job.launcher import interface
from job.launcher.environment import Environment, Rendezvous, detect_environment
from job.launcher.supervisor import find_device, workers_wanted
from job.model.architecture import tensor_shapes
from job.model.flops import flops_per_token, parameter_counts
from job.model.optimizer_state import optimizer_state
from job.model.spec import ModelSpec
from job.preflight import capacity, data_set, machine, other_places, store
from job.preflight.assumed_data import AssumedData, assume_data, assume_known_corpus
from job.preflight.capacity import ModelSize
from job.preflight.existing_run import ExistingRun, check_existing_run
from job.preflight.findings import Findings, show
from job.preflight.nvidia_smi import InstalledGpu
from job.preflight.plan_table import show_plan
from job.preflight.settings import check_run_rules, check_settings, show_remarks
from job.preflight.target import KUBERNETES_FOLDER, PLACES, SLURM_SCRIPT, SWANLAB_CREDENTIALS, SWANLAB_VOLUMES, Target
from job.preflight.workload import Workload, compute_workload
from job.redaction import redacted
from job.report import make_console
from job.runs.choices import CPU_MICRO_BATCH_SIZE, choose, largest_micro_batch
from job.runs.compatibility import compatibility_key
from job.setting_kinds import AUTO
from job.training.rules import about_nodes

_LOG_WIDTH = 240
_DEFAULT_KUBERNETES_FOLDER = "single"


@dataclass(frozen=True)
class Preflight:
    """Result of all checks; what could not be found out is None."""

    findings: Findings
    config: Config
    """Settings that the run will have: on Kubernetes those in its manifests."""
    resolved: Train
    """Settings of training with what ``auto`` means at `target`."""
    model: ModelSize | None
    work: Workload | None
    existing: ExistingRun
    target: Target | None
    assumptions: tuple[str, ...]
    """Sentences that name the numbers assumed for `model` and `work`; empty if there is a data set."""
    command: list[str]
    """Command that starts the run there."""


def check(
    config: Config,
    place: str | None = None,
    *,
    deep: bool = False,
    mfu: float | None = None,
    price_per_gpu_hour: float | None = None,
    config_path: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
) -> int:
    """Print the findings and the plan; return the exit code: 78 if anything is wrong, else 0.

    Args:
        config: all settings.
        place: where the run will be: None for this machine, ``slurm``, ``kubernetes`` (which is ``kubernetes/single``),
            ``kubernetes/<folder>`` for a folder of launch/kubernetes, or ``swanlab``.
        deep: True to read every shard and compare its sha256.
        mfu: model FLOPs utilization to plan with, from 0 to 1; None for a typical one.
        price_per_gpu_hour: price in dollars to plan with; None for typical prices.
        config_path: file of the settings, for the printed command.
        overrides: dotted names and values that were typed, for the printed command.

    Raises:
        UserError: the place is unknown, or the MFU is above 1.
    """
    if mfu is not None and mfu > 1:
        raise UserError("--mfu", mfu, "expected a share of the GPU's peak, at most 1", "for example 0.3 for 30 %")
    result = preflight(config, place, deep=deep, mfu=mfu, config_path=config_path, overrides=overrides)
    console = make_console(_LOG_WIDTH)
    show(console, f"preflight{f', {place}' if place else ''}", result.findings.rows)
    if result.model is not None and result.work is not None and result.target is not None:
        show_plan(
            console,
            result.config.train,
            result.resolved,
            result.config.checkpoint,
            result.model,
            result.work,
            result.target,
            result.existing,
            mfu,
            price_per_gpu_hour,
            result.assumptions,
        )
    is_wrong = result.findings.any_wrong
    command = redacted(shlex.join(result.command))
    console.print(f"\n{'correct the rows marked ✗, then run it' if is_wrong else 'run it'}: {command}", soft_wrap=True)
    return EXIT_REFUSED if is_wrong else EXIT_DONE


def preflight(
    config: Config,
    place: str | None = None,
    *,
    deep: bool = False,
    mfu: float | None = None,
    config_path: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
) -> Preflight:
    """Run all checks, with the arguments of `check`; no file is left behind."""
    kind, _, folder = (place or "").partition("/")
    if place is not None and (kind not in PLACES or (folder and kind != "kubernetes")):
        raise UserError("--place", place, f"expected one of {', '.join(PLACES)}", "leave it out for this machine")
    findings, is_here = Findings(), place is None

    # ---- The model and the data ----
    spec = check_settings(findings, config.model, config.train, config.tracking, is_here)
    store_answers = store.check_store(findings, config.run.output, config.data.shards, config.store, is_here)
    listings: list[Listing] = []
    manifest = _check_data(findings, config, place or "", deep, listings.append) if store_answers else None
    assumed = None
    if manifest is None and listings:
        with findings.guard("plan"):
            assumed = assume_data(findings, config.data, config.tokenizer, listings[0])
    elif manifest is None:
        assumed = assume_known_corpus(config.data, config.tokenizer)
    planned = manifest if assumed is None else assumed.manifest
    model = None if spec is None or planned is None else _model_size(spec, planned, config.train.optimizer)
    work = None if model is None or planned is None else _workload(findings, config, model, planned, assumed)

    # ---- The run that it would continue ----
    existing = ExistingRun()
    if store_answers and (is_here or kind == "slurm" or storage.is_remote(config.run.output)):
        store.check_output(findings, config.run.output, config.store.single_writer)
        if spec is not None and manifest is not None:
            identity = compatibility_key(config.train, config.data, spec, manifest)
            with TemporaryDirectory(prefix="wikillm-") as scratch:
                existing = check_existing_run(findings, config.run.output, config.train, identity, scratch)

    # ---- The nodes that it would use ----
    target: Target | None
    checkpoint_bytes = None if model is None else model.checkpoint_bytes
    if is_here:
        target = _check_here(findings, config, manifest, checkpoint_bytes)
    else:
        target, config = other_places.check_other_place(
            findings, config, place or "", config_path, manifest, checkpoint_bytes
        )
    resolved = config.train
    if target is not None:
        show_remarks(findings, about_nodes(config.data, target.nodes))
        resolved = _resolved(findings, config.train, target, model, existing)
        capacity.check_target(findings, resolved, config.checkpoint, target, model, work, mfu)
    command = _start_command(place, config.run.output, config_path, overrides)
    assumptions = () if assumed is None else assumed.assumptions
    return Preflight(findings, config, resolved, model, work, existing, target, assumptions, command)


def _check_data(findings: Findings, config: Config, place: str, deep: bool, on_listed: OnListed) -> Manifest | None:
    """Return the manifest of the data set; None if there is none, or if it cannot be seen from this machine."""
    shards_url = config.data.shards
    kind = place.partition("/")[0]
    if kind == "swanlab" and shards_url.startswith(SWANLAB_VOLUMES) and not Path(shards_url).exists():
        found = f"{shards_url} is a volume of SwanLab, which cannot be read from here"
        findings.unsure("data set", found, "check the data set before you upload it")
        return None
    if kind == "kubernetes" and other_places.makes_data_set(place):
        with findings.guard("data set"):
            if not storage.exists(storage.join(shards_url, MANIFEST_NAME)):
                data_set.check_future_data(findings, config.data, place, on_listed)
                return None
    return data_set.check_data(findings, config.data, config.tokenizer.source, deep, on_listed)


def _resolved(
    findings: Findings, train: Train, target: Target, model: ModelSize | None, existing: ExistingRun
) -> Train:
    """Return the settings with what ``auto`` means at the target; a row says why, or why it cannot work there."""
    hardware, world_size = target.hardware, target.world_size

    def fitting(strategy: str, precision: str) -> int:
        if model is None:
            return CPU_MICRO_BATCH_SIZE
        return largest_micro_batch(train, model.spec, model.vocab_size, world_size, hardware, strategy, precision)

    values: dict[str, Any] = {"strategy": "zero2", "precision": "bf16", "micro_batch_size": CPU_MICRO_BATCH_SIZE}
    if train.global_batch_size % world_size == 0:  # else another row says so
        try:
            vocab_size = 1 if model is None else model.vocab_size
            choices = choose(train, vocab_size, world_size, hardware, fitting, existing.attempt_before)
        except UserError as error:
            with findings.guard(error.setting.removeprefix("train.")):
                raise
        else:
            findings.right("precision", str(choices.precision))
            findings.right("strategy", str(choices.strategy))
            values = {
                "strategy": choices.strategy.value,
                "precision": choices.precision.value,
                "micro_batch_size": choices.cut.micro_batch_size,
            }
    return train.model_copy(update={name: value for name, value in values.items() if getattr(train, name) == AUTO})


def _model_size(spec: ModelSpec, manifest: Manifest, optimizer: str) -> ModelSize:
    shapes = tensor_shapes(spec, manifest.vocab_size)
    return ModelSize(
        spec,
        manifest.vocab_size,
        parameter_counts(spec, manifest.vocab_size),
        optimizer_state(optimizer).checkpoint_bytes(shapes),
    )


def _workload(
    findings: Findings, config: Config, model: ModelSize, manifest: Manifest, assumed: AssumedData | None
) -> Workload | None:
    """Return the amount of work; None if the data set has no token to predict."""
    with findings.guard("schedule"):
        work = compute_workload(
            manifest,
            flops_per_token(model.spec, model.vocab_size, config.train.context_length),
            context_length=config.train.context_length,
            global_batch_size=config.train.global_batch_size,
            epochs=config.train.epochs,
            max_steps=config.train.max_steps,
            evaluate_every=config.evaluate.every,
            max_evaluated_sequences=config.evaluate.max_windows,
        )
        if assumed is None:
            check_run_rules(findings, config.train, config.checkpoint, config.data, manifest, work)
        return work
    return None


def _check_here(
    findings: Findings, config: Config, manifest: Manifest | None, checkpoint_bytes: int | None
) -> Target | None:
    """Check this machine and return it as the target; None if its environment variables contradict each other."""
    with findings.guard("place"):
        environment = detect_environment()
        for fact in environment.facts:
            findings.right(fact.what, fact.value + (f" ({fact.source})" if fact.source else ""))
        if environment.rendezvous is not None:
            findings.right("network", network_towards(environment.rendezvous))
        gpus = machine.find_usable_gpus(findings, config.train.device)
        workers = workers_wanted(config, environment, len(gpus))
        if gpus:
            machine.check_gpus(findings, gpus, workers, environment)
        processes = environment.world.local_world_size if environment.world else workers
        _check_device(findings, config, environment)
        if gpus:
            machine.check_shared_memory(findings, processes)
        schedule, output = config.train.schedule, config.run.output
        machine.check_disks(findings, config.data, config.checkpoint, schedule, output, manifest, checkpoint_bytes)
        # A process in MIG mode gets a part of the memory that nvidia-smi reports.
        memory_sizes = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None and not gpu.is_sliced]
        return Target(
            name=environment.kind,
            nodes=environment.world.world_size // processes if environment.world else environment.nodes,
            gpus_per_node=len(gpus),
            processes_per_node=processes,
            gpu_capability=min(map(_capability, filter(lambda gpu: gpu.capability, gpus)), default=None),
            gpu_name=gpus[0].name if gpus and not gpus[0].is_sliced else "",
            gpu_memory_bytes=min(memory_sizes, default=None),
            memory_bytes=machine.memory_bytes(),
            time_limit_seconds=None if environment.ends_at is None else environment.ends_at - time.time(),
        )
    return None


def _capability(gpu: InstalledGpu) -> tuple[int, int]:
    """Return the compute capability as torch gives it: 8.6 is (8, 6)."""
    return divmod(round(10 * (gpu.capability or 0)), 10)


def _check_device(findings: Findings, config: Config, environment: Environment) -> None:
    with findings.guard("device"):
        device = find_device(config, environment)
        findings.right("device", f"{device.kind}: {device.reason}")


def _start_command(
    place: str | None, output: str, config_path: str | None, overrides: Sequence[tuple[str, str]]
) -> list[str]:
    """Return the words of the command that starts the run at `place`; None: on this machine."""
    kind, _, folder = (place or "").partition("/")
    config_words = ["--config", config_path] if config_path else []
    override_words = [word for name, value in overrides for word in (f"--{name}", value)]
    if kind == "":
        return [python(), "-m", "job", "train", *config_words, *override_words]
    if kind == "slurm":
        return ["sbatch", str(SLURM_SCRIPT), *config_words[1:], *override_words]
    if kind == "kubernetes":
        return ["kubectl", "apply", "-k", str(KUBERNETES_FOLDER / (folder or _DEFAULT_KUBERNETES_FOLDER))]
    command = [python(), "-m", "launch.swanlab", "submit", *config_words, *override_words]
    if storage.is_remote(output):
        command += ["--until-done", "--with-credentials", SWANLAB_CREDENTIALS]
    return command


def network_towards(rendezvous: Rendezvous) -> str:
    """Describe the network interface that this node's workers will use, as far as it is known before the nodes meet."""
    used = interface.leading_to(rendezvous.address)
    if used is None or ip_address(used.address).is_loopback:
        return f"chosen when the nodes meet; from here, {rendezvous.address} leads to no other machine"
    return f"{interface.describe_choice(used, rendezvous)}; the address of this node there is {used.address}"
