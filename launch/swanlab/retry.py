"""The retry loop of the calls to SwanLab's service and to its object store."""

import time
from collections.abc import Callable
from typing import TypeVar

TRIES = 4
PAUSE_SECONDS = 0.25
"""Base of the pauses between tries: 4, 16 and 64 times this value."""

Result = TypeVar("Result")


def retry(
    function: Callable[[], Result],
    temporary: type[Exception] | tuple[type[Exception], ...],
    tries: int = TRIES,
    before_retry: Callable[[], None] = lambda: None,
) -> Result:
    """Return what `function` returns; call it again after a temporary error.

    Args:
        function: makes one try.
        temporary: errors after which another try may succeed; the last try's is raised.
        tries: number of tries.
        before_retry: called after the pause before each further try.
    """
    for number in range(1, tries):
        try:
            return function()
        except temporary:
            time.sleep(PAUSE_SECONDS * 4**number)
            before_retry()
    return function()
