"""Detects that the run hangs, and says which rank the others wait for."""

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from job import clock
from job.runs.world import World

NO_LIMIT = timedelta(days=365)
"""Timeout of collectives. The hang detector ends a run that hangs; a paused process may outlast any timeout."""
_TICKS_PER_TIMEOUT = 20
_LONGEST_INTERVAL_SECONDS = 5.0


class HangDetector:
    """Calls `on_hang` when this process has sent no heartbeat for too long.

    A collective waits for all ranks, so if one does not arrive, all of them hang. A thread of each process tells the
    others how many heartbeats its process has sent, and that the thread itself runs. So a process that was stopped
    tells nothing any more, and a process that is stuck has sent fewer heartbeats than the others.

    Time in which this process was paused does not count, and after a pause the timeout begins anew. The timeouts of the
    collectives, which do not know of pauses, are removed.

    Args:
        world: this process among the others.
        timeout_seconds: longest time between two heartbeats.
        on_hang: called from a thread with a line that names the missing ranks and says what this process is doing.
    """

    def __init__(self, world: World, timeout_seconds: float, on_hang: Callable[[str], None]) -> None:
        self._world, self._timeout_seconds, self._on_hang = world, timeout_seconds, on_hang
        self._interval_seconds = min(timeout_seconds / _TICKS_PER_TIMEOUT, _LONGEST_INTERVAL_SECONDS)
        self._store: Any = None
        if world.world_size > 1:
            # A store of its own connection: the default one may be busy in the main thread.
            store: Any = dist.distributed_c10d._get_default_store()  # has no public name
            self._store = dist.PrefixStore("heartbeats", store.clone())
            _remove_timeouts()
        self._beats, self._at, self._pauses, self._ticks = 0, clock.seconds(), clock.pauses(), 0
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang-detector", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Send a heartbeat."""
        self._beats, self._at = self._beats + 1, clock.seconds()

    def close(self) -> None:
        """Stop watching: what follows may take any time."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval_seconds):
            self._tell()
            if self._is_hung():
                diagnosis = self._diagnosis()
                if self._is_hung():  # still, after the time that the diagnosis took
                    self._on_hang(diagnosis)
                    return

    def _is_hung(self) -> bool:
        if (pauses := clock.pauses()) != self._pauses:
            self._pauses, self._at = pauses, clock.seconds()
        return clock.seconds() - self._at > self._timeout_seconds

    def _tell(self) -> None:
        self._ticks += 1
        if self._store is not None:
            self._store.set(str(self._world.rank), json.dumps([self._beats, self._ticks]))

    def _heard(self) -> dict[int, tuple[int, int]]:
        """Return two counters for each rank: heartbeats of its main thread, and turns of its hang detector's loop."""
        if self._store is None:
            return {self._world.rank: (self._beats, self._ticks)}
        known = [rank for rank in range(self._world.world_size) if self._store.check([str(rank)])]
        return {rank: tuple(json.loads(self._store.get(str(rank)))) for rank in known}

    def _diagnosis(self) -> str:
        before = self._heard()
        time.sleep(3 * self._interval_seconds)
        self._tell()
        after = self._heard()
        everyone = range(self._world.world_size)
        silent = [rank for rank in everyone if rank not in after or after[rank][1] == before.get(rank, (0, -1))[1]]
        fewest = min(beats for beats, _ in after.values())
        behind = [rank for rank in everyone if rank in after and after[rank][0] == fewest]
        seconds = f"{self._timeout_seconds:g} s (train.hang_timeout)"
        if silent:
            return f"{_named(silent)} sent no heartbeat for {seconds}; the other ranks waited"
        frame = sys._current_frames().get(self._main or 0)
        where = f"; rank {self._world.rank} is at\n{''.join(traceback.format_stack(frame)[-3:])}" if frame else ""
        if len(behind) == self._world.world_size:
            return f"no rank has made progress for {seconds}{where}"
        found = f"{_named(behind)} did not arrive where the other ranks have waited {seconds}"
        return f"{found}{where}" if self._world.rank in behind else found


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks}"


def _remove_timeouts() -> None:
    """Let the collectives of all process groups wait without a limit."""
    for group in list(dist.distributed_c10d._world.pg_map):  # neither has a public name
        dist.distributed_c10d._set_pg_timeout(NO_LIMIT, group)
