"""The nodes of a run: they meet before the workers start, hear at once when one of them fails, and end with one word.

torchrun starts the workers of one node and knows nothing of the others: where one fails, they would wait for it until a
timeout, and each would end with another exit code. So the agents share a store of keys and values at the rendezvous
address, the one that torchrun uses as well. Each says there what it brings, that it lives, and how its workers ended.

Node 0 alone looks at all of that, and publishes what came of it under one key: what the store has to do grows with the
number of nodes, not with its square. The keys are:

* ``card/N``, ``link/N``: what node N brings, and how it is reached; ``stop``: a node was asked to stop meanwhile;
* ``go``: node 0 has found that all are there and fit together, or why nothing comes of it;
* ``beat/N``: a number that grows as long as node N lives; ``over/N``: how its workers ended;
* ``news``: what node 0 has seen: whether one has failed and, at last, how all have ended; ``left/N``: node N knows it.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, TCPStore

from job import clock as awake
from job.errors import UserError
from job.launcher import interface, loopback
from job.launcher import ring_check as link
from job.launcher import worker_status as outcome
from job.launcher.environment import Rendezvous
from job.launcher.interface import Interface
from job.launcher.node_info import Card, misfit
from job.launcher.node_wait import NodesMissing, NodesStopped, Wait
from job.launcher.ring_check import Link
from job.launcher.worker_status import Outcome

_BEAT_SECONDS = 1.0
_LOST_SECONDS = 30.0
"""A node that has given no sign of life for so long is gone."""
_LOST_AT_THE_END_SECONDS = 10.0
"""The same when the workers of one have failed: the others are hardly better off."""
_OPERATION_SECONDS = 20.0
_ANSWER_SECONDS = 5.0
_OVER = "over"
"""A node's beat when its workers have ended."""
_NO_NEWS: dict[str, Any] = {"failed": False, "ended": None}


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
        self.interface: Interface | None = None
        """Interface over which this node reaches the others; None if it is not known."""
        self.first = Rendezvous(loopback.ADDRESS, rendezvous.port)
        """The rendezvous, as this node reaches it: an address instead of a name."""
        self.network = ""
        """Interfaces of all nodes in one line; node 0 knows it."""
        self._hosts = [f"node {node}" for node in range(count)]
        self._link = self._next = Link(card.host, rank, "", 0, "", "")
        self._listening: socket.socket | None = None
        self._no_answer = ""
        self._store: Any = None
        self._has_met = False
        # State of the threads that watch the other nodes.
        self._over: dict[str, Any] | None = None
        self._parting, self._done = threading.Event(), threading.Event()
        self._beats: dict[int, tuple[Any, float]] = {}
        self._found: dict[int, dict[str, Any] | None] = {}
        self._news, self._heard_at = _NO_NEWS, 0.0
        self._lost_seconds = _LOST_SECONDS

    # ---- Meeting ----

    def meet(self, timeout_seconds: float, stop_requested: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Waits until all nodes are there and node 0 has found that they fit together.

        Raises:
            UserError: they do not fit together: settings, versions or processes differ.
            NodesMissing: they do not all come in time.
            NodesStopped: one of them was asked to stop before that.
        """
        wait = Wait(timeout_seconds, lambda: stop_requested() or self._is_stopped(), say)
        try:
            if self.rank == 0:
                self._gather(wait)
            else:
                self._join(wait)
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
        self._next = Link(**self._get(f"link/{(self.rank + 1) % self.count}"))
        self._has_met = True

    def _refuse(self, how: str, *why: Any) -> None:
        """Node 0 tells those that are there why nothing comes of it."""
        if self.rank == 0 and self._store is not None:
            self._set("go", {how: why})

    def _gather(self, wait: Wait) -> None:
        """Node 0's part: waits until all are there and fit together, and tells them."""

        def missing() -> str:
            absent = [node for node in range(self.count) if not self._has([f"card/{node}"])]
            return f"nodes {link.listed(absent)} of {self.count} are not there (awaited at {self._rendezvous})"

        all_nodes, others = range(self.count), range(1, self.count)
        self._open_store(wait)
        self._set("card/0", asdict(self._card))
        wait.until(lambda: self._has(f"card/{node}" for node in all_nodes), missing)
        cards = [Card(**card) for card in self._get_all("card", all_nodes)]
        if (error := misfit(cards)) is not None:
            raise error
        links = [Link(**one) for one in self._get_all("link", others)]
        self.interface = link.interface_towards(links)
        self._publish_link()
        self.network = link.described([self._link, *links])
        self._hosts = [card.host for card in cards]
        self._store.multi_set([f"beat/{node}" for node in others], ["0"] * len(others))
        self._set("news", _NO_NEWS)
        self._set("go", {"tokens": [card.token for card in cards], "host": cards[0].host})

    def _join(self, wait: Wait) -> None:
        """The part of the others: waits until node 0 has found them all."""
        while True:
            try:
                self._open_store(wait)
                self._publish_link()
                self._set(f"card/{self.rank}", asdict(self._card))
                wait.until(lambda: self._has(["go"]), lambda: f"node 0 at {self._rendezvous} waits for further nodes")
                go = self._get("go")
                if "refused" in go:
                    raise UserError(*go["refused"])
                if "missing" in go:
                    raise NodesMissing(*go["missing"])
                if go["tokens"][self.rank] == self._card.token:
                    self._hosts[0] = go["host"]
                    return
                # They have met whoever had this node's place before, and are about to notice that it is gone.
                wait.until(lambda: not self._has(["go"]), lambda: "the nodes of the start before have not ended")
            except RuntimeError:  # node 0 has ended, and its store with it; when it starts again, there is another one
                self._store = None

    def _is_stopped(self) -> bool:
        return self._store is not None and self._has(["stop"])

    def _open_store(self, wait: Wait) -> None:
        timeout = timedelta(seconds=_OPERATION_SECONDS)
        if self.rank == 0:
            address, port = self._rendezvous
            listening: list[socket.socket] = []
            taken = f"port {port} of this node is taken by another process"
            wait.until(lambda: link.listen_everywhere(port, listening), lambda: taken)
            # torchrun finds this server in its process, and uses it too.
            more: dict[str, Any] = {"multi_tenant": True, "master_listen_fd": listening[0].detach()}
            store = TCPStore(*self.first, None, True, timeout, wait_for_workers=False, **more)
            elsewhere = f"{address} does not lead to this node, which is to be node 0"
            wait.until(self._is_reachable, lambda: f"{elsewhere} ({self._no_answer})")
        else:
            missing = f"node 0 does not answer at {self._rendezvous}"
            wait.until(self._is_reachable, lambda: f"{missing} ({self._no_answer})")
            store = TCPStore(*self.first, None, False, timeout, wait_for_workers=False)
        self._store = PrefixStore(f"nodes of {self._job}", store)

    def _is_reachable(self) -> bool:
        """Return True if node 0 answers, and remember the addresses of that connection."""
        try:
            with socket.create_connection(self._rendezvous, timeout=_ANSWER_SECONDS) as connection:
                if self.rank != 0:
                    self.first = self.first._replace(address=connection.getpeername()[0])
                    self.interface = interface.with_address(connection.getsockname()[0])
        except OSError as error:
            here = interface.leading_to(self._rendezvous.address)
            self._no_answer = f"from {here or 'here'}: {(error.strerror or str(error)).lower()}"
            return False
        return True

    def _publish_link(self) -> None:
        """Tells the others how the workers of this node are reached, and listens there."""
        found = None
        with suppress(UserError):  # raised by `reach`, when the others can be told of it
            found = interface.of_gloo(self.interface)
        self._listening = link.listen_at(found.address) if found else None
        port = self._listening.getsockname()[1] if self._listening else 0
        words = interface.described(self.interface, self._rendezvous)
        self._link = Link(self._card.host, self.rank, found.address if found else "", port, self.first.address, words)
        self._set(f"link/{self.rank}", asdict(self._link))

    def reach(self) -> None:
        """Check that the workers of this node can reach those of the next one.

        Raises:
            link.NodesApart: they will not.
            UserError: the user has named an interface that this node does not have.
        """
        interface.of_gloo(self.interface)
        link.reach(self._link, self._next)

    # ---- Watching ----

    def watch(self, end_workers: Callable[[], None]) -> None:
        """From now on `end_workers` is called, once, as soon as another node has failed or is gone."""
        self._heard_at = awake.seconds()
        for run in (self._watch, self._guard):
            threading.Thread(target=run, args=(end_workers,), name="nodes", daemon=True).start()

    def _watch(self, end_workers: Callable[[], None]) -> None:
        """Takes part in the exchange, until all is over or node 0 is gone."""
        try:
            while not self._done.is_set():
                self._hear(self._preside() if self.rank == 0 else self._report(), end_workers)
                self._heard_at = awake.seconds()
                if self._parting.wait(_BEAT_SECONDS):
                    self._done.wait(_BEAT_SECONDS / 5)
        except RuntimeError:  # the store is node 0's
            self._hear(self._without_node_0(), end_workers)

    def _guard(self, end_workers: Callable[[], None]) -> None:
        """Notices that node 0 is gone where nothing says so, since its machine is off or a cable is cut."""
        while not self._done.wait(_BEAT_SECONDS):
            if awake.seconds() - self._heard_at > self._lost_seconds:
                self._hear(self._without_node_0(), end_workers)

    def _hear(self, news: dict[str, Any], end_workers: Callable[[], None]) -> None:
        if self._done.is_set():
            return
        is_new, self._news = news["failed"] and not self._news["failed"], news
        if news["ended"] is not None:
            self._done.set()
        if is_new and not self._parting.is_set():
            end_workers()

    def _report(self) -> dict[str, Any]:
        """A round of every other node: says that it lives, or how its workers ended, and asks what node 0 has seen."""
        if self._over is not None and self.rank not in self._found:
            self._set(f"over/{self.rank}", self._over)
            self._found[self.rank] = self._over
        self._set(f"beat/{self.rank}", _OVER if self.rank in self._found else awake.seconds())
        news: dict[str, Any] = self._get("news")
        if news["ended"] is not None:
            self._set(f"left/{self.rank}", True)
        return news

    def _preside(self) -> dict[str, Any]:
        """A round of node 0: looks at all others, and tells them what it has seen."""
        others = range(1, self.count)
        for node, beat in zip(others, self._get_all("beat", others), strict=True):
            if node in self._found:
                continue
            if beat == _OVER:
                self._found[node] = self._get(f"over/{node}")
            elif self._is_lost(node, beat):
                self._found[node] = None
        if self._over is not None:
            self._found[0] = self._over
        failed = any(found is None or found["failed"] for found in self._found.values())
        if failed:
            self._lost_seconds = _LOST_AT_THE_END_SECONDS
        news = {"failed": failed, "ended": self._ended() if len(self._found) == self.count else None}
        if news != self._news:
            self._set("news", news)
        return news

    def _is_lost(self, node: int, beat: Any) -> bool:
        known, since = self._beats.get(node, (None, 0.0))
        if beat != known:
            self._beats[node] = beat, awake.seconds()
            return False
        return awake.seconds() - since > self._lost_seconds

    def _ended(self) -> dict[str, Any]:
        """How all nodes have ended; the messages that nobody will be told are not sent to every node."""
        gone = [node for node, found in self._found.items() if found is None]
        outcomes = [self._lost(node) for node in gone]
        outcomes += [Outcome(**one) for found in self._found.values() if found for one in found["outcomes"]]
        return {"gone": gone, "outcomes": [asdict(one) for one in outcome.without_details(outcomes)]}

    def _without_node_0(self) -> dict[str, Any]:
        """The news when node 0 is gone, and with it what the others have said."""
        return {"failed": True, "ended": {"gone": [0], "outcomes": [asdict(self._lost(0))]}}

    def _lost(self, node: int) -> Outcome:
        """The outcome of a node that is gone: as that of its first worker."""
        message = f"{self._hosts[node]} (node {node}) is gone"
        return Outcome(node * self._card.processes, outcome.LOST, message, time.time())

    # ---- Parting ----

    def part(self, folder: Path, failed: bool) -> None:
        """Tells the others how this node's workers ended, waits for their end, and notes it in `folder` as well."""
        gone: list[int] = []
        if self._has_met:
            if failed:
                self._lost_seconds = _LOST_AT_THE_END_SECONDS
            self._over = {"failed": failed, "outcomes": [asdict(one) for one in outcome.read_all(folder)]}
            self._parting.set()
            self._done.wait()
            gone = self._news["ended"]["gone"]
            found = [Outcome(**one) for one in self._news["ended"]["outcomes"]]
            outcome.record_others(folder, [one for one in found if one.rank // self._card.processes != self.rank])
        elif self._store is not None:
            with suppress(RuntimeError):
                self._set(f"left/{self.rank}", True)
        if self.rank == 0 and self._store is not None:
            self._wait_for_readers([node for node in range(1, self.count) if node not in gone])
        if self._listening is not None:
            self._listening.close()

    def _wait_for_readers(self, alive: list[int]) -> None:
        """Node 0 keeps the store until those of the others that are there have read it."""
        there = [f"left/{node}" for node in alive if self._has([f"card/{node}"])]
        deadline = awake.seconds() + _LOST_AT_THE_END_SECONDS
        while there and not self._has(there) and awake.seconds() < deadline:
            time.sleep(_BEAT_SECONDS / 20)

    # ---- The store ----

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key))

    def _get_all(self, kind: str, nodes: Iterable[int]) -> list[Any]:
        return [json.loads(value) for value in self._store.multi_get([f"{kind}/{node}" for node in nodes])]

    def _has(self, keys: Iterable[str]) -> bool:
        """Whether all of them are there."""
        return bool(self._store.check(list(keys)))
