"""What only the first process looks after, in a thread, while training goes on: the stop file, and who has the run."""

import logging
import threading

from job import storage
from job.errors import UserError
from job.runs.attempts import Attempt, Attempts, Superseded

_LOOK_SECONDS = 10.0
"""Between two looks; each costs a request or two."""

logger = logging.getLogger(__name__)


class Watch:
    """Looks for the stop file and for a newer attempt, from now on until `close`.

    Args:
        output: the run's prefix.
        attempt: the start that has the run.
        stop_file: path or URL; None: there is none.
        look_seconds: between two looks.
    """

    def __init__(
        self, output: str, attempt: Attempt, stop_file: str | None, look_seconds: float = _LOOK_SECONDS
    ) -> None:
        self._attempts, self._attempt, self._stop_file = Attempts(output), attempt, stop_file
        self._look_seconds = look_seconds
        self._closed = threading.Event()
        self._stop_file_seen = False
        self._refusal: UserError | None = None
        self._thread = threading.Thread(target=self._look_again_and_again, name="watch", daemon=True)
        self._thread.start()

    @property
    def stop_requested(self) -> bool:
        """Whether the stop file was there."""
        return self._stop_file_seen

    def raise_if_lost(self) -> None:
        """Raises a UserError if a newer attempt has the run."""
        if self._refusal is not None:
            raise self._refusal

    def close(self) -> None:
        """Ends it."""
        self._closed.set()

    def _look_again_and_again(self) -> None:
        said = False
        while not self._closed.is_set():
            try:
                with storage.limits(deadline_seconds=self._look_seconds, cancelled=self._closed):
                    self._look()
            except Superseded as error:
                self._refusal = error
                return
            except (storage.StoreError, storage.Cancelled):
                pass  # an outage: it has not been seen, and will be looked for again
            except (OSError, UserError) as error:  # such as credentials that have expired: looked for again as well
                if not said:
                    logger.warning("the store cannot be asked for the stop file or a newer attempt: %s", error)
                said = True
            else:
                said = False
            self._closed.wait(self._look_seconds)

    def _look(self) -> None:
        self._attempts.check_is_ours(self._attempt)
        if self._stop_file is not None and storage.exists(self._stop_file):
            self._stop_file_seen = True
