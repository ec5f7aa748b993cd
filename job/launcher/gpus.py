"""GPUs and number of processes that the environment gives to this node."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from job.errors import UserError
from job.launcher.environment_variables import read_integer

SKYPILOT_GPUS = "SKYPILOT_NUM_GPUS_PER_NODE"
_TRAINER_PROCESSES = "PET_NPROC_PER_NODE"
"""Variable of Kubeflow Trainer, which is also the default of torchrun's option."""


class Gpus(NamedTuple):
    """GPUs of this node according to the environment and the driver's files; torch may not be able to use them."""

    number: int
    source: str
    """Variable or folder that gave the number, or why there are none."""
    is_by_name: bool = False
    """True if a scheduler or user named these GPUs for this process; device files may belong to other processes too."""
    may_be: bool = False
    """True if there may be GPUs although none were counted."""


def find_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> Gpus:
    """Count the GPUs that this process was given, without importing torch, which takes seconds.

    Args:
        environment: variables of CUDA, Slurm, SkyPilot and NVIDIA's container runtime. CUDA's list ends at the first
            entry that is not a device, such as -1 or Slurm's NoDevFiles.
        devices: folder of the device files.

    Raises:
        UserError: CUDA_VISIBLE_DEVICES leaves a SkyPilot task fewer GPUs than it was given.
    """
    skypilot_gpus = read_integer(environment, SKYPILOT_GPUS) if environment.get(SKYPILOT_GPUS) else 0
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = Gpus(_count_devices(visible), "CUDA_VISIBLE_DEVICES", is_by_name=True)
        if gpus.number < skypilot_gpus:  # The user pays for all of them.
            expected = f"CUDA_VISIBLE_DEVICES={visible} allows only {gpus.number} of the GPUs of this task"
            raise UserError(SKYPILOT_GPUS, skypilot_gpus, expected, "unset CUDA_VISIBLE_DEVICES in the task")
        return gpus
    if skypilot_gpus:
        return Gpus(skypilot_gpus, SKYPILOT_GPUS, is_by_name=True)
    if (on_node := environment.get("SLURM_GPUS_ON_NODE", "")).isdecimal() and int(on_node):
        return Gpus(int(on_node), "SLURM_GPUS_ON_NODE", is_by_name=True)
    # NVIDIA's images set this variable to `all` even without a GPU. A device plugin lists the GPUs of the pod in it.
    if named := _count_devices(environment.get("NVIDIA_VISIBLE_DEVICES", "")):
        return Gpus(named, "NVIDIA_VISIBLE_DEVICES", is_by_name=True)
    # A container may see all GPUs of its machine in /proc, but in /dev it sees only its own.
    for folder, pattern in ((devices, "nvidia[0-9]*"), (Path("/proc/driver/nvidia/gpus"), "*")):
        if count := len(list(folder.glob(pattern))):
            return Gpus(count, str(folder))
    if (devices / "dxg").exists():
        return Gpus(0, "WSL's /dev/dxg, which may or may not be an NVIDIA GPU", may_be=True)
    return Gpus(0, "no NVIDIA device was found")


def _count_devices(text: str) -> int:
    """Return how many devices a list names by index or UUID, up to the first entry that is neither."""
    names = [name.strip() for name in text.split(",")]
    return len(list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-[\w/-]+").fullmatch, names)))


def requested_processes(environment: Mapping[str, str], gpus: Gpus) -> tuple[int | None, str]:
    """Return how many workers the launcher requests for this node, and the reason in words.

    Returns:
        The number, and its source. The number is None for the default: one per GPU, or one without GPUs.

    Raises:
        UserError: PET_NPROC_PER_NODE, torchrun's option, has a value that this program does not support.
    """
    default = "one for each GPU" if gpus.number else "one, since there are no GPUs"
    if environment.get(SKYPILOT_GPUS):
        return max(1, read_integer(environment, SKYPILOT_GPUS)), SKYPILOT_GPUS
    text = environment.get(_TRAINER_PROCESSES, "")
    if text.isdecimal():
        return read_integer(environment, _TRAINER_PROCESSES, minimum=1), _TRAINER_PROCESSES
    remedy = "set numProcPerNode of the TrainJob to a number, or set train.processes"
    if text not in ("", "auto", "gpu"):
        raise UserError(_TRAINER_PROCESSES, text, "expected a whole number, auto or gpu", remedy)
    if text == "gpu" and not gpus.number:
        raise UserError(_TRAINER_PROCESSES, text, "this process may use no GPU of this node", remedy)
    return None, f"{_TRAINER_PROCESSES}={text}: {default}" if text else default
