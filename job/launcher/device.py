"""The choice between GPU and CPU: made once for all processes of a node, before they start.

The environment and the driver's files promise GPUs; only torch knows whether it can use them. Where a GPU is promised,
torch is asked, in a process of its own. A promise that is not kept is an error: a job that has reserved GPUs would
otherwise train on the CPU for as long as it may.
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
"""Importing torch from a network disk takes a minute at times; a driver that hangs never answers."""
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
        """Variables of the workers, so that no library in them finds another device."""
        return {"CUDA_VISIBLE_DEVICES": ""} if self.kind == "cpu" else {}


ON_CPU = Device("cpu", (), "train.device is cpu")


@dataclass(frozen=True)
class Answer:
    """Result of trying the GPUs with torch."""

    gpus: tuple[str, ...]
    """Names of the GPUs on which a computation succeeded."""
    error: str
    """Why the next GPU, or any GPU, cannot be used; empty if all can be used."""
    build: str
    """Version and CUDA version of torch, such as ``torch 2.13.0+cu130, built for CUDA 13.0``."""


def choose_device(setting: DeviceSetting, promised: Gpus, ask: Callable[[], Answer] | None = None) -> Device:
    """Decide for a CPU or for GPUs that torch can use.

    Args:
        setting: `train.device`.
        promised: GPUs as environment and driver have them.
        ask: asks torch; None: in another process.

    Raises:
        UserError: GPUs are promised or asked for, and torch cannot use them, or not all of them.
    """
    if setting == "cpu":
        return ON_CPU
    if setting == "auto" and not promised.number and not promised.may_be:
        return Device("cpu", (), f"there is no GPU: {promised.source}")
    answer = (ask or _asked_elsewhere)()
    named = promised.number if promised.is_by_name else min(promised.number, 1)
    if answer.gpus and len(answer.gpus) >= named and not answer.error:
        return Device("cuda", answer.gpus, f"torch can use {len(answer.gpus)}, {promised.source}")
    if setting == "auto" and not promised.number:
        return Device("cpu", (), f"torch finds no GPU: {answer.error}")
    raise UserError("train.device", setting, _expected(promised, answer), _remedy(setting))


def _expected(promised: Gpus, answer: Answer) -> str:
    if not promised.number:
        wanted = f"a GPU was asked for, and there is none ({promised.source})"
    else:
        wanted = f"{promised.source} promises {promised.number} GPU{'s' if promised.number > 1 else ''}"
    able = f"torch can use {len(answer.gpus)}" if answer.gpus else "torch cannot use any"
    why = f": {answer.error}" if answer.error else ""
    return f"{wanted}, but {able}{why} (driver {driver_version() or 'not loaded'}; {answer.build})"


def _remedy(setting: DeviceSetting) -> str:
    mend = f"`nvidia-smi` and `{command('check')}` tell more"
    return f"{mend}; train.device cpu trains without GPUs" if setting == "auto" else mend


def driver_version(path: Path = _DRIVER_VERSION) -> str | None:
    """Return the version of the loaded NVIDIA driver; None if no driver is loaded or its file cannot be read."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d+\.\d[\d.]*)\s", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def ask_torch(only: int | None = None) -> Answer:
    """Compute something on every GPU in this process, which then holds memory there.

    Args:
        only: compute on this one alone, for a process that will use no other.
    """
    try:
        import torch
    except Exception as error:  # a library that does not load raises whatever it likes
        return Answer((), one_line(f"torch cannot be imported: {error}"), "no torch")
    cuda = torch.version.cuda
    build = f"torch {torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
    names: list[str] = []
    usable = 0
    try:
        torch.cuda.init()
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        for index in range(len(names)):
            if only in (None, index):
                torch.ones(8, device=f"cuda:{index}").sum().item()  # waits for a kernel, of which an old card has none
            usable += 1
    except Exception as error:  # AssertionError without CUDA, RuntimeError for a driver, AcceleratorError for a card
        return Answer(tuple(names[:usable]), one_line(str(error)), build)
    return Answer(tuple(names), "", build)


def _asked_elsewhere(environment: Mapping[str, str] = os.environ, seconds: float = _PROBE_SECONDS) -> Answer:
    """Ask torch in a process of its own: it takes memory on every GPU, and a broken driver may end or stop it."""
    words = [sys.executable, "-m", "job.launcher.device"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Answer((), f"the driver has not answered in {seconds:.0f} s", "torch did not answer")
    try:
        values = json.loads(done.stdout.splitlines()[-1])
        return Answer(tuple(values["gpus"]), values["error"], values["build"])
    except (IndexError, ValueError, KeyError, TypeError):
        said = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        return Answer((), one_line(f"asking it ended with {done.returncode}: {said}"), "torch did not answer")


if __name__ == "__main__":
    answer = ask_torch()
    sys.stdout.write(f"\n{json.dumps({'gpus': answer.gpus, 'error': answer.error, 'build': answer.build})}\n")
