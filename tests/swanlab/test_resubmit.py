"""Tests of `submit --until-done`: it starts tasks until the run is complete, and gives up without progress."""

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from launched import Launch
from service import BUCKET, SwanLab, Task

from job import storage
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NO_PROGRESS, EXIT_REFUSED
from job.runs.attempts import Attempts
from job.runs.run_status import RunStatus
from launch.swanlab import cli, resubmit

CONFIG = str(Path(__file__).parents[2] / "configs" / "wiki-123m.yaml")
TASK_RESULT = tuple[int | None, str | None, str | None]
"""What a task leaves in the run's store: the step of a checkpoint, how the attempt ended, and its error."""


class FakeTasks:
    """Runs tasks that only write to the run's store: each task writes one of the given results."""

    def __init__(self, output: str, *results: TASK_RESULT, status: str = "CRASHED") -> None:
        self._output, self._results, self._status = output, list(results), status

    def __call__(self, task: Task) -> tuple[str, str]:
        if not self._results:
            return "STOPPED", resubmit.STOPPED_BY_USER  # A task more than expected ends the loop.
        step, ended, error = self._results.pop(0)
        attempts = Attempts(self._output)
        if ended == RunStatus.GAVE_UP:
            attempts.give_up(error or "")
        elif ended is not None:
            attempt = attempts.claim("the-run", task.cuid, None, "auto")
            attempts.update(replace(attempt, ended=ended, error=error))
        if step is not None:
            name = f"step-{step:08d}-a{len(attempts.numbers()) or 1}"
            storage.write_bytes(storage.join(self._output, "checkpoints", name, "manifest.json"), b"{}")
        return self._status if ended != RunStatus.DONE else "COMPLETED", "killed"


@pytest.fixture
def output(code_store: Any) -> str:
    return f"s3://{BUCKET}/runs/{secrets.token_hex(6)}"


@pytest.fixture
def submit(swanlab: SwanLab, launch: Launch, output: str) -> Callable[..., object]:
    """A function that runs `submit --until-done` with tasks that leave the given results."""

    def run(*results: TASK_RESULT, status: str = "CRASHED") -> object:
        swanlab.run = FakeTasks(output, *results, status=status)
        return launch(
            *("submit", "--until-done", "--config", CONFIG, "--data.shards", "https://example.com/shards"),
            *("--run.output", output, "--with-credentials", "AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY"),
        )

    return run


def test_tasks_are_started_until_the_run_is_complete(
    swanlab: SwanLab, submit: Callable[..., Launch], output: str
) -> None:
    result = submit(
        (100, RunStatus.STOPPED, None), (200, RunStatus.STOPPED, None), (300, None, None), (None, RunStatus.DONE, None)
    )
    assert (result.code, result.err) == (EXIT_DONE, "")
    assert len(swanlab.tasks) == 4
    assert len({task.bundle for task in swanlab.tasks}) == 1
    assert result.out.endswith(f"{output} is complete\n")


