"""What makes a run one run: its id, fixed before the first step by whoever writes run.json first."""

import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from job import storage
from job.errors import UserError
from job.revision import code_version
from job.training.tracking import new_run_id

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


def begin_run(output: str, name: str | None, config: dict[str, Any], replace: bool) -> RunRecord:
    """A new run at `output`, or, if somebody else has begun one this moment, that one.

    Args:
        output: the run's prefix.
        name: what to call it; None: the last part of `output`.
        config: all settings, recorded for a reader.
        replace: put it in the place of the run that is there.
    """
    url = storage.join(output, _NAME)
    fresh = RunRecord(
        id=new_run_id(),
        name=name or output.rstrip("/").rpartition("/")[2] or f"run-{secrets.token_hex(3)}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_version=code_version(),
        config=config,
    )
    content = orjson.dumps(asdict(fresh), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    if replace:
        storage.write_bytes(url, content)
        return fresh
    if storage.create_bytes(url, content):
        return fresh
    found = read_run(output)
    if found is None:
        expected = f"its {_NAME} was there a moment ago, and is gone"
        raise UserError("run.output", output, expected, "let nobody delete the run while it starts, and start it again")
    return found
