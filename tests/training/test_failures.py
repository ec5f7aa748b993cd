"""Tests of runs with failures around them: a store outage, a hanging process, a full disk, bad steps."""

import os
import re
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fault_proxy import FaultProxy, Refusal
from small_run import (
    ALONE,
    ENDLESS,
    STEPS,
    Job,
    WriteSettings,
    checkpoint_urls,
    redirected,
    run,
    saved_steps,
    stored,
)

from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED
from job.runs.metrics_file import read_metrics

pytestmark = pytest.mark.recovery

# ---- Store outages ----


def test_training_continues_through_an_outage_and_saves_later(
    settings: WriteSettings, output: str, proxy: FaultProxy
) -> None:
    path = settings(
        train=ALONE | ENDLESS, checkpoint={"every": 20}, store={"deadline_seconds": 5}, evaluate={"every": 1_000_000}
    )
    with Job("train", path, AWS_ENDPOINT_URL=proxy.endpoint_url) as job:
        first = int(job.read_until_matching(r"step (\d+) \| saved ")[1])
        proxy.start_outage()
        failed = job.read_until_matching(r"step (\d+) \| save failed, trying again later: ")
        begun = int(failed[1])
        assert int(job.read_until_matching(r"step (\d+)/")[1]) > begun, "it trains while it tries"
        proxy.end_outage()
        saved = int(job.read_until_matching(r"step (\d+) \| saved ")[1])
        job.process.send_signal(signal.SIGTERM)
        code, out, err = job.end()
    assert code == EXIT_STOPPED, out + err
    assert "Traceback" not in err
    assert saved > begun
    assert saved_steps(output)[0] == first
    assert [row["step"] for row in read_metrics(output)] == list(range(1, saved_steps(output)[-1] + 1))


def test_expired_credentials_fail_the_run_only_at_the_last_save(
    settings: WriteSettings, output: str, proxy: FaultProxy
) -> None:
    path = settings(train=ALONE | ENDLESS, checkpoint={"every": 20, "stop_deadline": "3s"})
    expired = threading.Event()
    proxy.inject(
        Refusal(403, "ExpiredToken"),
        lambda request: expired.is_set() and request.method == "PUT",
        times=float("inf"),
    )
    not_saved = r"step (\d+) \| save failed, trying again later: .*ExpiredToken"
    with Job("train", path, AWS_ENDPOINT_URL=proxy.endpoint_url) as job:
        job.read_until("step 20 | saved")
        expired.set()
        failed = int(job.read_until_matching(not_saved)[1])
        assert int(job.read_until_matching(r"step (\d+)/")[1]) > failed, "it trains on"
        expired.clear()
        saved = int(job.read_until_matching(r"step (\d+) \| saved ")[1])
        assert saved > failed
        expired.set()
        job.read_until_matching(not_saved)
        job.process.send_signal(signal.SIGTERM)
        code, _, err = job.end(seconds=90)
    assert code == EXIT_REFUSED
    assert "ExpiredToken" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert saved_steps(output)[-1] >= saved


# ---- A console that fails ----


def test_full_log_disk_does_not_end_the_run(settings: WriteSettings, output: str) -> None:
    path = settings(run={"output": output, "name": "a [/name] :100:"})
    code, out, err = run("train", path, under=redirected(">/dev/full"), PYTHONIOENCODING="ascii")
    assert (code, out) == (EXIT_DONE, "")
    first, last = err.splitlines()
    assert first == "standard output cannot be written (No space left on device); the command goes on without it"
    assert int(re.fullmatch(r"standard output has lost (\d+) lines .*: No space left on device", last)[1]) > STEPS  # type: ignore[index]
    assert saved_steps(output) == [STEPS]
    for command, redirection in (("generate", ">&-"), ("evaluate", ">/dev/full")):
        code, out, err = run(command, path, under=redirected(redirection), PYTHONIOENCODING="ascii")
        assert (code, out) == (EXIT_DONE, "")
        assert "standard output cannot be written (" in err


