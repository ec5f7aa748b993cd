"""The work that the entrypoint gives to the agent and the workers of its node, as a file in the folder of the start."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from job.config import Config
from job.launcher.device import Device
from job.launcher.environment import Rendezvous

_FILE = "worker_job.json"


@dataclass(frozen=True)
class WorkerJob:
    """What the workers of one node have to do in one start of a run."""

    command: str
    """``train`` or ``evaluate``."""
    config: Config
    start: str
    """Unique name of this start."""
    began_at: float
    """Time at which the entrypoint started, in seconds since 1970."""
    ends_at: float | None
    """Time at which the scheduler ends the job, in seconds since 1970; None if it is not known."""
    job_id: str | None
    """Same as `Environment.job_id`."""
    node_rank: int
    nodes: int
    workers_per_node: int
    rendezvous: Rendezvous | None
    """Address at which the nodes meet; None for one node."""
    device: Device
    """Device that the workers of this node use."""

    @property
    def ranks(self) -> range:
        """Ranks of the workers of this node."""
        return range(self.node_rank * self.workers_per_node, (self.node_rank + 1) * self.workers_per_node)

    @property
    def world_size(self) -> int:
        """Number of workers on all nodes."""
        return self.nodes * self.workers_per_node

    def write(self, folder: Path) -> None:
        """Write this job to a file in `folder`."""
        values = asdict(self) | {"config": self.config.model_dump(mode="json")}
        (folder / _FILE).write_bytes(orjson.dumps(values, default=list))

    @classmethod
    def read(cls, folder: Path) -> "WorkerJob":
        """Return the job that `write` stored in `folder`."""
        values: dict[str, Any] = orjson.loads((folder / _FILE).read_bytes())
        values["config"] = Config.model_validate(values["config"])
        if values["rendezvous"] is not None:
            values["rendezvous"] = Rendezvous(*values["rendezvous"])
        values["device"] = Device(**values["device"] | {"gpus": tuple(values["device"]["gpus"])})
        return cls(**values)
