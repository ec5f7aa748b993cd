"""What each worker leaves behind when it ends, for the process that started it: torchrun gives no exit codes back."""

from dataclasses import dataclass, replace
from pathlib import Path
from time import time

import orjson

from job.record import record_bytes

DONE, STOPPED, REFUSED, NO_PROGRESS, HUNG, CRASHED, KILLED, LOST = (
    *("done", "stopped", "refused", "no progress", "hung", "crashed", "killed", "lost"),
)


@dataclass(frozen=True)
class Outcome:
    """How one worker ended."""

    rank: int
    status: str
    """``done``, ``stopped``, ``refused`` (a UserError), ``no progress``, ``hung``, ``crashed``, ``killed``, or ``lost``
    with its whole node."""
    message: str = ""
    """The line of the error, the traceback, or the signal that killed it."""
    at: float = 0.0
    """Seconds since 1970: of several crashes the first is the cause."""


def record(folder: Path, outcome: Outcome) -> None:
    """Leaves `outcome` in `folder`, whole or not at all."""
    path = folder / f"rank-{outcome.rank}.json"
    partial = path.with_suffix(".partial")
    partial.write_bytes(record_bytes(replace(outcome, at=outcome.at or time())))
    partial.replace(path)


def read_all(folder: Path) -> list[Outcome]:
    """The outcomes in `folder`, the earliest first."""
    return sorted(
        (Outcome(**orjson.loads(path.read_bytes())) for path in folder.glob("rank-*.json")), key=lambda o: o.at
    )
