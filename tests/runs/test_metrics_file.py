"""metrics.jsonl: every step once and in order, whatever was stopped or killed in between."""

from job import storage
from job.runs.metrics_file import MetricsLog, metrics_url, read_metrics


def test_what_is_measured_at_a_step_stands_in_one_line() -> None:
    log = MetricsLog()
    log.add(1, {"train/loss": 5.5})
    log.add(2, {"train/loss": 5.25})
    log.add(2, {"validation/loss": 6.0, "样本": "人工智能"})
    assert log.content().decode().splitlines() == [
        '{"step": 1, "train/loss": 5.5}',
        '{"step": 2, "train/loss": 5.25, "validation/loss": 6.0, "样本": "人工智能"}',
    ]


def test_a_log_goes_on_from_any_of_its_lines_as_if_there_had_been_no_stop(bucket: str) -> None:
    whole = MetricsLog()
    contents = [whole.content()]
    for step in range(1, 6):
        whole.add(step, {"train/loss": 1.0 / step})
        contents.append(whole.content())
        whole.add(step, {"validation/loss": 2.0 / step})
        contents.append(whole.content())
    for begun, content in enumerate(contents):
        log = MetricsLog(content)
        for number in range(begun, 10):
            step, name = number // 2 + 1, "validation/loss" if number % 2 else "train/loss"
            log.add(step, {name: (2.0 if number % 2 else 1.0) / step})
        assert log.content() == whole.content()
    storage.write_bytes(metrics_url(bucket), whole.content())
    assert [row["step"] for row in read_metrics(bucket)] == [1, 2, 3, 4, 5]


def test_it_knows_what_was_measured_at_the_last_step() -> None:
    log = MetricsLog(b'{"step": 3, "train/loss": 5.0}\n{"step": 4, "validation/loss": 6.0}\n')
    assert log.has(4, "validation/loss")
    assert not log.has(4, "train/loss")
    assert not log.has(3, "train/loss")
    assert not MetricsLog().has(0, "train/loss")


def test_nothing_is_read_where_nothing_was_written(bucket: str) -> None:
    assert read_metrics(bucket) == []
