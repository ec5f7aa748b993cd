"""The protocol of a tracker: one place that shows the numbers of a run, such as SwanLab.

The methods of a tracker may block or raise: `TrackerGroup` calls them in a thread of the tracker's own. To add a
tracker, write a class that follows `Tracker` and add it to the table in `job/tracking/__init__.py`.
"""

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from job.errors import UserError


class Ending(Enum):
    """How an attempt ended, as trackers show it."""

    DONE = "the last step is done"
    STOPPED = "stopped as asked, and checkpointed; the next attempt continues the run"
    FAILED = "ended with an error, which the attempt's log shows"
    SUPERSEDED = "a newer attempt has taken over the run"


Image = NDArray[np.uint8]
"""An RGB image, `[height, width, 3]`."""
IN_METRICS_FILE = "the numbers are in logs/metrics.jsonl of the run"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker needs to know about a run."""

    id: str
    """Identifier of the run, the same in every attempt: letters and digits."""
    name: str
    """Name of the run that people read."""
    step: int
    """Steps that are done when this attempt starts. An earlier attempt may have logged later steps."""
    settings: dict[str, Any]
    """Settings and facts to show with the run, without secrets. `start_trackers` makes a nested dict flat: trackers get
    dotted names, such as ``train.learning_rate``."""
    attempt: int = 1
    """Number of this attempt, from 1."""


class Tracker(Protocol):
    """A place that shows the numbers of a run.

    Every method below is called from one thread. A tracker is made in every process, also by `job check`, and started
    only on rank 0: making it must not use the network or write files, and raises a UserError if the tracker cannot
    work with the settings or the installed packages.
    """

    description: str
    """How the tracker works and why, in a few words: "offline (no API key)"."""
    how_to_watch: str = ""
    """The command or address that shows the run, set by `start`."""
    how_to_complete: str = ""
    """The command that delivers what `finish` could not deliver in time, set by `start`; empty if there is none."""

    def start(self, run: TrackedRun, report_failure: Callable[[str], None]) -> None:
        """Start tracking, or continue the run of an earlier attempt.

        Args:
            run: the run to show.
            report_failure: to be called for a failure that no method can raise, from any thread.

        Raises:
            UserError: a setting is wrong. This ends the run; every other exception costs one warning.
        """

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Add one point to the chart of each name. A chart that has a point at this step keeps that one."""

    def log_texts(self, name: str, texts: Mapping[str, str], step: int) -> None:
        """Add texts by their captions."""

    def log_images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        """Add RGB images, `[height, width, 3]`, by their captions."""

    def finish(self, ending: Ending) -> None:
        """End this attempt, and show how it ended. Also called after a `start` that failed."""


def make_log_folder(folder: Path) -> None:
    """Create a folder for a tracker's files.

    Raises:
        UserError: the folder cannot be written.
        OSError: the disk is full, which is no mistake in the settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _not_writable(folder, error.strerror or repr(error)) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _not_writable(folder, os.strerror(errno.EACCES))


def _not_writable(folder: Path, reason: str) -> UserError:
    return UserError("tracking.log_dir", str(folder), f"cannot be written: {reason}", "name another folder")
