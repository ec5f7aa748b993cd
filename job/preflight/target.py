"""Target of a run: how many nodes, processes, GPUs, how much memory and time it has there."""

from dataclasses import dataclass
from pathlib import Path

from job.runs.choices import Hardware

PLACES = ("slurm", "kubernetes", "swanlab")
"""Places that `--place` accepts; ``kubernetes`` may be followed by ``/`` and a folder of `KUBERNETES_FOLDER`."""
SLURM_SCRIPT = Path("launch/slurm.sh")
KUBERNETES_FOLDER = Path("launch/kubernetes")
SWANLAB_SPEC = Path("launch/swanlab.yaml")
SWANLAB_VOLUMES = "/data/"
"""Folder in which a SwanLab task sees the volumes of its spec."""
SWANLAB_CREDENTIALS = "AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY,AWS_SESSION_TOKEN"
"""Environment variables that `launch.swanlab submit --with-credentials` passes on to the task."""
SHARED_MEMORY_BYTES = 2**30
"""Least size of /dev/shm, through which NCCL connects the processes of a node; containers have 64 MiB by default."""


@dataclass(frozen=True)
class Target:
    """Equal nodes on which the run would train: this machine, or what a launch file asks for."""

    name: str
    """Name of the place, as it is printed."""
    nodes: int
    gpus_per_node: int
    """GPUs of one node; 0 if the run trains on the CPU."""
    processes_per_node: int
    """Training processes on one node."""
    gpu_name: str = ""
    """Name that CUDA gives the GPUs; empty if not known."""
    gpu_capability: tuple[int, int] | None = None
    """Lowest CUDA compute capability of the GPUs, such as (9, 0); None if not known."""
    gpu_memory_bytes: int | None = None
    """Memory of the smallest GPU; None if not known."""
    memory_bytes: int | None = None
    """Main memory of one node that the run may use; None if not known."""
    time_limit_seconds: float | None = None
    """How long one attempt may run; None if there is no limit or it is not known."""
    grace_seconds: float | None = None
    """Time between the request to stop and SIGKILL; None if not known."""

    @property
    def world_size(self) -> int:
        """Number of training processes on all nodes together."""
        return self.nodes * self.processes_per_node

    @property
    def hardware(self) -> Hardware:
        """The GPUs or CPUs of the target, as `job.runs.choices.choose` takes them."""
        if not self.gpus_per_node:
            return Hardware("cpu")
        return Hardware("cuda", self.gpu_name, self.gpu_capability, self.gpu_memory_bytes, self.gpu_memory_bytes)
