"""GPUs of this machine, as nvidia-smi reports them: importing torch to ask for them would take seconds."""

import csv
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_FIELDS = ("index", "uuid", "name", "memory.total", "memory.used", "driver_version", "mig.mode.current", "compute_cap")
_TIMEOUT_SECONDS = 20
"""A driver that is being loaded needs seconds to answer; a driver that hangs never answers."""


@dataclass(frozen=True)
class InstalledGpu:
    """A GPU of this machine; a field is None if nvidia-smi does not know it."""

    index: str
    uuid: str
    name: str
    memory_bytes: int | None
    used_bytes: int | None
    """Memory that processes use now."""
    driver: str
    """Version of the NVIDIA driver."""
    is_sliced: bool
    """True in MIG mode: a process gets a slice of the GPU."""
    capability: float | None
    """CUDA compute capability, such as 8.0."""


def find_gpus() -> tuple[list[InstalledGpu], str]:
    """Return the GPUs that this process may use, and what is wrong with them; empty if nothing is wrong."""
    if (program := shutil.which("nvidia-smi")) is None:
        has_device = any(Path("/dev").glob("nvidia[0-9]*"))
        return [], "GPU devices exist in /dev, but the program nvidia-smi is not installed" if has_device else ""
    # An old nvidia-smi does not know compute_cap and then reports nothing at all.
    for fields in (_FIELDS, _FIELDS[:-1]):
        try:
            done = subprocess.run(
                [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=_TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [], f"nvidia-smi did not answer within {_TIMEOUT_SECONDS} s: the driver hangs"
        except OSError as error:
            return [], f"nvidia-smi cannot be started: {error.strerror}"
        if done.returncode == 0:
            return _visible([_parsed(row) for row in csv.reader(done.stdout.splitlines()) if len(row) == len(fields)])
        if "not a valid field" not in done.stdout + done.stderr:
            break
    lines = (done.stdout + done.stderr).strip().splitlines()
    return [], f"nvidia-smi exited with code {done.returncode}: {lines[0] if lines else 'it printed nothing'}"


def _parsed(row: list[str]) -> InstalledGpu:
    values = [value.strip() for value in row] + [""]
    memory, used, capability = (_number(values[position]) for position in (3, 4, 7))
    return InstalledGpu(
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
    """Return a number; None for ``[N/A]``, ``[Not Supported]``, ``[Insufficient Permissions]`` and the like."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _visible(gpus: list[InstalledGpu]) -> tuple[list[InstalledGpu], str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES lists, in its order, and what is wrong with the list.

    An entry is an index or the beginning of a UUID. Like CUDA, ignore all entries after the first unknown one.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return gpus, ""
    visible: list[InstalledGpu] = []
    for entry in filter(None, (entry.strip() for entry in wanted.split(","))):
        matching = [gpu for gpu in gpus if entry == gpu.index or (entry[:3] == "GPU" and gpu.uuid.startswith(entry))]
        if not matching:
            # nvidia-smi does not list MIG slices, and -1 means "no GPU".
            is_valid = entry.startswith("MIG") or entry == "-1"
            return visible, "" if is_valid else f"CUDA_VISIBLE_DEVICES lists {entry}, but there is no such GPU"
        visible += matching[:1]
    return visible, ""
