"""Check launch/swanlab.yaml and the settings against what a SwanLab task offers: one GPU for at most 4 hours."""

from pathlib import Path

from job.config import Config
from job.launcher.environment import SWANLAB_MAX_TIME
from job.model.gpu_table import find_gpu
from job.preflight.findings import Findings
from job.preflight.target import SWANLAB_CREDENTIALS, SWANLAB_VOLUMES, Target
from launch.swanlab.service import find_account
from launch.swanlab.spec import load_spec
from launch.swanlab.task_config import check_max_time, check_processes, check_shards

_GPU_NAMES = {"H800-1": "NVIDIA H800", "RTX3090-1": "NVIDIA GeForce RTX 3090"}
"""Kind of task → name that CUDA gives its GPU. A task that names no kind may get any, so the smaller one counts."""


def check_swanlab(findings: Findings, config: Config, path: Path) -> Target | None:
    """Check the spec file and the settings; return the one GPU of the spec, or None if the spec is not valid."""
    with findings.guard("spec"):
        spec = load_spec(path)
        combo, volumes = spec.metadata.combo, spec.spec.volumes
        findings.right("spec", f"{path}: {combo or 'a GPU of the service'}, {spec.spec.entry}")
        with findings.guard("GPUs"):
            check_processes(config)
        with findings.guard("data.shards"):
            check_shards(config, spec)
            _check_volume(findings, config.data.shards, [volume.name for volume in volumes])
        if config.run.output.startswith("s3://"):
            found = f"{config.run.output} needs credentials, which a task does not have"
            remedy = f"submit with --with-credentials {SWANLAB_CREDENTIALS}, and use keys made for this purpose"
            findings.unsure("run.output", found, remedy)
        else:
            found = f"{config.run.output} is on the task's disk: checkpoints and model are deleted with it"
            findings.wrong("run.output", found, "set it to an s3:// URL")
        with findings.guard("train.max_time"):
            check_max_time(config)
        with findings.guard("API key"):
            findings.right("API key", f"found, for {find_account().host}")
        gpu_name = _GPU_NAMES[combo or "RTX3090-1"]
        gpu = find_gpu(gpu_name)
        return Target(
            name="SwanLab",
            nodes=1,
            gpus_per_node=1,
            processes_per_node=config.train.processes or 1,
            gpu_name=gpu_name,
            gpu_capability=None if gpu is None else gpu.capability,
            gpu_memory_bytes=None if gpu is None else gpu.memory_bytes[-1],
            time_limit_seconds=SWANLAB_MAX_TIME.seconds,
        )
    return None


def _check_volume(findings: Findings, shards: str, volumes: list[str | None]) -> None:
    """Check that the task finds `data.shards` on its volume or in a store that it can read."""
    name = "data.shards"
    if shards.startswith(SWANLAB_VOLUMES):
        folder = shards.removeprefix(SWANLAB_VOLUMES).partition("/")[0]
        if volumes[0] is not None and volumes[0] != folder:
            found = f"{shards}, but the volume is named {volumes[0]} and mounted at {SWANLAB_VOLUMES}{volumes[0]}"
            findings.wrong(name, found, f"set data.shards to {SWANLAB_VOLUMES}{volumes[0]}")
        else:
            findings.right(name, f"{shards}, on the volume {volumes[0] or ''}")
    elif shards.startswith("s3://"):
        found = f"{shards} needs credentials, which a task does not have"
        findings.unsure(name, found, "upload the shards as a volume, or submit with --with-credentials")
    else:
        findings.right(name, shards)
