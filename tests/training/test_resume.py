"""Tests of whole runs that are stopped and resumed, and of checkpoints that a run refuses to resume from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    ALONE,
    STEPS,
    DataSet,
    FinishedRun,
    checkpoint_urls,
    read_json,
    run,
    saved_steps,
    stored,
    tensor_files,
    train_until,
    write_settings,
)

from job import storage
from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED
from job.runs.checkpoint import open_checkpoint
from job.runs.metrics_file import read_metrics

SeenIn = Callable[[int, str], dict[str, Any]]

MEASURED = ["train/loss", "train/gradient_norm", "train/learning_rate", "train/tokens_seen", "train/epoch"]
"""Metrics that depend only on the training, not on its speed."""


def copy_of(finished: FinishedRun, bucket: str) -> str:
    """Copy all files of a finished run to another bucket; return the URL of the copy."""
    output = f"{bucket}/run"
    for url, content in stored(finished.output).items():
        storage.write_bytes(url.replace(finished.output, output), content)
    return output


def measured(output: str) -> dict[int, list[float]]:
    return {row["step"]: [row[name] for name in MEASURED] for row in read_metrics(output)}


# ---- Whole runs ----


@pytest.mark.recovery
def test_run_stopped_twice_equals_undisturbed_run_bit_for_bit(
    finished_run: FinishedRun, data_set: DataSet, s3_server: S3Server, tmp_path: Path
) -> None:
    output = f"{s3_server.create_bucket('stopped-run')}/run"
    # The intervals differ from those of the finished run, since evaluating and saving must not change the training.
    settings = write_settings(tmp_path, data_set, output, checkpoint={"keep": 2}, evaluate={"every": 50})
    stops: list[int] = []
    for step in (5, 35):
        code, out, err = train_until(step, settings)
        assert (code, err) == (EXIT_STOPPED, ""), out + err
        stops += saved_steps(output)[-1:]
        assert step <= stops[-1] < STEPS
        assert f"stopped after step {stops[-1]}" in out
        assert "a signal asked for it" in storage.read_bytes(f"{output}/logs/report.html").decode()
    code, out, err = run("train", settings, PYTHONOPTIMIZE="1")  # A run must work without assert statements too.
    assert (code, err) == (EXIT_DONE, ""), out + err
    assert f"step {stops[-1] + 1}/{STEPS}" in out
    assert f"step {stops[-1]}/{STEPS}" not in out

    final, expected = (checkpoint_urls(one)[-1] for one in (output, finished_run.output))
    assert tensor_files(final) == tensor_files(expected), f"stopped after {stops}"
    assert saved_steps(output) == [stops[-1], STEPS], "keep: 2"
    assert [row["step"] for row in read_metrics(output)] == list(range(1, STEPS + 1))
    assert measured(output) == measured(finished_run.output)
    run_ids = {open_checkpoint(url).state.run_id for url in checkpoint_urls(output)}
    assert run_ids == {read_json(f"{output}/run.json")["id"]}


def test_run_continues_a_named_checkpoint_of_another_run(
    finished_run: FinishedRun, data_set: DataSet, s3_server: S3Server, tmp_path: Path
) -> None:
    output, begun = f"{s3_server.create_bucket('forked-run')}/run", STEPS // 2
    origin = stored(finished_run.output)
    checkpoint = f"{finished_run.output}/checkpoints/step-{begun:08d}-a1"
    train = {"resume": checkpoint, "processes": 1, "strategy": "ddp", "micro_batch_size": 8}
    code, out, err = run("train", write_settings(tmp_path, data_set, output, train=train))
    assert (code, err) == (EXIT_DONE, ""), out + err
    seen, expected = measured(output), measured(finished_run.output)
    assert list(seen) == list(range(begun + 1, STEPS + 1))
    for step, values in seen.items():
        assert values == pytest.approx(expected[step], rel=1e-5), step
    assert stored(finished_run.output) == origin


@pytest.mark.recovery
def test_resume_keeps_the_micro_batch_in_another_world(
    finished_run: FinishedRun, data_set: DataSet, output: str, tmp_path: Path
) -> None:
    train = {"micro_batch_size": 32, "max_steps": 3}
    code, out, err = run("train", write_settings(tmp_path, data_set, output, train=train | {"strategy": "ddp"}))
    assert (code, err) == (EXIT_DONE, ""), out + err
    assert "1 x 4 sequences (train.micro_batch_size is 32, which does not divide the 4 sequences of a process)" in out
    assert read_json(f"{output}/attempts/00000001.json")["micro_batch_size"] == 4
    expected = measured(finished_run.output)
    for step, values in measured(output).items():
        assert values == pytest.approx(expected[step], rel=1e-5), step

    alone = train | ALONE | {"max_steps": 4}
    code, out, err = run("train", write_settings(tmp_path, data_set, output, train=alone))
    assert (code, err) == (EXIT_DONE, ""), out + err
    assert "2 x 4 sequences (as in attempt 1; train.micro_batch_size is 32)" in out


def test_resume_never_begins_a_new_run_over_an_old_one(
    finished_run: FinishedRun, data_set: DataSet, s3_server: S3Server, tmp_path: Path
) -> None:
    output = copy_of(finished_run, s3_server.create_bucket("begun-anew"))
    train = {"resume": "never", "processes": 1, "strategy": "ddp", "max_steps": 4}
    code, out, err = run("train", write_settings(tmp_path, data_set, output, train=train))
    assert (code, err) == (EXIT_DONE, ""), out + err
    assert read_json(f"{output}/run.json")["id"] != read_json(f"{finished_run.output}/run.json")["id"]
    assert saved_steps(output) == [4], "the checkpoints of the old run are gone"
    assert list(measured(output)) == [1, 2, 3, 4]
    assert measured(output)[1][0] == pytest.approx(measured(finished_run.output)[1][0], rel=1e-5)


def test_done_run_is_only_said_to_be_done_while_it_has_its_model(
    finished_run: FinishedRun, data_set: DataSet, s3_server: S3Server, tmp_path: Path
) -> None:
    output = copy_of(finished_run, s3_server.create_bucket("done-run"))
    settings = write_settings(tmp_path, data_set, output, train=ALONE)
    before = stored(output)
    code, out, err = run("train", settings)
    assert (code, err) == (EXIT_DONE, ""), out + err
    assert f"already done: {output}/final; to train longer, raise train.epochs or train.max_steps" in out
    assert "validation:" not in out
    after = stored(output)
    assert {url for url in after if before.get(url) != after[url]} == {f"{output}/attempts/00000002.json"}
    assert read_json(f"{output}/attempts/00000002.json")["ended"] == "done"
    (model,) = [url for url in before if url.endswith("final/config.json")]
    storage.delete([model])
    code, out, err = run("train", settings)
    assert (code, err) == (EXIT_DONE, ""), out + err
    assert f"done: {output}/final" in out and "validation:" in out
    assert f"report: {output}/logs/report.html" in out
    assert f"-m job generate --generate.model {output}/final " in out
    assert storage.read_bytes(model) == before[model]


def test_incompatible_checkpoint_is_refused_and_nothing_changes(
    finished_run: FinishedRun, data_set: DataSet, s3_server: S3Server, tmp_path: Path
) -> None:
    bucket = s3_server.create_bucket("refused-run")
    origin, checkpoint = stored(finished_run.output), checkpoint_urls(finished_run.output)[0]
    settings = write_settings(
        tmp_path,
        data_set,
        f"{bucket}/run",
        train={"resume": checkpoint, "global_batch_size": 16},
        model={"intermediate_size": 64},
    )
    code, _, err = run("train", settings)
    assert code == EXIT_REFUSED
    (line,) = err.splitlines()
    assert line.startswith(f"train.resume: '{checkpoint}'")
    assert "global_batch_size was 8, is 16" in line
    assert "model.intermediate_size was 48, is 64" in line and "hidden_size" not in line
    assert "context_length" not in line
    assert stored(bucket) == {}
    assert stored(finished_run.output) == origin
