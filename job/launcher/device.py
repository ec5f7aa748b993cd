"""The choice between GPU and CPU: made once for all processes of a node, before they start.

The environment and the driver's files say how many GPUs to expect, but only torch knows whether it can use them. So
where GPUs are expected, torch tries them in a separate process. If it cannot use them, that is an error: a job that has
reserved GPUs would otherwise train on the CPU until its time limit.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from job.config import DeviceSetting
from job.errors import UserError, one_line
from job.invocation import command
from job.launcher.gpus import Gpus

_PROBE_SECONDS = 180
"""Time limit for trying the GPUs. Importing torch from a network disk can take a minute; a hung driver never ends."""
_DRIVER_VERSION = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Device:
    """Device that all worker processes of a node use."""

    kind: Literal["cuda", "cpu"]
    gpus: tuple[str, ...]
    """Names of the GPUs that this process may use, in torch's order; empty on a CPU."""
    reason: str
    """Why this device was chosen."""

    def environment(self) -> dict[str, str]:
        """Return environment variables that make every library in a worker use only this device."""
        return {"CUDA_VISIBLE_DEVICES": ""} if self.kind == "cpu" else {}


ON_CPU = Device("cpu", (), "train.device is cpu")


@dataclass(frozen=True)
class GpuProbe:
    """Result of trying the GPUs with torch."""

    gpus: tuple[str, ...]
    """Names of the GPUs on which a computation succeeded."""
    error: str
    """Why the next GPU, or any GPU, cannot be used; empty if all can be used."""
    build: str
    """Version and CUDA version of torch, such as ``torch 2.13.0+cu130, built for CUDA 13.0``."""


def choose_device(setting: DeviceSetting, promised: Gpus, probe: Callable[[], GpuProbe] | None = None) -> Device:
    """Decide for the CPU or for GPUs that torch can use.

    Args:
        setting: `train.device`.
        promised: GPUs according to the environment and the driver.
        probe: tries the GPUs; None: try them in a separate process.

    Raises:
        UserError: GPUs are promised or set in `train.device`, but torch cannot use them, or not all of them.
    """
    if setting == "cpu":
        return ON_CPU
    if setting == "auto" and not promised.number and not promised.may_be:
        return Device("cpu", (), f"there is no GPU: {promised.source}")
    result = (probe or _probe_in_subprocess)()
    # Some of the device files may be for GPUs of other jobs, so it is enough if torch can use one of them.
    needed = promised.number if promised.is_by_name else min(promised.number, 1)
    if result.gpus and len(result.gpus) >= needed and not result.error:
        return Device("cuda", result.gpus, f"torch can use {_count(len(result.gpus))} ({promised.source})")
    if setting == "auto" and not promised.number:
        return Device("cpu", (), f"torch finds no GPU: {result.error}")
    raise UserError("train.device", setting, _expected(promised, result), _remedy(setting))


def _expected(promised: Gpus, result: GpuProbe) -> str:
    """Return what is wrong with the GPUs, in one line."""
    reason = f": {result.error}" if result.error else ""
    details = f"driver {driver_version() or 'not loaded'}; {result.build}"
    usable = f"torch can use {len(result.gpus)}" if result.gpus else "torch cannot use any"
    if promised.number:
        return f"{promised.source} promises {_count(promised.number)}, but {usable}{reason} ({details})"
    return f"expected a GPU, but {usable}{reason} ({promised.source}; {details})"


def _count(gpus: int) -> str:
    return f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"


def _remedy(setting: DeviceSetting) -> str:
    remedy = f"run `nvidia-smi` and `{command('check')}` to find the reason"
    return f"{remedy}, or set train.device cpu to train without GPUs" if setting == "auto" else remedy


def driver_version(path: Path = _DRIVER_VERSION) -> str | None:
    """Return the version of the loaded NVIDIA driver; None if no driver is loaded or its file cannot be read."""
    try:
        match = re.search(r"Kernel Module\b.*?\s(\d+\.\d[\d.]*)\s", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[1] if match else None


def probe_gpus(only: int | None = None) -> GpuProbe:
    """Compute something on every GPU, in this process, which then holds memory on each of them.

    Args:
        only: index of the only GPU to compute on, for a process that will use no other; None: all.
    """
    try:
        import torch
    except Exception as error:  # A library that cannot be loaded raises exceptions of many types.
        return GpuProbe((), one_line(f"torch cannot be imported: {error}"), "no torch")
    cuda = torch.version.cuda
    build = f"torch {torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
    names: list[str] = []
    usable = 0
    try:
        torch.cuda.init()
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        for index in range(len(names)):
            if only in (None, index):
                # The sum needs a kernel, which this build of torch may not have for an old GPU.
                torch.ones(8, device=f"cuda:{index}").sum().item()
            usable += 1
    except Exception as error:  # AssertionError without CUDA, RuntimeError for a driver, AcceleratorError for a GPU
        return GpuProbe(tuple(names[:usable]), one_line(str(error)), build)
    return GpuProbe(tuple(names), "", build)


def _probe_in_subprocess(environment: Mapping[str, str] = os.environ, seconds: float = _PROBE_SECONDS) -> GpuProbe:
    """Try the GPUs in a separate process, which may hang or crash, and which frees the GPUs' memory at its end."""
    program = [sys.executable, "-m", "job.launcher.device"]
    try:
        done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return GpuProbe((), f"the NVIDIA driver did not answer within {seconds:.0f} s", "torch did not answer")
    try:
        values = json.loads(done.stdout.splitlines()[-1])
        return GpuProbe(tuple(values["gpus"]), values["error"], values["build"])
    except (IndexError, ValueError, KeyError, TypeError):
        last_line = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        error = f"the process that tries the GPUs exited with code {done.returncode}: {last_line}"
        return GpuProbe((), one_line(error), "torch did not answer")


if __name__ == "__main__":
    result = probe_gpus()
    sys.stdout.write(f"\n{json.dumps({'gpus': result.gpus, 'error': result.error, 'build': result.build})}\n")
