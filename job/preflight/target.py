"""Where the run is to go, in the few numbers that decide whether it fits: of this machine, or as a launch file says."""

from dataclasses import dataclass
from pathlib import Path

PLACES = ("slurm", "kubernetes", "swanlab")
SLURM_SCRIPT = Path("launch/slurm.sh")
KUBERNETES_FOLDER = Path("launch/kubernetes")
SWANLAB_SPEC = Path("launch/swanlab.yaml")
SWANLAB_VOLUMES = "/data/"
"""Below it, a task of SwanLab's sees the data set of its spec."""
SWANLAB_CREDENTIALS = "AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY,AWS_SESSION_TOKEN"


@dataclass(frozen=True)
class Target:
    """A number of equal nodes."""

    name: str
    nodes: int
    gpus: int
    """Of a node; 0: it trains on the CPU."""
    processes: int
    """Training processes of a node."""
    gpu_name: str = ""
    """As CUDA calls it; empty where that is not known."""
    gpu_memory_bytes: int | None = None
    """Of the smallest of its GPUs; None: not known."""
    memory_bytes: int | None = None
    """Of the node's own memory that the run may take; None: not known."""
    seconds: float | None = None
    """How long one start may run; None: no limit is known."""
    grace_seconds: float | None = None
    """Between the request to stop and the end; None: not known."""

    @property
    def world_size(self) -> int:
        """Training processes of all nodes."""
        return self.nodes * self.processes
