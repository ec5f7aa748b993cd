"""Tests of runs that are asked to stop at bad moments and of runs that are started several times at once."""

import signal
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from statistics import fmean

import pytest
from fault_proxy import SLOW_DOWN, Fault, FaultProxy
from small_run import ALONE, ENDLESS, STEPS, FinishedRun, Job, WriteSettings, run, saved_steps

from job import storage
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from job.runs.attempts import Attempts
from job.runs.checkpoint_list import list_checkpoints
from job.runs.metrics_file import read_metrics
from job.runs.run_status import RunStatus

pytestmark = pytest.mark.recovery

# ---- Stop requests at bad moments ----


def test_stop_while_waiting_for_shards_stops_all_ranks(settings: WriteSettings, output: str, proxy: FaultProxy) -> None:
    proxy.stall_seconds = 3600
    proxy.inject(Fault.STALL, lambda request: request.method == "GET" and "/train/" in request.path, times=float("inf"))
    with Job("train", settings(), AWS_ENDPOINT_URL=proxy.endpoint_url) as job:
        job.read_until("tracking: ")  # The last line before the first shard; unread lines would block the run.
        proxy.wait_for(lambda request: request.fault is Fault.STALL, 240)
        job.workers()[1].send_signal(signal.SIGTERM)
        code, out, err = job.end()
    assert (code, err) == (EXIT_STOPPED, ""), out + err
    assert "stopped after step 0" in out
    assert saved_steps(output) == [0]


def test_interrupted_evaluation_is_done_by_the_next_start(
    settings: WriteSettings, output: str, finished_run: FinishedRun
) -> None:
    path = settings(evaluate={"every": 30, "batch_size": 1})  # The evaluation takes hundreds of batches.
    with Job("train", path) as job:
        job.read_until("step 30/")
        job.process.send_signal(signal.SIGUSR1)
        code, out, err = job.end()
    assert (code, err) == (EXIT_STOPPED, ""), out + err
    assert saved_steps(output) == [30]
    assert "validation/loss" not in read_metrics(output)[-1]
    code, out, err = run("train", path)
    assert (code, err) == (EXIT_DONE, ""), out + err
    found, expected = (
        {row["step"]: row["validation/loss"] for row in read_metrics(one) if "validation/loss" in row}
        for one in (output, finished_run.output)
    )
    assert found == pytest.approx(expected, rel=1e-6)
    assert list(found) == [30, 60, STEPS]


def test_interval_measurements_survive_a_stop(settings: WriteSettings, output: str) -> None:
    path = settings(train=ALONE | {"log_every": 20, "max_steps": 200}, checkpoint={"every": 33})
    with Job("train", path) as job:
        job.read_until_matching(r"step \d+ \| saved")
        job.process.kill()
    code, out, err = run("train", path)
    assert (code, err) == (EXIT_DONE, ""), out + err
    begun = Attempts(output).read(2)
    assert begun is not None and begun.from_step is not None and begun.from_step % 20 != 0
    log_of_every_step = settings(train=ALONE | {"max_steps": 200}, run={"output": f"{output}-2"})
    assert run("train", log_of_every_step)[0] == EXIT_DONE
    losses = {row["step"]: row["train/loss"] for row in read_metrics(f"{output}-2")}
    found = {row["step"]: row["train/loss"] for row in read_metrics(output)}
    # All batches of this data have nearly the same number of targets; only the last sequence of a shard is shorter.
    intervals = ((1, 1), (2, 20), *((last - 19, last) for last in range(40, 201, 20)))
    expected = {last: fmean(losses[step] for step in range(first, last + 1)) for first, last in intervals}
    assert found == pytest.approx(expected, rel=1e-3)


def test_expired_time_limit_stops_before_the_first_step(settings: WriteSettings, output: str) -> None:
    code, out, err = run("train", settings(train=ALONE | {"max_time": "1s"}))
    assert (code, err) == (EXIT_STOPPED, ""), out + err
    assert "stopping: train.max_time is 1s, and " in out
    assert saved_steps(output) == [0]
    attempt = Attempts(output).newest()
    assert attempt is not None and attempt.ended == RunStatus.STOPPED
    assert attempt.error == "there was no time for a single step: train.max_time is 1s", "it counts as no progress"


