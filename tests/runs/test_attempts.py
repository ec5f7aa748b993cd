"""Attempts: the highest number has the run, and too many without progress end it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from job import storage
from job.errors import NoProgress, UserError
from job.runs.attempts import (
    DONE,
    FAILED,
    GAVE_UP,
    STOPPED,
    SUPERSEDED,
    Attempt,
    Attempts,
    note_failure,
)
from job.runs.run_watcher import Watch
from job.runs.time_limit import TimeBudget


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


# ---- How many make no progress ----


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def leave(output: str, *attempts: dict[str, object]) -> Attempts:
    """Attempts as records, one minute after the other, the last one a minute ago; unless they say otherwise."""
    for index, known in enumerate(attempts):
        claim(output, **({"from_step": 20, "began": ago(60 * (len(attempts) - index))} | known))
    return Attempts(output)


def check(attempts: Attempts, limit: int, from_step: int = 20) -> None:
    attempts.check_progress("a-run", from_step, limit)


FAILURE = {"ended": FAILED, "error": "the disk is on fire"}
SILENT: dict[str, object] = {}


def test_failures_and_silent_ends_from_one_step_are_counted(bucket: str) -> None:
    attempts = leave(bucket, FAILURE, SILENT, FAILURE | {"error": "no room"})
    check(attempts, limit=4)
    with pytest.raises(NoProgress) as given_up:
        check(attempts, limit=3)
    assert (
        "3 attempts from step 20 without one new checkpoint (train.max_attempts_without_progress is 3); "
        "the last one: no room"
    ) in str(given_up.value)


def test_ten_that_were_killed_without_a_word_are_enough(bucket: str) -> None:
    """Pods killed for memory leave no error, and never chose a step; they are started again every minute."""
    attempts = leave(bucket, *[{"from_step": None}] * 10)
    with pytest.raises(NoProgress, match="none of them recorded why it ended"):
        check(attempts, limit=3, from_step=0)


def test_starts_at_the_same_time_are_not_counted(bucket: str) -> None:
    """Each takes the run from the one before within seconds; none of them has failed."""
    check(leave(bucket, *[{"began": ago(3 - index), "from_step": None} for index in range(4)]), limit=1, from_step=0)


def test_the_one_that_just_began_is_not_counted(bucket: str) -> None:
    attempts = leave(bucket, SILENT, SILENT, {"began": ago(29)})
    check(attempts, limit=3)
    with pytest.raises(NoProgress):
        check(attempts, limit=2)


def test_failure_is_counted_however_soon_the_next_one_begins(bucket: str) -> None:
    attempts = leave(bucket, *[FAILURE | {"began": ago(3 - index)} for index in range(3)])
    with pytest.raises(NoProgress):
        check(attempts, limit=3)


@pytest.mark.parametrize("ended", [SUPERSEDED, STOPPED])
def test_superseded_and_stopped_attempts_are_no_attempts_without_progress(bucket: str, ended: str) -> None:
    """Spot machines may be taken away during the start-up again and again."""
    attempts = leave(bucket, FAILURE, *[{"ended": ended}] * 5, FAILURE)
    check(attempts, limit=3)
    with pytest.raises(NoProgress):
        check(attempts, limit=2)


def test_attempt_that_had_no_time_for_a_step_is_counted(bucket: str) -> None:
    attempts = leave(bucket, *[{"ended": STOPPED, "error": "no time for a single step"}] * 3)
    with pytest.raises(NoProgress, match="no time for a single step"):
        check(attempts, limit=3)


@pytest.mark.parametrize(
    "between",
    [
        pytest.param({"from_step": 10}, id="another step"),
        pytest.param({"ended": DONE}, id="done"),
        pytest.param({"ended": GAVE_UP}, id="gave up, as an earlier version recorded it"),
        pytest.param({"run_id": "another-run"}, id="another run"),
    ],
)
def test_progress_begins_the_count_anew(bucket: str, between: dict[str, object]) -> None:
    check(leave(bucket, FAILURE, FAILURE, between, FAILURE, FAILURE), limit=3)


def test_a_start_after_one_that_gave_up_is_not_refused_for_the_same_attempts(bucket: str) -> None:
    attempts = leave(bucket, FAILURE, FAILURE)
    attempts.give_up("2 attempts failed")
    attempts.give_up("a second start found the same")
    assert (given_up := attempts.last_give_up()) is not None and given_up.error == "2 attempts failed"
    assert attempts.numbers() == [1, 2], "it has claimed nothing"
    check(attempts, limit=1)
    claim(bucket, **(FAILURE | {"from_step": 20}))
    assert attempts.last_give_up() is None
    with pytest.raises(NoProgress):
        check(attempts, limit=1)


def test_superseded_attempt_records_that_it_was(bucket: str) -> None:
    older = claim(bucket, from_step=20)
    claim(bucket)
    with pytest.raises(UserError):
        Attempts(bucket).check_is_ours(older)
    found = Attempts(bucket).read(1)
    assert found is not None and (found.ended, found.from_step) == (SUPERSEDED, 20)


@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b'{"number": "1"}', b"\xff"])
def test_damaged_record_still_holds_its_number(bucket: str, content: bytes) -> None:
    older = claim(bucket)
    storage.write_bytes(f"{bucket}/attempts/00000002.json", content)
    assert Attempts(bucket).newest() is None
    check(Attempts(bucket), limit=1)
    with pytest.raises(UserError, match="attempt 2 has taken this run over from attempt 1"):
        Attempts(bucket).check_is_ours(older)
    assert claim(bucket).number == 3


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
