"""What the entrypoint hands to the agent and the workers of its node, as a file in their folder."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from job.config import Config
from job.launcher.device import Device
from job.launcher.environment import Rendezvous

_FILE = "task.json"


@dataclass(frozen=True)
class Task:
    """One node's part of one start."""

    command: str
    """``train`` or ``evaluate``."""
    config: Config
    start: str
    """A name that no other start has."""
    began_at: float
    """When the entrypoint was started, in seconds since 1970."""
    ends_at: float | None
    """When the place ends it, in seconds since 1970; None if it does not say."""
    job_id: str | None
    """As `Place.job_id`."""
    node_rank: int
    nodes: int
    processes: int
    """Workers of each node."""
    rendezvous: Rendezvous | None
    """None for one node."""
    device: Device
    """What its workers compute on."""

    @property
    def ranks(self) -> range:
        """Of this node's workers."""
        return range(self.node_rank * self.processes, (self.node_rank + 1) * self.processes)

    @property
    def world_size(self) -> int:
        """Workers of all nodes."""
        return self.nodes * self.processes

    def write(self, folder: Path) -> None:
        """Leaves it in `folder`."""
        values = asdict(self) | {"config": self.config.model_dump(mode="json")}
        (folder / _FILE).write_bytes(orjson.dumps(values, default=list))

    @classmethod
    def read(cls, folder: Path) -> "Task":
        """What `write` has left in `folder`."""
        values: dict[str, Any] = orjson.loads((folder / _FILE).read_bytes())
        values["config"] = Config.model_validate(values["config"])
        if values["rendezvous"] is not None:
            values["rendezvous"] = Rendezvous(*values["rendezvous"])
        values["device"] = Device(**values["device"] | {"gpus": tuple(values["device"]["gpus"])})
        return cls(**values)
