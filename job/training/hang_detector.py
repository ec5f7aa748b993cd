"""Notices that the run stands still, and says which process the others wait for."""

import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from job import clock as awake
from job.runs.world import World

NO_LIMIT = timedelta(days=365)
"""Timeout of collectives: it is the watchdog that ends a run that hangs, and a pause may outlast any timeout."""
_SIGNS_PER_TIMEOUT = 20
_LONGEST_INTERVAL_SECONDS = 5.0


class Watchdog:
    """Calls `on_hang` when this process has given no sign of life for too long.

    A collective waits for all processes, so when one does not come, all stand still. Each has a thread that tells the
    others how many signs its process has given, and that the thread itself lives: a process that was stopped tells
    nothing any more, and one that is stuck in its own affairs has given fewer signs than the others.

    The time in which this process itself was paused is not counted, and after a pause the timeout begins anew. The
    collectives' own timeouts, which know of no pause, are lifted.

    Args:
        world: this process among the others.
        timeout_seconds: longest time between two signs of life.
        on_hang: called from a thread with a line that names who does not come, and what this process is doing.
    """

    def __init__(self, world: World, timeout_seconds: float, on_hang: Callable[[str], None]) -> None:
        self._world, self._timeout_seconds, self._on_hang = world, timeout_seconds, on_hang
        self._interval_seconds = min(timeout_seconds / _SIGNS_PER_TIMEOUT, _LONGEST_INTERVAL_SECONDS)
        self._store: Any = None
        if world.world_size > 1:
            # A store of its own connection: the default one may be busy in the main thread.
            store: Any = dist.distributed_c10d._get_default_store()  # has no public name
            self._store = dist.PrefixStore("signs-of-life", store.clone())
            _lift_timeouts()
        self._signs, self._at, self._pauses, self._ticks = 0, awake.seconds(), awake.pauses(), 0
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """A sign of life."""
        self._signs, self._at = self._signs + 1, awake.seconds()

    def close(self) -> None:
        """Ends it: what follows may take as long as it takes."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._interval_seconds):
            self._tell()
            if self._is_hung():
                diagnosis = self._diagnosis()
                if self._is_hung():  # nothing has moved meanwhile
                    self._on_hang(diagnosis)
                    return

    def _is_hung(self) -> bool:
        if (pauses := awake.pauses()) != self._pauses:
            self._pauses, self._at = pauses, awake.seconds()
        return awake.seconds() - self._at > self._timeout_seconds

    def _tell(self) -> None:
        self._ticks += 1
        if self._store is not None:
            self._store.set(str(self._world.rank), json.dumps([self._signs, self._ticks]))

    def _heard(self) -> dict[int, tuple[int, int]]:
        """By rank: signs given by its process, ticks of its thread."""
        if self._store is None:
            return {self._world.rank: (self._signs, self._ticks)}
        known = [rank for rank in range(self._world.world_size) if self._store.check([str(rank)])]
        return {rank: tuple(json.loads(self._store.get(str(rank)))) for rank in known}

    def _diagnosis(self) -> str:
        before = self._heard()
        time.sleep(3 * self._interval_seconds)
        self._tell()
        after = self._heard()
        everyone = range(self._world.world_size)
        silent = [rank for rank in everyone if rank not in after or after[rank][1] == before.get(rank, (0, -1))[1]]
        fewest = min(signs for signs, _ in after.values())
        behind = [rank for rank in everyone if rank in after and after[rank][0] == fewest]
        seconds = f"{self._timeout_seconds:g} s (train.hang_timeout)"
        if silent:
            return f"ranks {silent} give no sign of life any more; the others have waited {seconds} for them"
        frame = sys._current_frames().get(self._main or 0)
        where = f"; rank {self._world.rank} is at\n{''.join(traceback.format_stack(frame)[-3:])}" if frame else ""
        if len(behind) == self._world.world_size:
            return f"no process has come on for {seconds}{where}"
        found = f"ranks {behind} did not come to where the others have waited for them {seconds}"
        return f"{found}{where}" if self._world.rank in behind else found


def _lift_timeouts() -> None:
    """Has the collectives of all process groups wait without a limit."""
    for group in list(dist.distributed_c10d._world.pg_map):  # neither has a public name
        dist.distributed_c10d._set_pg_timeout(NO_LIMIT, group)
