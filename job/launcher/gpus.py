"""GPUs that the environment promises to this node, and how many processes a launcher asks for."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from job.errors import UserError
from job.launcher.environment_variables import number

SKYPILOT_GPUS = "SKYPILOT_NUM_GPUS_PER_NODE"
_TRAINER_PROCESSES = "PET_NPROC_PER_NODE"


class Gpus(NamedTuple):
    """GPUs of this node as the environment and the driver's files have them: a promise, which torch may not keep."""

    number: int
    source: str
    """Variable or folder that gave the number."""
    is_by_name: bool = False
    """True if a scheduler or user named these GPUs for this process; device files may belong to other processes too."""
    may_be: bool = False
    """True if there may be GPUs although none were counted."""


def find_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> Gpus:
    """Count the GPUs that this process was given, without torch, which takes seconds to import.

    Args:
        environment: the variables of CUDA (whose list ends at the first entry that is no device, such as -1 or Slurm's
            NoDevFiles), Slurm, SkyPilot and NVIDIA's container runtime.
        devices: the folder of the device files.

    Raises:
        UserError: a SkyPilot task has fewer than it was given.
    """
    of_task = number(environment, SKYPILOT_GPUS) if environment.get(SKYPILOT_GPUS) else 0
    if (visible := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = Gpus(_named_devices(visible), "CUDA_VISIBLE_DEVICES", is_by_name=True)
        if gpus.number < of_task:  # they are paid for
            expected = f"CUDA_VISIBLE_DEVICES={visible} leaves {gpus.number} of the node's GPUs"
            raise UserError(SKYPILOT_GPUS, of_task, expected, "unset CUDA_VISIBLE_DEVICES in the task")
        return gpus
    if of_task:
        return Gpus(of_task, SKYPILOT_GPUS, is_by_name=True)
    if (on_node := environment.get("SLURM_GPUS_ON_NODE", "")).isdecimal() and int(on_node):
        return Gpus(int(on_node), "SLURM_GPUS_ON_NODE", is_by_name=True)
    # NVIDIA's images have `all` in it, without any GPU; a device plugin names those that it has given to a pod.
    if named := _named_devices(environment.get("NVIDIA_VISIBLE_DEVICES", "")):
        return Gpus(named, "NVIDIA_VISIBLE_DEVICES", is_by_name=True)
    # A container may see all of its machine's below /proc, but has the devices of its own alone.
    for folder, pattern in ((devices, "nvidia[0-9]*"), (Path("/proc/driver/nvidia/gpus"), "*")):
        if found := len(list(folder.glob(pattern))):
            return Gpus(found, str(folder))
    if (devices / "dxg").exists():
        return Gpus(0, "WSL's /dev/dxg, which may be a GPU of NVIDIA's or none", may_be=True)
    return Gpus(0, "no device of NVIDIA's driver")


def _named_devices(text: str) -> int:
    """Return how many devices a list names by index or UUID, up to the first entry that is neither."""
    words = [word.strip() for word in text.split(",")]
    return len(list(itertools.takewhile(re.compile(r"\d+|(GPU|MIG)-[\w/-]+").fullmatch, words)))


def processes_asked(environment: Mapping[str, str], gpus: Gpus) -> tuple[int | None, str]:
    """Return how many workers the launcher wants on this node (None: one per GPU, or one without GPUs), and why.

    Raises:
        UserError: PET_NPROC_PER_NODE, which is torchrun's option, has a value that cannot be followed here.
    """
    source = "one for each GPU" if gpus.number else "one, since there are no GPUs"
    if environment.get(SKYPILOT_GPUS):
        return max(1, number(environment, SKYPILOT_GPUS)), SKYPILOT_GPUS
    text = environment.get(_TRAINER_PROCESSES, "")
    if text.isdecimal():
        return number(environment, _TRAINER_PROCESSES, least=1), _TRAINER_PROCESSES
    remedy = "set numProcPerNode of the TrainJob to a number, or train.processes"
    if text not in ("", "auto", "gpu"):
        raise UserError(_TRAINER_PROCESSES, text, "expected a whole number, auto or gpu", remedy)
    if text == "gpu" and not gpus.number:
        raise UserError(_TRAINER_PROCESSES, text, "this node has no GPU that this process may use", remedy)
    return None, f"{_TRAINER_PROCESSES}={text}: {source}" if text else source
