"""The rendezvous of the nodes of a run: they meet, watch each other while the workers run, and agree on how all ended.

torchrun starts the workers of one node and knows nothing about the other nodes. Without this module, the other nodes
would wait for a failed one until a timeout, and each node would exit with another code. So the agents of all nodes
share a key-value store at the rendezvous address, which torchrun uses as well.

Only node 0 reads the keys of all nodes, and publishes a summary under one key. So the number of operations grows
linearly with the number of nodes, not quadratically. The keys are:

* ``info/N``, ``address/N``: node N's `NodeInfo` and `NodeAddress`; it has joined.
* ``stop``: a node was asked to stop before the start.
* ``start``: written by node 0 when all nodes have joined and are equal, or when the run cannot start, with the reason.
* ``heartbeat/N``: a value that changes as long as node N is alive.
* ``ended/N``: how the workers of node N ended.
* ``summary``: written by node 0: whether a node has failed and, at the end, how all workers ended.
* ``left/N``: node N has read the last summary.
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

from job import clock
from job.errors import UserError
from job.launcher import interface, loopback, ring_check, worker_status
from job.launcher.environment import Rendezvous
from job.launcher.interface import Interface
from job.launcher.node_info import NodeInfo, find_difference
from job.launcher.node_wait import NodesMissing, NodesStopped, Wait
from job.launcher.ring_check import NodeAddress
from job.launcher.worker_status import WorkerStatus
from job.runs.run_status import RunStatus

_HEARTBEAT_SECONDS = 1.0
_LOST_SECONDS = 30.0
"""A node without a new heartbeat for this time is considered lost."""
_LOST_AFTER_FAILURE_SECONDS = 10.0
"""The same after the workers of any node have failed: the other nodes have probably failed too."""
_OPERATION_SECONDS = 20.0
"""Timeout of an operation of the store."""
_CONNECT_SECONDS = 5.0
_ENDED = "ended"
"""Heartbeat of a node whose workers have ended."""
_NOTHING_FAILED: dict[str, Any] = {"failed": False, "ended": None}


class NodeRendezvous:
    """One node's side of the rendezvous of all nodes: call `meet`, `check_next`, `watch` and, at the end, `part`.

    Args:
        rank: rank of this node.
        count: number of nodes.
        job: name that distinguishes the job from others, because two jobs may use the same port of a machine.
        rendezvous: address of node 0, where the nodes meet.
        info: description of this node.
    """

    def __init__(self, rank: int, count: int, job: str, rendezvous: Rendezvous, info: NodeInfo) -> None:
        self.rank, self.count, self._job, self._rendezvous, self._info = rank, count, job, rendezvous, info
        self.interface: Interface | None = None
        """Interface over which this node reaches the others; None if it is not known."""
        self.first = Rendezvous(loopback.ADDRESS, rendezvous.port)
        """The rendezvous as this node reaches it: with an IP address instead of a host name."""
        self.network = ""
        """Interfaces of all nodes in one line; only node 0 knows it."""
        self._hosts = [f"node {node}" for node in range(count)]
        self._address = self._next_address = NodeAddress(info.host, rank, "", 0, "", "")
        self._listening: socket.socket | None = None
        self._connect_error = ""
        self._store: Any = None
        self._has_met = False
        # State of the threads that watch the other nodes.
        self._own_end: dict[str, Any] | None = None
        self._is_parting, self._is_done = threading.Event(), threading.Event()
        self._heartbeats: dict[int, tuple[Any, float]] = {}
        """Last heartbeat of each node, and the time at which it changed; only on node 0."""
        self._ends: dict[int, dict[str, Any] | None] = {}
        """End of the workers of each node; None for a lost node."""
        self._summary, self._summary_read_at = _NOTHING_FAILED, 0.0
        self._lost_seconds = _LOST_SECONDS

    # ---- Meeting ----

    def meet(self, timeout_seconds: float, stop_requested: Callable[[], bool], say: Callable[[str], None]) -> None:
        """Wait until all nodes have joined and node 0 has found that they are equal.

        Args:
            timeout_seconds: time limit.
            stop_requested: returns True if this node was asked to stop.
            say: prints a message.

        Raises:
            UserError: settings, versions or numbers of workers differ between nodes.
            NodesMissing: not all nodes joined in time.
            NodesStopped: a node was asked to stop.
        """
        wait = Wait(timeout_seconds, lambda: stop_requested() or self._is_stop_published(), say)
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
            self._cancel("refused", error.setting, error.value, error.expected, error.remedy)
            raise
        except NodesMissing as error:
            self._cancel("missing", str(error))
            raise
        self._next_address = NodeAddress(**self._get(f"address/{(self.rank + 1) % self.count}"))
        self._has_met = True

    def _cancel(self, kind: str, *arguments: Any) -> None:
        """On node 0, tell the nodes that have joined why the run does not start."""
        if self.rank == 0 and self._store is not None:
            self._set("start", {kind: arguments})

    def _gather(self, wait: Wait) -> None:
        """Do node 0's part of `meet`: wait until all nodes have joined, compare them, and tell them to start."""

        def describe_missing() -> str:
            missing = [node for node in range(self.count) if not self._has([f"info/{node}"])]
            return f"nodes {ring_check.list_nodes(missing)} of {self.count} have not joined at {self._rendezvous}"

        nodes, others = range(self.count), range(1, self.count)
        self._open_store(wait)
        self._set("info/0", asdict(self._info))
        wait.until(lambda: self._has(f"info/{node}" for node in nodes), describe_missing)
        infos = [NodeInfo(**info) for info in self._get_all("info", nodes)]
        if (error := find_difference(infos)) is not None:
            raise error
        addresses = [NodeAddress(**address) for address in self._get_all("address", others)]
        self.interface = ring_check.interface_of_node_0(addresses)
        self._publish_address()
        self.network = ring_check.describe_networks([self._address, *addresses])
        self._hosts = [info.host for info in infos]
        self._store.multi_set([f"heartbeat/{node}" for node in others], ["0"] * len(others))
        self._set("summary", _NOTHING_FAILED)
        self._set("start", {"tokens": [info.token for info in infos], "host": infos[0].host})

    def _join(self, wait: Wait) -> None:
        """Do another node's part of `meet`: join, and wait until node 0 tells all nodes to start."""
        while True:
            try:
                self._open_store(wait)
                self._publish_address()
                self._set(f"info/{self.rank}", asdict(self._info))
                wait.until(
                    lambda: self._has(["start"]), lambda: f"node 0 at {self._rendezvous} is waiting for more nodes"
                )
                start = self._get("start")
                if "refused" in start:
                    raise UserError(*start["refused"])
                if "missing" in start:
                    raise NodesMissing(*start["missing"])
                if start["tokens"][self.rank] == self._info.token:
                    self._hosts[0] = start["host"]
                    return
                # The other nodes have met a previous node with this rank. They will notice that it is lost, and exit.
                wait.until(
                    lambda: not self._has(["start"]), lambda: "the nodes of the previous start have not exited yet"
                )
            except RuntimeError:  # Node 0 has exited, and its store with it. When it starts again, it has a new store.
                self._store = None

    def _is_stop_published(self) -> bool:
        return self._store is not None and self._has(["stop"])

    def _open_store(self, wait: Wait) -> None:
        """Open the store: on node 0 its server, on other nodes a client of it."""
        timeout = timedelta(seconds=_OPERATION_SECONDS)
        if self.rank == 0:
            store = TCPStore(*self.first, None, True, timeout, wait_for_workers=False, **self._server_options(wait))
            unreachable = f"the rendezvous address {self._rendezvous.address} does not reach node 0, which is this node"
            wait.until(self._is_reachable, lambda: f"{unreachable} ({self._connect_error})")
        else:
            unreachable = f"node 0 does not answer at {self._rendezvous}"
            wait.until(self._is_reachable, lambda: f"{unreachable} ({self._connect_error})")
            store = TCPStore(*self.first, None, False, timeout, wait_for_workers=False)
        self._store = PrefixStore(f"nodes of {self._job}", store)

    def _server_options(self, wait: Wait) -> dict[str, Any]:
        """Return options that open the store's server on all addresses of this node, once its port is free."""
        sockets: list[socket.socket] = []

        def is_listening() -> bool:
            if (opened := ring_check.listen_on_all_addresses(self._rendezvous.port)) is not None:
                sockets.append(opened)
            return bool(sockets)

        taken = f"port {self._rendezvous.port} of this node is used by another process"
        remedy = "stop that process, or set MASTER_PORT to a free port on all nodes"
        wait.until(is_listening, lambda: f"{taken} ({remedy})")
        # With `multi_tenant`, torchrun in this process uses this server too, instead of opening its own.
        return {"multi_tenant": True, "master_listen_fd": sockets[0].detach()}

    def _is_reachable(self) -> bool:
        """Return True if node 0 answers; remember the addresses of the connection, or the error."""
        try:
            with socket.create_connection(self._rendezvous, timeout=_CONNECT_SECONDS) as connection:
                if self.rank != 0:
                    self.first = self.first._replace(address=connection.getpeername()[0])
                    self.interface = interface.find_by_address(connection.getsockname()[0])
        except OSError as error:
            source = interface.leading_to(self._rendezvous.address)
            reason = (error.strerror or str(error)).lower()
            self._connect_error = f"from {source}: {reason}" if source else reason
            return False
        return True

    def _publish_address(self) -> None:
        """Listen where the workers of this node will, and publish the address to the other nodes."""
        gloo = None
        with suppress(UserError):  # `check_next` raises it again, when the other nodes can be told about it.
            gloo = interface.gloo_interface(self.interface)
        self._listening = ring_check.listen_at(gloo.address) if gloo else None
        self._address = NodeAddress(
            host=self._info.host,
            node=self.rank,
            address=gloo.address if gloo else "",
            port=self._listening.getsockname()[1] if self._listening else 0,
            first=self.first.address,
            network=interface.describe_choice(self.interface, self._rendezvous),
        )
        self._set(f"address/{self.rank}", asdict(self._address))

    def check_next(self) -> None:
        """Check that the workers of this node can connect to those of the next node.

        Raises:
            ring_check.NodeUnreachable: they cannot.
            UserError: the user has set an interface that this node does not have.
        """
        interface.gloo_interface(self.interface)
        ring_check.check_connection(self._address, self._next_address)

    # ---- Watching ----

    def watch(self, end_workers: Callable[[], None]) -> None:
        """Start to watch the other nodes; call `end_workers` once, as soon as another node has failed or is lost."""
        self._summary_read_at = clock.seconds()
        for run in (self._watch, self._guard):
            threading.Thread(target=run, args=(end_workers,), name="nodes", daemon=True).start()

    def _watch(self, end_workers: Callable[[], None]) -> None:
        """Exchange heartbeats and summaries until all nodes have ended or node 0 is lost."""
        try:
            while not self._is_done.is_set():
                summary = self._summarize() if self.rank == 0 else self._report()
                self._receive(summary, end_workers)
                self._summary_read_at = clock.seconds()
                if self._is_parting.wait(_HEARTBEAT_SECONDS):
                    self._is_done.wait(_HEARTBEAT_SECONDS / 5)
        except RuntimeError:  # The store is on node 0, so node 0 is lost.
            self._receive(self._summary_without_node_0(), end_workers)

    def _guard(self, end_workers: Callable[[], None]) -> None:
        """Detect that node 0 is lost if no operation fails, for example because its machine or the network is down."""
        while not self._is_done.wait(_HEARTBEAT_SECONDS):
            if clock.seconds() - self._summary_read_at > self._lost_seconds:
                self._receive(self._summary_without_node_0(), end_workers)

    def _receive(self, summary: dict[str, Any], end_workers: Callable[[], None]) -> None:
        """Store a summary, and end the workers of this node if another node has failed."""
        if self._is_done.is_set():
            return
        is_first_failure = summary["failed"] and not self._summary["failed"]
        self._summary = summary
        if summary["ended"] is not None:
            self._is_done.set()
        if is_first_failure and not self._is_parting.is_set():
            end_workers()

    def _report(self) -> dict[str, Any]:
        """Publish this node's heartbeat or its workers' end, and return node 0's summary; for all nodes but node 0."""
        if self._own_end is not None and self.rank not in self._ends:
            self._set(f"ended/{self.rank}", self._own_end)
            self._ends[self.rank] = self._own_end
        self._set(f"heartbeat/{self.rank}", _ENDED if self.rank in self._ends else clock.seconds())
        summary: dict[str, Any] = self._get("summary")
        if summary["ended"] is not None:
            self._set(f"left/{self.rank}", True)
        return summary

    def _summarize(self) -> dict[str, Any]:
        """On node 0, read the state of all other nodes, publish a summary, and return it."""
        others = range(1, self.count)
        for node, heartbeat in zip(others, self._get_all("heartbeat", others), strict=True):
            if node in self._ends:
                continue
            if heartbeat == _ENDED:
                self._ends[node] = self._get(f"ended/{node}")
            elif self._is_lost(node, heartbeat):
                self._ends[node] = None
        if self._own_end is not None:
            self._ends[0] = self._own_end
        failed = any(end is None or end["failed"] for end in self._ends.values())
        if failed:
            self._lost_seconds = _LOST_AFTER_FAILURE_SECONDS
        summary = {"failed": failed, "ended": self._all_ends() if len(self._ends) == self.count else None}
        if summary != self._summary:
            self._set("summary", summary)
        return summary

    def _is_lost(self, node: int, heartbeat: Any) -> bool:
        """Return True if the node's heartbeat has not changed for too long."""
        last, changed_at = self._heartbeats.get(node, (None, 0.0))
        if heartbeat != last:
            self._heartbeats[node] = heartbeat, clock.seconds()
            return False
        return clock.seconds() - changed_at > self._lost_seconds

    def _all_ends(self) -> dict[str, Any]:
        """Return how the workers of all nodes ended, without messages that no node will show."""
        lost = [node for node, end in self._ends.items() if end is None]
        workers = [self._lost_status(node) for node in lost]
        for end in self._ends.values():
            if end is not None:
                workers += [WorkerStatus.from_dict(worker) for worker in end["workers"]]
        return {"lost": lost, "workers": [asdict(worker) for worker in worker_status.without_details(workers)]}

    def _summary_without_node_0(self) -> dict[str, Any]:
        """Return the summary after node 0 was lost, together with what the other nodes had published."""
        return {"failed": True, "ended": {"lost": [0], "workers": [asdict(self._lost_status(0))]}}

    def _lost_status(self, node: int) -> WorkerStatus:
        """Return the status of a lost node, as the status of its first worker."""
        message = f"{self._hosts[node]} (node {node}) stopped responding (killed? machine or network down?)"
        return WorkerStatus(node * self._info.workers, RunStatus.LOST, message, time.time())

    # ---- Parting ----

    def part(self, folder: Path, failed: bool) -> None:
        """Tell the other nodes how this node's workers ended, and wait until all nodes have ended.

        Args:
            folder: folder of this start, from which the statuses of this node are read; those of other nodes are added.
            failed: True if the workers of this node failed.
        """
        lost: list[int] = []
        if self._has_met:
            if failed:
                self._lost_seconds = _LOST_AFTER_FAILURE_SECONDS
            self._own_end = {"failed": failed, "workers": [asdict(worker) for worker in worker_status.read_all(folder)]}
            self._is_parting.set()
            self._is_done.wait()
            lost = self._summary["ended"]["lost"]
            workers = [WorkerStatus.from_dict(worker) for worker in self._summary["ended"]["workers"]]
            others = [worker for worker in workers if worker.rank // self._info.workers != self.rank]
            worker_status.record_others(folder, others)
        elif self._store is not None:
            with suppress(RuntimeError):
                self._set(f"left/{self.rank}", True)
        if self.rank == 0 and self._store is not None:
            self._wait_for_readers([node for node in range(1, self.count) if node not in lost])
        if self._listening is not None:
            self._listening.close()

    def _wait_for_readers(self, nodes: list[int]) -> None:
        """On node 0, keep the store open until those of these nodes that have joined have read the last summary."""
        keys = [f"left/{node}" for node in nodes if self._has([f"info/{node}"])]
        deadline = clock.seconds() + _LOST_AFTER_FAILURE_SECONDS
        while keys and not self._has(keys) and clock.seconds() < deadline:
            time.sleep(_HEARTBEAT_SECONDS / 20)

    # ---- The store ----

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _get(self, key: str) -> Any:
        return json.loads(self._store.get(key))

    def _get_all(self, kind: str, nodes: Iterable[int]) -> list[Any]:
        return [json.loads(value) for value in self._store.multi_get([f"{kind}/{node}" for node in nodes])]

    def _has(self, keys: Iterable[str]) -> bool:
        """Return True if all these keys exist."""
        return bool(self._store.check(list(keys)))
