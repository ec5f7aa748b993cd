"""Groups of many nodes, all in this process: who asks the store for what, and that all hear of the same end."""

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

from job.launcher import node_rendezvous as nodes
from job.launcher import worker_status as outcome
from job.launcher.environment import Rendezvous
from job.launcher.node_info import Card
from job.launcher.node_rendezvous import Nodes
from job.launcher.worker_status import Outcome

SECONDS = 120
ROUNDS = 3
SETTINGS = {f"section.setting{number}": number for number in range(80)}


class CountingStore:
    """torch's store as one node uses it, which counts the keys that it is asked for."""

    def __init__(self, prefix: str, store: dist.Store) -> None:
        self._store = dist.PrefixStore(prefix, store)
        self.asked: Counter[tuple[str, str]] = Counter()
        """By operation and key."""

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        def call(keys: str | Sequence[str], *values: Any) -> Any:
            self.asked.update((operation, key) for key in ([keys] if isinstance(keys, str) else keys))
            return getattr(self._store, operation)(keys, *values)

        return call

    @property
    def keys(self) -> set[str]:
        return {key for _, key in self.asked}

    @property
    def rounds(self) -> int:
        """Times that it has looked what is new."""
        return self.asked["get", "news"] or self.asked["multi_get", "beat/1"]


class Group:
    """Nodes that have met; `failures` takes those whose workers were ended because another node has failed."""

    def __init__(self, count: int, folder: Path) -> None:
        self._folder, rendezvous = folder, Rendezvous("127.0.0.1", free_port())
        self.nodes = [
            Nodes(rank, count, "job", rendezvous, Card(f"host{rank}", f"token{rank}", 1, {"torch": "2"}, SETTINGS))
            for rank in range(count)
        ]
        self.ended_by_others: list[int] = []
        self._threads = ThreadPoolExecutor(count)
        began = time.monotonic()
        self.each(lambda node: node.meet(SECONDS, lambda: False, print))
        print(f"{count} nodes have met in {time.monotonic() - began:.1f} s")
        self.each(lambda node: node.watch(lambda: self.ended_by_others.append(node.rank)))

    def each(self, do: Callable[[Nodes], Any]) -> None:
        list(self._threads.map(do, self.nodes, timeout=SECONDS))

    def part(
        self, rank: int, status: str = outcome.DONE, at: float = 2.0, message: str = ""
    ) -> "Future[list[Outcome]]":
        """That node's outcomes of all nodes, when its own is this one and all have ended."""
        folder = self._folder / str(rank)
        folder.mkdir()
        outcome.record(folder, Outcome(rank, status, message, at))

        def part() -> list[Outcome]:
            self.nodes[rank].part(folder, failed=status != outcome.DONE)
            return sorted(outcome.read_all(folder), key=lambda one: one.rank)

        return self._threads.submit(part)

    def stores(self) -> list[CountingStore]:
        return [node._store for node in self.nodes]

    def until(self, come: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not come():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Group]:
    """Starts a group; with `is_real`, its store is in the network, where torch asks for the name of every address."""
    monkeypatch.setattr(nodes, "PrefixStore", CountingStore)
    store, opened = dist.HashStore(), []

    def open_store(*_: Any, master_listen_fd: int | None = None, **__: Any) -> dist.Store:
        if master_listen_fd is not None:
            opened.append(socket.socket(fileno=master_listen_fd))
        return store

    def start_group(count: int, is_real: bool = False) -> Group:
        if not is_real:
            monkeypatch.setattr(nodes, "TCPStore", open_store)
        return Group(count, tmp_path)

    return start_group


@pytest.mark.parametrize(
    ("count", "is_real"),
    [
        (2, True),
        (16, False),
        (64, False),
        *(pytest.param(256, real, marks=pytest.mark.recovery) for real in (False, True)),
    ],
)
def test_what_the_store_is_asked_for_grows_with_the_nodes_and_not_with_their_square(
    start: Callable[..., Group], count: int, is_real: bool
) -> None:
    group = start(count, is_real)
    first, *others = group.stores()
    group.until(lambda: all(store.rounds >= ROUNDS for store in group.stores()))

    # A quiet group, round for round: a sign of life and a look at the news; node 0 looks at all signs of life.
    for rank, store in enumerate(others, 1):
        asked = store.asked.copy()
        assert 0 <= asked["set", f"beat/{rank}"] - asked["get", "news"] <= 1
    rounds = first.asked["multi_get", "beat/1"]
    signs = sum(first.asked["multi_get", f"beat/{node}"] for node in range(1, count))
    assert (rounds - 1) * (count - 1) <= signs <= (rounds + 1) * (count - 1)

    outcomes = [one.result(SECONDS) for one in [group.part(rank) for rank in range(count)]]
    assert all([one.status for one in found] == [outcome.DONE] * count for found in outcomes)
    assert group.ended_by_others == []
    # From the meeting to the end, no other node asks for what a third one says, but how the next one is reached.
    for rank, store in enumerate(others, 1):
        own = {f"{kind}/{rank}" for kind in ("card", "link", "beat", "over", "left")}
        assert store.keys <= own | {"go", "stop", "news", f"link/{(rank + 1) % count}"}
    assert len(first.keys) <= 5 * count + 3


def test_a_failed_node_ends_the_workers_of_all_others_and_all_know_how_all_have_ended(
    start: Callable[..., Group],
) -> None:
    group = start(16)
    others = [rank for rank in range(16) if rank != 5]
    parted = {5: group.part(5, outcome.CRASHED, 1.0, "the cause, which is told everywhere")}
    group.until(lambda: sorted(group.ended_by_others) == others)
    parted |= {rank: group.part(rank, outcome.CRASHED, 2.0, "what came of it") for rank in others}
    for rank, one in parted.items():
        found = one.result(SECONDS)
        assert [other.status for other in found] == [outcome.CRASHED] * 16
        assert {other.rank for other in found if other.message} == {5, rank}


def test_a_node_without_a_sign_of_life_is_named_by_all_others(
    start: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_LOST_SECONDS", 5.0)
    group = start(4)
    group.nodes[2]._done.set()  # ends its watching
    group.until(lambda: sorted(group.ended_by_others) == [0, 1, 3])
    for one in [group.part(rank, outcome.CRASHED) for rank in (0, 1, 3)]:
        assert [other.message for other in one.result(SECONDS) if other.status == outcome.LOST] == [
            "host2 (node 2) is gone"
        ]
