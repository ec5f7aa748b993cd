"""run.json: the record of a run, created before its first step; its id stays the same through every restart."""

import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from job import storage
from job.errors import UserError
from job.json_record import record_bytes
from job.tracking.swanlab import new_run_id
from job.version import code_version

_NAME = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json."""

    id: str
    """Also the id of the run in SwanLab, through all restarts."""
    name: str
    created: str
    code_version: str
    config: dict[str, Any]


def read_run(output: str) -> RunRecord | None:
    """The run at `output`; None if there is none.

    Raises:
        UserError: run.json is not a run's record.
    """
    try:
        return storage.read_record(storage.join(output, _NAME), RunRecord)
    except FileNotFoundError:
        return None
    except ValueError as error:
        expected = f"its {_NAME} is not the record of a run: {error}"
        raise UserError("run.output", output, expected, "choose another place") from None


def begin_run(output: str, name: str | None, config: dict[str, Any]) -> RunRecord:
    """Create the record of a new run; return the one that is there if another start was quicker.

    Args:
        output: the run's prefix.
        name: what to call it; None: the last part of `output`.
        config: all settings, recorded for a reader.
    """
    fresh = new_record(output, name, config)
    if storage.create_bytes(storage.join(output, _NAME), record_bytes(fresh)):
        return fresh
    found = read_run(output)
    if found is None:
        raise UserError("run.output", output, f"its {_NAME} was deleted while the run began", "start it again")
    return found


def new_record(output: str, name: str | None, config: dict[str, Any]) -> RunRecord:
    """A record with an id of its own; arguments as `begin_run`."""
    return RunRecord(
        id=new_run_id(),
        name=name or output.rstrip("/").rpartition("/")[2] or f"run-{secrets.token_hex(3)}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=code_version(),
        config=config,
    )


def replace_run(output: str, record: RunRecord) -> None:
    """Put a record in the place of the one that is there; for the attempt that has the run."""
    storage.write_bytes(storage.join(output, _NAME), record_bytes(record))