def test_complete_run_is_not_submitted(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    assert submit((None, RunStatus.DONE, None)).code == EXIT_DONE
    result = submit()
    assert (result.code, len(swanlab.tasks)) == (EXIT_DONE, 1)
    assert "is complete: nothing to do" in result.out


def test_gives_up_without_checkpoints_and_shows_the_last_error(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    result = submit(*[(None, RunStatus.FAILED, "data.shards: there is no such bucket")] * 9)
    assert (result.code, len(swanlab.tasks), result.err.count("\n")) == (EXIT_NO_PROGRESS, 3, 1)
    assert result.err.endswith("data.shards: there is no such bucket\n")


def test_task_without_attempt_shows_the_service_message(
    submit: Callable[..., Launch],
) -> None:
    result = submit(*[(None, None, None)] * 9)
    assert (result.code, result.err.count("\n")) == (EXIT_NO_PROGRESS, 1)
    assert result.err.endswith(": killed\n")


def test_new_checkpoint_resets_the_count(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    nothing = (None, RunStatus.FAILED, "out of memory")
    result = submit(
        nothing,
        nothing,
        (100, RunStatus.FAILED, "x"),
        nothing,
        nothing,
        (200, RunStatus.FAILED, "x"),
        (None, RunStatus.DONE, None),
    )
    assert (result.code, len(swanlab.tasks)) == (EXIT_DONE, 7)


def test_checkpoint_at_the_same_step_is_not_progress(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    result = submit(*[(100, RunStatus.STOPPED, None)] * 9)
    assert (result.code, len(swanlab.tasks)) == (EXIT_NO_PROGRESS, 4)


def test_run_that_gave_up_is_not_restarted(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    result = submit((100, RunStatus.GAVE_UP, "the loss blows up"))
    assert (result.code, len(swanlab.tasks)) == (EXIT_NO_PROGRESS, 1)
    assert "the loss blows up" in result.err


def test_task_stopped_by_the_user_is_not_restarted(
    swanlab: SwanLab, submit: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped_by_hand(task: Task) -> tuple[str, str]:
        cli.main(["stop", task.cuid])
        return "CRASHED", ""

    monkeypatch.setattr(FakeTasks, "__call__", lambda self, task: stopped_by_hand(task))
    result = submit()
    assert (result.code, len(swanlab.tasks)) == (EXIT_REFUSED, 1)
    assert "stopped by python -m launch.swanlab stop" in result.err


def test_waits_for_free_task_slots_and_for_the_service(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    swanlab.injected["POST", "/task"] = [406, 406, 503, 406]
    result = submit((None, RunStatus.DONE, None))
    assert (result.code, len(swanlab.tasks)) == (EXIT_DONE, 1)
    assert result.out.count("too many tasks") == 2


def test_service_outage_is_waited_for(
    swanlab: SwanLab, submit: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeTasks.__call__

    def during_an_outage(self: FakeTasks, task: Task) -> tuple[str, str]:
        swanlab.injected["GET", f"/task/{task.cuid}"] = [503] * 10
        return run(self, task)

    monkeypatch.setattr(FakeTasks, "__call__", during_an_outage)
    with monkeypatch.context() as impatient:
        impatient.setattr(resubmit, "PATIENCE_SECONDS", -1)
        assert submit((100, RunStatus.STOPPED, None)).code == EXIT_FAILED
    assert submit((None, RunStatus.DONE, None)).code == EXIT_DONE
    assert [swanlab.injected["GET", f"/task/{task.cuid}"] for task in swanlab.tasks][1] == []


def test_bundles_with_credentials_are_deleted(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    result = submit((100, RunStatus.STOPPED, None), (None, RunStatus.DONE, None))
    assert result.code == EXIT_DONE
    assert b"credentials.json" in swanlab.tasks[0].bundle
    assert swanlab.objects("tasks") == {}
    assert "these keys do not expire" in result.out


def test_ctrl_c_leaves_the_task_running_and_says_so(
    swanlab: SwanLab, submit: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    # Replace the clock in this module only, because other threads of the process sleep too.
    monkeypatch.setattr(resubmit, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupted))
    monkeypatch.setattr(FakeTasks, "__call__", lambda self, task: (task.stop.wait(), ("STOPPED", ""))[1])
    result = submit()
    assert result.code == EXIT_INTERRUPTED
    assert len(swanlab.objects("tasks")) == 1  # The bundle stays, because the task may not have read it yet.
    assert "submitted tasks go on: see `list`, and stop them with `stop`" in result.err


def test_until_done_needs_checkpoints_that_outlive_the_task(launch: Launch, output: str) -> None:
    words = ("submit", "--until-done", "--config", CONFIG, "--data.shards", "https://example.com/shards")
    result = launch(*words, "--run.output", "/tmp/run")
    assert result.code == EXIT_REFUSED
    assert result.err.startswith("run.output: '/tmp/run': is deleted with the task")
    result = launch(
        *words, "--run.output", output, "--with-credentials", "AWS_ACCESS_KEY_ID", "--train.resume", "never"
    )
    assert result.code == EXIT_REFUSED
    assert result.err.startswith("train.resume: 'never': every task would start at step 0")
