"""Which interface the workers of a node use, as this machine's system says it, and what a blocked way looks like."""

import socket
from pathlib import Path

import psutil
import pytest

from job.errors import UserError
from job.launcher import interface
from job.launcher import ring_check as link
from job.launcher.environment import Rendezvous
from job.launcher.interface import Interface
from job.launcher.ring_check import Link
from job.preflight.check import network_towards

LOOPBACK, BOTH = Interface("lo", "127.0.0.1"), {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
OWN = [
    (name, one.address)
    for name, addresses in psutil.net_if_addrs().items()
    for one in addresses
    if one.family == socket.AF_INET and psutil.net_if_stats()[name].isup
]
"""The addresses of this machine, each with its interface."""


@pytest.fixture(autouse=True)
def no_file_of_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_NCCL_FILES", ())


def link_of(node: int, address: str = "127.0.0.1", port: int = 0, first: str = "", network: str = "") -> Link:
    return Link(f"host{node}", node, address, port, first, network)


@pytest.mark.parametrize(("name", "address"), OWN)
def test_an_address_of_this_machine_is_of_the_interface_that_has_it(name: str, address: str) -> None:
    # The kernel sends to it over the loopback interface.
    assert interface.leading_to(address) == interface.with_address(address) == Interface(name, address)


@pytest.mark.parametrize(("name", "address"), OWN)
def test_a_check_tells_the_interface_unless_the_nodes_find_it_when_they_meet(name: str, address: str) -> None:
    said = network_towards(Rendezvous(address, 29500))
    if address.startswith("127."):  # as where /etc/hosts says that of the first node's own name
        assert said == f"found when the nodes meet; from here, {address} leads to no other machine"
    else:
        assert said == f"{name} (leads to {address}:29500); this node has {address} there"


def test_an_address_of_another_machine_has_no_interface_here() -> None:
    assert interface.with_address("203.0.113.7") is None
    assert interface.leading_to("127.0.7.1") == LOOPBACK


def test_the_interface_is_set_for_gloo_and_nccl_unless_the_user_has_set_one() -> None:
    found = Interface("eth0", "10.0.0.5")
    assert interface.variables(found, {}) == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert interface.variables(found, {"GLOO_SOCKET_IFNAME": "ib0"}) == {"NCCL_SOCKET_IFNAME": "=eth0"}
    assert interface.variables(found, {"NCCL_SOCKET_IFNAME": "ib"}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert interface.variables(found, {"NCCL_SOCKET_IFNAME": ""}).keys() == BOTH


def test_nccl_takes_the_address_family_that_leads_to_the_other_nodes() -> None:
    found = Interface("eth0", "fd00::1")
    assert interface.variables(found, {})["NCCL_SOCKET_FAMILY"] == "AF_INET6"
    assert interface.variables(found, {"NCCL_SOCKET_FAMILY": "AF_INET"}).keys() == BOTH
    assert interface.variables(found, {"NCCL_SOCKET_IFNAME": "eth1"}).keys() == {"GLOO_SOCKET_IFNAME"}


def test_a_file_of_nccl_is_a_setting_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, found = tmp_path / "nccl.conf", Interface("eth0", "10.0.0.5")
    monkeypatch.setattr(interface, "_NCCL_FILES", (str(tmp_path / "none"), str(file)))
    file.write_text("# NCCL_SOCKET_IFNAME=eth9\nNCCL_DEBUG=WARN\n")
    assert interface.variables(found, {}).keys() == BOTH
    file.write_text("NCCL_DEBUG=WARN\n NCCL_SOCKET_IFNAME = ib0\n")
    assert interface.variables(found, {}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert interface.described(found, "10.0.0.5:1", {}) == f"eth0 (leads to 10.0.0.5:1) and what {file} says"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "eth0 (leads to 10.0.0.5:1)"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, "eth0 (leads to 10.0.0.5:1) and ib0 (GLOO_SOCKET_IFNAME)"),
        (
            {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib"},
            "ib0 (GLOO_SOCKET_IFNAME) and ib (NCCL_SOCKET_IFNAME)",
        ),
    ],
)
def test_the_interfaces_are_told_with_the_reason(environment: dict[str, str], words: str) -> None:
    assert interface.described(Interface("eth0", "10.0.0.6"), "10.0.0.5:1", environment) == words


def test_gloo_takes_the_first_address_of_an_interface_and_refuses_one_that_is_not_there() -> None:
    assert interface.of_gloo(LOOPBACK, {}) == LOOPBACK
    assert interface.of_gloo(Interface("eth0", "10.0.0.6"), {"GLOO_SOCKET_IFNAME": "lo"}) == LOOPBACK
    with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME: 'lo,no-such': .* has no such interface; it has .*lo"):
        interface.of_gloo(None, {"GLOO_SOCKET_IFNAME": "lo,no-such"})


def test_node_0_takes_the_interface_by_which_it_was_reached_and_not_what_its_name_stands_for() -> None:
    name, address = OWN[-1]
    assert link.interface_towards([link_of(1, "203.0.113.7", first=address)]) == Interface(name, address)
    # What forwards to node 0 has an address that node 0 does not have.
    assert link.interface_towards([link_of(1, "127.0.0.1", first="203.0.113.1")]) == LOOPBACK


def test_the_interfaces_of_all_nodes_are_one_line() -> None:
    same = [link_of(node, network="eth0 (leads to n0:1)") for node in range(3)]
    assert link.described(same) == "network: eth0 (leads to n0:1), on all 3 nodes"
    other = link_of(3, network="ens5 (leads to n0:1)")
    assert link.described([*same, other]) == (
        "network: eth0 (leads to n0:1), on nodes [0, 1, 2]; ens5 (leads to n0:1), on nodes [3]"
    )
    assert link.listed(list(range(30))) == "[0, 1, 2, 3, 4, 5, 6, 7] and 22 more"


def test_a_node_that_does_not_answer_is_one_line_with_both_addresses() -> None:
    listening = link.listen_at("127.0.0.1")
    assert listening is not None
    theirs = link_of(1, port=listening.getsockname()[1])
    link.reach(link_of(0, "10.0.0.5"), theirs)
    listening.close()
    with pytest.raises(link.NodesApart) as raised:
        link.reach(link_of(0, "10.0.0.5"), theirs)
    said = str(raised.value)
    assert said.startswith("host0 (node 0, 10.0.0.5) has met host1 (node 1, 127.0.0.1), but cannot connect to it at ")
    assert "connection refused" in said and "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: "
            "Connection timed out, remote=[10.77.0.1]:1971$1",
            "cannot connect to one at 10.77.0.1: Connection timed out; ",
        ),
        (
            "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.h:311] Connect timeout [none]",
            "no worker of another node has connected to one of ",
        ),
        (
            "NCCL error in: /src/ProcessGroupNCCL.cpp:94, remote process exited or there was a network error\n"
            "Last error:\nconnect to 10.67.10.124<36085> returned Connection refused, exceeded error retry count "
            "after 35 attempts",
            "cannot connect to one at 10.67.10.124: Connection refused; ",
        ),
    ],
    ids=["Gloo, who connects", "Gloo, who is connected to", "NCCL"],
)
def test_workers_that_cannot_connect_to_each_other_are_told_in_one_line(text: str, part: str) -> None:
    said = interface.join_error(RuntimeError(text))
    assert said is not None
    assert part in said and socket.gethostname() in said and "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in said
    assert "\n" not in said


def test_other_errors_keep_their_traceback() -> None:
    assert interface.join_error(RuntimeError("Gloo AllReduce failed: Connection closed by peer")) is None
    assert interface.join_error(ValueError("Gloo connectFullMesh failed ... Connect timeout")) is None
