"""metrics.jsonl: every step once and in order, even if the run was stopped or killed in between."""

from job import storage
from job.runs.metrics_file import MetricsFile, metrics_url, parse_rows, read_metrics


def test_metrics_of_one_step_share_one_line() -> None:
    log = MetricsFile(attempt=3, clock=iter([10.0004, 20.0]).__next__)
    log.add(1, {"train/loss": 5.5})
    log.add(2, {"train/loss": 5.25})
    log.add(2, {"validation/loss": 6.0, "samples": {"人工": "智能"}})
    assert log.content().decode().splitlines() == [
        '{"step": 1, "time": 10.0, "attempt": 3, "train/loss": 5.5}',
        '{"step": 2, "time": 20.0, "attempt": 3, "train/loss": 5.25, "validation/loss": 6.0, '
        '"samples": {"人工": "智能"}}',
    ]


def test_line_continued_by_another_attempt_keeps_its_time() -> None:
    log = MetricsFile(b'{"step": 3, "time": 1.0, "attempt": 1, "train/loss": 5.0}\n', attempt=2, clock=lambda: 9.0)
    log.add(3, {"validation/loss": 6.0})
    log.add(4, {"train/loss": 4.0})
    rows = parse_rows(log.content())
    assert [(row["step"], row["time"], row["attempt"]) for row in rows] == [(3, 1.0, 1), (4, 9.0, 2)]
    assert rows[0]["validation/loss"] == 6.0


def test_lines_of_an_earlier_version_are_continued() -> None:
    log = MetricsFile(b'{"step": 3, "train/loss": 5.0}\n', attempt=2, clock=lambda: 9.0)
    log.add(4, {"train/loss": 4.0})
    assert log.content().decode().splitlines()[0] == '{"step": 3, "train/loss": 5.0}'


def test_samples_are_stored_without_secrets() -> None:
    log = MetricsFile()
    log.add(1, {"samples": {"see": "https://me:hunter22@example.org/x"}})
    assert "hunter22" not in log.content().decode()


def test_continued_file_equals_an_uninterrupted_one(bucket: str) -> None:
    whole = MetricsFile(clock=lambda: 1.0)
    contents = [whole.content()]
    for step in range(1, 6):
        whole.add(step, {"train/loss": 1.0 / step})
        contents.append(whole.content())
        whole.add(step, {"validation/loss": 2.0 / step})
        contents.append(whole.content())
    for added, content in enumerate(contents):
        log = MetricsFile(content, clock=lambda: 1.0)
        for number in range(added, 10):
            step, name = number // 2 + 1, "validation/loss" if number % 2 else "train/loss"
            log.add(step, {name: (2.0 if number % 2 else 1.0) / step})
        assert log.content() == whole.content()
    storage.write_bytes(metrics_url(bucket), whole.content())
    assert [row["step"] for row in read_metrics(bucket)] == [1, 2, 3, 4, 5]


def test_has_knows_the_metrics_of_the_last_step_only() -> None:
    log = MetricsFile(b'{"step": 3, "train/loss": 5.0}\n{"step": 4, "validation/loss": 6.0}\n')
    assert log.has(4, "validation/loss")
    assert not log.has(4, "train/loss")
    assert not log.has(3, "train/loss")
    assert not MetricsFile().has(0, "train/loss")


def test_missing_file_has_no_rows(bucket: str) -> None:
    assert read_metrics(bucket) == []
