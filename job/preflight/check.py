"""`job check`, from top to bottom: settings → store → data → run → where it goes → does it fit there → the plan."""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory

from job import storage
from job.config import Config
from job.data.manifest import Manifest
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError
from job.invocation import python
from job.launcher import interface
from job.launcher.environment import Rendezvous, find_place
from job.launcher.supervisor import find_device, workers_wanted
from job.model.flops import flops_per_token, parameter_counts
from job.model.spec import ModelSpec
from job.preflight import capacity as world
from job.preflight import data_set as data
from job.preflight import existing_run as run
from job.preflight import machine, store
from job.preflight.capacity import Shape
from job.preflight.findings import Findings, show
from job.preflight.other_places import check_elsewhere
from job.preflight.plan_table import show_plan
from job.preflight.settings import check_run_rules, check_settings
from job.preflight.target import (
    KUBERNETES_FOLDER,
    PLACES,
    SLURM_SCRIPT,
    SWANLAB_CREDENTIALS,
    SWANLAB_VOLUMES,
    Target,
)
from job.preflight.workload import Workload, plan
from job.redaction import redacted
from job.report import make_console

_LOG_WIDTH = 240


@dataclass(frozen=True)
class Preflight:
    """What was found; what could not be found out is None."""

    findings: Findings
    config: Config
    """The settings that will hold: in the pods of Kubernetes they are those of its manifests."""
    shape: Shape | None
    work: Workload | None
    earlier: run.Earlier
    target: Target | None
    command: list[str]
    """By which the run is started there."""


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
    """Prints what is found and the plan; returns the exit code: 78 if anything is wrong, else 0.

    Args:
        config: all settings.
        place: where the run is to go: None, right here; ``slurm``; ``kubernetes``, which is its folder ``single``, or
            ``kubernetes/<folder>``; ``swanlab``.
        deep: read every shard and compare its sha256.
        mfu: model FLOPs utilization to plan with; None: a typical one.
        price_per_gpu_hour: dollars; None: typical ones.
        config_path: the file of the settings, as it stands in the command that is printed.
        overrides: dotted names and values as typed, which stand there as well.

    Raises:
        UserError: there is no such place, or no such MFU.
    """
    if mfu is not None and mfu > 1:
        raise UserError("--mfu", mfu, "expected a share of the card's peak, at most 1")
    found = preflight(config, place, deep=deep, mfu=mfu, config_path=config_path, overrides=overrides)
    console = make_console(_LOG_WIDTH)
    show(console, f"preflight{f', {place}' if place else ''}", found.findings.rows)
    if found.shape is not None and found.work is not None and found.target is not None:
        show_plan(console, found.config, found.shape, found.work, found.target, found.earlier, mfu, price_per_gpu_hour)
    is_wrong = found.findings.are_wrong
    command = redacted(shlex.join(found.command))
    console.print(f"\n{'not yet' if is_wrong else 'run it'}: {command}", soft_wrap=True)
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
    """Looks at everything, as `check` describes it; leaves nothing behind."""
    kind, _, folder = (place or "").partition("/")
    if place is not None and (kind not in PLACES or (folder and kind != "kubernetes")):
        raise UserError("--place", place, f"expected one of {', '.join(PLACES)}", "leave it out for this machine")
    findings, is_here = Findings(), place is None

    # ---- What is to run, and on which data ----
    spec = check_settings(findings, config, is_here)
    store_answers = store.check_store(findings, config, is_here)
    manifest = _check_data(findings, config, kind, deep) if store_answers else None
    shape = None if spec is None or manifest is None else _shape(spec, manifest)
    work = None if shape is None or manifest is None else _work(findings, config, shape, manifest)

    # ---- What it would go on from ----
    earlier = run.Earlier()
    if store_answers and (is_here or kind == "slurm" or storage.is_remote(config.run.output)):
        store.check_output(findings, config.run.output, config.store.single_writer)
        if spec is not None and manifest is not None:
            with TemporaryDirectory(prefix="wikillm-") as scratch:
                earlier = run.check_run(findings, config, spec, manifest, scratch)

    # ---- Where it would go ----
    target: Target | None
    named = ["--config", config_path] if config_path else []
    typed = [word for name, value in overrides for word in (f"--{name}", value)]
    if is_here:
        target = _check_here(findings, config, manifest, shape)
        command = [python(), "-m", "job", "train", *named, *typed]
    else:
        checkpoint_bytes = None if shape is None else shape.checkpoint_bytes
        target, config = check_elsewhere(findings, config, place or "", config_path, manifest, checkpoint_bytes)
        if kind == "slurm":
            command = ["sbatch", str(SLURM_SCRIPT), *named[1:], *typed]
        elif kind == "kubernetes":
            command = ["kubectl", "apply", "-k", str(KUBERNETES_FOLDER / (folder or "single"))]
        else:
            command = [python(), "-m", "launch.swanlab", "submit", *named, *typed]
            if storage.is_remote(config.run.output):
                command += ["--until-done", "--with-credentials", SWANLAB_CREDENTIALS]
    if target is not None:
        world.check_target(findings, config, target, shape, work, mfu)
    return Preflight(findings, config, shape, work, earlier, target, command)


