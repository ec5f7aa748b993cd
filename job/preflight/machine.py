"""Checks of this machine: GPUs, driver, NCCL, shared memory, main memory and disks."""

import importlib.metadata
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from job import storage
from job.config import Checkpoint, Data
from job.data.cache_quota import most_cached_bytes
from job.data.manifest import Manifest
from job.launcher import interface
from job.launcher.environment import Environment
from job.local_dirs import cache_folder, loading_folder
from job.preflight.findings import Findings
from job.preflight.interconnect import check_interconnect
from job.preflight.nvidia_driver import check_driver
from job.preflight.nvidia_smi import InstalledGpu, find_gpus
from job.preflight.target import SHARED_MEMORY_BYTES
from job.runs.retention import most_kept

_IN_USE_BYTES = 2**30
"""Used memory above which another program is probably using the GPU."""


def find_usable_gpus(findings: Findings, device: str) -> list[InstalledGpu]:
    """Return the GPUs that training would use; a row says why there are none.

    Args:
        findings: takes the row.
        device: `train.device`.
    """
    if device == "cpu":
        findings.right("GPUs", "not used: train.device is cpu")
        return []
    gpus, fault = find_gpus()
    if fault:
        findings.wrong("GPUs", fault, "make sure that `nvidia-smi` shows the GPUs that the run should use")
        return []
    if not gpus:
        findings.unsure(
            "GPUs",
            "none found: training would run on the CPU",
            "a CPU is enough for the demonstration and configs/laptop.yaml",
        )
    return gpus


def check_gpus(
    findings: Findings,
    gpus: Sequence[InstalledGpu],
    processes: int,
    environment: Environment,
) -> None:
    """Check the GPUs of this machine, their driver, and the libraries and network between the processes.

    Args:
        findings: takes the rows.
        gpus: at least one GPU.
        processes: training processes on this node.
        environment: the nodes of the run.
    """
    _check_models(findings, gpus, processes)
    check_driver(findings, gpus[0].driver, {gpu.name: gpu.capability for gpu in gpus})
    world = environment.world
    has_other_nodes = environment.nodes > 1 or (world is not None and world.world_size > world.local_world_size)
    if processes > 1 or has_other_nodes:
        _check_nccl(findings)
    if has_other_nodes:
        rendezvous = environment.rendezvous
        used_interface = interface.leading_to(rendezvous.address) if rendezvous else None
        check_interconnect(findings, os.environ | (interface.variables(used_interface) if used_interface else {}))


def _check_models(findings: Findings, gpus: Sequence[InstalledGpu], processes: int) -> None:
    names = {gpu.name for gpu in gpus}
    found = f"{len(gpus)} x {' and '.join(sorted(names))}"
    busy = [gpu for gpu in gpus if (gpu.used_bytes or 0) > _IN_USE_BYTES]
    if processes > len(gpus):
        remedy = f"set train.processes to {len(gpus)}, or to null"
        findings.wrong("GPUs", f"{found} for {processes} processes, but each process needs a GPU of its own", remedy)
    elif busy:
        used = ", ".join(f"{(gpu.used_bytes or 0) / 2**30:.1f} GiB of GPU {gpu.index}" for gpu in busy)
        remedy = "stop those programs, or choose other GPUs by CUDA_VISIBLE_DEVICES"
        findings.unsure("GPUs", f"{found}; other programs use {used}", remedy)
    elif len(names) > 1:
        remedy = "choose equal GPUs by CUDA_VISIBLE_DEVICES"
        findings.unsure("GPUs", f"{found}: all of them run at the speed of the slowest", remedy)
    elif any(gpu.is_sliced for gpu in gpus):
        findings.unsure("GPUs", f"{found} in MIG mode: a process gets the memory and speed of one slice")
    else:
        findings.right("GPUs", found)


def _check_nccl(findings: Findings) -> None:
    for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            findings.right("NCCL", f"{importlib.metadata.version(name)} ({name})")
        except importlib.metadata.PackageNotFoundError:
            continue
        return
    findings.unsure("NCCL", "no NCCL package is installed: torch must contain it, or the system must have it")


def check_shared_memory(findings: Findings, processes: int, folder: str = "/dev/shm") -> None:
    """Check that /dev/shm is large enough for the processes of a node."""
    try:
        total = shutil.disk_usage(folder).total
    except OSError:
        findings.unsure("shared memory", f"{folder} does not exist")
        return
    found = f"{folder} has {total / 2**20:,.0f} MiB"
    if processes > 1 and total < SHARED_MEMORY_BYTES:
        remedy = "start the container with --shm-size=1g or more (or --ipc=host), or mount a memory volume there"
        findings.unsure("shared memory", f"{found} for {processes} processes", remedy)
    else:
        findings.right("shared memory", found)


def memory_bytes() -> int | None:
    """Return the free main memory of this machine or container; None if the system does not say."""
    meminfo, limit, used = (
        _text(path) for path in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    )
    available = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    free = [int(available[1]) * 1024] if available else []
    if limit.isdecimal() and used.isdecimal():
        free.append(int(limit) - int(used))
    return min(free, default=None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def check_disks(
    findings: Findings,
    data: Data,
    checkpoint: Checkpoint,
    schedule: str,
    output: str,
    manifest: Manifest | None,
    checkpoint_bytes: int | None,
) -> None:
    """Check that the disks have room for cached shards, for a checkpoint being loaded, and for a run on a disk.

    Args:
        findings: takes the rows.
        data: settings of the data.
        checkpoint: settings of the checkpoints.
        schedule: schedule of the learning rate, `train.schedule`.
        output: where the run is stored, `run.output`.
        manifest: manifest of the data set; None if there is none yet.
        checkpoint_bytes: size of one checkpoint; None if not known yet.
    """
    if manifest is not None and storage.is_remote(data.shards):
        cache = cache_folder(data.cache_dir)
        cached_bytes = sum(path.stat().st_size for path in cache.glob("*.shard")) if cache.is_dir() else 0
        needed_bytes = max(0, most_cached_bytes(manifest, int(data.cache_bytes)) - cached_bytes)
        _check_disk(findings, "disk for shards", "data.cache_dir", cache, needed_bytes)
    if checkpoint_bytes is None:
        return
    scratch = loading_folder(checkpoint.scratch_dir)
    _check_disk(findings, "disk for loading", "checkpoint.scratch_dir", scratch, checkpoint_bytes)
    if not storage.is_remote(output):
        folder = storage.path_of(output)
        # The newest checkpoint is written before the oldest is deleted; the exported weights come at the end.
        needed_bytes = checkpoint_bytes * (most_kept(checkpoint.keep, schedule) + 1) + checkpoint_bytes // 3
        _check_disk(findings, "disk for checkpoints", "run.output", folder, needed_bytes)


def _check_disk(findings: Findings, name: str, setting: str, folder: Path, needed_bytes: int) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        findings.wrong(name, f"{setting}: {folder} is not writable", f"set {setting} to a writable folder")
        return
    free_bytes = shutil.disk_usage(existing).free
    found = f"{needed_bytes / 2**30:,.2f} GiB needed, {free_bytes / 2**30:,.1f} GiB free in {folder} ({setting})"
    remedy = f"free space on this disk, or set {setting} to a folder on another disk"
    findings.judge(name, free_bytes >= needed_bytes, found, remedy)