def test_stop_file_stops_every_start_while_it_exists(settings: WriteSettings, output: str) -> None:
    stop_file = f"{output}/please-stop"
    path = settings(train=ALONE | ENDLESS | {"stop_file": stop_file})
    with Job("train", path) as job:
        job.read_until("step 3/")
        storage.write_bytes(stop_file, b"")
        code, out, err = job.end()
    assert (code, err) == (EXIT_STOPPED, ""), out + err
    assert f"stopping: {stop_file} exists" in out
    (step,) = saved_steps(output)
    code, out, err = run("train", path)
    assert code == EXIT_STOPPED
    assert saved_steps(output)[-1] <= step + 2000


def test_stop_without_a_store_ends_at_its_deadline(settings: WriteSettings, output: str, proxy: FaultProxy) -> None:
    path = settings(train=ALONE | ENDLESS, checkpoint={"every": 5, "stop_deadline": "3s"})
    with Job("train", path, AWS_ENDPOINT_URL=proxy.endpoint_url) as job:
        job.read_until("step 5 | saved")
        proxy.start_outage()
        job.process.send_signal(signal.SIGTERM)
        code, out, err = job.end(seconds=90)
    assert code == EXIT_FAILED, out
    assert "could not be saved in time, step" in err
    assert "Traceback" not in err
    assert saved_steps(output)[0] >= 5


# ---- Several starts at once ----


def test_newer_attempt_takes_over_and_checkpoints_never_mix(settings: WriteSettings, output: str) -> None:
    path = settings(train=ALONE | ENDLESS, checkpoint={"every": 20, "keep": 1000})
    with Job("train", path) as older:
        older.read_until("step 20 | saved")
        with Job("train", path) as newer:
            line = newer.read_until("taking over the run from attempt 1 ")
            assert f"process {older.workers()[0].pid} on" in line
            code, _, err = older.end()
            assert code == EXIT_REFUSED
            assert err.startswith(f"run.output: '{output}': attempt 2 (process {newer.workers()[0].pid} on ")
            newer.read_until("step ")
            newer.process.send_signal(signal.SIGTERM)
            code, out, err = newer.end()
    assert (code, err) == (EXIT_STOPPED, ""), out
    begun = Attempts(output).read(2)
    assert begun is not None and begun.from_step is not None
    names = list_checkpoints(output)
    assert {name.attempt for name in names if name.step > begun.from_step} == {2}
    assert {name.attempt for name in names if name.step <= begun.from_step} == {1}
    assert [row["step"] for row in read_metrics(output)] == list(range(1, names[-1].step + 1))


def test_superseded_attempt_never_writes_the_final_model(
    settings: WriteSettings, output: str, proxy: FaultProxy
) -> None:
    """A newer attempt claims the run between the last save of the older one and its export of the model."""
    claimed: list[bool] = []
    proxy.inject(
        SLOW_DOWN,
        lambda request: not claimed and request.method == "PUT" and "/logs/metrics.jsonl" in request.path,
        times=float("inf"),
    )
    with (
        ThreadPoolExecutor(1) as pool,
        Job("train", settings(train=ALONE), AWS_ENDPOINT_URL=proxy.endpoint_url) as job,
    ):
        end = pool.submit(job.end)  # This reads the lines of the run in the background.
        proxy.wait_for(lambda request: request.fault is SLOW_DOWN, 240)
        Attempts(output).claim("a-run", "a-start", None, "auto")
        claimed.append(True)
        code, out, err = end.result()
    assert code == EXIT_REFUSED, out + err
    assert "attempt 2 (process" in err
    assert storage.list_files(f"{output}/final") == []


def test_of_many_simultaneous_starts_one_trains(settings: WriteSettings, output: str) -> None:
    """A user submits a job five times; with this setting, one attempt without progress already ends the run."""
    path = settings(train=ALONE | ENDLESS | {"max_attempts_without_progress": 1, "log_every": 100})
    with ExitStack() as ending, ThreadPoolExecutor(5) as pool:
        starts = [ending.enter_context(Job("train", path)) for _ in range(5)]
        ends = {pool.submit(start.end): start for start in starts}
        for index, end in enumerate(as_completed(ends)):
            code, out, err = end.result()
            assert code == (EXIT_REFUSED if index < 4 else EXIT_STOPPED), out + err
            if index == 3:
                (left,) = (start for end, start in ends.items() if not end.done())
                left.process.send_signal(signal.SIGTERM)
    attempts = Attempts(output)
    ends = [attempts.read(number).ended for number in attempts.numbers()]  # type: ignore[union-attr]
    assert ends == [RunStatus.SUPERSEDED] * 4 + [RunStatus.STOPPED]
    assert {name.attempt for name in list_checkpoints(output)} == {5}
