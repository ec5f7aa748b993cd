"""This machine: GPUs, driver, NCCL, memory and disks, asked of the tools themselves; torch takes seconds to import."""

import csv
import importlib.metadata
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from job import storage
from job.config import Config
from job.data.manifest import Manifest
from job.launcher import interface
from job.launcher.environment import Place
from job.launcher.supervisor import workers_wanted
from job.local_dirs import cache_folder, loading_folder
from job.preflight.findings import Findings
from job.preflight.interconnect import check_interconnect
from job.preflight.nvidia_driver import check_driver

_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used", "driver_version", "mig.mode.current", "compute_cap")
_SMI_SECONDS = 20
"""A driver that is being loaded takes seconds to answer; one that hangs never does."""
_BF16_CAPABILITY = 8.0
"""Ampere; what came before has no bf16 in its tensor cores."""
_SHARED_MEMORY_BYTES = 2**30
"""NCCL's processes of one node meet in /dev/shm; containers have 64 MiB of it unless told otherwise."""
_IN_USE_BYTES = 2**30


@dataclass(frozen=True)
class GpuFound:
    """A GPU as nvidia-smi shows it; None where it does not know."""

    index: str
    uuid: str
    name: str
    memory_bytes: int | None
    used_bytes: int | None
    driver: str
    is_sliced: bool
    """In MIG mode: what a process gets is a slice of it."""
    capability: float | None


