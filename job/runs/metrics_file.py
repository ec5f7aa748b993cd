"""metrics.jsonl: one line a log interval, in the run's prefix, continued through every restart."""

import json
from dataclasses import dataclass
from typing import Any

from job import storage
from job.errors import UserError
from job.json_record import parse_record


@dataclass(frozen=True)
class _Row:
    """The field that every row has."""

    step: int


def metrics_url(output: str) -> str:
    """Where the log of the run at `output` is."""
    return storage.join(output, "logs", "metrics.jsonl")


class MetricsLog:
    """The run's metrics as JSON lines, every step once and in order.

    Each checkpoint holds the log up to its step, so that going on from it redoes the later steps' lines too.

    Args:
        content: the log up to the step that training goes on from.
    """

    def __init__(self, content: bytes = b"") -> None:
        self._closed = content.splitlines(keepends=True)
        self._row: dict[str, Any] = json.loads(self._closed.pop()) if self._closed else {}

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Adds what was measured at `step`, to the line of that step if there is one."""
        if self._row and self._row["step"] != step:
            self._closed.append(_line(self._row))
            self._row = {}
        self._row = {"step": step} | self._row | values

    def has(self, step: int, name: str) -> bool:
        """Whether `name` was measured at `step`, which is the last one."""
        return self._row.get("step") == step and name in self._row

    def content(self) -> bytes:
        """The whole log; an object store has no appending."""
        return b"".join([*self._closed, *([_line(self._row)] if self._row else [])])


def read_metrics(output: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none if it has not been written yet.

    Raises:
        UserError: it is damaged.
    """
    try:
        return parse_rows(storage.read_bytes(metrics_url(output)))
    except FileNotFoundError:
        return []
    except (ValueError, storage.IntegrityError) as error:
        expected = f"the run's log is damaged: {error}"
        raise UserError(
            "run.output", metrics_url(output), expected, "delete it: the next checkpoint writes it"
        ) from None


def parse_rows(content: bytes) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl with this content.

    Raises:
        ValueError: a line is not a row; the message says which and why.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            parse_record(line, _Row)
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def _line(row: dict[str, Any]) -> bytes:
    return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
