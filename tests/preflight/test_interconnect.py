"""What NCCL takes between nodes, on machines whose /sys and /dev are made here."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from job.preflight import interconnect
from job.preflight.findings import RIGHT, UNSURE, WRONG, Finding, Findings


@dataclass
class Node:
    """A folder with the /sys and /dev of a node, and the libraries that it has."""

    folder: Path
    libraries: set[str] = field(default_factory=lambda: {"libibverbs.so.1"})
    lockable_bytes: int | None = None

    def card(self, name: str, state: str = "4: ACTIVE", layer: str = "InfiniBand", vendor: str = "0x02c9") -> None:
        port = self.folder / "sys/class/infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "link_layer").write_text(f"{layer}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
        (port.parent.parent / "device").mkdir()
        (port.parent.parent / "device/vendor").write_text(f"{vendor}\n")

    def interface(self, name: str, state: str = "up", speed: str = "10000") -> None:
        folder = self.folder / "sys/class/net" / name
        folder.mkdir(parents=True)
        (folder / "operstate").write_text(f"{state}\n")
        (folder / "speed").write_text(f"{speed}\n")

    def open_devices(self) -> None:
        (self.folder / "dev/infiniband").mkdir(parents=True)
        (self.folder / "dev/infiniband/uverbs0").touch()

    def found(self, **environment: str) -> Finding:
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
    node.interface("lo", "unknown", "")
    node.interface("docker0")
    node.interface("veth1234")
    node.interface("eth0")
    return node


@pytest.mark.parametrize(("layer", "kind"), [("InfiniBand", "InfiniBand"), ("Ethernet", "RoCE")])
def test_active_ports_that_can_be_opened_are_taken(node: Node, layer: str, kind: str) -> None:
    node.open_devices()
    node.card("mlx5_0", layer=layer)
    node.card("mlx5_1", layer=layer)
    node.card("mlx5_2", "1: DOWN", layer)
    row = node.found()
    assert (row.mark, row.found) == (RIGHT, f"NCCL takes {kind}: mlx5_0 (400 Gb/sec), mlx5_1 (400 Gb/sec)")


def test_of_many_ports_four_are_shown(node: Node) -> None:
    node.open_devices()
    for number in range(8):
        node.card(f"mlx5_{number}")
    assert node.found().found.endswith("mlx5_3 (400 Gb/sec) and 4 more")


def test_without_a_card_it_is_tcp_which_is_slow(node: Node) -> None:
    row = node.found()
    assert row.mark == UNSURE
    no_card = "no InfiniBand, RoCE or EFA in /sys/class/infiniband"
    assert row.found == f"NCCL takes TCP over eth0 (10 Gb/s) ({no_card}): slow on several nodes"


@pytest.mark.parametrize(
    ("lack", "said", "remedy"),
    [
        ("library", "libibverbs is missing", "install libibverbs1"),
        ("devices", "dev/infiniband is not in this container", "--device /dev/infiniband"),
        ("port", "no port of mlx5_0 (400 Gb/sec) is active", "bring the port up"),
    ],
)
def test_what_keeps_a_card_from_being_taken_is_named(node: Node, lack: str, said: str, remedy: str) -> None:
    node.card("mlx5_0", "1: DOWN" if lack == "port" else "4: ACTIVE")
    if lack != "devices":
        node.open_devices()
    if lack == "library":
        node.libraries.clear()
    row = node.found()
    assert row.mark == UNSURE and "NCCL takes TCP over eth0" in row.found
    assert said in row.found and remedy in row.remedy
    forced = node.found(NCCL_NET="IB")
    assert forced.mark == WRONG and said in forced.found and "would not start" in forced.found


def test_a_low_limit_of_locked_memory_is_named(node: Node) -> None:
    node.open_devices()
    node.card("mlx5_0")
    node.lockable_bytes = 65536
    row = node.found()
    assert row.mark == UNSURE and "only 64 KiB" in row.found and "memlock=-1" in row.remedy


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"NCCL_NET": "Socket"}, "NCCL_NET says so"),
        ({"NCCL_IB_DISABLE": "1"}, "NCCL_IB_DISABLE says so"),
        ({"NCCL_IB_HCA": "mlx4"}, "NCCL_IB_HCA=mlx4 names none of mlx5_0"),
        ({"NCCL_IB_HCA": "^mlx5_0:1"}, "NCCL_IB_HCA=^mlx5_0:1 names none of mlx5_0"),
    ],
)
def test_variables_that_turn_infiniband_off_are_honoured_and_named(
    node: Node, environment: dict[str, str], said: str
) -> None:
    node.open_devices()
    node.card("mlx5_0")
    row = node.found(**environment)
    assert row.mark == UNSURE and "NCCL takes TCP over eth0" in row.found and said in row.found


@pytest.mark.parametrize("named", ["mlx5", "mlx5_0,mlx5_1", "=mlx5_0:1", "^mlx5_1", "mlx5_0:1"])
def test_cards_that_are_named_are_taken(node: Node, named: str) -> None:
    node.open_devices()
    node.card("mlx5_0")
    assert node.found(NCCL_IB_HCA=named, NCCL_IB_DISABLE="0").mark == RIGHT


def test_efa_takes_a_plugin(node: Node) -> None:
    node.open_devices()
    node.card("rdmap79s0", layer="Unspecified", vendor="0x1d0f")
    row = node.found()
    assert row.mark == UNSURE and "there is EFA, rdmap79s0 (400 Gb/sec), but no plugin for it" in row.found
    assert "EFA_VERSION" in row.remedy
    node.libraries.add("libnccl-net.so")
    assert (node.found().mark, node.found().found) == (RIGHT, "NCCL takes EFA: rdmap79s0 (400 Gb/sec)")
    assert node.found(NCCL_NET_PLUGIN="none").mark == UNSURE
    assert node.found(NCCL_NET="Socket").mark == UNSURE


def test_a_plugin_that_is_named_decides(node: Node) -> None:
    row = node.found(NCCL_NET_PLUGIN="gIB")
    assert row.mark == UNSURE and "NCCL_NET_PLUGIN gIB" in row.found and "NCCL_DEBUG=INFO" in row.remedy
    row = node.found(NCCL_NET="AWS Libfabric")
    assert row.mark == WRONG and "no plugin libnccl-net.so" in row.found


@pytest.mark.parametrize(
    ("named", "over"),
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
def test_the_interface_is_the_one_that_nccl_would_choose(node: Node, named: str, over: str) -> None:
    node.interface("eth1", speed="25000")
    node.interface("eth2", "down")
    node.interface("ib0", speed="-1")
    assert f"TCP over {over}" in node.found(NCCL_SOCKET_IFNAME=named).found


def test_an_interface_that_is_not_there_is_wrong(node: Node) -> None:
    row = node.found(NCCL_SOCKET_IFNAME="bond0")
    assert row.mark == WRONG and "NCCL_SOCKET_IFNAME=bond0 names no interface" in row.found
    assert "docker0, eth0" in row.remedy


def test_this_machine_is_asked_without_a_mistake() -> None:
    findings = Findings()
    interconnect.check_interconnect(findings, {})
    assert [row.name for row in findings.rows] == ["between nodes"]
