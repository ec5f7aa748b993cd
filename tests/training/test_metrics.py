"""metrics.jsonl: every step once and in order, whatever was stopped or killed in between."""

from job import storage
from job.training.metrics import MetricsLog, read_metrics


def log_steps(log: MetricsLog, steps: range, loss: float) -> None:
    for step in steps:
        log.add(step, {"train/loss": loss})


def test_what_is_measured_at_a_step_stands_in_one_line(bucket: str) -> None:
    log = MetricsLog(bucket, from_step=0)
    log.add(1, {"train/loss": 5.5})
    log.add(2, {"train/loss": 5.25})
    log.add(2, {"validation/loss": 6.0, "样本": "人工智能"})
    log.store()
    lines = storage.read_bytes(f"{bucket}/logs/metrics.jsonl").decode().splitlines()
    assert lines == [
        '{"step": 1, "train/loss": 5.5}',
        '{"step": 2, "train/loss": 5.25, "validation/loss": 6.0, "样本": "人工智能"}',
    ]


def test_a_run_that_goes_on_drops_the_lines_that_its_checkpoint_does_not_know(bucket: str) -> None:
    before = MetricsLog(bucket, from_step=0)
    log_steps(before, range(1, 11), loss=1.0)
    before.store()
    after = MetricsLog(bucket, from_step=6)
    log_steps(after, range(7, 13), loss=2.0)
    after.store()
    rows = read_metrics(bucket)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["train/loss"] for row in rows] == [1.0] * 6 + [2.0] * 6


def test_a_run_that_begins_anew_begins_a_new_log(bucket: str) -> None:
    before = MetricsLog(bucket, from_step=0)
    log_steps(before, range(1, 11), loss=1.0)
    before.store()
    after = MetricsLog(bucket, from_step=0)
    log_steps(after, range(1, 3), loss=2.0)
    after.store()
    assert [row["train/loss"] for row in read_metrics(bucket)] == [2.0, 2.0]


def test_nothing_is_read_where_nothing_was_written(bucket: str) -> None:
    assert read_metrics(bucket) == []
