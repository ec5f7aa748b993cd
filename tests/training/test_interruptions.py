"""What happens to a run: asked to stop at bad moments, two at a time, a store that is gone, numbers that blow up."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import Fault, FaultProxy, Refusal
from small_run import STEPS, DataSet, FinishedRun, Job, checkpoint_urls, run, saved_steps, stored, write_settings

from job import storage
from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED
from job.training.attempts import Attempts
from job.training.checkpoint import list_checkpoints
from job.training.metrics import read_metrics

Settings = Callable[..., Path]
ALONE = {"processes": 1, "strategy": "ddp"}
ENDLESS = {"max_steps": 1_000_000, "epochs": 10_000}


@pytest.fixture
def output(bucket: str) -> str:
    return f"{bucket}/run"


@pytest.fixture
def settings(data_set: DataSet, output: str, tmp_path: Path) -> Settings:
    def write(**changes: Any) -> Path:
        return write_settings(tmp_path, data_set, output, **changes)

    return write


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


def through(proxy: FaultProxy) -> dict[str, str]:
    return {"AWS_ENDPOINT_URL": proxy.endpoint_url}


# ---- Asked to stop at a bad moment ----


def test_a_stop_while_shards_are_awaited_is_one_of_all_processes(
    settings: Settings, output: str, proxy: FaultProxy
) -> None:
    proxy.stall_seconds = 3600
    proxy.inject(Fault.STALL, lambda request: request.method == "GET" and "/train/" in request.path, times=float("inf"))
    with Job("train", settings(), **through(proxy)) as job:
        proxy.wait_for(lambda request: request.fault is Fault.STALL, 120)
        job.workers()[1].send_signal(signal.SIGTERM)
        code, out, err = job.end(seconds=60)
    assert (code, err) == (EXIT_STOPPED, ""), out + err
    assert "stopped after step 0" in out
    assert saved_steps(output) == [0]


def test_an_evaluation_that_a_stop_cut_off_is_made_up_for(
    settings: Settings, output: str, finished_run: FinishedRun
) -> None:
    path = settings(evaluate={"every": 30, "batch_size": 1})  # so that it takes hundreds of rounds
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


def test_what_is_measured_between_two_lines_of_the_log_outlives_a_stop(settings: Settings, output: str) -> None:
    path = settings(train=ALONE | {"log_every": 20, "max_steps": 40}, checkpoint={"every": 10})
    with Job("train", path) as job:
        job.read_until("step 30 | saved")
        job.process.kill()
    code, out, err = run("train", path)
    assert (code, err) == (EXIT_DONE, ""), out + err
    assert Attempts(output).read(2).from_step == 30  # type: ignore[union-attr]
    log_of_every_step = settings(train=ALONE | {"max_steps": 40}, run={"output": f"{output}-2"})
    assert run("train", log_of_every_step)[0] == EXIT_DONE
    rows = {row["step"]: row["train/loss"] for row in read_metrics(f"{output}-2")}
    # Every global batch of this data holds the same number of targets but for the last windows of shards.
    expected = sum(rows[step] for step in range(21, 41)) / 20
    assert {row["step"]: row["train/loss"] for row in read_metrics(output)}[40] == pytest.approx(expected, rel=2e-3)


def test_a_time_that_is_over_stops_before_the_first_step(settings: Settings, output: str) -> None:
    code, out, err = run("train", settings(train=ALONE | {"max_time": "1s"}))
    assert (code, err) == (EXIT_STOPPED, ""), out + err
    assert "stopping: train.max_time is 1s, and " in out
    assert saved_steps(output) == [0]


def test_a_stop_file_stops_every_start_as_long_as_it_is_there(settings: Settings, output: str) -> None:
    stop_file = f"{output}/please-stop"
    path = settings(train=ALONE | ENDLESS | {"stop_file": stop_file})
    with Job("train", path) as job:
        job.read_until("step 3/")
        storage.write_bytes(stop_file, b"")
        code, out, err = job.end()
    assert (code, err) == (EXIT_STOPPED, ""), out + err
    assert f"stopping: {stop_file} is there" in out
    (step,) = saved_steps(output)
    code, out, err = run("train", path)
    assert code == EXIT_STOPPED
    assert saved_steps(output)[-1] <= step + 2000


def test_a_stop_without_a_store_to_save_to_ends_when_its_time_is_over(
    settings: Settings, output: str, proxy: FaultProxy
) -> None:
    path = settings(train=ALONE | ENDLESS, checkpoint={"every": 5, "stop_deadline": "3s"})
    with Job("train", path, **through(proxy)) as job:
        job.read_until("step 5 | saved")
        proxy.start_outage()
        job.process.send_signal(signal.SIGTERM)
        code, out, err = job.end(seconds=90)
    assert code == EXIT_FAILED, out
    assert "could not be saved in time, step" in err
    assert "Traceback" not in err
    assert saved_steps(output)[0] >= 5


# ---- Two at a time ----


def test_the_newer_of_two_takes_the_run_over_and_their_checkpoints_never_mix(settings: Settings, output: str) -> None:
    path = settings(train=ALONE | ENDLESS, checkpoint={"every": 20, "keep": 1000})
    with Job("train", path) as older:
        older.read_until("step 20 | saved")
        with Job("train", path) as newer:
            line = newer.read_until("taking the run over from attempt 1 ")
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


# ---- A store that is gone for a while ----


def test_training_goes_on_through_an_outage_and_saves_when_it_is_over(
    settings: Settings, output: str, proxy: FaultProxy
) -> None:
    path = settings(
        train=ALONE | ENDLESS, checkpoint={"every": 20}, store={"deadline_seconds": 1.5}, evaluate={"every": 1_000_000}
    )
    with Job("train", path, **through(proxy)) as job:
        job.read_until("step 20 | saved")
        proxy.start_outage()
        failed = job.read_until_matching(r"step (\d+) \| not saved, and tried again later: ")
        begun = int(failed[1])
        job.read_until(f"step {begun + 50}/")
        proxy.end_outage()
        saved = int(job.read_until_matching(r"step (\d+) \| saved ")[1])
        job.process.send_signal(signal.SIGTERM)
        code, out, err = job.end()
    assert code == EXIT_STOPPED, out + err
    assert "Traceback" not in err
    assert saved > begun
    assert saved_steps(output)[:1] == [20]
    assert [row["step"] for row in read_metrics(output)] == list(range(1, saved_steps(output)[-1] + 1))


def test_credentials_that_expire_end_the_run_at_once(settings: Settings, output: str, proxy: FaultProxy) -> None:
    path = settings(train=ALONE | ENDLESS, checkpoint={"every": 20})
    with Job("train", path, **through(proxy)) as job:
        job.read_until("step 20 | saved")
        proxy.inject(Refusal(403, "ExpiredToken"), lambda request: request.method == "PUT", times=float("inf"))
        code, _, err = job.end(seconds=60)
    assert code == EXIT_REFUSED
    (line,) = err.splitlines()
    assert "ExpiredToken" in line
    assert saved_steps(output)[0] == 20


# ---- A process that does not come, a disk that is full, numbers that blow up ----


def test_a_process_that_stands_still_is_named(settings: Settings) -> None:
    with Job("train", settings(train={"hang_timeout": "4s"})) as job:
        job.read_until("step 3/")
        job.workers()[1].suspend()
        code, _, err = job.end(seconds=90)
    assert code == EXIT_FAILED
    assert err == "ranks [1] give no sign of life any more; the others have waited 4 s (train.hang_timeout) for them\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own takes root to mount")
def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(settings: Settings, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=True)
    try:
        path = settings(
            run={"output": str(disk / "run")}, train=ALONE, checkpoint={"every": 10}, model={"hidden_size": 32}
        )
        code, out, err = run("train", path)
        assert code == EXIT_REFUSED, out
        (line,) = err.splitlines()
        assert line.startswith(f"run.output: '{disk}")
        assert "no space left" in line
        good = saved_steps(str(disk / "run"))
        assert good and f"step {good[-1]} | saved" in out
        assert list(disk.rglob("*.partial")) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_numbers_that_blow_up_step_after_step_end_the_run_and_leave_its_checkpoint(
    settings: Settings, output: str
) -> None:
    train = ALONE | {"max_skipped_steps": 4}
    assert run("train", settings(train=train | {"max_steps": 6}, checkpoint={"every": 3}))[0] == EXIT_DONE
    before = {url: content for url, content in stored(output).items() if "/checkpoints/" in url}
    code, out, err = run(
        "train", settings(train=train | {"learning_rate": 1e38, "min_learning_rate": 1e38}, checkpoint={"every": 1000})
    )
    assert code == EXIT_NO_PROGRESS, out + err
    assert err.startswith("4 steps in a row were skipped (train.max_skipped_steps is 4)")
    assert "gradient norm inf, windows train/" in err
    assert out.count(" skipped: loss ") == 4
    assert {url: content for url, content in stored(output).items() if "/checkpoints/" in url} == before
    assert checkpoint_urls(output)


def test_a_run_that_cannot_come_further_gives_up_with_the_last_error(settings: Settings, output: str) -> None:
    path = settings(train=ALONE | {"max_attempts_without_progress": 2})
    ends = []
    for _ in range(2):
        with Job("train", path) as job:
            job.read_until("step 3/")
            job.workers()[0].kill()
            ends.append(job.end(seconds=60)[0])
    code, _, err = run("train", path)
    assert [*ends, code] == [EXIT_FAILED, EXIT_FAILED, EXIT_NO_PROGRESS]
    (line,) = err.splitlines()
    assert "2 starts from step 0 without one new checkpoint" in line
    assert "the last one: rank 0 was killed by SIGKILL" in line
