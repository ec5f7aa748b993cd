"""`submit --until-done`: as many tasks as it takes, and no more where nothing comes of them."""

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
from job.runs.attempts import DONE, FAILED, GAVE_UP, STOPPED, Attempts
from launch.swanlab import cli, rounds

CONFIG = str(Path(__file__).parents[2] / "configs" / "wiki-123m.yaml")
ROUND = tuple[int | None, str | None, str | None]
"""What a start leaves in the run's store: the step of a checkpoint, and how it ended with which error."""


class Rounds:
    """Tasks that leave in the store what a real one would, one entry each."""

    def __init__(self, output: str, *left: ROUND, status: str = "CRASHED") -> None:
        self._output, self._left, self._status = output, list(left), status

    def __call__(self, task: Task) -> tuple[str, str]:
        if not self._left:
            return "STOPPED", rounds.BY_HAND  # one task too many: an end, not a loop
        step, ended, error = self._left.pop(0)
        attempts = Attempts(self._output)
        if ended == GAVE_UP:
            attempts.give_up(error or "")
        elif ended is not None:
            attempt = attempts.claim("the-run", task.cuid, None, "auto")
            attempts.update(replace(attempt, ended=ended, error=error))
        if step is not None:
            name = f"step-{step:08d}-a{len(attempts.numbers()) or 1}"
            storage.write_bytes(storage.join(self._output, "checkpoints", name, "manifest.json"), b"{}")
        return self._status if ended != DONE else "COMPLETED", "killed"


@pytest.fixture
def output(code_store: Any) -> str:
    return f"s3://{BUCKET}/runs/{secrets.token_hex(6)}"


@pytest.fixture
def submit(swanlab: SwanLab, launch: Launch, output: str) -> Callable[..., object]:
    """Submits until it is done, with tasks that leave what is given."""

    def run(*left: ROUND, status: str = "CRASHED") -> object:
        swanlab.run = Rounds(output, *left, status=status)
        return launch(
            *("submit", "--until-done", "--config", CONFIG, "--data.shards", "https://example.com/shards"),
            *("--run.output", output, "--with-credentials", "AWS_ACCESS_KEY_ID,AWS_SECRET_ACCESS_KEY"),
        )

    return run


def test_tasks_follow_one_another_until_the_run_is_complete(
    swanlab: SwanLab, submit: Callable[..., Launch], output: str
) -> None:
    said = submit((100, STOPPED, None), (200, STOPPED, None), (300, None, None), (None, DONE, None))
    assert (said.code, said.err) == (EXIT_DONE, "")
    assert len(swanlab.tasks) == 4
    assert len({task.bundle for task in swanlab.tasks}) == 1
    assert said.out.endswith(f"{output} is complete\n")


