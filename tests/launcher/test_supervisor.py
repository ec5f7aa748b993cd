"""How a run ends, by real launches: one exit code, one word about the cause, one checkpoint, no process left."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from small_run import ENDLESS, REPOSITORY, STEPS, DataSet, Job, prepare_sample, saved_steps, still_alive, write_settings

from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED
from job.launcher import worker_status as outcome
from job.launcher.loopback import interface_environment
from job.launcher.supervisor import _ending
from job.launcher.worker_status import CRASHED, DONE, HUNG, KILLED, NO_PROGRESS, REFUSED, STOPPED, Outcome, record


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


@pytest.mark.recovery
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
    assert err == "rank 0 was killed by SIGKILL (out of memory? a smaller train.micro_batch_size takes less)\n"
    assert still_alive(processes) == []


@pytest.mark.recovery
def test_a_single_worker_has_no_torchrun_above_it_and_is_told_of_all_the_same(one_process: Path) -> None:
    with Job("train", one_process) as job:
        job.read_until("step 3/")
        (worker,) = job.workers()
        (launcher,) = [one for one in job.descendants() if one != worker]
        # Loaded, torch is 150 MiB and seconds of every start.
        assert [mapped.path for mapped in launcher.memory_maps() if "torch" in mapped.path] == []
        assert [mapped.path for mapped in worker.memory_maps() if "torch" in mapped.path] != []
        worker.kill()
        code, _, err = job.end(seconds=60)
    assert code == EXIT_FAILED
    assert err == "rank 0 was killed by SIGKILL (out of memory? a smaller train.micro_batch_size takes less)\n"


@pytest.mark.recovery
def test_nothing_goes_on_where_the_entrypoint_was_killed(one_process: Path) -> None:
    with Job("train", one_process) as job:
        job.read_until("step 3/")
        processes = job.descendants()
        assert len(processes) == 2
        job.process.kill()
        job.process.wait()
        assert still_alive(processes) == []


# ---- Ports ----


@pytest.mark.recovery
@pytest.mark.parametrize(
    "train", [{"processes": 1, "strategy": "ddp"}, {"processes": 2, "strategy": "zero2"}], ids=["one", "two"]
)
def test_a_run_on_one_node_listens_on_the_loopback_interface_alone(
    data_set: DataSet, bucket: str, tmp_path: Path, train: dict[str, object]
) -> None:
    settings = write_settings(tmp_path, data_set, f"{bucket}/run", train=ENDLESS | train)
    with Job("train", settings) as job:
        job.read_until("step 3/")
        processes = [psutil.Process(job.process.pid), *job.descendants()]
        listening = {
            (place.ip, place.port)
            for one in processes
            for place in (found.laddr for found in one.net_connections() if found.status == psutil.CONN_LISTEN)
        }
        workers = job.workers()
        assert len(listening) > len(workers)  # a store, and gloo of each worker
        assert {address for address, _ in listening} == {"127.0.0.1"}
        # On another machine the name of the host may stand for an interface that others reach.
        assert train["processes"] == 1 or {one.environ()["GLOO_SOCKET_IFNAME"] for one in workers} == {"lo"}


def test_interfaces_that_the_user_has_set_for_gloo_and_nccl_stay() -> None:
    assert interface_environment({}) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert interface_environment({"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth1"}) == {}


# ---- Stops ----


@pytest.mark.parametrize(
    ("number", "whom", "of"),
    [
        pytest.param(signal.SIGINT, "the entrypoint", "settings", marks=pytest.mark.recovery),
        pytest.param(signal.SIGUSR2, "the launcher", "settings", marks=pytest.mark.recovery),
        pytest.param(signal.SIGUSR1, "one worker", "settings", marks=pytest.mark.recovery),
        (signal.SIGTERM, "all, twice", "settings"),
        (signal.SIGHUP, "the entrypoint", "one_process"),
        pytest.param(signal.SIGHUP, "all, twice", "settings", marks=pytest.mark.recovery),
        pytest.param(signal.SIGTERM, "the launcher", "one_process", marks=pytest.mark.recovery),
        pytest.param(signal.SIGTERM, "all, twice", "one_process", marks=pytest.mark.recovery),
    ],
)
def test_a_signal_to_any_process_is_one_stop_of_all(
    request: pytest.FixtureRequest, bucket: str, number: signal.Signals, whom: str, of: str
) -> None:
    with Job("train", request.getfixturevalue(of)) as job:
        job.read_until("step 3/")
        processes, workers = job.descendants(), job.workers()
        (launcher,) = [one for one in processes if one not in workers]
        addressed = {
            "the entrypoint": [job.process],
            "the launcher": [launcher],
            "one worker": [workers[-1]],
            "all, twice": [job.process, *processes] * 2,  # as Slurm does
        }[whom]
        for process in addressed:
            process.send_signal(number)
        code, out, err = job.end()
    (step,) = saved_steps(f"{bucket}/run")
    assert (code, err) == (EXIT_STOPPED, ""), out
    assert out.endswith(f"stopped after step {step}, checkpointed; start it again to go on\n")
    assert step < STEPS
    assert still_alive(processes) == []


@pytest.mark.recovery
def test_under_nohup_a_closed_terminal_stops_nothing(settings: Path, bucket: str) -> None:
    with Job("train", settings, under=["nohup"]) as job:
        job.read_until("step 3/")
        for process in job.family():
            process.send_signal(signal.SIGHUP)
        code, out, err = job.end()
    assert (code, err) == (EXIT_DONE, ""), out
    assert saved_steps(f"{bucket}/run") == [STEPS]


def test_a_variable_of_another_program_decides_nothing_and_is_named(one_process: Path, bucket: str) -> None:
    foreign = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "FSDP_VERSION": "2",
        "PET_MAX_RESTARTS": "3",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # torch would look for a store that there is not
    }
    with Job("train", one_process, **foreign) as job:
        code, out, err = job.end()
    assert code == EXIT_DONE, out + err
    assert err == f"removed from the environment, since the settings alone decide: {', '.join(foreign)}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a namespace of process ids takes root")
@pytest.mark.recovery
def test_as_the_first_process_of_a_container_it_stops_as_anywhere(one_process: Path, bucket: str) -> None:
    with Job("train", one_process, under=["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]) as job:
        job.read_until("step 3/")
        entrypoint, *others = job.descendants()
        assert entrypoint.cmdline()[1:4] == ["-m", "job", "train"]
        entrypoint.send_signal(signal.SIGTERM)
        code, out, err = job.end()
    (step,) = saved_steps(f"{bucket}/run")
    assert (code, err) == (EXIT_STOPPED, ""), out
    assert out.endswith(f"stopped after step {step}, checkpointed; start it again to go on\n")
    assert still_alive(others) == []


@pytest.mark.recovery
def test_a_second_signal_stops_at_once(settings: Path, bucket: str) -> None:
    with Job("train", settings) as job:
        job.read_until("step 3/")
        processes = job.descendants()
        for one in processes:  # the workers do not come to the end of their step: the first signal cannot be enough
            one.suspend()
        job.process.send_signal(signal.SIGUSR1)  # a warning is not a demand
        job.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            job.process.wait(timeout=1.5)
        job.process.send_signal(signal.SIGTERM)
        code, _, err = job.end(seconds=30)
    assert code == 128 + signal.SIGTERM
    assert err == "stopped at once by a second SIGTERM: nothing was saved\n"
    assert still_alive(processes) == []
    assert saved_steps(f"{bucket}/run") == []


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
        ([Outcome(0, REFUSED, "a.b: wrong"), Outcome(1, REFUSED, "a.b: wrong")], EXIT_REFUSED, "a.b: wrong"),
        ([Outcome(1, REFUSED, "a.b: wrong", 2.0), Outcome(0, CRASHED, "lost", 1.0)], EXIT_REFUSED, "a.b: wrong"),
        (
            [Outcome(0, CRASHED, "the other is gone", 2.0), Outcome(1, CRASHED, "why", 1.0)],
            EXIT_FAILED,
            "rank 1 failed first:\nwhy",
        ),
        (
            [Outcome(0, CRASHED, "the other is gone", 1.0), Outcome(1, KILLED, "SIGSEGV", 2.0)],
            EXIT_FAILED,
            "rank 1 was killed by SIGSEGV",
        ),
        (
            [Outcome(0, HUNG, "rank 1 did not come", 1.0), Outcome(1, KILLED, "SIGKILL", 2.0)],
            EXIT_FAILED,
            "rank 1 did not come",
        ),
        ([Outcome(1, NO_PROGRESS, "no"), Outcome(0, CRASHED, "the other is gone")], EXIT_NO_PROGRESS, "no"),
        ([Outcome(0, DONE)], EXIT_FAILED, "ranks [1] ended without a word (killed? out of memory?)"),
        ([], EXIT_FAILED, "ranks [0, 1] ended without a word (killed? out of memory?)"),
    ],
)
def test_one_word_and_one_code_say_how_the_workers_ended(
    tmp_path: Path, outcomes: list[Outcome], code: int, said: str
) -> None:
    for one in outcomes:
        record(tmp_path, one)
    assert _ending(outcome.read_all(tmp_path), 2, 1)[:2] == (code, said)


def test_an_outcome_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    record(tmp_path, Outcome(3, CRASHED, "a traceback", 5.0))
    (tmp_path / "rank-4.partial").write_bytes(b'{"rank": 4, "sta')
    assert outcome.read_all(tmp_path) == [Outcome(3, CRASHED, "a traceback", 5.0)]
