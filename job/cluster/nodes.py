"""The nodes of a run: they meet before the workers start, hear at once when one of them fails, and end with one word.

torchrun starts the workers of one node and knows nothing of the others: where one fails, they would wait for it until a
timeout, and each would end with another exit code. So the agents share a store of keys and values at the rendezvous
address, the one that torchrun uses as well: each says there what it brings, that it lives, and how its workers ended.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from job import awake
from job.cluster import outcome
from job.cluster.outcome import Outcome
from job.cluster.place import Rendezvous
from job.errors import UserError

ABORT = signal.SIGVTALRM
"""Signal that a node's agent sends to itself when another node has failed, so that torchrun ends its workers. It is not
sent by any person, terminal or scheduler, and ends a process that does not handle it."""
_BEAT_SECONDS = 1.0
_LOST_SECONDS = 30.0
"""A node that has given no sign of life for so long is gone."""
_LOST_AT_THE_END_SECONDS = 10.0
"""The same when this node's workers have failed: the others are hardly better off."""
_FIRST_WORD_SECONDS = 10.0
"""A person is told whom a start waits for after this time, and then each time it has doubled."""
_OPERATION_SECONDS = 20.0
_ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Card:
    """What a node says of itself; what follows the token must be the same on all nodes."""

    host: str
    token: str
    """Of this start of it: whoever takes its place has another."""
    processes: int
    """Workers of the node."""
    versions: dict[str, str]
    """Of the packages that decide what is computed, by name."""
    settings: dict[str, Any]
    """By dotted name, without those that are a node's own."""


class NodesStopped(Exception):
    """The run was asked to stop before all nodes were there."""


class NodesMissing(Exception):
    """Not all nodes came in time: when they are started again, they may."""


