"""metrics.jsonl: the metrics of a run, one line for each logged step, continued by every attempt.

    {"step": 500, "time": 1764000000.1, "attempt": 2, "train/loss": 4.1, …, "samples": {"北京市": "是…"}}

`time` is when the line was begun, in seconds since 1970, and `attempt` is the number of the attempt that computed the
step. Files of earlier versions have neither. A line has `samples`, a text for each prompt, if the model was sampled.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from job import storage
from job.errors import UserError, one_line
from job.redaction import redacted_tree

SAMPLES = "samples"
"""Field of a line with the continuation of each prompt."""


def metrics_url(output: str) -> str:
    """Return the path or URL of metrics.jsonl of the run at `output`."""
    return storage.join(output, "logs", "metrics.jsonl")


class MetricsFile:
    """The content of metrics.jsonl in memory: one JSON line for each logged step, in the order of the steps.

    Each checkpoint contains the lines up to its step. An attempt that continues from a checkpoint starts with these
    lines and writes those of the later steps again.

    Args:
        content: the lines up to the step that training continues from.
        attempt: number of the attempt that adds lines.
        clock: returns the time in seconds since 1970.
    """

    def __init__(self, content: bytes = b"", attempt: int = 1, clock: Callable[[], float] = time.time) -> None:
        self._attempt, self._clock = attempt, clock
        self._finished_lines = [line for line in content.splitlines(keepends=True) if line.strip()]
        self._row: dict[str, Any] = json.loads(self._finished_lines.pop()) if self._finished_lines else {}

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Add metrics of `step`: to the last line if it is of this step, otherwise in a new line."""
        if self._row.get("step") != step:
            self._finished_lines += [_line(self._row)] if self._row else []
            self._row = {"step": step, "time": round(self._clock(), 3), "attempt": self._attempt}
        self._row |= values

    def has(self, step: int, name: str) -> bool:
        """Return True if `step` is the last step with metrics and the metric `name` is one of them."""
        return self._row.get("step") == step and name in self._row

    def content(self) -> bytes:
        """Return all lines. The file is always written as a whole, because object stores cannot append."""
        return b"".join([*self._finished_lines, *([_line(self._row)] if self._row else [])])


def read_metrics(output: str) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl of the run at `output`; an empty list if there is no such file yet.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return parse_rows(storage.read_bytes(metrics_url(output)))
    except FileNotFoundError:
        return []
    except (ValueError, storage.IntegrityError) as error:
        remedy = "delete it: the next checkpoint writes it again"
        raise UserError("run.output", metrics_url(output), f"the run's metrics are damaged: {error}", remedy) from None


def parse_rows(content: bytes) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl with this content, in which blank lines do not count.

    Raises:
        ValueError: a line is not a row; the message holds the number of the line and the reason.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            rows += [parse_row(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return rows


def parse_row(line: bytes) -> dict[str, Any]:
    """Return the row in one line.

    Raises:
        ValueError: the line is not a row; the message is one line with the reason.
    """
    try:
        row = from_json(line)
    except ValueError as error:
        raise ValueError(one_line(f"Invalid JSON: {error}")) from None
    if not isinstance(row, dict):
        raise ValueError("it is not an object with the fields of a row")
    if type(row.get("step")) is not int:  # True is an instance of int.
        raise ValueError("step: it is missing or not a whole number")
    return row


def _line(row: dict[str, Any]) -> bytes:
    return f"{json.dumps(redacted_tree(row), ensure_ascii=False)}\n".encode()
