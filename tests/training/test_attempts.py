"""Attempts: the highest number has the run, and too many that come no further are the last."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from job import storage
from job.errors import NoProgress, UserError
from job.training.attempts import DONE, FAILED, GAVE_UP, STOPPED, Attempt, Attempts, note_failure
from job.training.budget import TimeBudget
from job.training.watch import Watch


def claim(output: str, start: str = "a-start", **known: object) -> Attempt:
    attempts = Attempts(output)
    return attempts.update(replace(attempts.claim("a-run", start, None, "auto"), **known))  # type: ignore[arg-type]


# ---- Who has the run ----


def test_of_many_that_start_at_once_each_has_a_number_of_its_own(bucket: str) -> None:
    barrier = threading.Barrier(8)

    def take(number: int) -> int:
        attempts = Attempts(bucket)
        barrier.wait()
        return attempts.claim("a-run", f"start-{number}", None, "auto").number

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(take, range(8))) == list(range(1, 9))


def test_the_newest_has_the_run_and_the_others_are_told_who(bucket: str) -> None:
    older, newer = claim(bucket), claim(bucket)
    Attempts(bucket).check_is_ours(newer)
    with pytest.raises(UserError) as refused:
        Attempts(bucket).check_is_ours(older)
    assert refused.value.setting == "run.output"
    assert f"attempt 2 (process {newer.pid} on {newer.host}, since {newer.began}) has taken" in str(refused.value)


def test_who_has_the_run_is_looked_for_while_it_trains(bucket: str) -> None:
    older = claim(bucket)
    watch = Watch(bucket, older, None, look_seconds=0.05)
    watch.raise_if_lost()
    claim(bucket)
    with pytest.raises(UserError, match="attempt 2 "):
        for _ in until(30):
            watch.raise_if_lost()
    watch.close()


@pytest.mark.parametrize("is_remote", [True, False])
def test_a_stop_file_is_found_wherever_it_is(bucket: str, tmp_path: Path, is_remote: bool) -> None:
    stop_file = f"{bucket}/stop" if is_remote else str(tmp_path / "stop")
    watch = Watch(bucket, claim(bucket), stop_file, look_seconds=0.05)
    assert not watch.stop_requested
    storage.write_bytes(stop_file, b"")
    for _ in until(30):
        if watch.stop_requested:
            break
    assert watch.stop_requested
    watch.close()


def until(seconds: float):  # type: ignore[no-untyped-def]
    """Again and again, for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)


# ---- How many come no further ----


def test_starts_from_one_step_that_leave_no_checkpoint_are_counted(bucket: str) -> None:
    attempts = Attempts(bucket)
    for ended in (None, FAILED, STOPPED):
        now = claim(bucket, from_step=20)
        attempts.check_progress(now, limit=3)
        attempts.update(replace(now, ended=ended, error="the disk is on fire" if ended == FAILED else None))
    fourth = claim(bucket, from_step=20)
    with pytest.raises(NoProgress) as given_up:
        Attempts(bucket).check_progress(fourth, limit=3)
    assert "3 starts from step 20 without one new checkpoint (train.max_attempts_without_progress is 3)" in str(
        given_up.value
    )
    Attempts(bucket).check_progress(fourth, limit=4)


def test_the_last_error_is_told(bucket: str) -> None:
    claim(bucket, from_step=0, ended=FAILED, error="the first error")
    claim(bucket, from_step=0, ended=FAILED, error="the disk is on fire")
    with pytest.raises(NoProgress, match="the last one: the disk is on fire"):
        Attempts(bucket).check_progress(claim(bucket, from_step=0), limit=2)


def test_starts_that_died_before_they_chose_a_step_count_too(bucket: str) -> None:
    for _ in range(3):
        claim(bucket)
    with pytest.raises(NoProgress, match="they ended without a word"):
        Attempts(bucket).check_progress(claim(bucket, from_step=0), limit=3)


@pytest.mark.parametrize(
    "between",
    [
        pytest.param({"from_step": 10}, id="another step"),
        pytest.param({"from_step": 20, "ended": DONE}, id="one that was done"),
        pytest.param({"from_step": 20, "ended": GAVE_UP}, id="one that a person has looked at"),
        pytest.param({"from_step": 20, "run_id": "another-run"}, id="one of another run"),
    ],
)
def test_progress_begins_the_count_anew(bucket: str, between: dict[str, object]) -> None:
    for known in ({"from_step": 20}, {"from_step": 20}, between, {"from_step": 20}, {"from_step": 20}):
        claim(bucket, **known)
    Attempts(bucket).check_progress(claim(bucket, from_step=20), limit=3)


def test_a_failure_is_noted_with_the_start_that_it_ended_and_no_other(bucket: str) -> None:
    claim(bucket, "one")
    note_failure(bucket, "another", "not this")
    note_failure(bucket, "one", "the disk is on fire")
    note_failure(bucket, "one", "said twice")
    newest = Attempts(bucket).newest()
    assert newest is not None and (newest.ended, newest.error) == (FAILED, "the disk is on fire")
    claim(bucket, "two")
    note_failure(bucket, "one", "too late")
    assert Attempts(bucket).newest().error is None  # type: ignore[union-attr]


# ---- How long one may take ----


def test_a_start_stops_in_time_to_have_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    budget = TimeBudget(ends_at=1600.0, checkpoint_bytes=1_000_000_000)
    for seconds in (3.0, 10.0, 4.0):
        budget.step_took(seconds)
    save_seconds = 100.0
    needed = budget.needed_seconds(save_seconds)
    assert needed >= save_seconds + 2 * 10.0, "the save, the step that has begun, and the one after it"
    clock[0] = 1600.0 - needed - 1
    assert not budget.is_over(save_seconds)
    clock[0] = 1600.0 - needed
    assert budget.is_over(save_seconds)
    assert not budget.is_over(save_seconds / 2), "a quicker save leaves more time to train"


def test_until_a_save_was_measured_its_time_is_guessed_from_its_size() -> None:
    small, large = (TimeBudget(600.0, size) for size in (1_000_000, 2_000_000_000))
    assert large.needed_seconds(None) - small.needed_seconds(None) > 60
    assert large.needed_seconds(1.0) == small.needed_seconds(1.0)
