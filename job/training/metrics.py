"""metrics.jsonl: one line a log interval, in the run's prefix, continued through every restart."""

import json
from typing import Any

from job import storage


class MetricsLog:
    """The run's metrics as JSON lines, every step once and in order.

    Args:
        output: the run's prefix.
        from_step: the step that training goes on from; later lines, which a stop has cut off, are dropped.
    """

    def __init__(self, output: str, from_step: int) -> None:
        self._url = storage.join(output, "logs", "metrics.jsonl")
        self._rows = [row for row in read_metrics(output) if row["step"] <= from_step] if from_step else []

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Adds what was measured at `step`, to the line of that step if there is one."""
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1] |= values
        else:
            self._rows.append({"step": step, **values})

    def store(self) -> None:
        """Writes the whole log; an object store has no appending."""
        lines = (json.dumps(row, ensure_ascii=False) for row in self._rows)
        storage.write_bytes(self._url, "".join(f"{line}\n" for line in lines).encode())


def read_metrics(output: str) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none if it has not been written yet."""
    try:
        content = storage.read_bytes(storage.join(output, "logs", "metrics.jsonl"))
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in content.decode().splitlines()]
