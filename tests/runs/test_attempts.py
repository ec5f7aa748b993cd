"""Attempts: the newest one owns the run, and too many without progress make the next start give up."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from job import storage
from job.errors import NoProgress, UserError
from job.runs.attempts import Attempt, Attempts, note_failure
from job.runs.run_status import RunStatus
from job.runs.run_watcher import RunWatcher
from job.runs.time_limit import TimeLimit


def claim(output: str, start: str = "a-start", **fields: object) -> Attempt:
    attempts = Attempts(output)
    return attempts.update(replace(attempts.claim("a-run", start, None, "auto"), **fields))  # type: ignore[arg-type]


# ---- Which attempt owns the run ----


def test_concurrent_claims_get_distinct_numbers(bucket: str) -> None:
    barrier = threading.Barrier(8)

    def take(number: int) -> int:
        attempts = Attempts(bucket)
        barrier.wait()
        return attempts.claim("a-run", f"start-{number}", None, "auto").number

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(take, range(8))) == list(range(1, 9))


def test_older_attempt_is_refused_and_told_the_newer_one(bucket: str) -> None:
    older, newer = claim(bucket), claim(bucket)
    Attempts(bucket).raise_if_superseded(newer)
    with pytest.raises(UserError) as refused:
        Attempts(bucket).raise_if_superseded(older)
    assert refused.value.setting == "run.output"
    assert f"attempt 2 (process {newer.pid} on {newer.host}, since {newer.began}) has taken over this run" in str(
        refused.value
    )


def test_watcher_reports_a_newer_attempt(bucket: str) -> None:
    older = claim(bucket)
    watch = RunWatcher(bucket, older, None, poll_seconds=0.05)
    watch.raise_if_superseded()
    claim(bucket)
    with pytest.raises(UserError, match="attempt 2 "):
        for _ in until(30):
            watch.raise_if_superseded()
    watch.close()


@pytest.mark.parametrize("is_remote", [True, False])
def test_watcher_finds_local_and_remote_stop_files(bucket: str, tmp_path: Path, is_remote: bool) -> None:
    stop_file = f"{bucket}/stop" if is_remote else str(tmp_path / "stop")
    watch = RunWatcher(bucket, claim(bucket), stop_file, poll_seconds=0.05)
    assert not watch.stop_requested
    storage.write_bytes(stop_file, b"")
    for _ in until(30):
        if watch.stop_requested:
            break
    assert watch.stop_requested
    watch.close()


def until(seconds: float):  # type: ignore[no-untyped-def]
    """Yield every 20 ms until `seconds` have passed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)


# ---- Attempts without progress ----


