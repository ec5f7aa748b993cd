"""What each worker leaves behind when it ends, for the process that started it: torchrun gives no exit codes back."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import time
from typing import Any

import orjson

from job.json_record import record_bytes

DONE, STOPPED, REFUSED, NO_PROGRESS, HUNG, CRASHED, KILLED, LOST = (
    *("done", "stopped", "refused", "no progress", "hung", "crashed", "killed", "lost"),
)
_OTHERS = "others.json"


@dataclass(frozen=True)
class Outcome:
    """How one worker ended."""

    rank: int
    status: str
    """``done``, ``stopped``, ``refused`` (a UserError), ``no progress``, ``hung``, ``crashed``, ``killed``, or ``lost``
    (its node is gone, or cannot reach the others)."""
    message: str = ""
    """The line of the error, the traceback, or the signal that killed it."""
    at: float = 0.0
    """Seconds since 1970: of several crashes the first is the cause."""


def record(folder: Path, outcome: Outcome) -> None:
    """Leaves `outcome` in `folder`, whole or not at all."""
    _write(folder / f"rank-{outcome.rank}.json", asdict(replace(outcome, at=outcome.at or time())))


def record_others(folder: Path, outcomes: list[Outcome]) -> None:
    """Leaves the outcomes of all workers of other nodes in `folder`, in one file: there may be thousands."""
    _write(folder / _OTHERS, {"outcomes": [asdict(one) for one in outcomes]})


def read_all(folder: Path) -> list[Outcome]:
    """The outcomes in `folder`, the earliest first."""
    found = [orjson.loads(path.read_bytes()) for path in folder.glob("rank-*.json")]
    if (others := folder / _OTHERS).exists():
        found += orjson.loads(others.read_bytes())["outcomes"]
    return sorted((Outcome(**one) for one in found), key=lambda one: one.at)


def without_details(outcomes: list[Outcome]) -> list[Outcome]:
    """The outcomes with few messages: of each status that of the earliest and the longest, of which one may be told.

    When a worker of a thousand fails, all others leave a traceback too.
    """
    kept: set[int] = set()
    for status in {one.status for one in outcomes}:
        these = [one for one in outcomes if one.status == status]
        kept |= {min(these, key=lambda one: one.at).rank, max(these, key=lambda one: len(one.message)).rank}
    return [one if one.rank in kept else replace(one, message="") for one in outcomes]


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(record_bytes(values))
    partial.replace(path)
