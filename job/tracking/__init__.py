"""Show the numbers of a run: the table of trackers, and the two functions that training and `job check` call.

``logs/metrics.jsonl`` of the run has the same numbers without any tracker, so a run never needs one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from job.config import Tracking
from job.local_dirs import log_folder
from job.redaction import redacted
from job.suggestions import find_entry
from job.tracking.swanlab import SwanLab
from job.tracking.tensorboard import TensorBoard
from job.tracking.tracker import TrackedRun, Tracker
from job.tracking.tracker_group import TrackerGroup

TRACKERS: dict[str, Callable[[Tracking, Path], Tracker]] = {
    "swanlab": SwanLab.from_settings,
    "tensorboard": TensorBoard.from_settings,
}
"""Name in `tracking.to` → function that makes the tracker from the settings and the folder for its files."""


def make_tracker(name: str, settings: Tracking) -> Tracker:
    """Return the tracker with this name. It is not started yet: nothing is written or sent.

    Raises:
        UserError: there is no tracker of this name, or it cannot work with the settings or the installed packages.
    """
    factory = find_entry("tracking.to", name, TRACKERS)
    return factory(settings, log_folder(settings.log_dir))


def make_trackers(settings: Tracking) -> dict[str, Tracker]:
    """Return every tracker that `tracking.to` names, by its name; errors as in `make_tracker`."""
    return {name: make_tracker(name, settings) for name in settings.to}


def start_trackers(trackers: Mapping[str, Tracker], run: TrackedRun, say: Callable[[str], None]) -> TrackerGroup:
    """Start trackers, print how to watch the run, and return them as one; only rank 0 passes any trackers.

    Raises:
        UserError: a tracker refuses a setting.
    """
    group = TrackerGroup(trackers, say)
    group.start(replace(run, name=redacted(run.name), settings=dict(_flat(run.settings))))
    return group


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested dict with their dotted names. Trackers show a dict in a dict as no table."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
