"""Run the trackers of a run so that none of their failures and delays reaches training."""

import atexit
import contextlib
import io
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue

from job.errors import UserError, one_line
from job.redaction import redacted
from job.tracking.shown_names import shown_name
from job.tracking.tracker import IN_METRICS_FILE, Ending, Image, TrackedRun, Tracker

START_SECONDS = 60.0
"""Longest wait for all trackers at the start. SwanLab's login takes at most 16 s (port closed) or 46 s (no answer)."""
FINISH_SECONDS = 15.0
"""Longest wait for all trackers at the end. A job that was told to stop has little time."""
_LONGEST_QUEUE = 10_000
"""Calls that may wait for one tracker. With more, the tracker hangs, and further calls are dropped."""

logger = logging.getLogger(__name__)


class TrackerGroup:
    """All trackers of a run. No call raises, and only `start` and `finish` wait, up to a deadline.

    Each tracker has a thread of its own, so a tracker that fails or hangs does not affect the others. Its failures are
    counted, and the first one is reported as a warning.

    Args:
        trackers: trackers by name; empty on every rank but 0.
        say: prints a line for the person who watches the run.
    """

    def __init__(self, trackers: Mapping[str, Tracker], say: Callable[[str], None]) -> None:
        self._say = say
        self._trackers = [_TrackerThread(name, tracker) for name, tracker in trackers.items()]
        self._running: list[_TrackerThread] = []

    def start(self, run: TrackedRun) -> None:
        """Start every tracker, and print how to watch the run. A tracker that does not start costs one warning.

        Raises:
            UserError: a tracker refuses a setting.
        """
        pending = [
            (thread, thread.submit(partial(thread.tracker.start, run, thread.report_failure)))
            for thread in self._trackers
        ]
        refused: UserError | None = None
        for thread, future, seconds in _with_deadline(pending, START_SECONDS):
            try:
                _wait(future, seconds)
                self._running.append(thread)
            except UserError as error:
                refused = refused or error
            except TimeoutError as error:
                thread.abandon(str(error) or f"it does not answer (waited {START_SECONDS:.0f} s)")
            except Exception as error:
                thread.abandon(repr(error))
        # Registered after the libraries' own exit functions, and so called before them: SwanLab's would wait for its
        # cloud without a deadline, and mark every run as finished.
        atexit.register(self.finish, Ending.FAILED)
        if refused is not None:
            self.finish(Ending.FAILED)
            raise refused
        if not self._trackers:
            self._say(f"tracking: none (tracking.to is empty); {IN_METRICS_FILE}")
        for thread in self._trackers:
            how = thread.tracker.how_to_watch if thread in self._running else f"not started; {IN_METRICS_FILE}"
            self._say(f"tracking: {thread.name}, {thread.tracker.description}; {how}")

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to the chart of each name, shown as `SHOWN_NAMES` says."""
        values = {shown_name(name): value for name, value in values.items()}
        self._call(lambda tracker: tracker.log_metrics(values, step))

    def log_texts(self, name: str, texts: Mapping[str, str], step: int) -> None:
        """Add texts, such as continuations by their prompts. Secrets in them are replaced."""
        texts = {redacted(caption): redacted(text) for caption, text in texts.items()}
        self._call(lambda tracker: tracker.log_texts(shown_name(name), texts, step))

    def log_images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        """Add RGB images, `[height, width, 3]`, by their captions."""
        images = {redacted(caption): image.copy() for caption, image in images.items()}
        self._call(lambda tracker: tracker.log_images(name, images, step))

    def finish(self, ending: Ending) -> None:
        """End the attempt in every tracker; a later call does nothing."""
        running, self._running = self._running, []
        atexit.unregister(self.finish)
        pending = [(thread, thread.submit(partial(thread.tracker.finish, ending))) for thread in running]
        for thread, future, seconds in _with_deadline(pending, FINISH_SECONDS):
            try:
                _wait(future, seconds)
            except TimeoutError:
                rest = f"; to add the rest: {thread.tracker.how_to_complete}" if thread.tracker.how_to_complete else ""
                if rest or not thread.failures:
                    logger.warning("tracking: %s has not taken the whole run in time%s", thread.name, rest)
            except Exception as error:
                thread.report_failure(repr(error))
            if thread.failures > 1:
                self._say(f"tracking: {thread.name} failed {thread.failures} times, and what it shows may have gaps")

    def _call(self, work: Callable[[Tracker], None]) -> None:
        for thread in self._running:
            thread.call(work)


class _TrackerThread:
    """A tracker, the thread that makes its calls one after the other, and the number of its failures.

    The thread is a daemon: a call that hangs does not keep the process from ending.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker, self.failures = name, tracker, 0
        self._lock = threading.Lock()
        self._queue: SimpleQueue[tuple[Callable[[], None], Future[None]]] = SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def submit(self, work: Callable[[], None]) -> "Future[None]":
        """Run `work` after all earlier work, and return its result as a future."""
        future: Future[None] = Future()
        self._queue.put((work, future))
        return future

    def call(self, work: Callable[[Tracker], None]) -> None:
        """Run `work` with the tracker after all earlier work, and count its failure; wait for nothing."""
        if self._queue.qsize() > _LONGEST_QUEUE:
            self.report_failure("its calls do not return")
        else:
            self.submit(lambda: work(self.tracker)).add_done_callback(self._count)

    def abandon(self, problem: str) -> None:
        """Print a warning that the tracker did not start, and let it end what it may have started."""
        logger.warning("tracking: %s did not start; %s: %s", self.name, IN_METRICS_FILE, one_line(problem))
        self.submit(partial(self.tracker.finish, Ending.FAILED))

    def report_failure(self, problem: str) -> None:
        """Count a failure, and print the first one as a warning."""
        with self._lock:
            self.failures += 1
            is_first = self.failures == 1
        if is_first:
            logger.warning(
                "tracking: %s failed, and what it shows may have gaps; %s: %s",
                self.name,
                IN_METRICS_FILE,
                one_line(problem),
            )

    def _count(self, future: "Future[None]") -> None:
        if (error := future.exception()) is not None:
            self.report_failure(repr(error))

    def _serve(self) -> None:
        while True:
            work, future = self._queue.get()
            try:
                work()
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)


def _with_deadline(
    pending: Iterable[tuple[_TrackerThread, "Future[None]"]], seconds: float
) -> Iterator[tuple[_TrackerThread, "Future[None]", float]]:
    """Yield each future with the seconds that are left until one deadline for all of them."""
    deadline = time.monotonic() + seconds
    for thread, future in pending:
        yield thread, future, max(0.0, deadline - time.monotonic())


def _wait(future: "Future[None]", seconds: float) -> None:
    """Wait for a future, and discard what a tracker's library prints meanwhile."""
    with contextlib.redirect_stdout(io.StringIO()):
        future.result(timeout=seconds)