def find_gpus() -> tuple[list[GpuFound], str]:
    """The GPUs that this process may use, and why there are none, or not all, where that is worth a word."""
    if (program := shutil.which("nvidia-smi")) is None:
        has_device = any(Path("/dev").glob("nvidia[0-9]*"))
        return [], "the devices are there, but no nvidia-smi" if has_device else ""
    for fields in (_FIELDS, _FIELDS[:-1]):  # an old one does not know compute_cap, and refuses all
        try:
            done = subprocess.run(
                [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=_SMI_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [], f"nvidia-smi has not answered in {_SMI_SECONDS} s: the driver hangs"
        except OSError as error:
            return [], f"nvidia-smi cannot be started: {error.strerror}"
        if done.returncode == 0:
            return _visible([_parsed(row) for row in csv.reader(done.stdout.splitlines()) if len(row) == len(fields)])
        if "not a valid field" not in done.stdout + done.stderr:
            break
    said = (done.stdout + done.stderr).strip().splitlines()
    return [], f"nvidia-smi ends with {done.returncode}: {said[0] if said else 'no word'}"


def _parsed(row: list[str]) -> GpuFound:
    values = [value.strip() for value in row] + [""]
    memory, used, capability = (_number(values[position]) for position in (3, 4, 7))
    return GpuFound(
        index=values[0],
        uuid=values[1],
        name=values[2],
        memory_bytes=None if memory is None else int(memory * 2**20),
        used_bytes=None if used is None else int(used * 2**20),
        driver=values[5],
        is_sliced=values[6] == "Enabled",
        capability=capability,
    )


def _number(text: str) -> float | None:
    """A number; None for ``[N/A]``, ``[Not Supported]``, ``[Insufficient Permissions]`` and the like."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _visible(gpus: list[GpuFound]) -> tuple[list[GpuFound], str]:
    """Those that CUDA_VISIBLE_DEVICES names, by index or by the beginning of a UUID, up to the first that is not."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus, ""
    visible: list[GpuFound] = []
    for word in filter(None, (word.strip() for word in wanted.split(","))):
        found = [gpu for gpu in gpus if word == gpu.index or (word[:3] == "GPU" and gpu.uuid.startswith(word))]
        if not found:
            known = word.startswith("MIG") or word == "-1"
            return visible, "" if known else f"CUDA_VISIBLE_DEVICES names {word}, which is not there"
        visible += found[:1]
    return visible, ""


def check_gpus(findings: Findings, config: Config, place: Place) -> list[GpuFound]:
    """The GPUs that training would use, judged."""
    if config.train.device == "cpu":
        findings.right("GPUs", "none are used: train.device is cpu")
        return []
    gpus, fault = find_gpus()
    if fault:
        findings.wrong("GPUs", fault, "see that `nvidia-smi` shows the GPUs that the run is to use")
        return []
    if not gpus:
        findings.unsure("GPUs", "none: it would train on the CPU", "for the demonstration that is enough")
        return []
    names = {gpu.name for gpu in gpus}
    found = f"{len(gpus)} x {' and '.join(sorted(names))}"
    processes = workers_wanted(config, place, len(gpus))
    busy = [gpu for gpu in gpus if (gpu.used_bytes or 0) > _IN_USE_BYTES]
    old = [gpu for gpu in gpus if gpu.capability is not None and gpu.capability < _BF16_CAPABILITY]
    if processes > len(gpus):
        remedy = f"set train.processes to {len(gpus)}, or to null"
        findings.wrong("GPUs", f"{found} for {processes} processes: each takes one of its own", remedy)
    elif old and config.train.precision == "bf16":
        remedy = "set train.precision fp32, or take an Ampere or later"
        findings.wrong("GPUs", f"{found}, of compute capability {old[0].capability}, has no bf16", remedy)
    elif busy:
        used = ", ".join(f"GPU {gpu.index}: {(gpu.used_bytes or 0) / 2**30:.1f} GiB" for gpu in busy)
        findings.unsure("GPUs", f"{found}; others use {used}", "end what runs there, or set CUDA_VISIBLE_DEVICES")
    elif len(names) > 1:
        findings.unsure("GPUs", f"{found}: the slowest sets the pace", "set CUDA_VISIBLE_DEVICES to equal ones")
    elif any(gpu.is_sliced for gpu in gpus):
        findings.unsure("GPUs", f"{found} in MIG mode: its memory and speed are those of a slice")
    else:
        findings.right("GPUs", found)
    check_driver(findings, gpus[0].driver, {gpu.name: gpu.capability for gpu in gpus})
    are_several = place.nodes > 1 or (place.world is not None and place.world.world_size > place.world.local_world_size)
    if processes > 1 or are_several:
        _check_nccl(findings)
    if are_several:
        over = interface.leading_to(place.rendezvous.address) if place.rendezvous else None
        check_interconnect(findings, os.environ | (interface.variables(over) if over else {}))
    return gpus


def _check_nccl(findings: Findings) -> None:
    for name in ("nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            findings.right("NCCL", f"{importlib.metadata.version(name)} ({name})")
        except importlib.metadata.PackageNotFoundError:
            continue
        return
    findings.unsure("NCCL", "no package of it is installed: torch brings it, or the system has one")


def check_shared_memory(findings: Findings, processes: int, folder: str = "/dev/shm") -> None:
    """Room in which the processes of a node meet."""
    try:
        total = shutil.disk_usage(folder).total
    except OSError:
        findings.unsure("shared memory", f"there is no {folder}")
        return
    found = f"{folder} has {total / 2**20:,.0f} MiB"
    if processes > 1 and total < _SHARED_MEMORY_BYTES:
        remedy = "start the container with --shm-size=1g or more (--ipc=host), or mount a memory volume there"
        findings.unsure("shared memory", f"{found} for {processes} processes", remedy)
    else:
        findings.right("shared memory", found)


def memory_bytes() -> int | None:
    """What this machine, or the container that this is, can still give; None where it does not say."""
    meminfo, limit, used = (
        _text(path) for path in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    )
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    left = [int(found[1]) * 1024] if found else []
    if limit.isdecimal() and used.isdecimal():
        left.append(int(limit) - int(used))
    return min(left, default=None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""


def check_disks(findings: Findings, config: Config, manifest: Manifest | None, checkpoint_bytes: int | None) -> None:
    """Room for shards in use, for a checkpoint that is loaded, and for the run where it is on a disk."""
    wanted: list[tuple[str, str, Path, int]] = []
    if manifest is not None and storage.is_remote(config.data.shards):
        shards = manifest.train + manifest.validation
        cache = cache_folder(config.data.cache_dir)
        there = sum(path.stat().st_size for path in cache.glob("*.shard")) if cache.is_dir() else 0
        needed = min(int(config.data.cache_bytes), sum(shard.size for shard in shards))
        wanted.append(("disk for shards", "data.cache_dir", cache, max(0, needed - there)))
    if checkpoint_bytes is not None:
        scratch = loading_folder(config.checkpoint.scratch_dir)
        wanted.append(("disk for loading", "checkpoint.scratch_dir", scratch, checkpoint_bytes))
        if not storage.is_remote(config.run.output):
            output = Path(config.run.output.removeprefix("file://")).expanduser()
            # One more than are kept, while the newest is written, and the weights at the end.
            needed = checkpoint_bytes * (config.checkpoint.keep + 1) + checkpoint_bytes // 3
            wanted.append(("disk for checkpoints", "run.output", output, needed))
    for name, setting, folder, needed in wanted:
        _check_disk(findings, name, setting, folder, needed)


def _check_disk(findings: Findings, name: str, setting: str, folder: Path, needed: int) -> None:
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        findings.wrong(name, f"{setting}: {folder} cannot be written", "name a folder on a local disk")
        return
    free = shutil.disk_usage(there).free
    found = f"{needed / 2**30:,.2f} GiB needed, {free / 2**30:,.1f} GiB free in {folder} ({setting})"
    findings.judge(name, free >= needed, found, f"make room, or set {setting} to another disk")
