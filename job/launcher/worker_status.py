"""Files in which each worker records how it ended, since torchrun does not pass on the workers' exit codes."""

import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import time
from typing import Any

import orjson

from job.json_record import record_bytes
from job.runs.run_status import RunStatus

_OTHERS = "others.json"


@dataclass(frozen=True)
class WorkerStatus:
    """How one worker ended."""

    rank: int
    status: RunStatus
    message: str = ""
    """Error line or traceback; for `KILLED`, the name of the signal."""
    at: float = 0.0
    """Time of the end, in seconds since 1970; of several crashes, the first one is the cause."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "WorkerStatus":
        """Return the status that `dataclasses.asdict` converted to `values`."""
        return cls(**values | {"status": RunStatus(values["status"])})


def record(folder: Path, worker: WorkerStatus) -> None:
    """Write a status to `folder`. Readers see the whole file or none."""
    _write(folder / f"rank-{worker.rank}.json", asdict(replace(worker, at=worker.at or time())))


def record_if_killed(folder: Path, rank: int, exit_code: int) -> None:
    """Record the status of a worker if a signal ended it, because it could not record that itself.

    Args:
        folder: folder of this start.
        rank: rank of the worker.
        exit_code: the worker's exit code, as `subprocess` returns it: the negative number of the signal.
    """
    if exit_code < 0:
        record(folder, WorkerStatus(rank, RunStatus.KILLED, signal.Signals(-exit_code).name))


def record_others(folder: Path, workers: list[WorkerStatus]) -> None:
    """Write the statuses of all workers of other nodes to one file in `folder`: there may be thousands."""
    _write(folder / _OTHERS, {"workers": [asdict(worker) for worker in workers]})


def read_all(folder: Path) -> list[WorkerStatus]:
    """Return all statuses in `folder`, the earliest first."""
    values = [orjson.loads(path.read_bytes()) for path in folder.glob("rank-*.json")]
    if (others := folder / _OTHERS).exists():
        values += orjson.loads(others.read_bytes())["workers"]
    return sorted((WorkerStatus.from_dict(worker) for worker in values), key=lambda worker: worker.at)


def without_details(workers: list[WorkerStatus]) -> list[WorkerStatus]:
    """Return the statuses with most messages removed: each kind of status keeps its earliest and its longest message.

    Only one of those may be shown to the user. When one of a thousand workers fails, all others record a traceback too.
    """
    ranks_to_keep: set[int] = set()
    for status in {worker.status for worker in workers}:
        same_status = [worker for worker in workers if worker.status == status]
        ranks_to_keep.add(min(same_status, key=lambda worker: worker.at).rank)
        ranks_to_keep.add(max(same_status, key=lambda worker: len(worker.message)).rank)
    return [worker if worker.rank in ranks_to_keep else replace(worker, message="") for worker in workers]


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(record_bytes(values))
    partial.replace(path)
