"""Writes what a run stores, without training: a long run with three attempts, one of them killed."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from job import config as settings
from job.json_record import record_bytes
from job.runs.attempts import Attempt
from job.runs.run import RunRecord

BEGAN = 1_764_000_000
"""Begin of the first attempt, in seconds since 1970."""
STEPS = 1500
ID = "a" * 21
TRACEBACK = "Traceback\n  x\nOSError: disk\n"
EVIL = '<script>document.title="taken"</script> | `x` **y**'
SECRET = "hunter_2 & <co>"


def write_run(folder: Path, *, name: str = "wiki", is_old: bool = False, rate: float = 5e-4) -> str:
    """Write a run of `STEPS` steps to a folder and return its path.

    Args:
        folder: an empty folder, or none.
        name: name of the run.
        is_old: write what an earlier version wrote: no times, samples, ends or versions.
        rate: learning rate.
    """
    config = settings.to_dict(
        settings.build(
            {
                "run": {"output": str(folder)},
                "train": {"learning_rate": rate, "epochs": 2},
                "evaluate": {"max_windows": 2048},
            }
        )
    )
    record = RunRecord(ID, name, "2025-11-24T16:00:00+00:00", "0.1.0+0123456789ab", config)
    for part in ("attempts", "logs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_bytes(record_bytes(record))
    for attempt in attempts(config, is_old=is_old):
        (folder / "attempts" / f"{attempt['number']:08d}.json").write_bytes(record_bytes(attempt))
    lines = [json.dumps(row(step, is_old=is_old, rate=rate), ensure_ascii=False) for step in range(1, STEPS + 1)]
    (folder / "logs" / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def attempts(config: dict[str, Any], *, is_old: bool) -> list[dict[str, Any]]:
    """Return three attempts: stopped after 1 hour, killed after 2 hours more, failed after 1 hour more."""
    new = {"environment": {"hardware": "1 x NVIDIA H200", "torch": "2.13.0"}}
    made = [
        Attempt(1, ID, "s", None, "node-1", 1, when(0), "auto", 0, "stopped", None, when(1), "a signal asked for it"),
        Attempt(2, ID, "s", None, "node-2", 1, when(10), "auto", 500),
        Attempt(3, ID, "s", None, "node-1", 1, when(20), "auto", 1000, "failed", TRACEBACK,
                when(21), changed={"train.epochs": [1, 2]}),
    ]  # fmt: skip
    records = [asdict(attempt) | {"config": config} | new for attempt in made]
    for record in records if is_old else ():
        for key in ("ended_at", "stop_reason", "environment"):
            record.pop(key)
    return records


def edit_attempts(run: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the records of all attempts of a run with a function that changes one."""
    for path in sorted((Path(run) / "attempts").iterdir()):
        record = json.loads(path.read_text())
        edit(record)
        path.write_text(json.dumps(record))


def edit_rows(run: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the lines of metrics.jsonl of a run with a function that changes one."""
    path = Path(run) / "logs" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for values in rows:
        edit(values)
    path.write_text("".join(f"{json.dumps(values)}\n" for values in rows))


def when(hours: float) -> str:
    """Return a time in ISO 8601."""
    return datetime.fromtimestamp(BEGAN + 3600 * hours, UTC).isoformat()


def row(step: int, *, is_old: bool, rate: float) -> dict[str, Any]:
    """Return a line of metrics.jsonl; the three thirds of the steps take 1, 2 and 1 hours."""
    began, hours = [(0, 1), (10, 2), (20, 1)][(step - 1) // 500]
    values: dict[str, Any] = {"step": step}
    if not is_old:
        at = BEGAN + 3600 * (began + hours * ((step - 1) % 500 + 1) / 500)
        values |= {"time": at, "attempt": (step - 1) // 500 + 1}
    loss = 3 + 8 / math.sqrt(step) * (rate / 5e-4)
    values |= {
        "train/loss": 40.0 if step == 777 else loss,
        "train/learning_rate": rate,
        "train/gradient_norm": 1 + step % 7,
        "train/tokens_seen": step * 1000,
        "train/epoch": step / 750,
        "train/skipped_steps": 0,
        "speed/tokens_per_second": 45_000 + step % 100,
        "speed/data_wait": 0.01,
        "speed/stall": 0.5 if step % 250 == 0 else 0.0,
        "memory/peak_gib": 3.25,
    }
    if step % 250 == 0:
        values |= {"validation/loss": loss + 0.1, "validation/bits_per_byte": loss / 3}
        if not is_old:
            values["samples"] = {"北京市": f"是中国的首都 {step} {SECRET}", EVIL: f"{EVIL}\x00 {step}"}
    return values
