"""What a report tells about a run: its records, metrics, attempts and data set, read from `run.output`.

Only run.json is required. Everything else may be missing or damaged, because the run is still going, has failed, or was
made by an earlier version; `RunFacts.missing` then says what the report lacks and why.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from job import storage
from job.data.manifest import Manifest, load_manifest
from job.errors import UserError, one_line
from job.run_report.wording import Both, same
from job.runs.attempts import Attempt, Attempts
from job.runs.checkpoint_list import list_checkpoints
from job.runs.metrics_file import SAMPLES, metrics_url, parse_row
from job.runs.run import FINAL_MODEL, RUN_RECORD, RunRecord, read_run

_DATA_SET_SECONDS = 15
"""Longest time for reading the manifest of the data set, which may be in a store that cannot be reached from here."""
_LARGEST = 1e300
"""Values beyond this are not numbers that a chart can show."""
_LARGEST_STEP = 2**53
"""Steps beyond this are not exact as a floating-point number, and no run gets there."""
_LATEST = 2**35
"""Times beyond this, in seconds since 1970, are not believed."""


@dataclass(frozen=True)
class AttemptSpan:
    """An attempt and its place in time."""

    record: Attempt
    began: float | None
    """Seconds since 1970; None if the record is damaged."""
    last_seen: float | None
    """When it recorded its end; without that, when it began its last line of metrics.jsonl that still counts."""
    computed_before: float
    """Seconds of all attempts before it."""

    @property
    def seconds(self) -> float:
        """Seconds from its beginning to when it was last seen; 0 if that is not known."""
        return 0.0 if self.began is None or self.last_seen is None else max(0.0, self.last_seen - self.began)


@dataclass(frozen=True)
class RunFacts:
    """Everything that a report tells about one run."""

    url: str
    """Folder or URL of the run."""
    record: RunRecord
    attempts: tuple[AttemptSpan, ...]
    """Attempts of this run, in order; those of a run that was in the same place before are left out."""
    rows: tuple[dict[str, Any], ...]
    """Rows of metrics.jsonl, in the order of the steps."""
    manifest: Manifest | None
    """The data set; None if it cannot be read from here."""
    saved_steps: tuple[int, ...]
    """Steps of the complete checkpoints that the run still has."""
    has_final: bool
    """True if the final model was exported."""
    missing: tuple[Both, ...]
    """What could not be read, one sentence each."""
    _columns: dict[str, list[float | None]] = field(default_factory=dict, compare=False, repr=False)
    """The columns that were asked for; a copy with the same rows shares them."""

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the newest attempt that recorded them."""
        return next((span.record.config for span in reversed(self.attempts) if span.record.config), self.record.config)

    @cached_property
    def steps(self) -> int | None:
        """Steps of the run: those of its last line, and the few that a stop has saved without a line; None if none."""
        if not self.rows:
            return None
        last = int(self.rows[-1]["step"])
        interval = self.section("train").get("log_every")
        unlogged = range(last, last + interval) if isinstance(interval, int) else ()
        return max((step for step in self.saved_steps if step in unlogged), default=last)

    @property
    def tokens_seen(self) -> float | None:
        """Tokens that the run was trained on in all its `steps`."""
        tokens, last = self.last("train/tokens_seen"), self.rows[-1]["step"] if self.rows else 0
        return round(tokens * self.steps / last) if tokens and self.steps and last else tokens

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the settings; empty if the record has none, or something else in its place."""
        values = self.config.get(name)
        return values if isinstance(values, dict) else {}

    def value(self, row: dict[str, Any], name: str) -> float | None:
        """Return a metric of a row; None if it is not there or not a finite number."""
        value = row.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        return float(value) if -_LARGEST <= value <= _LARGEST else None  # NaN is not in any range.

    def last(self, name: str) -> float | None:
        """Return the last value of a metric; None if there is none."""
        return next((value for value in reversed(self.column(name)) if value is not None), None)

    def values(self, name: str) -> list[float]:
        """Return all values of a metric, in the order of the steps."""
        return [value for value in self.column(name) if value is not None]

    def column(self, name: str) -> list[float | None]:
        """Return the value of a metric in each row; None in rows without a finite number."""
        if name not in self._columns:
            self._columns[name] = [self.value(row, name) for row in self.rows]
        return self._columns[name]

    def places(self, axis: str) -> list[float | None]:
        """Return the place of each row on a horizontal axis, ``steps``, ``tokens`` or ``hours``; None if not known."""
        return self._places[axis]

    def hours(self, row: dict[str, Any]) -> float | None:
        """Return the hours of work of all attempts up to a row, without the pauses between them; None if not known."""
        at = self.value(row, "time")
        number = row.get("attempt")
        span = self._spans.get(number) if isinstance(number, int) else None
        if at is None or span is None or span.began is None:
            return None
        return (span.computed_before + max(0.0, at - span.began)) / 3600

    @cached_property
    def tokens(self) -> dict[int, float]:
        """Tokens seen after each step that has a line; of a line without the number, those of the line before."""
        found, tokens = {}, 0.0
        for row in self.rows:
            tokens = self.value(row, "train/tokens_seen") or tokens
            found[row["step"]] = tokens
        return found

    @cached_property
    def samples(self) -> list[tuple[int, dict[str, str]]]:
        """Return step and the texts by prompt of each time at which the model was sampled."""
        found = []
        for row in self.rows:
            texts = row.get(SAMPLES)
            if isinstance(texts, dict) and texts:
                found.append((row["step"], {str(prompt): str(text) for prompt, text in texts.items()}))
        return found

    @cached_property
    def _places(self) -> dict[str, list[float | None]]:
        return {
            "steps": [float(row["step"]) for row in self.rows],
            "tokens": [self.tokens[row["step"]] for row in self.rows],
            "hours": [self.hours(row) for row in self.rows],
        }

    @cached_property
    def _spans(self) -> dict[int, AttemptSpan]:
        return {span.record.number: span for span in self.attempts}


def read_facts(url: str) -> RunFacts:
    """Read what there is of the run at `url`, a folder or a URL.

    Raises:
        UserError: there is no run, or its run.json is damaged.
        StoreError: the store failed until the deadline.
    """
    record = read_run(url)
    if record is None:
        expected = f"there is no {RUN_RECORD}, so no run"
        raise UserError("report", url, expected, "name the folder or URL that was run.output when it was trained")
    missing: list[Both] = []
    rows = _read_rows(url, missing)
    spans = tuple(_spans(_read_attempts(url, missing), rows))
    facts = RunFacts(
        url,
        record,
        spans,
        tuple(rows),
        None,
        tuple(name.step for name in list_checkpoints(url)),
        storage.exists(storage.join(url, FINAL_MODEL, "config.json")),
        (),
    )
    if rows and not any("time" in row for row in rows):
        missing.append(
            Both(
                "metrics.jsonl was written by an earlier version and has no times, so nothing is drawn against hours.",
                "metrics.jsonl 由较早的版本写成，没有时间，因此没有以小时为横轴的曲线。",
            )
        )
    if rows and not facts.samples:
        missing.append(
            Both(
                "metrics.jsonl has no samples: it was not sampled yet, or by an earlier version.",
                "metrics.jsonl 里没有样本：还没有采样，或由较早的版本训练。",
            )
        )
    manifest = _read_manifest(str(facts.section("data").get("shards", "")), missing)
    return replace(facts, manifest=manifest, missing=tuple(missing))


def _read_rows(url: str, missing: list[Both]) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl in the order of their steps, without damaged lines."""
    try:
        content = storage.read_bytes(metrics_url(url))
    except FileNotFoundError:
        missing.append(
            Both(
                "There is no logs/metrics.jsonl yet: it is written with the first checkpoint.",
                "还没有 logs/metrics.jsonl：它随第一个 checkpoint 写出。",
            )
        )
        return []
    except storage.IntegrityError as error:
        missing.append(same(f"logs/metrics.jsonl: {one_line(str(error))}"))
        return []
    rows, damaged = {}, []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            if line.strip():
                row = parse_row(line)
                if not 0 <= row["step"] <= _LARGEST_STEP:
                    raise ValueError(f"step: it is not from 0 to {_LARGEST_STEP}")
                rows[row["step"]] = row
        except ValueError as error:
            damaged.append((number, str(error)))
    if damaged:
        number, reason = damaged[0]
        missing.append(
            Both(
                f"{len(damaged)} damaged lines of logs/metrics.jsonl are left out, first line {number}: {reason}",
                f"logs/metrics.jsonl 有 {len(damaged)} 行损坏，已略过；第一处是第 {number} 行：{reason}",
            )
        )
    return [rows[step] for step in sorted(rows)]