def ago(seconds: float) -> str:
    """The time `seconds` before now, in ISO 8601."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec="seconds")


def write_attempts(output: str, *attempts: dict[str, object]) -> Attempts:
    """Write records of attempts that began one minute after another, the last one a minute ago, all from step 20.

    Each argument holds fields of one record, which override these defaults.
    """
    for index, fields in enumerate(attempts):
        claim(output, **({"from_step": 20, "began": ago(60 * (len(attempts) - index))} | fields))
    return Attempts(output)


def check(attempts: Attempts, limit: int, from_step: int = 20) -> None:
    attempts.check_progress("a-run", from_step, limit)


FAILURE = {"ended": RunStatus.FAILED, "error": "the disk is on fire"}
SILENT: dict[str, object] = {}


def test_failed_and_silent_attempts_from_one_step_count(bucket: str) -> None:
    attempts = write_attempts(bucket, FAILURE, SILENT, FAILURE | {"error": "no room"})
    check(attempts, limit=4)
    with pytest.raises(NoProgress) as given_up:
        check(attempts, limit=3)
    assert (
        "3 attempts from step 20 without a new checkpoint (train.max_attempts_without_progress is 3); "
        "the last one: no room;"
    ) in str(given_up.value)


def test_ten_killed_attempts_without_a_recorded_end_are_too_many(bucket: str) -> None:
    """Pods killed for lack of memory record no error and no step, and are started again every minute."""
    attempts = write_attempts(bucket, *[{"from_step": None}] * 10)
    with pytest.raises(NoProgress, match="the last one recorded no error"):
        check(attempts, limit=3, from_step=0)


def test_starts_within_seconds_of_each_other_do_not_count(bucket: str) -> None:
    """Each one takes over the run within seconds; none of them has failed."""
    check(
        write_attempts(bucket, *[{"began": ago(3 - index), "from_step": None} for index in range(4)]),
        limit=1,
        from_step=0,
    )


def test_attempt_that_just_began_does_not_count(bucket: str) -> None:
    attempts = write_attempts(bucket, SILENT, SILENT, {"began": ago(29)})
    check(attempts, limit=3)
    with pytest.raises(NoProgress):
        check(attempts, limit=2)


def test_failure_counts_however_soon_the_next_attempt_begins(bucket: str) -> None:
    attempts = write_attempts(bucket, *[FAILURE | {"began": ago(3 - index)} for index in range(3)])
    with pytest.raises(NoProgress):
        check(attempts, limit=3)


@pytest.mark.parametrize("ended", [RunStatus.SUPERSEDED, RunStatus.STOPPED])
def test_superseded_and_stopped_attempts_do_not_count(bucket: str, ended: str) -> None:
    """Spot machines may be preempted many times before they have started up."""
    attempts = write_attempts(bucket, FAILURE, *[{"ended": ended}] * 5, FAILURE)
    check(attempts, limit=3)
    with pytest.raises(NoProgress):
        check(attempts, limit=2)


def test_attempt_stopped_before_its_first_step_counts(bucket: str) -> None:
    attempts = write_attempts(bucket, *[{"ended": RunStatus.STOPPED, "error": "no time for a single step"}] * 3)
    with pytest.raises(NoProgress, match="no time for a single step"):
        check(attempts, limit=3)


@pytest.mark.parametrize(
    "between",
    [
        pytest.param({"from_step": 10}, id="another step"),
        pytest.param({"ended": RunStatus.DONE}, id="done"),
        pytest.param({"ended": RunStatus.GAVE_UP}, id="gave up, from an earlier version"),
        pytest.param({"run_id": "another-run"}, id="another run"),
    ],
)
def test_progress_restarts_the_count(bucket: str, between: dict[str, object]) -> None:
    check(write_attempts(bucket, FAILURE, FAILURE, between, FAILURE, FAILURE), limit=3)


def test_start_after_a_give_up_ignores_the_same_attempts(bucket: str) -> None:
    attempts = write_attempts(bucket, FAILURE, FAILURE)
    attempts.give_up("2 attempts failed")
    attempts.give_up("a second start gave up as well")
    assert (given_up := attempts.last_give_up()) is not None and given_up.error == "2 attempts failed"
    assert attempts.numbers() == [1, 2], "giving up does not claim the run"
    check(attempts, limit=1)
    claim(bucket, **(FAILURE | {"from_step": 20}))
    assert attempts.last_give_up() is None
    with pytest.raises(NoProgress):
        check(attempts, limit=1)


def test_superseded_attempt_records_its_end(bucket: str) -> None:
    older = claim(bucket, from_step=20)
    claim(bucket)
    with pytest.raises(UserError):
        Attempts(bucket).raise_if_superseded(older)
    record = Attempts(bucket).read(1)
    assert record is not None and (record.ended, record.from_step) == (RunStatus.SUPERSEDED, 20)


@pytest.mark.parametrize("content", [b"", b"null", b"[" * 100_000, b'{"number": "1"}', b"\xff"])
def test_damaged_record_keeps_its_number(bucket: str, content: bytes) -> None:
    older = claim(bucket)
    storage.write_bytes(f"{bucket}/attempts/00000002.json", content)
    assert Attempts(bucket).newest() is None
    check(Attempts(bucket), limit=1)
    with pytest.raises(UserError, match="attempt 2 has taken over this run from attempt 1"):
        Attempts(bucket).raise_if_superseded(older)
    assert claim(bucket).number == 3


def test_failure_is_recorded_only_for_the_start_that_failed(bucket: str) -> None:
    claim(bucket, "one")
    note_failure(bucket, "another", "not this")
    note_failure(bucket, "one", "the disk is on fire")
    note_failure(bucket, "one", "said twice")
    newest = Attempts(bucket).newest()
    assert newest is not None and (newest.ended, newest.error) == (RunStatus.FAILED, "the disk is on fire")
    claim(bucket, "two")
    note_failure(bucket, "one", "too late")
    assert Attempts(bucket).newest().error is None  # type: ignore[union-attr]


# ---- Time limit ----


def test_time_limit_leaves_time_for_the_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    time_limit = TimeLimit(ends_at=1600.0, checkpoint_bytes=1_000_000_000)
    for seconds in (3.0, 10.0, 4.0):
        time_limit.step_took(seconds)
    save_seconds = 100.0
    needed = time_limit.needed_seconds(save_seconds)
    assert needed >= save_seconds + 2 * 10.0, "the save, the running step, and the one after it"
    clock[0] = 1600.0 - needed - 1
    assert not time_limit.is_over(save_seconds)
    clock[0] = 1600.0 - needed
    assert time_limit.is_over(save_seconds)
    assert not time_limit.is_over(save_seconds / 2), "a quicker save leaves more time to train"


def test_first_save_time_is_estimated_from_checkpoint_size() -> None:
    small, large = (TimeLimit(600.0, size) for size in (1_000_000, 2_000_000_000))
    assert large.needed_seconds(None) - small.needed_seconds(None) > 60
    assert large.needed_seconds(1.0) == small.needed_seconds(1.0)