def test_closed_standard_output_does_not_end_the_run(settings: WriteSettings, output: str) -> None:
    with Job("train", settings(train=ALONE), PYTHONIOENCODING="gbk") as job:
        job.read_until("run run (")
        assert job.process.stdout is not None
        job.process.stdout.close()
        code, _, err = job.end()
    assert code == EXIT_DONE, err
    assert err.startswith("standard output cannot be written (Broken pipe); the command goes on without it\n")
    assert saved_steps(output) == [STEPS]


# ---- Hanging or paused processes, full disks, bad steps ----


def test_hanging_rank_is_named(settings: WriteSettings) -> None:
    with Job("train", settings(train={"hang_timeout": "4s"})) as job:
        job.read_until("step 3/")
        job.workers()[1].suspend()
        code, _, err = job.end(seconds=90)
    assert code == EXIT_FAILED
    assert err == "rank 1 sent no heartbeat for 4 s (train.hang_timeout); the other ranks waited\n"


@pytest.mark.parametrize("train", [ALONE, {"strategy": "ddp"}, {}], ids=["one process", "DDP", "ZeRO-2"])
def test_pause_of_all_processes_is_no_hang(settings: WriteSettings, output: str, train: dict[str, object]) -> None:
    with Job("train", settings(train=train | ENDLESS | {"hang_timeout": "3s"})) as job:
        job.read_until("step 3/")
        everyone = job.family()
        for one in everyone:
            one.suspend()
        time.sleep(9)  # The pause is three times as long as the timeout.
        for one in everyone:
            one.resume()
        paused_at = int(job.read_until_matching(r"step (\d+)/")[1])
        job.read_until(f"step {paused_at + 50}/")  # The pipe may still hold lines of earlier steps.
        job.process.send_signal(signal.SIGTERM)
        code, out, err = job.end()
    assert (code, err) == (EXIT_STOPPED, ""), out


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")
def test_full_disk_delays_saves_until_there_is_room(settings: WriteSettings, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], check=True)
    try:
        train = ALONE | ENDLESS
        path = settings(
            run={"output": str(disk / "run")}, train=train, checkpoint={"every": 10, "keep": 1, "stop_deadline": "3s"}
        )
        with Job("train", path) as job:
            job.read_until("step 10 | saved")
            fill(disk)
            failed = int(job.read_until_matching(r"step (\d+) \| save failed, trying again later: .*no space left")[1])
            assert int(job.read_until_matching(r"step (\d+)/")[1]) > failed, "it trains on"
            (disk / "filling").unlink()
            saved = int(job.read_until_matching(r"step (\d+) \| saved ")[1])
            assert saved > failed
            assert list(disk.rglob("*.partial")) == []
            fill(disk)
            job.process.send_signal(signal.SIGTERM)
            code, out, err = job.end(seconds=90)
        assert code == EXIT_REFUSED, out
        line = err.splitlines()[-1]
        assert line.startswith(f"run.output: '{disk}")
        assert "no space left" in line
        assert "Traceback" not in err
        assert saved_steps(str(disk / "run"))[-1] >= saved
        assert list(disk.rglob("*.partial")) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Fill a disk until it has no room left."""
    with suppress(OSError), (disk / "filling").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def test_too_many_bad_steps_end_the_run_and_keep_its_checkpoint(settings: WriteSettings, output: str) -> None:
    train = ALONE | {"max_skipped_steps": 4}
    assert run("train", settings(train=train | {"max_steps": 6}, checkpoint={"every": 3}))[0] == EXIT_DONE
    before = {url: content for url, content in stored(output).items() if "/checkpoints/" in url}
    code, out, err = run(
        "train", settings(train=train | {"learning_rate": 1e12, "min_learning_rate": 1e12}, checkpoint={"every": 1000})
    )
    assert code == EXIT_NO_PROGRESS, out + err
    assert err.startswith("4 steps in a row were skipped (train.max_skipped_steps is 4)")
    assert "gradient norm inf, sequences train/" in err
    assert out.count(" skipped: loss ") == 4
    assert {url: content for url, content in stored(output).items() if "/checkpoints/" in url} == before
    assert checkpoint_urls(output)


def test_run_without_progress_gives_up_with_the_last_error(settings: WriteSettings, output: str) -> None:
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
    assert "2 attempts from step 0 without a new checkpoint" in line
    assert "the last one: rank 0 was killed by SIGKILL" in line
