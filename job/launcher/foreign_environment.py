"""Environment variables by which accelerate, DeepSpeed and torchrun would decide what the settings decide.

A variable that was meant for another program, such as ``ACCELERATE_GRADIENT_ACCUMULATION_STEPS``, would silently change
the updates. None of these variables reaches a worker, and the names of the removed ones are printed.
"""

import sys
from collections.abc import Mapping

_PREFIXES = (
    # accelerate: precision, accumulation, device, strategy and compiler
    *("ACCELERATE_", "FSDP_", "FP8_", "MEGATRON_LM_", "PARALLELISM_CONFIG_"),
    # accelerate and DeepSpeed: rank and world size as MPI gives them
    *("OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL"),
    # torchrun: its arguments where they are not given
    "PET_",
)
_NAMES = (
    *("PMI_RANK", "PMI_SIZE", "FORK_LAUNCHED", "USE_TORCH_XLA", "XLA_USE_BF16", "XLA_DOWNCAST_BF16"),
    *("LOCAL_SIZE", "DEEPSPEED_TIMEOUT"),
    *("PYTHON_EXEC", "TORCH_ELASTIC_WORKER_IDENTICAL", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"),
)
_OF_TORCHRUN = "TORCHELASTIC_"
"""Prefix of the variables that torchrun sets for its workers. If torchrun did not start this process, they belong to
another run."""
_READ = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT", "PET_NPROC_PER_NODE")
"""Variables that `job.launcher.environment` has already used. They are removed too, but are not reported as ignored."""


def is_foreign(name: str, is_worker: bool = False) -> bool:
    """Return True if the variable would decide what the settings decide.

    Args:
        name: of the variable.
        is_worker: torchrun has started this process.
    """
    return name.startswith(_PREFIXES) or name in _NAMES or (not is_worker and name.startswith(_OF_TORCHRUN))


def without_foreign(environment: Mapping[str, str], is_worker: bool = False) -> dict[str, str]:
    """Return `environment` without variables of other programs, and print the names of those that have no effect."""
    removed = [name for name in environment if is_foreign(name, is_worker)]
    ignored = sorted(set(removed) - set(_READ))
    if ignored:
        sys.stderr.write(f"removed from the environment, since the settings alone decide: {', '.join(ignored)}\n")
    return {name: value for name, value in environment.items() if name not in removed}