class Nodes:
    """The nodes of a run, seen from one of them.

    Args:
        rank: this node's.
        count: of the nodes.
        job: what tells their job from others; two jobs may have the same port of a machine.
        rendezvous: where they meet, an address of node 0.
        card: of this node.
    """

    def __init__(self, rank: int, count: int, job: str, rendezvous: Rendezvous, card: Card) -> None:
        self.rank, self.count, self._job, self._rendezvous, self._card = rank, count, job, rendezvous, card
        self.hosts = [f"node {node}" for node in range(count)]
        self._store: Any = None
        self._has_met = False
        self._lock = threading.Lock()
        self._beats: dict[int, tuple[int, float]] = {}
        self._lost_seconds = _LOST_SECONDS
        self._closed = threading.Event()

    # ---- Meeting ----

    def meet(self, timeout_seconds: float, stop_requested: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Waits until all nodes are there and node 0 has found that they fit together.

        Raises:
            UserError: they do not fit together: settings, versions or processes differ.
            NodesMissing: they do not all come in time.
            NodesStopped: one of them was asked to stop before that.
        """
        wait = _Wait(timeout_seconds, lambda: stop_requested() or self._is_stopped(), say)
        try:
            self.hosts = self._gather(wait) if self.rank == 0 else self._join(wait)
        except NodesStopped:
            if self._store is not None:
                self._set("stop", True)
            raise
        except UserError as error:
            self._refuse("refused", error.setting, error.value, error.expected, error.remedy)
            raise
        except NodesMissing as error:
            self._refuse("missing", str(error))
            raise
        self._has_met = True

    def _refuse(self, how: str, *why: Any) -> None:
        """Node 0 tells those that are there why nothing comes of it."""
        if self.rank == 0 and self._store is not None:
            self._set("go", {how: why})

    def _gather(self, wait: "_Wait") -> list[str]:
        """Node 0's part: the hosts of all, when they are there and fit together."""

        def missing() -> list[int]:
            return [node for node in range(self.count) if not self._has(f"card/{node}")]

        self._open_store(wait)
        self._set(f"card/{self.rank}", asdict(self._card))
        wait.until(lambda: not missing(), lambda: f"nodes {missing()} of {self.count} are not there")
        cards = [Card(**self._get(f"card/{node}")) for node in range(self.count)]
        if (error := _misfit(cards)) is not None:
            raise error
        self._set("go", {"tokens": [card.token for card in cards], "hosts": [card.host for card in cards]})
        return [card.host for card in cards]

    def _join(self, wait: "_Wait") -> list[str]:
        """The part of the others: the hosts of all, when node 0 has found them all."""
        while True:
            try:
                self._open_store(wait)
                self._set(f"card/{self.rank}", asdict(self._card))
                wait.until(lambda: self._has("go"), lambda: f"node 0 at {self._rendezvous} waits for further nodes")
                go = self._get("go")
                if "refused" in go:
                    raise UserError(*go["refused"])
                if "missing" in go:
                    raise NodesMissing(*go["missing"])
                if go["tokens"][self.rank] == self._card.token:
                    hosts: list[str] = go["hosts"]
                    return hosts
                # They have met whoever had this node's place before, and are about to notice that it is gone.
                wait.until(lambda: not self._has("go"), lambda: "the nodes of the start before have not ended")
            except RuntimeError:  # node 0 has ended, and its store with it; when it starts again, there is another one
                self._store = None

    def _is_stopped(self) -> bool:
        return self._store is not None and self._has("stop")

    def _open_store(self, wait: "_Wait") -> None:
        address, port = self._rendezvous
        timeout = timedelta(seconds=_OPERATION_SECONDS)
        if self.rank == 0:
            wait.until(lambda: _is_free(port), lambda: f"port {port} of this node is taken by another process")
            # torchrun finds this server in its process, and uses it too.
            store = TCPStore("localhost", port, None, True, timeout, wait_for_workers=False, multi_tenant=True)
            wait.until(self._is_reachable, lambda: f"{address} does not lead to this node, which is to be node 0")
        else:
            wait.until(self._is_reachable, lambda: f"node 0 does not answer at {self._rendezvous}")
            store = TCPStore(address, port, None, False, timeout, wait_for_workers=False)
        self._store = PrefixStore(f"nodes of {self._job}", store)

    def _is_reachable(self) -> bool:
        with suppress(OSError), socket.create_connection(self._rendezvous, timeout=_ANSWER_SECONDS):
            return True
        return False

    # ---- Watching ----

    def watch(self) -> None:
        """From now on this process gets `ABORT` as soon as another node has failed or is gone."""
        threading.Thread(target=self._watch, name="nodes", daemon=True).start()

    def _watch(self) -> None:
        while not self._closed.wait(_BEAT_SECONDS):
            with suppress(RuntimeError):  # node 0 is gone: found below
                self._beat()
            if any(found is None or found["failed"] for found in self._ended().values()):
                os.kill(os.getpid(), ABORT)
                return

    def _beat(self) -> None:
        with self._lock:
            self._store.add(f"beat/{self.rank}", 1)

    def _ended(self) -> dict[int, dict[str, Any] | None]:
        """What the other nodes that have ended left, by their ranks; None for one that is gone without a word."""
        found: dict[int, dict[str, Any] | None] = {}
        for node in range(self.count):
            if node == self.rank:
                continue
            try:
                if self._has(f"over/{node}"):
                    found[node] = self._get(f"over/{node}")
                elif self._is_lost(node):
                    found[node] = None
            except RuntimeError:  # the store is node 0's
                return {0: None}
        return found

    def _is_lost(self, node: int) -> bool:
        with self._lock:
            beats = self._store.add(f"beat/{node}", 0)
        known, since = self._beats.get(node, (-1, 0.0))
        if beats != known:
            self._beats[node] = beats, awake.seconds()
            return False
        return awake.seconds() - since > self._lost_seconds

    # ---- Parting ----

    def part(self, folder: Path, failed: bool) -> None:
        """Tells the others how this node's workers ended, waits for their end, and notes it in `folder` as well.

        A node that is gone is noted as the outcome of its first worker.
        """
        self._closed.set()
        ended: dict[int, dict[str, Any] | None] = {}
        if self._has_met:
            if failed:
                self._lost_seconds = _LOST_AT_THE_END_SECONDS
            ended = self._exchange([asdict(one) for one in outcome.read_all(folder)], failed)
        for node, found in ended.items():
            if found is None:
                gone = f"{self.hosts[node]} (node {node}) is gone"
                outcome.record(folder, Outcome(node * self._card.processes, outcome.LOST, gone))
            else:
                for one in found["outcomes"]:
                    outcome.record(folder, Outcome(**one))
        if self._store is not None:
            self._leave([node for node in range(self.count) if ended.get(node, {}) is not None])

    def _exchange(self, outcomes: list[dict[str, Any]], failed: bool) -> dict[int, dict[str, Any] | None]:
        """As `_ended`, when all have."""
        ended: dict[int, dict[str, Any] | None] = {}
        with suppress(RuntimeError):
            self._set(f"over/{self.rank}", {"failed": failed, "outcomes": outcomes})
        while len(ended) < self.count - 1:
            with suppress(RuntimeError):
                self._beat()
            ended |= self._ended()
            if 0 in ended and ended[0] is None:
                break  # with node 0, what the others have said is gone
            time.sleep(_BEAT_SECONDS / 5)
        return ended

    def _leave(self, alive: list[int]) -> None:
        """Node 0 keeps the store until those of the others that are there have read it."""
        with suppress(RuntimeError):
            self._set(f"left/{self.rank}", True)
            deadline = awake.seconds() + _LOST_AT_THE_END_SECONDS
            there = [node for node in alive if self._has(f"card/{node}")]
            while self.rank == 0 and awake.seconds() < deadline:
                if all(self._has(f"left/{node}") for node in there):
                    return
                time.sleep(_BEAT_SECONDS / 20)

    # ---- The store ----

    def _set(self, key: str, value: Any) -> None:
        with self._lock:
            self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        with self._lock:
            return json.loads(self._store.get(key))

    def _has(self, key: str) -> bool:
        with self._lock:
            return bool(self._store.check([key]))


class _Wait:
    """Waits for other nodes, with a limit for all of it, and tells a person what for."""

    def __init__(self, timeout_seconds: float, stop_requested: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._began, self._timeout_seconds = awake.seconds(), timeout_seconds
        self._stop_requested, self._say = stop_requested, say
        self._next_word_seconds = _FIRST_WORD_SECONDS

    def until(self, come: Callable[[], bool], missing: Callable[[], str]) -> None:
        """Returns when they have `come`; `missing` says who has not."""
        while not come():
            waited = awake.seconds() - self._began
            if self._stop_requested():
                raise NodesStopped
            if waited > self._timeout_seconds:
                raise NodesMissing(f"{missing()} after {waited:.0f} s (train.node_timeout)")
            if waited > self._next_word_seconds:
                self._say(f"waiting for {waited:.0f} s: {missing()}")
                self._next_word_seconds *= 2
            time.sleep(_BEAT_SECONDS / 5)


def _misfit(cards: list[Card]) -> UserError | None:
    """In what a node differs from node 0, if any does."""
    first, remedy = cards[0], "start the same command, with the same image and settings, on all nodes"
    for node, card in enumerate(cards):
        where = f"on {card.host} (node {node}), but {{!r}} on {first.host} (node 0)"
        if card.processes != first.processes:
            few = "are all GPUs there? or set train.processes"
            return UserError("train.processes", card.processes, where.format(first.processes), few)
        for what, mine, theirs in (("version of ", card.versions, first.versions), ("", card.settings, first.settings)):
            for name in sorted(mine.keys() | theirs.keys()):
                if mine.get(name) != theirs.get(name):
                    return UserError(f"{what}{name}", mine.get(name), where.format(theirs.get(name)), remedy)
    return None


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def say(line: str) -> None:
    """One line on standard error, which a person sees at once."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
