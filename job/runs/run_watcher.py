"""A thread of rank 0 that watches for the stop file and for a newer attempt while training continues."""

import logging
import threading

from job import storage
from job.errors import UserError
from job.runs.attempts import Attempt, Attempts, Superseded

_POLL_SECONDS = 10.0
"""Time between two polls; each poll costs one or two requests to the store."""

logger = logging.getLogger(__name__)


class RunWatcher:
    """Polls for the stop file and for a newer attempt, from its creation until `close`.

    Args:
        output: folder or URL of the run.
        attempt: the attempt of this process.
        stop_file: path or URL of the stop file; None: there is none.
        poll_seconds: time between two polls.
    """

    def __init__(
        self, output: str, attempt: Attempt, stop_file: str | None, poll_seconds: float = _POLL_SECONDS
    ) -> None:
        self._attempts, self._attempt, self._stop_file = Attempts(output), attempt, stop_file
        self._poll_seconds = poll_seconds
        self._closed = threading.Event()
        self._stop_file_seen = False
        self._superseded: Superseded | None = None
        self._thread = threading.Thread(target=self._poll_until_closed, name="watch", daemon=True)
        self._thread.start()

    @property
    def stop_requested(self) -> bool:
        """Return True if the stop file existed at any poll."""
        return self._stop_file_seen

    def raise_if_superseded(self) -> None:
        """Raise `Superseded` if a poll found a newer attempt."""
        if self._superseded is not None:
            raise self._superseded

    def close(self) -> None:
        """End the thread, without waiting for it."""
        self._closed.set()

    def _poll_until_closed(self) -> None:
        has_warned = False
        while not self._closed.is_set():
            try:
                with storage.limits(deadline_seconds=self._poll_seconds, cancelled=self._closed):
                    self._poll()
            except Superseded as error:
                self._superseded = error
                return
            except (storage.StoreError, storage.Cancelled):
                pass  # An outage of the store says nothing about the run. The next poll looks again.
            except (OSError, UserError) as error:  # such as expired credentials, which may be renewed
                if not has_warned:
                    logger.warning("cannot look for the stop file or a newer attempt, trying again: %s", error)
                has_warned = True
            else:
                has_warned = False
            self._closed.wait(self._poll_seconds)

    def _poll(self) -> None:
        self._attempts.raise_if_superseded(self._attempt)
        if self._stop_file is not None and storage.exists(self._stop_file):
            self._stop_file_seen = True
