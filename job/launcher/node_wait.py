"""Waiting for other nodes before the start, with a time limit and messages."""

import time
from collections.abc import Callable

from job import clock as awake

_FIRST_WORD_SECONDS = 10.0
"""Time until the first message that says which nodes are missing; further messages come at twice the time each."""
_POLL_SECONDS = 0.2


class NodesStopped(Exception):
    """The run was asked to stop before all nodes were there."""


class NodesMissing(Exception):
    """Not all nodes came in time: when they are started again, they may."""


class Wait:
    """Waits for several conditions under one time limit, and prints what it waits for."""

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
            time.sleep(_POLL_SECONDS)
