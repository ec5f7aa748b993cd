"""Tests of runs on several nodes, which are separate processes here: they meet, and end with the same exit code."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    ENDLESS,
    REPOSITORY,
    STEPS,
    DataSet,
    Job,
    checkpoint_urls,
    free_port,
    run,
    saved_steps,
    still_alive,
    write_settings,
)

from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from job.runs.checkpoint import open_checkpoint

pytestmark = pytest.mark.recovery

THREE = {"global_batch_size": 12}
"""Settings whose global batch can be divided among three nodes."""
Written = Callable[..., Path]


@pytest.fixture
def settings(data_set: DataSet, bucket: str, tmp_path: Path) -> Written:
    """Return a function that writes the settings of a node: one process, ZeRO-2."""

    def write(output: str = "run", **changes: Any) -> Path:
        train = {"processes": 1} | changes.pop("train", {})
        return write_settings(tmp_path, data_set, f"{bucket}/{output}", train=train, **changes)

    return write


def environment(rank: int, nodes: int, port: int) -> dict[str, str]:
    return {
        "WIKILLM_NODES": str(nodes),
        "WIKILLM_NODE_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@contextmanager
def started(*settings: Path, **more: str) -> Iterator[list[Job]]:
    """Start a run with one node for each settings file; `more` are environment variables for all nodes."""
    port = free_port()
    with ExitStack() as stack:
        yield [
            stack.enter_context(Job("train", path, **environment(rank, len(settings), port), **more))
            for rank, path in enumerate(settings)
        ]


def weight_checksums(output: str) -> dict[str, str]:
    last = open_checkpoint(checkpoint_urls(output)[-1])
    return {name: file.sha256 for name, file in last.files.items() if "safetensors" in name}


# ---- Without failures ----


def test_two_nodes_train_the_same_model_as_one_node(settings: Written, bucket: str) -> None:
    alone = settings("alone", train={"processes": 2})
    with started(settings(), settings()) as nodes, Job("train", alone) as job:
        ends = [node.end() for node in [*nodes, job]]
    assert [(code, err) for code, _, err in ends] == [(EXIT_DONE, "")] * 3
    assert f"step {STEPS}/{STEPS}" in ends[0][1]
    assert ends[1][1] == ""
    assert weight_checksums(f"{bucket}/run") == weight_checksums(f"{bucket}/alone")


def test_signal_to_one_node_stops_all_nodes_at_the_same_step(settings: Written, bucket: str) -> None:
    path = settings(train=ENDLESS)
    with started(path, path) as nodes:
        nodes[0].read_until("step 3/")
        nodes[1].process.send_signal(signal.SIGTERM)
        ends = [node.end() for node in nodes]
    assert [(code, err) for code, _, err in ends] == [(EXIT_STOPPED, "")] * 2
    assert len(saved_steps(f"{bucket}/run")) == 1


# ---- A node fails ----


def test_failed_worker_ends_all_nodes_with_traceback_on_its_own(settings: Written) -> None:
    paths = [str(Path(__file__).with_name("failing_rank")), str(REPOSITORY)]
    path = settings(train=ENDLESS)
    with started(path, path, PYTHONPATH=os.pathsep.join(paths)) as nodes:
        ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [EXIT_FAILED] * 2
    assert ends[0][2] == "rank 1 failed first; see the log of node 1\n"
    assert ends[1][2].startswith("rank 1 failed first:\nTraceback (most recent call last):\n")
    assert ends[1][2].rstrip().endswith("ValueError: rank 1 has had enough")


def test_killed_worker_is_named_on_all_nodes(settings: Written) -> None:
    path = settings(train=ENDLESS)
    with started(path, path) as nodes:
        nodes[0].read_until("step 3/")
        everyone = [process for node in nodes for process in node.descendants()]
        nodes[1].workers()[0].kill()
        ends = [node.end() for node in nodes]
        assert still_alive(everyone) == []
    killed = "rank 1 was killed by SIGKILL (out of memory? try a smaller train.micro_batch_size)\n"
    assert [(code, err) for code, _, err in ends] == [(EXIT_FAILED, killed)] * 2


@pytest.mark.parametrize("lost", [0, 1])
def test_lost_node_is_named_by_the_other_node(settings: Written, lost: int) -> None:
    path = settings(train=ENDLESS)
    with started(path, path) as nodes:
        nodes[0].read_until("step 3/")
        nodes[lost].process.kill()
        code, _, err = nodes[1 - lost].end(seconds=60)
    message = f"{socket.gethostname()} (node {lost}) stopped responding (killed? machine or network down?)\n"
    assert (code, err) == (EXIT_FAILED, message)


def test_replacement_node_waits_until_the_others_restart(settings: Written) -> None:
    path, port = settings(train=ENDLESS), free_port()
    with (
        Job("train", path, **environment(0, 2, port)) as first,
        Job("train", path, **environment(1, 2, port)) as lost,
    ):
        first.read_until("step 3/")
        lost.process.kill()
        with Job("train", path, **environment(1, 2, port)) as second:
            assert first.end()[0] == EXIT_FAILED
            with Job("train", path, **environment(0, 2, port)) as again:
                again.read_until("step 3/")
                again.process.send_signal(signal.SIGTERM)
                assert [node.end()[0] for node in (again, second)] == [EXIT_STOPPED] * 2


# ---- The nodes do not meet ----


def test_different_settings_are_refused_on_all_nodes(settings: Written, bucket: str) -> None:
    with started(settings(), settings(train={"learning_rate": 3e-3})) as nodes:
        ends = [node.end() for node in nodes]
    here = socket.gethostname()
    line = (
        f"train.learning_rate: 0.003: is the value on {here} (node 1), but {here} (node 0) has 0.01; "
        "start the same command, with the same image and settings, on all nodes\n"
    )
    assert [(code, err) for code, _, err in ends] == [(EXIT_REFUSED, line)] * 2
    assert saved_steps(f"{bucket}/run") == []


def test_different_numbers_of_processes_are_refused(settings: Written) -> None:
    with started(settings(), settings(train={"processes": 2})) as nodes:
        ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [EXIT_REFUSED] * 2
    assert all(err.startswith("train.processes: 2: is the value on ") for _, _, err in ends)


@pytest.mark.parametrize(
    ("rank", "missing"),
    [(0, "nodes [1, 2] of 3 have not joined at 127.0.0.1:"), (1, "node 0 does not answer at 127.0.0.1:")],
)
def test_missing_nodes_are_named_after_the_timeout(settings: Written, rank: int, missing: str) -> None:
    path = settings(train=THREE | {"node_timeout": "1s"})
    code, out, err = run("train", path, **environment(rank, 3, free_port()))
    assert (code, out) == (EXIT_FAILED, "")
    assert err.startswith(missing)
    assert err.count("\n") == 1


def test_waiting_node_can_be_stopped_and_late_node_can_join(settings: Written) -> None:
    path, port = settings(train={"max_steps": 1}), free_port()
    with Job("train", path, **environment(1, 2, port)) as early:
        assert early.process.stderr is not None
        assert early.process.stderr.readline().startswith(b"waiting for 10 s: node 0 does not answer at ")
        early.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code, out, err = early.end()
    assert (code, out, err) == (EXIT_STOPPED, "", "")
    assert time.monotonic() - began < 60
    with (
        Job("train", path, **environment(0, 2, port)) as first,
        Job("train", path, **environment(1, 2, port)) as second,
    ):
        assert [node.end()[0] for node in (first, second)] == [EXIT_DONE] * 2


def test_node_of_another_job_at_the_same_port_does_not_join(settings: Written) -> None:
    path, port = settings(train=THREE | {"node_timeout": "8s"}), free_port()
    nodes = [environment(0, 3, port), environment(1, 3, port), environment(2, 3, port) | {"WIKILLM_JOB_ID": "another"}]
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job("train", path, **node)) for node in nodes]
        assert [job.end()[0] for job in jobs] == [EXIT_FAILED] * 3


def test_rendezvous_address_of_another_machine_is_an_error(settings: Written) -> None:
    elsewhere = environment(0, 2, free_port()) | {"MASTER_ADDR": "192.0.2.1"}
    code, _, err = run("train", settings(train={"node_timeout": "1s"}), **elsewhere)
    assert code == EXIT_FAILED
    assert err.startswith("the rendezvous address 192.0.2.1 does not reach node 0, which is this node")


def test_stop_request_reaches_nodes_that_wait_for_another(settings: Written) -> None:
    path, port = settings(train=THREE), free_port()
    with (
        Job("train", path, **environment(0, 3, port)) as first,
        Job("train", path, **environment(1, 3, port)) as second,
    ):
        assert first.process.stderr is not None and second.process.stderr is not None
        assert first.process.stderr.readline().startswith(b"waiting for 10 s: nodes [2] of 3 have not joined at ")
        assert second.process.stderr.readline().startswith(b"waiting for 10 s: node 0 at ")
        second.process.send_signal(signal.SIGTERM)
        assert [node.end()[0] for node in (first, second)] == [EXIT_STOPPED] * 2
