"""launch/swanlab.yaml against the settings: one GPU for four hours, a volume below /data/, nothing secret."""

from pathlib import Path

from job import storage
from job.config import Config
from job.invocation import command
from job.preflight.findings import Findings
from job.preflight.target import SWANLAB_CREDENTIALS, SWANLAB_VOLUMES, Target
from launch.swanlab.service import find_account
from launch.swanlab.settle import MAX_TIME
from launch.swanlab.spec import load_spec

_GPU_MEMORY_BYTES = {"H800-1": 80 * 2**30, "RTX3090-1": 24 * 2**30, None: 24 * 2**30}


def check_swanlab(findings: Findings, config: Config, path: Path) -> Target | None:
    """The one GPU of the spec; None if the spec is not one."""
    with findings.guard("spec"):
        spec = load_spec(path)
        combo, volumes = spec.metadata.combo, spec.spec.volumes
        findings.right("spec", f"{path}: {combo or 'a GPU of the service'}, {spec.spec.entry}")
        if config.train.processes not in (None, 1):
            found = f"{config.train.processes} processes for the one GPU of a task"
            findings.wrong("GPUs", found, "set train.processes to null")
        _check_shards(findings, config.data.shards, [volume.name for volume in volumes])
        if config.run.output.startswith("s3://"):
            found = f"{config.run.output} outlives the task, and takes credentials that it has not"
            remedy = f"submit with --with-credentials {SWANLAB_CREDENTIALS}, made for this alone"
            findings.unsure("run.output", found, remedy)
        else:
            found = f"{config.run.output} is on the task's disk: checkpoints and model are gone when it ends"
            findings.wrong("run.output", found, "give an s3:// URL")
        limit = MAX_TIME.seconds
        if config.train.max_time is not None and config.train.max_time.seconds > limit:
            found = f"train.max_time is {config.train.max_time}, a task ends after 4 h, set-up included"
            findings.wrong("train.max_time", found, f"set it to {MAX_TIME}, or to null: the entrypoint knows the limit")
        with findings.guard("API key"):
            findings.right("API key", f"there is one, for {find_account().host}")
        return Target(
            name="SwanLab",
            nodes=1,
            gpus=1,
            processes=config.train.processes or 1,
            gpu_memory_bytes=_GPU_MEMORY_BYTES[combo],
            seconds=limit,
        )
    return None


def _check_shards(findings: Findings, shards: str, volumes: list[str | None]) -> None:
    name = "data.shards"
    if shards.startswith(SWANLAB_VOLUMES):
        wanted = shards.removeprefix(SWANLAB_VOLUMES).partition("/")[0]
        if not volumes:
            findings.wrong(name, f"{shards}, but the spec has no volume", "add it under spec.volumes, with its id")
        elif volumes[0] is not None and volumes[0] != wanted:
            found = f"{shards}, but the volume is called {volumes[0]}: it appears as {SWANLAB_VOLUMES}{volumes[0]}"
            findings.wrong(name, found, f"set data.shards to {SWANLAB_VOLUMES}{volumes[0]}")
        else:
            findings.right(name, f"{shards}, the volume {volumes[0] or ''}")
    elif not storage.is_remote(shards):
        found = f"{shards} is on this machine alone"
        findings.wrong(
            name,
            found,
            f"`{command('upload', module='launch.swanlab')}` it, and set data.shards to {SWANLAB_VOLUMES}NAME",
        )
    elif shards.startswith("s3://"):
        found = f"{shards} takes credentials that a task has not"
        findings.unsure(name, found, "upload the shards as a volume, or submit with --with-credentials")
    else:
        findings.right(name, shards)
