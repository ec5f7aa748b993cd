"""Several nodes, each a process of its own as on a machine of its own: they meet, and end with one exit code."""

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
    prepare_sample,
    run,
    saved_steps,
    still_alive,
    write_settings,
)

from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED
from job.runs.checkpoint import open_checkpoint

pytestmark = pytest.mark.recovery

THREE = {"global_batch_size": 12}
"""Settings of a run that can be cut into three."""
Written = Callable[..., Path]


@pytest.fixture(scope="module")
def data_set(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return prepare_sample(s3_server, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def settings(data_set: DataSet, bucket: str, tmp_path: Path) -> Written:
    """Writes the settings of a node: one process, ZeRO-2."""

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
    """A run over as many nodes as there are settings."""
    port = free_port()
    with ExitStack() as stack:
        yield [
            stack.enter_context(Job("train", path, **environment(rank, len(settings), port), **more))
            for rank, path in enumerate(settings)
        ]


def sums(output: str) -> dict[str, str]:
    last = open_checkpoint(checkpoint_urls(output)[-1])
    return {name: file.sha256 for name, file in last.files.items() if "safetensors" in name}


# ---- All is well ----


def test_two_nodes_train_what_one_node_with_as_many_processes_trains(settings: Written, bucket: str) -> None:
    alone = settings("alone", train={"processes": 2})
    with started(settings(), settings()) as nodes, Job("train", alone) as job:
        ends = [node.end() for node in [*nodes, job]]
    assert [(code, err) for code, _, err in ends] == [(EXIT_DONE, "")] * 3
    assert f"step {STEPS}/{STEPS}" in ends[0][1]
    assert ends[1][1] == ""
    assert sums(f"{bucket}/run") == sums(f"{bucket}/alone")


def test_a_signal_to_one_node_stops_all_of_them_after_the_same_step(settings: Written, bucket: str) -> None:
    path = settings(train=ENDLESS)
    with started(path, path) as nodes:
        nodes[0].read_until("step 3/")
        nodes[1].process.send_signal(signal.SIGTERM)
        ends = [node.end() for node in nodes]
    assert [(code, err) for code, _, err in ends] == [(EXIT_STOPPED, "")] * 2
    assert len(saved_steps(f"{bucket}/run")) == 1


# ---- One of them fails ----


def test_a_worker_that_raises_ends_all_nodes_and_its_traceback_is_on_its_node_alone(settings: Written) -> None:
    paths = [str(Path(__file__).with_name("failing_rank")), str(REPOSITORY)]
    path = settings(train=ENDLESS)
    with started(path, path, PYTHONPATH=os.pathsep.join(paths)) as nodes:
        ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [EXIT_FAILED] * 2
    assert ends[0][2] == "rank 1 failed first; see the log of node 1\n"
    assert ends[1][2].startswith("rank 1 failed first:\nTraceback (most recent call last):\n")
    assert ends[1][2].rstrip().endswith("ValueError: rank 1 has had enough")


def test_a_killed_worker_is_named_on_all_nodes(settings: Written) -> None:
    path = settings(train=ENDLESS)
    with started(path, path) as nodes:
        nodes[0].read_until("step 3/")
        everyone = [process for node in nodes for process in node.descendants()]
        nodes[1].workers()[0].kill()
        ends = [node.end() for node in nodes]
        assert still_alive(everyone) == []
    killed = "rank 1 was killed by SIGKILL (out of memory? a smaller train.micro_batch_size takes less)\n"
    assert [(code, err) for code, _, err in ends] == [(EXIT_FAILED, killed)] * 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_vanishes_is_named_by_the_other(settings: Written, lost: int) -> None:
    path = settings(train=ENDLESS)
    with started(path, path) as nodes:
        nodes[0].read_until("step 3/")
        nodes[lost].process.kill()
        code, _, err = nodes[1 - lost].end(seconds=60)
    assert (code, err) == (EXIT_FAILED, f"{socket.gethostname()} (node {lost}) is gone\n")


def test_who_takes_the_place_of_a_node_that_is_gone_waits_for_the_others_to_start_again(settings: Written) -> None:
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


# ---- They do not come together ----


def test_what_one_node_alone_refuses_is_refused_by_all(settings: Written, bucket: str) -> None:
    with started(settings(), settings(train={"learning_rate": 3e-3})) as nodes:
        ends = [node.end() for node in nodes]
    here = socket.gethostname()
    line = (
        f"train.learning_rate: 0.003: on {here} (node 1), but 0.01 on {here} (node 0); "
        "start the same command, with the same image and settings, on all nodes\n"
    )
    assert [(code, err) for code, _, err in ends] == [(EXIT_REFUSED, line)] * 2
    assert saved_steps(f"{bucket}/run") == []


def test_a_node_with_another_number_of_processes_is_named(settings: Written) -> None:
    with started(settings(), settings(train={"processes": 2})) as nodes:
        ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [EXIT_REFUSED] * 2
    assert all(err.startswith("train.processes: 2: on ") for _, _, err in ends)


@pytest.mark.parametrize(
    ("rank", "missing"), [(0, "nodes [1, 2] of 3 are not there"), (1, "node 0 does not answer at 127.0.0.1:")]
)
def test_nodes_that_do_not_come_are_named(settings: Written, rank: int, missing: str) -> None:
    path = settings(train=THREE | {"node_timeout": "1s"})
    code, out, err = run("train", path, **environment(rank, 3, free_port()))
    assert (code, out) == (EXIT_FAILED, "")
    assert err.startswith(missing)
    assert err.count("\n") == 1


def test_a_node_may_be_late_and_the_others_stopped_meanwhile(settings: Written) -> None:
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


def test_a_stranger_at_the_same_port_is_not_taken_for_a_node(settings: Written) -> None:
    path, port = settings(train=THREE | {"node_timeout": "8s"}), free_port()
    nodes = [environment(0, 3, port), environment(1, 3, port), environment(2, 3, port) | {"WIKILLM_JOB_ID": "another"}]
    with ExitStack() as stack:
        ends = [stack.enter_context(Job("train", path, **node)) for node in nodes]
        assert [one.end()[0] for one in ends] == [EXIT_FAILED] * 3


def test_an_address_that_is_not_of_the_first_node_is_refused_there(settings: Written) -> None:
    elsewhere = environment(0, 2, free_port()) | {"MASTER_ADDR": "192.0.2.1"}
    code, _, err = run("train", settings(train={"node_timeout": "1s"}), **elsewhere)
    assert code == EXIT_FAILED
    assert err.startswith("192.0.2.1 does not lead to this node")


def test_a_stop_reaches_the_nodes_that_wait_for_another_one(settings: Written) -> None:
    path, port = settings(train=THREE), free_port()
    with (
        Job("train", path, **environment(0, 3, port)) as first,
        Job("train", path, **environment(1, 3, port)) as second,
    ):
        assert first.process.stderr is not None and second.process.stderr is not None
        assert first.process.stderr.readline().startswith(b"waiting for 10 s: nodes [2] of 3 are not there")
        assert second.process.stderr.readline().startswith(b"waiting for 10 s: node 0 at ")
        second.process.send_signal(signal.SIGTERM)
        assert [node.end()[0] for node in (first, second)] == [EXIT_STOPPED] * 2
