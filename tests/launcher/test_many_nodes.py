"""Tests of the rendezvous of many nodes, all in this process: load of the store, failures, and the common result."""

import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from small_run import free_port

from job.launcher import node_rendezvous, worker_status
from job.launcher.environment import Rendezvous
from job.launcher.node_info import NodeInfo
from job.launcher.node_rendezvous import NodeRendezvous
from job.launcher.worker_status import WorkerStatus
from job.runs.run_status import RunStatus

SECONDS = 120
ROUNDS = 3
SETTINGS = {f"section.setting{number}": number for number in range(80)}


class CountingStore:
    """Wrapper of torch's store for one node. It counts operations by key."""

    def __init__(self, prefix: str, store: dist.Store) -> None:
        self._store = dist.PrefixStore(prefix, store)
        self.operations: Counter[tuple[str, str]] = Counter()
        """Number of calls by operation and key."""

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        def call(keys: str | Sequence[str], *values: Any) -> Any:
            self.operations.update((operation, key) for key in ([keys] if isinstance(keys, str) else keys))
            return getattr(self._store, operation)(keys, *values)

        return call

    @property
    def keys(self) -> set[str]:
        return {key for _, key in self.operations}

    @property
    def rounds(self) -> int:
        """Number of times that the node has exchanged heartbeats and summary."""
        return self.operations["get", "summary"] or self.operations["multi_get", "heartbeat/1"]


class Group:
    """Nodes that have met. `ended_by_others` lists those whose workers were ended because another node failed."""

    def __init__(self, count: int, folder: Path) -> None:
        self._folder, rendezvous = folder, Rendezvous("127.0.0.1", free_port())
        self.nodes = [
            NodeRendezvous(
                rank, count, "job", rendezvous, NodeInfo(f"host{rank}", f"token{rank}", 1, {"torch": "2"}, SETTINGS)
            )
            for rank in range(count)
        ]
        self.ended_by_others: list[int] = []
        self._threads = ThreadPoolExecutor(count)
        began = time.monotonic()
        self.each(lambda node: node.meet(SECONDS, lambda: False, print))
        print(f"{count} nodes met in {time.monotonic() - began:.1f} s")
        self.each(lambda node: node.watch(lambda: self.ended_by_others.append(node.rank)))

    def each(self, do: Callable[[NodeRendezvous], Any]) -> None:
        list(self._threads.map(do, self.nodes, timeout=SECONDS))

    def part(
        self, rank: int, status: RunStatus = RunStatus.DONE, at: float = 2.0, message: str = ""
    ) -> "Future[list[WorkerStatus]]":
        """Let one node part with this status of its worker; the result is the statuses of all nodes as it sees them."""
        folder = self._folder / str(rank)
        folder.mkdir()
        worker_status.record(folder, WorkerStatus(rank, status, message, at))

        def part() -> list[WorkerStatus]:
            self.nodes[rank].part(folder, failed=status != RunStatus.DONE)
            return sorted(worker_status.read_all(folder), key=lambda worker: worker.rank)

        return self._threads.submit(part)

    def stores(self) -> list[CountingStore]:
        return [node._store for node in self.nodes]

    def wait_until(self, is_met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not is_met():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Group]:
    """Return a function that starts a group.

    With `is_real`, its store uses the network, and torch looks up the host name of every address.
    """
    monkeypatch.setattr(node_rendezvous, "PrefixStore", CountingStore)
    store, opened = dist.HashStore(), []

    def open_store(*_: Any, master_listen_fd: int | None = None, **__: Any) -> dist.Store:
        if master_listen_fd is not None:
            opened.append(socket.socket(fileno=master_listen_fd))
        return store

    def start_group(count: int, is_real: bool = False) -> Group:
        if not is_real:
            monkeypatch.setattr(node_rendezvous, "TCPStore", open_store)
        return Group(count, tmp_path)

    return start_group


@pytest.mark.parametrize(
    ("count", "is_real"),
    [
        (2, True),
        (16, False),
        (64, False),
        # Not with the store in memory: it wakes all waiting threads for each key, which can take minutes.
        pytest.param(256, True, marks=pytest.mark.recovery),
    ],
)
def test_store_operations_grow_linearly_with_the_nodes(start: Callable[..., Group], count: int, is_real: bool) -> None:
    group = start(count, is_real)
    first, *others = group.stores()
    group.wait_until(lambda: all(store.rounds >= ROUNDS for store in group.stores()))

    # In each round without events, a node writes its heartbeat and reads the summary; node 0 reads all heartbeats.
    for rank, store in enumerate(others, 1):
        operations = store.operations.copy()
        assert 0 <= operations["set", f"heartbeat/{rank}"] - operations["get", "summary"] <= 1
    rounds = first.operations["multi_get", "heartbeat/1"]
    heartbeats = sum(first.operations["multi_get", f"heartbeat/{node}"] for node in range(1, count))
    assert (rounds - 1) * (count - 1) <= heartbeats <= (rounds + 1) * (count - 1)

    results = [parted.result(SECONDS) for parted in [group.part(rank) for rank in range(count)]]
    assert all([worker.status for worker in workers] == [RunStatus.DONE] * count for workers in results)
    assert group.ended_by_others == []
    # Except for node 0, a node uses only its own keys, the common ones, and the address of the next node.
    for rank, store in enumerate(others, 1):
        own = {f"{kind}/{rank}" for kind in ("info", "address", "heartbeat", "ended", "left")}
        assert store.keys <= own | {"start", "stop", "summary", f"address/{(rank + 1) % count}"}
    assert len(first.keys) <= 5 * count + 3


def test_failed_node_ends_all_others_and_all_learn_all_statuses(
    start: Callable[..., Group],
) -> None:
    group = start(16)
    others = [rank for rank in range(16) if rank != 5]
    parted = {5: group.part(5, RunStatus.CRASHED, 1.0, "the cause, which all nodes receive")}
    group.wait_until(lambda: sorted(group.ended_by_others) == others)
    parted |= {rank: group.part(rank, RunStatus.CRASHED, 2.0, "a consequence") for rank in others}
    for rank, result in parted.items():
        workers = result.result(SECONDS)
        assert [worker.status for worker in workers] == [RunStatus.CRASHED] * 16
        assert {worker.rank for worker in workers if worker.message} == {5, rank}


def test_node_without_heartbeats_is_named_by_all_others(
    start: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_rendezvous, "_LOST_SECONDS", 5.0)
    group = start(4)
    group.nodes[2]._is_done.set()  # Ends the threads that send its heartbeats.
    group.wait_until(lambda: sorted(group.ended_by_others) == [0, 1, 3])
    for result in [group.part(rank, RunStatus.CRASHED) for rank in (0, 1, 3)]:
        assert [worker.message for worker in result.result(SECONDS) if worker.status == RunStatus.LOST] == [
            "host2 (node 2) stopped responding (killed? machine or network down?)"
        ]
