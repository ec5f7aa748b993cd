"""What NCCL uses between nodes, on machines whose /sys and /dev are made by the tests."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from job.preflight import interconnect
from job.preflight.findings import RIGHT, UNSURE, WRONG, Finding, Findings


@dataclass
class Node:
    """A folder with the /sys and /dev of a node, and the libraries that are installed."""

    folder: Path
    libraries: set[str] = field(default_factory=lambda: {"libibverbs.so.1"})
    lockable_bytes: int | None = None

    def add_card(self, name: str, state: str = "4: ACTIVE", layer: str = "InfiniBand", vendor: str = "0x02c9") -> None:
        port = self.folder / "sys/class/infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text(f"{layer}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port.parent.parent / "device").mkdir()
        (port.parent.parent / "device/vendor").write_text(f"{vendor}\n")

    def add_interface(self, name: str, state: str = "up", speed: str = "10000") -> None:
        folder = self.folder / "sys/class/net" / name
        folder.mkdir(parents=True)
        (folder / "operstate").write_text(f"{state}\n")
        (folder / "speed").write_text(f"{speed}\n")

    def add_devices(self) -> None:
        (self.folder / "dev/infiniband").mkdir(parents=True)
        (self.folder / "dev/infiniband/uverbs0").touch()

    def row(self, **environment: str) -> Finding:
        findings = Findings()
        interconnect.check_interconnect(
            findings,
            environment,
            self.folder / "sys",
            self.folder / "dev",
            lambda library: library in self.libraries,
            lambda interface: not interface.startswith("veth"),
            lambda: self.lockable_bytes,
        )
        [row] = findings.rows
        assert row.name == "between nodes"
        return row


@pytest.fixture
def node(tmp_path: Path) -> Node:
    node = Node(tmp_path)
    node.add_interface("lo", "unknown", "")
    node.add_interface("docker0")
    node.add_interface("veth1234")
    node.add_interface("eth0")
    return node


@pytest.mark.parametrize(("layer", "kind"), [("InfiniBand", "InfiniBand"), ("Ethernet", "RoCE")])
def test_active_ports_that_can_be_opened_are_used(node: Node, layer: str, kind: str) -> None:
    node.add_devices()
    node.add_card("mlx5_0", layer=layer)
    node.add_card("mlx5_1", layer=layer)
    node.add_card("mlx5_2", "1: DOWN", layer)
    row = node.row()
    assert (row.mark, row.found) == (RIGHT, f"NCCL uses {kind}: mlx5_0 (400 Gb/sec), mlx5_1 (400 Gb/sec)")


def test_row_lists_at_most_four_ports(node: Node) -> None:
    node.add_devices()
    for number in range(8):
        node.add_card(f"mlx5_{number}")
    assert node.row().found.endswith("mlx5_3 (400 Gb/sec) and 4 more")


def test_tcp_is_used_and_called_slow_without_a_card(node: Node) -> None:
    row = node.row()
    assert row.mark == UNSURE
    no_card = "no InfiniBand, RoCE or EFA in /sys/class/infiniband"
    assert row.found == f"NCCL uses TCP over eth0 (10 Gb/s) ({no_card}): slow on several nodes"


@pytest.mark.parametrize(
    ("missing", "reason", "remedy"),
    [
        ("library", "libibverbs is missing", "install libibverbs1"),
        ("devices", "dev/infiniband is not in this container", "--device /dev/infiniband"),
        ("port", "no port of mlx5_0 (400 Gb/sec) is active", "bring the port up"),
    ],
)
def test_row_says_why_a_card_cannot_be_used(node: Node, missing: str, reason: str, remedy: str) -> None:
    node.add_card("mlx5_0", "1: DOWN" if missing == "port" else "4: ACTIVE")
    if missing != "devices":
        node.add_devices()
    if missing == "library":
        node.libraries.clear()
    row = node.row()
    assert row.mark == UNSURE and "NCCL uses TCP over eth0" in row.found
    assert reason in row.found and remedy in row.remedy
    forced = node.row(NCCL_NET="IB")
    assert forced.mark == WRONG and reason in forced.found and "would not start" in forced.found


def test_low_limit_of_locked_memory_is_a_warning(node: Node) -> None:
    node.add_devices()
    node.add_card("mlx5_0")
    node.lockable_bytes = 65536
    row = node.row()
    assert row.mark == UNSURE and "only 64 KiB" in row.found and "memlock=-1" in row.remedy


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"NCCL_NET": "Socket"}, "NCCL_NET says so"),
        ({"NCCL_IB_DISABLE": "1"}, "NCCL_IB_DISABLE says so"),
        ({"NCCL_IB_HCA": "mlx4"}, "NCCL_IB_HCA=mlx4 names none of mlx5_0"),
        ({"NCCL_IB_HCA": "^mlx5_0:1"}, "NCCL_IB_HCA=^mlx5_0:1 names none of mlx5_0"),
    ],
)
def test_variable_that_turns_infiniband_off_is_named(node: Node, environment: dict[str, str], reason: str) -> None:
    node.add_devices()
    node.add_card("mlx5_0")
    row = node.row(**environment)
    assert row.mark == UNSURE and "NCCL uses TCP over eth0" in row.found and reason in row.found


@pytest.mark.parametrize("named", ["mlx5", "mlx5_0,mlx5_1", "=mlx5_0:1", "^mlx5_1", "mlx5_0:1"])
def test_cards_that_nccl_ib_hca_selects_are_used(node: Node, named: str) -> None:
    node.add_devices()
    node.add_card("mlx5_0")
    assert node.row(NCCL_IB_HCA=named, NCCL_IB_DISABLE="0").mark == RIGHT


def test_efa_needs_a_plugin(node: Node) -> None:
    node.add_devices()
    node.add_card("rdmap79s0", layer="Unspecified", vendor="0x1d0f")
    row = node.row()
    assert row.mark == UNSURE and "there is EFA, rdmap79s0 (400 Gb/sec), but no plugin for it" in row.found
    assert "EFA_VERSION" in row.remedy
    node.libraries.add("libnccl-net.so")
    assert (node.row().mark, node.row().found) == (RIGHT, "NCCL uses EFA: rdmap79s0 (400 Gb/sec)")
    assert node.row(NCCL_NET_PLUGIN="none").mark == UNSURE
    assert node.row(NCCL_NET="Socket").mark == UNSURE


def test_named_plugin_decides(node: Node) -> None:
    row = node.row(NCCL_NET_PLUGIN="gIB")
    assert row.mark == UNSURE and "NCCL_NET_PLUGIN gIB" in row.found and "NCCL_DEBUG=INFO" in row.remedy
    row = node.row(NCCL_NET="AWS Libfabric")
    assert row.mark == WRONG and "no plugin libnccl-net.so" in row.found


@pytest.mark.parametrize(
    ("named", "interfaces"),
    [
        *(
            ("", "ib0"),
            ("eth", "eth0 (10 Gb/s), eth1 (25 Gb/s)"),
            ("=eth1", "eth1 (25 Gb/s)"),
            ("^ib,docker,lo", "eth0"),
        ),
        ("docker0", "docker0"),
    ],
)
def test_interfaces_are_those_that_nccl_would_choose(node: Node, named: str, interfaces: str) -> None:
    node.add_interface("eth1", speed="25000")
    node.add_interface("eth2", "down")
    node.add_interface("ib0", speed="-1")
    assert f"TCP over {interfaces}" in node.row(NCCL_SOCKET_IFNAME=named).found


def test_interface_that_does_not_exist_is_wrong(node: Node) -> None:
    row = node.row(NCCL_SOCKET_IFNAME="bond0")
    assert row.mark == WRONG and "NCCL_SOCKET_IFNAME=bond0 names no interface" in row.found
    assert "docker0, eth0" in row.remedy


def test_check_runs_on_this_machine_without_an_error() -> None:
    findings = Findings()
    interconnect.check_interconnect(findings, {})
    assert [row.name for row in findings.rows] == ["between nodes"]