def test_a_run_that_is_complete_is_not_submitted(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    assert submit((None, DONE, None)).code == EXIT_DONE
    said = submit()
    assert (said.code, len(swanlab.tasks)) == (EXIT_DONE, 1)
    assert "is complete: nothing to do" in said.out


def test_it_gives_up_after_so_many_tasks_without_a_checkpoint_and_says_what_the_last_one_failed_of(
    swanlab: SwanLab, submit: Callable[..., Launch]
) -> None:
    said = submit(*[(None, FAILED, "data.shards: there is no such bucket")] * 9)
    assert (said.code, len(swanlab.tasks), said.err.count("\n")) == (EXIT_NO_PROGRESS, 3, 1)
    assert said.err.endswith("data.shards: there is no such bucket\n")


def test_a_task_that_never_came_so_far_as_to_begin_is_told_by_the_service_s_words(
    submit: Callable[..., Launch],
) -> None:
    said = submit(*[(None, None, None)] * 9)
    assert (said.code, said.err.count("\n")) == (EXIT_NO_PROGRESS, 1)
    assert said.err.endswith(": killed\n")


def test_a_new_checkpoint_lets_it_try_anew(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    nothing = (None, FAILED, "out of memory")
    said = submit(nothing, nothing, (100, FAILED, "x"), nothing, nothing, (200, FAILED, "x"), (None, DONE, None))
    assert (said.code, len(swanlab.tasks)) == (EXIT_DONE, 7)


def test_a_checkpoint_of_the_same_step_is_no_progress(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    said = submit(*[(100, STOPPED, None)] * 9)
    assert (said.code, len(swanlab.tasks)) == (EXIT_NO_PROGRESS, 4)


def test_a_run_that_has_given_up_is_not_started_again(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    said = submit((100, GAVE_UP, "the loss blows up"))
    assert (said.code, len(swanlab.tasks)) == (EXIT_NO_PROGRESS, 1)
    assert "the loss blows up" in said.err


def test_a_task_that_a_person_has_stopped_is_not_started_again(
    swanlab: SwanLab, submit: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped_by_hand(task: Task) -> tuple[str, str]:
        cli.main(["stop", task.cuid])
        return "CRASHED", ""

    monkeypatch.setattr(Rounds, "__call__", lambda self, task: stopped_by_hand(task))
    said = submit()
    assert (said.code, len(swanlab.tasks)) == (EXIT_REFUSED, 1)
    assert "stopped by python -m launch.swanlab stop" in said.err


def test_it_waits_while_there_are_too_many_tasks_or_no_service(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    swanlab.planted["POST", "/task"] = [406, 406, 503, 406]
    said = submit((None, DONE, None))
    assert (said.code, len(swanlab.tasks)) == (EXIT_DONE, 1)
    assert said.out.count("too many tasks") == 2


def test_a_service_that_is_away_for_a_while_is_asked_again(
    swanlab: SwanLab, submit: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Rounds.__call__

    def during_an_outage(self: Rounds, task: Task) -> tuple[str, str]:
        swanlab.planted["GET", f"/task/{task.cuid}"] = [503] * 10
        return run(self, task)

    monkeypatch.setattr(Rounds, "__call__", during_an_outage)
    with monkeypatch.context() as impatient:
        impatient.setattr(rounds, "PATIENCE_SECONDS", -1)
        assert submit((100, STOPPED, None)).code == EXIT_FAILED
    assert submit((None, DONE, None)).code == EXIT_DONE
    assert [swanlab.planted["GET", f"/task/{task.cuid}"] for task in swanlab.tasks][1] == []


def test_bundles_with_credentials_do_not_stay_in_the_store(swanlab: SwanLab, submit: Callable[..., Launch]) -> None:
    said = submit((100, STOPPED, None), (None, DONE, None))
    assert said.code == EXIT_DONE
    assert b"credentials.json" in swanlab.tasks[0].bundle
    assert swanlab.objects("tasks") == {}
    assert "these keys do not end by themselves" in said.out


def test_ctrl_c_leaves_the_task_and_says_so(
    swanlab: SwanLab, submit: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    # Only this module's view of the clock: other threads of the process sleep as well.
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=time.monotonic, sleep=interrupted))
    monkeypatch.setattr(Rounds, "__call__", lambda self, task: (task.stop.wait(), ("STOPPED", ""))[1])
    said = submit()
    assert said.code == EXIT_INTERRUPTED
    assert len(swanlab.objects("tasks")) == 1  # it may not have read its bundle yet
    assert "goes on: see `list`, and `stop`" in said.err


def test_what_leaves_nothing_to_go_on_from_is_refused(launch: Launch, output: str) -> None:
    words = ("submit", "--until-done", "--config", CONFIG, "--data.shards", "https://example.com/shards")
    said = launch(*words, "--run.output", "/tmp/run")
    assert said.code == EXIT_REFUSED
    assert said.err.startswith("run.output: '/tmp/run': is gone with the task")
    said = launch(*words, "--run.output", output, "--with-credentials", "AWS_ACCESS_KEY_ID", "--train.resume", "never")
    assert said.code == EXIT_REFUSED
    assert said.err.startswith("train.resume: 'never': every task would begin at step 0")
