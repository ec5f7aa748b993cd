"""Removal of environment variables by which accelerate, DeepSpeed and torchrun would override settings.

A variable meant for another program, such as ``ACCELERATE_GRADIENT_ACCUMULATION_STEPS``, would silently change the
training. None of these variables reaches a worker, and the names of the removed ones are printed.
"""

import re
import sys
from collections.abc import Mapping

_PREFIXES = (
    # accelerate: precision, accumulation, device, strategy and compiler
    *("ACCELERATE_", "FSDP_", "FP8_", "MEGATRON_LM_", "PARALLELISM_CONFIG_"),
    # accelerate and DeepSpeed: rank and world size under MPI
    *("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL"),
    # torchrun: defaults of its arguments
    "PET_",
)
_NAMES = (
    *("PMI_RANK", "PMI_SIZE", "FORK_LAUNCHED", "USE_TORCH_XLA", "XLA_USE_BF16", "XLA_DOWNCAST_BF16"),
    *("LOCAL_SIZE", "DEEPSPEED_TIMEOUT"),
    *("PYTHON_EXEC", "TORCH_ELASTIC_WORKER_IDENTICAL", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
)
_TORCHRUN_PREFIX = "TORCHELASTIC_"
"""Prefix of the variables that torchrun sets for its workers. If torchrun did not start this process, they belong to
another run."""
_USED = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NPROC_PER_NODE")
"""Variables that `job.launcher.environment` has already used. They are removed too, but not reported."""
_THREADS = "OMP_NUM_THREADS"
"""OpenMP allows a list, such as ``4,2``, and a deployment file may set it to nothing. accelerate then fails."""


def is_foreign(name: str, is_worker: bool = False) -> bool:
    """Return True if the variable would override settings.

    Args:
        name: name of the variable.
        is_worker: True if torchrun started this process.
    """
    return name.startswith(_PREFIXES) or name in _NAMES or (not is_worker and name.startswith(_TORCHRUN_PREFIX))


def without_foreign(environment: Mapping[str, str], is_worker: bool = False) -> dict[str, str]:
    """Return `environment` without foreign and unusable variables, and print those that have no effect.

    Args:
        environment: all variables.
        is_worker: True if torchrun started this process.
    """
    removed = [name for name in environment if is_foreign(name, is_worker)]
    unused = sorted(set(removed) - set(_USED))
    if unused:
        sys.stderr.write(f"environment variables ignored because settings decide this instead: {', '.join(unused)}\n")
    threads = environment.get(_THREADS)
    if threads is not None and not re.fullmatch("0*[1-9][0-9]*", threads):
        sys.stderr.write(f"{_THREADS}: {threads!r}: expected a whole number from 1; it is ignored\n")
        removed.append(_THREADS)
    return {name: value for name, value in environment.items() if name not in removed}
