"""TensorBoard: event files on this machine, in one folder for each run.

Every attempt adds one file to the folder. The file begins with a mark that makes TensorBoard hide what an earlier
attempt logged after the step from which this attempt starts. On another machine the run continues in a folder there.

The records are written here and not by `torch.utils.tensorboard.SummaryWriter`, whose own thread prints a traceback
when the disk is full. TensorBoard stores numbers as 32-bit floats.
"""

import importlib.util
import shlex
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from typing_extensions import override

from job.config import Tracking
from job.errors import UserError
from job.invocation import program, python
from job.tracking.tracker import Ending, Image, TrackedRun, Tracker, make_log_folder

REQUIREMENT = "tensorboard>=2.21,<3"
"""The extra `tensorboard` in pyproject.toml."""


class TensorBoard(Tracker):
    """Event files for TensorBoard.

    Args:
        folder: folder of all runs; each run gets a folder in it, named by its id.
    """

    def __init__(self, folder: Path) -> None:
        self.description = "event files on this machine"
        self._folder = folder
        self._run_folder = folder
        self._last_steps: dict[str, int] = {}  # of each chart
        self._records: Any = None

    @classmethod
    def from_settings(cls, settings: Tracking, log_dir: Path) -> "TensorBoard":
        """Return the tracker for these settings.

        Raises:
            UserError: the package tensorboard is not installed.
        """
        if importlib.util.find_spec("tensorboard") is None:
            remedy = f"{python()} -m pip install '{REQUIREMENT}', or leave tensorboard out of tracking.to"
            raise UserError(
                "tracking.to", "tensorboard", "needs the package tensorboard, which is not installed", remedy
            )
        return cls(log_dir / "tensorboard")

    @override
    def start(self, run: TrackedRun, report_failure: Callable[[str], None]) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from torch.utils.tensorboard import summary

        self._run_folder = self._folder.absolute() / run.id
        make_log_folder(self._run_folder)
        self.how_to_watch = f"{program('tensorboard')} --logdir {shlex.quote(str(self._folder))}"
        self._write(session_log=SessionLog(status=SessionLog.START), step=run.step + 1)
        settings = yaml.safe_dump({"name": run.name, **run.settings}, allow_unicode=True, sort_keys=False)
        # Markdown shows an indented text as it is.
        shown = "".join(f"    {line}" for line in settings.splitlines(keepends=True))
        self._write(summary=summary.text("settings", shown), step=run.step)

    @override
    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard import summary

        for name, value in values.items():
            if self._last_steps.get(name) != step:
                self._write(summary=summary.scalar(name, value), step=step)
                self._last_steps[name] = step

    @override
    def log_texts(self, name: str, texts: Mapping[str, str], step: int) -> None:
        from torch.utils.tensorboard import summary

        for caption, text in texts.items():
            self._write(summary=summary.text(f"{name}/{caption}", text), step=step)

    @override
    def log_images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        from torch.utils.tensorboard import summary

        for caption, image in images.items():
            self._write(summary=summary.image(f"{name}/{caption}", image, dataformats="HWC"), step=step)

    @override
    def finish(self, ending: Ending) -> None:
        if self._records is not None:
            self._records.close()
            self._records = None

    def _write(self, **content: Any) -> None:
        """Write one event, so that nothing is lost if the process is killed afterwards.

        After a failure the next event goes to a new file, because the reader stops at a damaged record.
        """
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            if self._records is None:
                self._records = self._open_file()
                self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()
        except Exception:
            self._records = None
            raise

    def _open_file(self) -> Any:
        """Create an event file. TensorBoard reads the files of a folder in the order of their names."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        path = self._run_folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}"
        return RecordWriter(path.open("xb"))