def _read_attempts(url: str, missing: list[Both]) -> list[Attempt]:
    attempts = Attempts(url)
    numbers = attempts.numbers()
    records = [record for number in numbers if (record := attempts.read(number)) is not None]
    if len(records) < len(numbers):
        lost = len(numbers) - len(records)
        missing.append(Both(f"{lost} damaged records of attempts are left out.", f"有 {lost} 个启动记录损坏，已略过。"))
    return [record for record in records if record.run_id == records[-1].run_id]


def _spans(attempts: list[Attempt], rows: list[dict[str, Any]]) -> Iterator[AttemptSpan]:
    computed = 0.0
    newest: dict[int, float] = {}
    for row in rows:
        number, at = row.get("attempt"), row.get("time")
        if isinstance(number, int) and isinstance(at, int | float) and 0 < at < _LATEST:
            newest[number] = max(newest.get(number, 0.0), at)
    for index, attempt in enumerate(attempts):
        last_seen = _time_of(attempt.ended_at) or newest.get(attempt.number)
        follower = _time_of(attempts[index + 1].began) if index + 1 < len(attempts) else None
        if last_seen is not None and follower is not None:
            last_seen = min(last_seen, follower)  # It may notice only later that another attempt has the run.
        span = AttemptSpan(attempt, _time_of(attempt.began), last_seen, computed)
        computed += span.seconds
        yield span


def _time_of(text: str | None) -> float | None:
    """Return a time in ISO 8601 as seconds since 1970; None if it cannot be parsed."""
    try:
        return datetime.fromisoformat(text or "").timestamp()
    except (ValueError, OverflowError):
        return None


def _read_manifest(shards: str, missing: list[Both]) -> Manifest | None:
    try:
        with storage.limits(deadline_seconds=_DATA_SET_SECONDS):
            return load_manifest(shards)
    except (OSError, UserError, ValueError) as error:
        reason = one_line(str(error))
        missing.append(
            Both(
                f"The data set cannot be read from here, so its numbers are left out: {reason}",
                f"这里读不到数据集，因此没有语料和分词器的数字：{reason}",
            )
        )
        return None
