"""How a run ends, by real launches: one exit code, one word about the cause, one checkpoint, no process left."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from small_run import REPOSITORY, STEPS, DataSet, Job, prepare_sample, saved_steps, still_alive, write_settings

from job.cluster import outcome
from job.cluster.launch import _exit_code
from job.cluster.outcome import CRASHED, DONE, KILLED, REFUSED, STOPPED, Outcome, record
from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED


@pytest.fixture(scope="module")
def data_set(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return prepare_sample(s3_server, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def settings(data_set: DataSet, bucket: str, tmp_path: Path) -> Path:
    return write_settings(tmp_path, data_set, f"{bucket}/run")


@pytest.fixture
def one_process(data_set: DataSet, bucket: str, tmp_path: Path) -> Path:
    train = {"processes": 1, "strategy": "ddp"}
    return write_settings(tmp_path, data_set, f"{bucket}/run", train=train)


# ---- Failures ----


def test_a_worker_that_raises_is_shown_once_with_its_rank_and_takes_the_others_along(
    settings: Path, bucket: str
) -> None:
    paths = [str(Path(__file__).with_name("failing_rank")), str(REPOSITORY)]
    with Job("train", settings, PYTHONPATH=os.pathsep.join(paths)) as job:
        job.read_until("step 1/")
        processes = job.descendants()
        code, _, err = job.end()
    assert code == EXIT_FAILED
    assert err.startswith("rank 1 failed first:\nTraceback (most recent call last):\n")
    assert err.rstrip().endswith("ValueError: rank 1 has had enough")
    assert err.count("Traceback") == 1
    assert still_alive(processes) == []
    assert saved_steps(f"{bucket}/run") == []


def test_a_killed_worker_is_named_and_takes_the_others_along(settings: Path) -> None:
    with Job("train", settings) as job:
        job.read_until("step 3/")
        processes = job.descendants()
        assert len(job.workers()) == 2
        job.workers()[0].kill()
        code, _, err = job.end(seconds=60)
    assert code == EXIT_FAILED
    assert err == "rank 0 was killed by SIGKILL (out of memory?)\n"
    assert still_alive(processes) == []


def test_nothing_goes_on_where_the_entrypoint_was_killed(one_process: Path) -> None:
    with Job("train", one_process) as job:
        job.read_until("step 3/")
        processes = job.descendants()
        assert len(processes) == 2
        job.process.kill()
        job.process.wait()
        assert still_alive(processes) == []


# ---- Stops ----


def test_signals_to_every_process_and_more_than_one_of_them_are_one_stop(settings: Path, bucket: str) -> None:
    with Job("train", settings) as job:
        job.read_until("step 3/")
        processes = job.descendants()

        def signal_all() -> None:  # as Slurm does
            while job.process.poll() is None:
                for process in (job.process, *processes):
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGTERM)
                time.sleep(0.02)

        impatience = threading.Thread(target=signal_all)
        impatience.start()
        code, out, err = job.end()
        impatience.join()
    (step,) = saved_steps(f"{bucket}/run")
    assert (code, err) == (EXIT_STOPPED, ""), out
    assert out.endswith(f"stopped after step {step}, checkpointed; start it again to go on\n")
    assert still_alive(processes) == []


def test_a_stop_while_the_workers_start_is_not_lost(one_process: Path, bucket: str) -> None:
    with Job("train", one_process) as job:
        while not job.workers():
            time.sleep(0.01)
        job.process.send_signal(signal.SIGINT)
        code, out, err = job.end()
    assert (code, err) == (EXIT_STOPPED, ""), out
    (step,) = saved_steps(f"{bucket}/run")
    assert step < STEPS


# ---- What the outcomes of the workers come to ----


@pytest.mark.parametrize(
    ("outcomes", "code", "said"),
    [
        ([Outcome(0, DONE), Outcome(1, DONE)], EXIT_DONE, ""),
        ([Outcome(0, STOPPED), Outcome(1, STOPPED)], EXIT_STOPPED, ""),
        ([Outcome(0, REFUSED, "a.b: wrong"), Outcome(1, REFUSED, "a.b: wrong")], EXIT_REFUSED, "a.b: wrong\n"),
        ([Outcome(1, REFUSED, "a.b: wrong", 2.0), Outcome(0, CRASHED, "lost", 1.0)], EXIT_REFUSED, "a.b: wrong\n"),
        (
            [Outcome(0, CRASHED, "the other is gone", 2.0), Outcome(1, CRASHED, "why", 1.0)],
            EXIT_FAILED,
            "rank 1 failed first:\nwhy\n",
        ),
        (
            [Outcome(0, CRASHED, "the other is gone", 1.0), Outcome(1, KILLED, "SIGSEGV", 2.0)],
            EXIT_FAILED,
            "rank 1 was killed by SIGSEGV\n",
        ),
        ([Outcome(0, DONE)], EXIT_FAILED, "ranks [1] ended without a word (killed? out of memory?)\n"),
        ([], EXIT_FAILED, "ranks [0, 1] ended without a word (killed? out of memory?)\n"),
    ],
)
def test_one_word_and_one_code_say_how_the_workers_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], outcomes: list[Outcome], code: int, said: str
) -> None:
    for one in outcomes:
        record(tmp_path, one)
    assert _exit_code(tmp_path, 2, 1) == code
    assert capsys.readouterr().err == said


def test_an_outcome_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    record(tmp_path, Outcome(3, CRASHED, "a traceback", 5.0))
    (tmp_path / "rank-4.partial").write_bytes(b'{"rank": 4, "sta')
    assert outcome.read_all(tmp_path) == [Outcome(3, CRASHED, "a traceback", 5.0)]
