"""Tests of the choice of the network interface, with this machine's interfaces, and of connection errors."""

import socket
from pathlib import Path

import psutil
import pytest

from job.errors import UserError
from job.launcher import interface, ring_check
from job.launcher.environment import Rendezvous
from job.launcher.interface import Interface
from job.launcher.ring_check import NodeAddress
from job.preflight.check import network_towards

LOOPBACK, BOTH = Interface("lo", "127.0.0.1"), {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
OWN = [
    (name, entry.address)
    for name, addresses in psutil.net_if_addrs().items()
    for entry in addresses
    if entry.family == socket.AF_INET and psutil.net_if_stats()[name].isup
]
"""Pairs of interface and IPv4 address of this machine."""


@pytest.fixture(autouse=True)
def no_nccl_configuration_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interface, "_NCCL_FILES", ())


def address_of(node: int, address: str = "127.0.0.1", port: int = 0, first: str = "", network: str = "") -> NodeAddress:
    return NodeAddress(f"host{node}", node, address, port, first, network)


@pytest.mark.parametrize(("name", "address"), OWN)
def test_own_address_belongs_to_its_interface(name: str, address: str) -> None:
    # This holds although the kernel uses the loopback interface to send to an own address.
    assert interface.leading_to(address) == interface.find_by_address(address) == Interface(name, address)


@pytest.mark.parametrize(("name", "address"), OWN)
def test_check_names_the_interface_unless_it_is_loopback(name: str, address: str) -> None:
    said = network_towards(Rendezvous(address, 29500))
    if address.startswith("127."):  # For example, /etc/hosts on node 0 may have this address for its own host name.
        assert said == f"chosen when the nodes meet; from here, {address} leads to no other machine"
    else:
        assert said == f"{name} (leads to {address}:29500); the address of this node there is {address}"


def test_address_of_another_machine_has_no_interface() -> None:
    assert interface.find_by_address("203.0.113.7") is None
    assert interface.leading_to("127.0.7.1") == LOOPBACK


def test_interface_is_set_for_gloo_and_nccl_unless_user_set_one() -> None:
    found = Interface("eth0", "10.0.0.5")
    assert interface.variables(found, {}) == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}
    assert interface.variables(found, {"GLOO_SOCKET_IFNAME": "ib0"}) == {"NCCL_SOCKET_IFNAME": "=eth0"}
    assert interface.variables(found, {"NCCL_SOCKET_IFNAME": "ib"}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    assert interface.variables(found, {"NCCL_SOCKET_IFNAME": ""}).keys() == BOTH


def test_nccl_uses_the_address_family_of_the_interface() -> None:
    found = Interface("eth0", "fd00::1")
    assert interface.variables(found, {})["NCCL_SOCKET_FAMILY"] == "AF_INET6"
    assert interface.variables(found, {"NCCL_SOCKET_FAMILY": "AF_INET"}).keys() == BOTH
    assert interface.variables(found, {"NCCL_SOCKET_IFNAME": "eth1"}).keys() == {"GLOO_SOCKET_IFNAME"}


def test_interface_in_nccl_configuration_file_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, found = tmp_path / "nccl.conf", Interface("eth0", "10.0.0.5")
    monkeypatch.setattr(interface, "_NCCL_FILES", (str(tmp_path / "none"), str(file)))
    file.write_text("# NCCL_SOCKET_IFNAME=eth9\nNCCL_DEBUG=WARN\n")
    assert interface.variables(found, {}).keys() == BOTH
    file.write_text("NCCL_DEBUG=WARN\n NCCL_SOCKET_IFNAME = ib0\n")
    assert interface.variables(found, {}) == {"GLOO_SOCKET_IFNAME": "eth0"}
    words = f"eth0 (leads to 10.0.0.5:1) and the one that {file} sets for NCCL"
    assert interface.describe_choice(found, "10.0.0.5:1", {}) == words


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
def test_interfaces_are_described_with_the_reason(environment: dict[str, str], words: str) -> None:
    assert interface.describe_choice(Interface("eth0", "10.0.0.6"), "10.0.0.5:1", environment) == words


def test_gloo_uses_first_address_and_refuses_missing_interface() -> None:
    assert interface.gloo_interface(LOOPBACK, {}) == LOOPBACK
    assert interface.gloo_interface(Interface("eth0", "10.0.0.6"), {"GLOO_SOCKET_IFNAME": "lo"}) == LOOPBACK
    with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME: 'lo,no-such': .* has no such interface; it has .*lo"):
        interface.gloo_interface(None, {"GLOO_SOCKET_IFNAME": "lo,no-such"})


def test_node_0_uses_the_interface_at_which_it_was_reached() -> None:
    name, address = OWN[-1]
    assert ring_check.interface_of_node_0([address_of(1, "203.0.113.7", first=address)]) == Interface(name, address)
    # With port forwarding, the others reach node 0 at an address that node 0 does not have.
    assert ring_check.interface_of_node_0([address_of(1, "127.0.0.1", first="203.0.113.1")]) == LOOPBACK


def test_interfaces_of_all_nodes_are_described_in_one_line() -> None:
    same = [address_of(node, network="eth0 (leads to n0:1)") for node in range(3)]
    assert ring_check.describe_networks(same) == "network: eth0 (leads to n0:1), on all 3 nodes"
    other = address_of(3, network="ens5 (leads to n0:1)")
    assert ring_check.describe_networks([*same, other]) == (
        "network: eth0 (leads to n0:1), on nodes [0, 1, 2]; ens5 (leads to n0:1), on nodes [3]"
    )
    assert ring_check.list_nodes(list(range(30))) == "[0, 1, 2, 3, 4, 5, 6, 7] and 22 more"


def test_unreachable_node_is_reported_with_both_addresses() -> None:
    listening = ring_check.listen_at("127.0.0.1")
    assert listening is not None
    other = address_of(1, port=listening.getsockname()[1])
    ring_check.check_connection(address_of(0, "10.0.0.5"), other)
    listening.close()
    with pytest.raises(ring_check.NodeUnreachable) as raised:
        ring_check.check_connection(address_of(0, "10.0.0.5"), other)
    said = str(raised.value)
    assert said.startswith("host0 (node 0, 10.0.0.5) cannot connect to host1 (node 1, 127.0.0.1) at that address, ")
    assert "connection refused" in said and "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: "
            "Connection timed out, remote=[10.77.0.1]:1971$1",
            "cannot connect to a worker at 10.77.0.1: Connection timed out; ",
        ),
        (
            "Gloo connectFullMesh failed with [/gloo/transport/tcp/pair.h:311] Connect timeout [none]",
            " received no connection from a worker of another node; ",
        ),
        (
            "NCCL error in: /src/ProcessGroupNCCL.cpp:94, remote process exited or there was a network error\n"
            "Last error:\nconnect to 10.67.10.124<36085> returned Connection refused, exceeded error retry count "
            "after 35 attempts",
            "cannot connect to a worker at 10.67.10.124: Connection refused; ",
        ),
    ],
    ids=["Gloo, connecting worker", "Gloo, waiting worker", "NCCL"],
)
def test_connection_errors_of_workers_become_one_line(text: str, part: str) -> None:
    said = interface.connection_error(RuntimeError(text))
    assert said is not None
    assert part in said and socket.gethostname() in said and "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in said
    assert "\n" not in said


def test_other_errors_are_not_connection_errors() -> None:
    assert interface.connection_error(RuntimeError("Gloo AllReduce failed: Connection closed by peer")) is None
    assert interface.connection_error(ValueError("Gloo connectFullMesh failed ... Connect timeout")) is None
