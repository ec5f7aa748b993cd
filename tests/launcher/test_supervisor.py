"""Tests of how a run ends, with real launches: one exit code, one message, one checkpoint, no process left."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from small_run import ENDLESS, REPOSITORY, STEPS, DataSet, Job, saved_steps, still_alive, write_settings

from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED
from job.launcher import worker_status
from job.launcher.loopback import interface_environment
from job.launcher.supervisor import _combine
from job.launcher.worker_status import WorkerStatus, record
from job.runs.run_status import RunStatus


@pytest.fixture
def settings(data_set: DataSet, bucket: str, tmp_path: Path) -> Path:
    return write_settings(tmp_path, data_set, f"{bucket}/run")


@pytest.fixture
def one_process(data_set: DataSet, bucket: str, tmp_path: Path) -> Path:
    train = {"processes": 1, "strategy": "ddp"}
    return write_settings(tmp_path, data_set, f"{bucket}/run", train=train)


# ---- Failures ----


@pytest.mark.recovery
def test_worker_exception_is_printed_once_and_ends_all_workers(settings: Path, bucket: str) -> None:
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


def test_killed_worker_is_named_and_ends_all_workers(settings: Path) -> None:
    with Job("train", settings) as job:
        job.read_until("step 3/")
        processes = job.descendants()
        assert len(job.workers()) == 2
        job.workers()[0].kill()
        code, _, err = job.end(seconds=60)
    assert code == EXIT_FAILED
    assert err == "rank 0 was killed by SIGKILL (out of memory? try a smaller train.micro_batch_size)\n"
    assert still_alive(processes) == []


@pytest.mark.recovery
def test_single_worker_runs_without_torchrun_and_reports_its_kill(one_process: Path) -> None:
    with Job("train", one_process) as job:
        job.read_until("step 3/")
        (worker,) = job.workers()
        (agent,) = [process for process in job.descendants() if process != worker]
        # Importing torch in the agent would add 150 MiB, and seconds to every start.
        assert [mapped.path for mapped in agent.memory_maps() if "torch" in mapped.path] == []
        assert [mapped.path for mapped in worker.memory_maps() if "torch" in mapped.path] != []
        worker.kill()
        code, _, err = job.end(seconds=60)
    assert code == EXIT_FAILED
    assert err == "rank 0 was killed by SIGKILL (out of memory? try a smaller train.micro_batch_size)\n"


@pytest.mark.recovery
def test_no_process_survives_a_killed_entrypoint(one_process: Path) -> None:
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
def test_run_on_one_node_listens_only_on_loopback(
    data_set: DataSet, bucket: str, tmp_path: Path, train: dict[str, object]
) -> None:
    settings = write_settings(tmp_path, data_set, f"{bucket}/run", train=ENDLESS | train)
    with Job("train", settings) as job:
        job.read_until("step 3/")
        processes = [psutil.Process(job.process.pid), *job.descendants()]
        listening = {
            (connection.laddr.ip, connection.laddr.port)
            for process in processes
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        workers = job.workers()
        assert len(listening) > len(workers)  # The store, and Gloo in each worker.
        assert {address for address, _ in listening} == {"127.0.0.1"}
        # On another machine, the host name may belong to an interface that other machines can reach.
        assert train["processes"] == 1 or {worker.environ()["GLOO_SOCKET_IFNAME"] for worker in workers} == {"lo"}


def test_interfaces_set_by_the_user_are_kept_on_one_node() -> None:
    assert interface_environment({}) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert interface_environment({"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth1"}) == {}


# ---- Stops ----


@pytest.mark.parametrize(
    ("number", "target", "fixture"),
    [
        pytest.param(signal.SIGINT, "the entrypoint", "settings", marks=pytest.mark.recovery),
        pytest.param(signal.SIGUSR2, "the agent", "settings", marks=pytest.mark.recovery),
        pytest.param(signal.SIGUSR1, "one worker", "settings", marks=pytest.mark.recovery),
        (signal.SIGTERM, "all, twice", "settings"),
        (signal.SIGHUP, "the entrypoint", "one_process"),
        pytest.param(signal.SIGHUP, "all, twice", "settings", marks=pytest.mark.recovery),
        pytest.param(signal.SIGTERM, "the agent", "one_process", marks=pytest.mark.recovery),
        pytest.param(signal.SIGTERM, "all, twice", "one_process", marks=pytest.mark.recovery),
    ],
)
def test_signal_to_any_process_stops_the_run_once(
    request: pytest.FixtureRequest, bucket: str, number: signal.Signals, target: str, fixture: str
) -> None:
    with Job("train", request.getfixturevalue(fixture)) as job:
        job.read_until("step 3/")
        processes, workers = job.descendants(), job.workers()
        (agent,) = [process for process in processes if process not in workers]
        targets = {
            "the entrypoint": [job.process],
            "the agent": [agent],
            "one worker": [workers[-1]],
            "all, twice": [job.process, *processes] * 2,  # Slurm does this.
        }[target]
        for process in targets:
            process.send_signal(number)
        code, out, err = job.end()
    (step,) = saved_steps(f"{bucket}/run")
    assert (code, err) == (EXIT_STOPPED, ""), out
    assert out.endswith(f"stopped after step {step}, checkpointed; start it again to continue\n")
    assert step < STEPS
    assert still_alive(processes) == []


@pytest.mark.recovery
def test_closed_terminal_does_not_stop_a_run_under_nohup(settings: Path, bucket: str) -> None:
    with Job("train", settings, under=["nohup"]) as job:
        job.read_until("step 3/")
        for process in job.family():
            process.send_signal(signal.SIGHUP)
        code, out, err = job.end()
    assert (code, err) == (EXIT_DONE, ""), out
    assert saved_steps(f"{bucket}/run") == [STEPS]


def test_foreign_environment_variables_are_ignored_and_printed(one_process: Path, bucket: str) -> None:
    foreign = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "FSDP_VERSION": "2",
        "PET_MAX_RESTARTS": "3",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # With this, torch would look for a store that does not exist.
    }
    with Job("train", one_process, **foreign) as job:
        code, out, err = job.end()
    assert code == EXIT_DONE, out + err
    assert err == f"environment variables ignored because settings decide this instead: {', '.join(foreign)}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="creating a namespace of process ids needs root")
@pytest.mark.recovery
def test_run_stops_on_signal_as_process_1_of_a_container(one_process: Path, bucket: str) -> None:
    with Job("train", one_process, under=["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]) as job:
        job.read_until("step 3/")
        entrypoint, *others = job.descendants()
        assert entrypoint.cmdline()[1:4] == ["-m", "job", "train"]
        entrypoint.send_signal(signal.SIGTERM)
        code, out, err = job.end()
    (step,) = saved_steps(f"{bucket}/run")
    assert (code, err) == (EXIT_STOPPED, ""), out
    assert out.endswith(f"stopped after step {step}, checkpointed; start it again to continue\n")
    assert still_alive(others) == []


@pytest.mark.recovery
def test_second_signal_stops_at_once(settings: Path, bucket: str) -> None:
    with Job("train", settings) as job:
        job.read_until("step 3/")
        processes = job.descendants()
        for process in processes:  # The workers cannot finish their step, so the first signal cannot stop the run.
            process.suspend()
        job.process.send_signal(signal.SIGUSR1)  # A warning does not count as the first of two signals.
        job.process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            job.process.wait(timeout=1.5)
        job.process.send_signal(signal.SIGTERM)
        code, _, err = job.end(seconds=30)
    assert code == 128 + signal.SIGTERM
    assert err == "stopped at once by a second SIGTERM: nothing was saved\n"
    assert still_alive(processes) == []
    assert saved_steps(f"{bucket}/run") == []


def test_stop_request_while_workers_start_is_not_lost(one_process: Path, bucket: str) -> None:
    with Job("train", one_process) as job:
        while not job.workers():
            time.sleep(0.01)
        job.process.send_signal(signal.SIGINT)
        code, out, err = job.end()
    assert (code, err) == (EXIT_STOPPED, ""), out
    (step,) = saved_steps(f"{bucket}/run")
    assert step < STEPS


# ---- Combining the statuses of the workers ----


@pytest.mark.parametrize(
    ("workers", "code", "message"),
    [
        ([WorkerStatus(0, RunStatus.DONE), WorkerStatus(1, RunStatus.DONE)], EXIT_DONE, ""),
        ([WorkerStatus(0, RunStatus.STOPPED), WorkerStatus(1, RunStatus.STOPPED)], EXIT_STOPPED, ""),
        (
            [WorkerStatus(0, RunStatus.REFUSED, "a.b: wrong"), WorkerStatus(1, RunStatus.REFUSED, "a.b: wrong")],
            EXIT_REFUSED,
            "a.b: wrong",
        ),
        (
            [WorkerStatus(1, RunStatus.REFUSED, "a.b: wrong", 2.0), WorkerStatus(0, RunStatus.CRASHED, "lost", 1.0)],
            EXIT_REFUSED,
            "a.b: wrong",
        ),
        (
            [
                WorkerStatus(0, RunStatus.CRASHED, "the other is gone", 2.0),
                WorkerStatus(1, RunStatus.CRASHED, "why", 1.0),
            ],
            EXIT_FAILED,
            "rank 1 failed first:\nwhy",
        ),
        (
            [
                WorkerStatus(0, RunStatus.CRASHED, "the other is gone", 1.0),
                WorkerStatus(1, RunStatus.KILLED, "SIGSEGV", 2.0),
            ],
            EXIT_FAILED,
            "rank 1 was killed by SIGSEGV",
        ),
        (
            [
                WorkerStatus(0, RunStatus.HUNG, "rank 1 did not come", 1.0),
                WorkerStatus(1, RunStatus.KILLED, "SIGKILL", 2.0),
            ],
            EXIT_FAILED,
            "rank 1 did not come",
        ),
        (
            [WorkerStatus(1, RunStatus.NO_PROGRESS, "no"), WorkerStatus(0, RunStatus.CRASHED, "the other is gone")],
            EXIT_NO_PROGRESS,
            "no",
        ),
        (
            [WorkerStatus(0, RunStatus.DONE)],
            EXIT_FAILED,
            "rank 1 exited without reporting a status (killed? out of memory?)",
        ),
        ([], EXIT_FAILED, "ranks [0, 1] exited without reporting a status (killed? out of memory?)"),
    ],
)
def test_worker_statuses_become_one_message_and_exit_code(
    tmp_path: Path, workers: list[WorkerStatus], code: int, message: str
) -> None:
    for worker in workers:
        record(tmp_path, worker)
    assert _combine(worker_status.read_all(tmp_path), 2, 1)[:2] == (code, message)


def test_partial_status_file_is_not_read(tmp_path: Path) -> None:
    record(tmp_path, WorkerStatus(3, RunStatus.CRASHED, "a traceback", 5.0))
    (tmp_path / "rank-4.partial").write_bytes(b'{"rank": 4, "sta')
    assert worker_status.read_all(tmp_path) == [WorkerStatus(3, RunStatus.CRASHED, "a traceback", 5.0)]
