"""Runs whose world fails: a store that is gone, a process that does not come, a full disk, numbers that blow up."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Refusal
from small_run import (
    ALONE,
    ENDLESS,
    Job,
    WriteSettings,
    checkpoint_urls,
    run,
    saved_steps,
    stored,
)

from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED
from job.training.metrics import read_metrics

pytestmark = pytest.mark.recovery

# ---- A store that is gone for a while ----


def test_training_goes_on_through_an_outage_and_saves_when_it_is_over(
    settings: WriteSettings, output: str, proxy: FaultProxy
) -> None:
    path = settings(
        train=ALONE | ENDLESS, checkpoint={"every": 20}, store={"deadline_seconds": 5}, evaluate={"every": 1_000_000}
    )
    with Job("train", path, AWS_ENDPOINT_URL=proxy.endpoint_url) as job:
        first = int(job.read_until_matching(r"step (\d+) \| saved ")[1])
        proxy.start_outage()
        failed = job.read_until_matching(r"step (\d+) \| not saved, and tried again later: ")
        begun = int(failed[1])
        assert int(job.read_until_matching(r"step (\d+)/")[1]) > begun + 50, "it trains while it tries"
        proxy.end_outage()
        saved = int(job.read_until_matching(r"step (\d+) \| saved ")[1])
        job.process.send_signal(signal.SIGTERM)
        code, out, err = job.end()
    assert code == EXIT_STOPPED, out + err
    assert "Traceback" not in err
    assert saved > begun
    assert saved_steps(output)[0] == first
    assert [row["step"] for row in read_metrics(output)] == list(range(1, saved_steps(output)[-1] + 1))


def test_credentials_that_expire_end_the_run_at_once(settings: WriteSettings, output: str, proxy: FaultProxy) -> None:
    path = settings(train=ALONE | ENDLESS, checkpoint={"every": 20})
    with Job("train", path, AWS_ENDPOINT_URL=proxy.endpoint_url) as job:
        job.read_until("step 20 | saved")
        proxy.inject(Refusal(403, "ExpiredToken"), lambda request: request.method == "PUT", times=float("inf"))
        code, _, err = job.end(seconds=60)
    assert code == EXIT_REFUSED
    (line,) = err.splitlines()
    assert "ExpiredToken" in line
    assert saved_steps(output)[0] == 20


# ---- A process that does not come, a disk that is full, numbers that blow up ----


def test_a_process_that_stands_still_is_named(settings: WriteSettings) -> None:
    with Job("train", settings(train={"hang_timeout": "4s"})) as job:
        job.read_until("step 3/")
        job.workers()[1].suspend()
        code, _, err = job.end(seconds=90)
    assert code == EXIT_FAILED
    assert err == "ranks [1] give no sign of life any more; the others have waited 4 s (train.hang_timeout) for them\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own takes root to mount")
def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(settings: WriteSettings, tmp_path: Path) -> None:
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
    settings: WriteSettings, output: str
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


def test_a_run_that_cannot_come_further_gives_up_with_the_last_error(settings: WriteSettings, output: str) -> None:
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
    assert "2 attempts from step 0 without one new checkpoint" in line
    assert "the last one: rank 0 was killed by SIGKILL" in line