def _check_data(findings: Findings, config: Config, kind: str, deep: bool) -> Manifest | None:
    """The data set; a volume of SwanLab's cannot be seen from here."""
    shards = config.data.shards
    if kind == "swanlab" and shards.startswith(SWANLAB_VOLUMES) and not Path(shards).exists():
        findings.unsure("data set", f"{shards} is a volume of SwanLab's", "check it before it is uploaded")
        return None
    return data.check_data(findings, config, deep)


def _shape(spec: ModelSpec, manifest: Manifest) -> Shape:
    return Shape(spec, manifest.vocab_size, parameter_counts(spec, manifest.vocab_size))


def _work(findings: Findings, config: Config, shape: Shape, manifest: Manifest) -> Workload | None:
    """What there is to compute; None if there is nothing to predict."""
    with findings.guard("schedule"):
        work = plan(
            manifest,
            flops_per_token(shape.spec, shape.vocab_size, config.train.context_length),
            context_length=config.train.context_length,
            global_batch_size=config.train.global_batch_size,
            epochs=config.train.epochs,
            max_steps=config.train.max_steps,
            evaluate_every=config.evaluate.every,
            evaluate_max_windows=config.evaluate.max_windows,
        )
        check_run_rules(findings, config, manifest, work)
        return work
    return None


def _check_here(findings: Findings, config: Config, manifest: Manifest | None, shape: Shape | None) -> Target | None:
    """This machine, judged; None where its environment contradicts itself."""
    with findings.guard("place"):
        place = find_place()
        for fact in place.facts:
            findings.right(fact.what, fact.value + (f" ({fact.source})" if fact.source else ""))
        if place.rendezvous is not None:
            findings.right("network", network_towards(place.rendezvous))
        gpus = machine.check_gpus(findings, config, place)
        processes = place.world.local_world_size if place.world else workers_wanted(config, place, len(gpus))
        with findings.guard("device"):
            device = find_device(config, place)
            findings.right("device", f"{device.kind}: {device.reason}")
        if gpus:
            machine.check_shared_memory(findings, processes)
        machine.check_disks(findings, config, manifest, None if shape is None else shape.checkpoint_bytes)
        sizes = [gpu.memory_bytes for gpu in gpus if gpu.memory_bytes is not None and not gpu.is_sliced]
        return Target(
            name=place.kind,
            nodes=place.world.world_size // processes if place.world else place.nodes,
            gpus=len(gpus),
            processes=processes,
            gpu_name=gpus[0].name if gpus else "",
            gpu_memory_bytes=min(sizes, default=None),
            memory_bytes=machine.memory_bytes(),
            seconds=None if place.ends_at is None else place.ends_at - time.time(),
        )
    return None


def network_towards(rendezvous: Rendezvous) -> str:
    """The interface that the workers of this node will use, as far as that is known before the nodes meet."""
    found = interface.leading_to(rendezvous.address)
    if found is None or ip_address(found.address).is_loopback:
        return f"found when the nodes meet; from here, {rendezvous.address} leads to no other machine"
    return f"{interface.described(found, rendezvous)}; this node has {found.address} there"
