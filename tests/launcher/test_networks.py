"""Tests of runs of two nodes, each on a virtual machine whose network is not configured for training."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import machines
import pytest
from machines import Machine
from small_run import ENDLESS, DataSet, Job, prepare_sample_at, saved_steps, write_settings

from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_REFUSED

pytestmark = [pytest.mark.recovery, pytest.mark.skipif(machines.CANNOT, reason=machines.WHY_NOT)]

PORT = 29500
IPV4, IPV6 = ("10.77.0.1/24", "10.77.0.2/24"), ("fd77::1/64", "fd77::2/64")
DEBIAN = "127.0.0.1 localhost\n127.0.1.1 {name}\n"
"""Hosts file as the installers of Debian and Ubuntu write it."""
NO_NAMES = ""
"""Hosts file without any name, as in a container. There is no name server either."""
Written = Callable[..., Path]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("data")
    return prepare_sample_at(str(folder / "shards"), folder)


@pytest.fixture
def settings(data_set: DataSet, tmp_path: Path) -> Written:
    """Return a function that writes the settings of a node: one process, ZeRO-2."""

    def write(**train: Any) -> Path:
        return write_settings(tmp_path, data_set, str(tmp_path / "run"), train={"processes": 1} | train)

    return write


@contextmanager
def started(two: list[Machine], settings: Path, address: str, **more: str) -> Iterator[list[Job]]:
    """Start a run on two machines.

    Args:
        two: the machines.
        settings: settings file.
        address: address of node 0.
        more: environment variables for both nodes.
    """
    variables = {"WIKILLM_NODES": "2", "MASTER_ADDR": address, "MASTER_PORT": str(PORT)} | more
    with ExitStack() as stack:
        yield [
            stack.enter_context(Job("train", settings, under=machine.under, WIKILLM_NODE_RANK=str(rank), **variables))
            for rank, machine in enumerate(two)
        ]


# ---- The nodes can connect ----


@pytest.mark.parametrize(
    ("hosts", "addresses", "master", "met_at"),
    [
        ((DEBIAN, DEBIAN), IPV4, "10.77.0.1", "10.77.0.1:29500"),
        ((DEBIAN, DEBIAN + "10.77.0.1 machine0\n"), IPV4, "machine0", "machine0:29500"),
        ((NO_NAMES, NO_NAMES), IPV4, "10.77.0.1", "10.77.0.1:29500"),
        ((NO_NAMES, NO_NAMES), IPV6, "[fd77::1]", "[fd77::1]:29500"),
    ],
    ids=["127.0.1.1", "node 0's own name is 127.0.1.1 on node 0", "no names", "IPv6"],
)
def test_two_nodes_train_whatever_their_host_names_resolve_to(
    settings: Written, tmp_path: Path, hosts: tuple[str, str], addresses: tuple[str, str], master: str, met_at: str
) -> None:
    with machines.joined(tmp_path, hosts, addresses) as two, started(two, settings(max_steps=5), master) as nodes:
        ends = [node.end() for node in nodes]
    assert [(code, err) for code, _, err in ends] == [(EXIT_DONE, "")] * 2
    assert f"network: cable (leads to {met_at}), on all 2 nodes\n" in ends[0][1]
    assert "step 5/5" in ends[0][1]
    assert ends[1][1] == ""


def test_interface_set_by_the_user_is_used_and_printed(settings: Written, tmp_path: Path) -> None:
    with (
        machines.joined(tmp_path, (DEBIAN, DEBIAN), IPV4) as two,
        started(two, settings(max_steps=1), "10.77.0.1", GLOO_SOCKET_IFNAME="cable", NCCL_SOCKET_IFNAME="cab") as nodes,
    ):
        ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [EXIT_DONE] * 2
    assert "network: cable (GLOO_SOCKET_IFNAME) and cab (NCCL_SOCKET_IFNAME), on all 2 nodes\n" in ends[0][1]


# ---- The nodes cannot connect ----


@pytest.mark.parametrize(("verdict", "why"), [("REJECT", "connection refused"), ("DROP", "timed out")])
def test_firewall_that_allows_only_the_rendezvous_is_one_line(
    settings: Written, tmp_path: Path, verdict: str, why: str
) -> None:
    with machines.joined(tmp_path, (DEBIAN, DEBIAN), IPV4) as two:
        for machine in two:
            machine.block_all_ports_but(PORT, verdict)
        with started(two, settings(), "10.77.0.1") as nodes:
            ends = [node.end() for node in nodes]
    (code, _, line), (other_code, _, other_line) = ends
    assert (code, other_code) == (EXIT_FAILED, EXIT_FAILED)
    assert line == other_line
    assert line.count("\n") == 1
    for part in ("machine0 (node 0, 10.77.0.1)", "machine1 (node 1, 10.77.0.2)", why, "firewall", "GLOO_SOCKET_IFNAME"):
        assert part in line


def test_blocked_worker_ports_are_reported_in_one_line(settings: Written, tmp_path: Path) -> None:
    with machines.joined(tmp_path, (DEBIAN, DEBIAN), IPV4) as two:
        for machine in two:
            machine.block_all_ports_but(PORT, "REJECT", spared=1)
        with started(two, settings(), "10.77.0.1") as nodes:
            ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [EXIT_FAILED] * 2
    line = "a worker on machine1, at 10.77.0.2 (cable), cannot connect to a worker at 10.77.0.1: Connection refused; "
    for _, _, err in ends:
        last = err.splitlines()[-1]  # On the node whose worker failed, Gloo prints its own lines before.
        assert last.startswith(line)
        assert "GLOO_SOCKET_IFNAME" in last
        assert "Traceback" not in err


def test_interface_without_route_to_others_is_one_line(settings: Written, tmp_path: Path) -> None:
    with (
        machines.joined(tmp_path, (DEBIAN, DEBIAN), IPV4) as two,
        started(two, settings(), "10.77.0.1", GLOO_SOCKET_IFNAME="lo") as nodes,
    ):
        ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [EXIT_FAILED] * 2
    assert ends[0][2] == ends[1][2]
    assert "at that address, although both joined the rendezvous" in ends[0][2]
    assert "127.0.0.1)" in ends[0][2]
    assert ends[0][2].count("\n") == 1


def test_missing_interface_is_refused_on_all_nodes(settings: Written, tmp_path: Path) -> None:
    with (
        machines.joined(tmp_path, (DEBIAN, DEBIAN), IPV4) as two,
        started(two, settings(), "10.77.0.1", GLOO_SOCKET_IFNAME="ib0") as nodes,
    ):
        ends = [node.end() for node in nodes]
    assert [code for code, _, _ in ends] == [EXIT_REFUSED] * 2
    assert all(err.startswith("GLOO_SOCKET_IFNAME: 'ib0': machine") and "lo, cable" in err for _, _, err in ends)


def test_unreachable_node_0_is_reported_with_own_address(settings: Written, tmp_path: Path) -> None:
    with (
        machines.joined(tmp_path, (DEBIAN, DEBIAN), IPV4) as two,
        Job(
            "train",
            settings(node_timeout="1s"),
            under=two[1].under,
            WIKILLM_NODES="2",
            WIKILLM_NODE_RANK="1",
            MASTER_ADDR="10.77.0.1",
            MASTER_PORT=str(PORT),
        ) as node,
    ):
        code, _, err = node.end()
    assert code == EXIT_FAILED
    assert err.startswith(
        "node 0 does not answer at 10.77.0.1:29500 (from 10.77.0.2 (cable): connection refused) after "
    )


def test_cut_cable_ends_both_nodes(settings: Written, tmp_path: Path) -> None:
    with (
        machines.joined(tmp_path, (DEBIAN, DEBIAN), IPV4) as two,
        started(two, settings(**ENDLESS), "10.77.0.1") as nodes,
    ):
        nodes[0].read_until("step 3/")
        two[0].cut()
        ends = [node.end() for node in nodes]
    assert [(code, err) for code, _, err in ends] == [
        (EXIT_FAILED, "machine1 (node 1) stopped responding (killed? machine or network down?)\n"),
        (EXIT_FAILED, "machine0 (node 0) stopped responding (killed? machine or network down?)\n"),
    ]
    assert saved_steps(str(tmp_path / "run")) == []
