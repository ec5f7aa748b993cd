"""run.json: the record of a run, created before its first step; its id stays the same through all attempts."""

import secrets
import string
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from job import storage
from job.errors import UserError
from job.json_record import record_bytes
from job.version import code_version

RUN_RECORD = "run.json"
FINAL_MODEL = "final"
"""Folder of the exported model inside `run.output`."""
_ID_LENGTH = 21
"""Older SwanLab servers accept only ids of this length, newer ones any length from 1 to 64."""


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json."""

    id: str
    """Id of the run, also in SwanLab."""
    name: str
    created: str
    """Time of creation, in ISO 8601."""
    code_version: str
    config: dict[str, Any]
    """All settings of the first attempt, for a reader; the program does not use them."""


def read_run(output: str) -> RunRecord | None:
    """Return the record of the run at `output`; None if there is no run.

    Raises:
        UserError: run.json is damaged, or is the file of another program.
    """
    try:
        return storage.read_record(storage.join(output, RUN_RECORD), RunRecord)
    except FileNotFoundError:
        return None
    except ValueError as error:
        expected = f"its {RUN_RECORD} is not a valid run record: {error}"
        raise UserError("run.output", output, expected, "restore the file, or choose another run.output") from None


def begin_run(output: str, name: str | None, config: dict[str, Any]) -> RunRecord:
    """Create the record of a new run; return the existing record if another start created one first.

    Args:
        output: folder or URL of the run.
        name: display name; None: the last part of `output`.
        config: all settings.
    """
    record = new_record(output, name, config)
    if storage.create_bytes(storage.join(output, RUN_RECORD), record_bytes(record)):
        return record
    existing = read_run(output)
    if existing is None:
        raise UserError("run.output", output, f"its {RUN_RECORD} was deleted while the run started", "start it again")
    return existing


def new_record(output: str, name: str | None, config: dict[str, Any]) -> RunRecord:
    """Return a record with a new id, without writing it; the arguments are those of `begin_run`."""
    return RunRecord(
        id=new_run_id(),
        name=name or output.rstrip("/").rpartition("/")[2] or f"run-{secrets.token_hex(3)}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=code_version(),
        config=config,
    )


def replace_run(output: str, record: RunRecord) -> None:
    """Overwrite run.json; only the attempt that owns the run may do this."""
    storage.write_bytes(storage.join(output, RUN_RECORD), record_bytes(record))


def new_run_id() -> str:
    """Return a random id of lower-case letters and digits, in the form that SwanLab accepts."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(_ID_LENGTH))
