"""Hardware and versions of one start of a run, for the record of its attempt."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from job.runs.choices import Hardware
from job.runs.world import World
from job.version import code_version

_PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "tokenizers", "numpy")


def run_environment(world: World, hardware: Hardware) -> dict[str, str]:
    """Return what this start computes with, by name: the hardware, this program, Python and the packages.

    Args:
        world: this process among the others.
        hardware: the weakest hardware of all processes.
    """
    machines = world.world_size // world.local_world_size
    where = f"{world.world_size} x {hardware.description}"
    if hardware.device == "cpu":
        where = f"CPU ({platform.machine()}, {os.cpu_count()} cores a machine), processes: {world.world_size}"
    return {
        "hardware": where if machines == 1 else f"{where}, machines: {machines}",
        "system": platform.platform(),
        "wikillm": code_version(),
        "python": platform.python_version(),
    } | {name: found for name in _PACKAGES if (found := _version_of(name))}


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
