"""Waiting for other nodes before a run starts, with a time limit and messages."""

import time
from collections.abc import Callable

from job import clock

_FIRST_MESSAGE_SECONDS = 10.0
"""Time until the first message that says what is awaited; the time doubles with each further message."""
_POLL_SECONDS = 0.2


class NodesStopped(Exception):
    """The run was asked to stop before all nodes had joined."""


class NodesMissing(Exception):
    """Not all nodes joined in time; starting the run again may help."""


class Wait:
    """Wait for several conditions under one time limit, and print messages meanwhile.

    Args:
        timeout_seconds: time limit for all conditions together.
        stop_requested: returns True if the run was asked to stop.
        say: prints a message.
    """

    def __init__(self, timeout_seconds: float, stop_requested: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._started_at, self._timeout_seconds = clock.seconds(), timeout_seconds
        self._stop_requested, self._say = stop_requested, say
        self._next_message_seconds = _FIRST_MESSAGE_SECONDS

    def until(self, is_met: Callable[[], bool], describe_missing: Callable[[], str]) -> None:
        """Return as soon as the condition is met.

        Args:
            is_met: the condition.
            describe_missing: returns what is missing, for messages.

        Raises:
            NodesStopped: the run was asked to stop.
            NodesMissing: the time limit has passed.
        """
        while not is_met():
            waited_seconds = clock.seconds() - self._started_at
            if self._stop_requested():
                raise NodesStopped
            if waited_seconds > self._timeout_seconds:
                raise NodesMissing(
                    f"{describe_missing()} after {waited_seconds:.0f} s; increase train.node_timeout to wait longer"
                )
            if waited_seconds > self._next_message_seconds:
                self._say(f"waiting for {waited_seconds:.0f} s: {describe_missing()}")
                self._next_message_seconds *= 2
            time.sleep(_POLL_SECONDS)
