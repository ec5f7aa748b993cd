"""SwanLab: a run in its cloud, in its dashboard on this machine, or in files that can be uploaded later.

All attempts of a run have one run id. What SwanLab shows for a second attempt depends on the mode:

cloud    The experiment is continued, and has a tag with the number of the attempt. Steps that it already has are kept,
         later steps are added.
local    Each attempt is a separate experiment in the dashboard, named `run`, `run-2`, and so on, because SwanLab cannot
         add to an experiment there. All attempts of a run have the same colour, so a chart of the project shows them as
         one curve. "Stop" and "Delete" in the dashboard end the tracking, not the training. The table of the dashboard
         shows each number one column too far to the right.
offline  Each attempt leaves a folder `run-<time>-<id>`. `swanlab sync --id <id> FOLDER`, called with the oldest folder
         first, makes them one experiment. Without `--id`, each folder becomes a new experiment. The dashboard does not
         show these folders.

Folders of every mode can be synced. A cloud run that lost the network can be synced too, with `--start-step 0`, which
fills the gaps. SwanLab itself writes the last kilobytes of a folder when the run ends; this tracker has it write them
every second, so that a kill costs only the numbers of the last seconds.

SwanLab has three words for the end of a run. An attempt that stopped because it was asked to is "aborted": neither
finished nor crashed, and the next attempt continues it. An attempt that an error ended is "crashed". The dashboard on
this machine knows only "Finished" and "Crashed": there an attempt that stopped as asked is "Finished", as each attempt
is an experiment of its own.

The charts of the groups `train` and `validation` have the tokens trained on as their axis. SwanLab uses the axis that a
chart has when it is first made in a project; later it is changed on the page.
"""

import atexit
import colorsys
import contextlib
import hashlib
import importlib.util
import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError
from typing_extensions import override

from job.config import Tracking
from job.errors import UserError, one_line
from job.invocation import program, python
from job.redaction import learn_value
from job.tracking.shown_names import TOKENS_SEEN
from job.tracking.tracker import IN_METRICS_FILE, Ending, Image, TrackedRun, Tracker, make_log_folder

Mode = Literal["cloud", "local", "offline", "disabled"]

_LOGIN_SECONDS = 5
_SWANLAB_LOGGER = "swanlab.internal"
_MOST_TAGS = 30
_FLUSH_SECONDS = 1.0
"""Most seconds that a number stays in the memory of this process, where a kill would lose it."""
_GROUPS_BY_TOKENS = ("train", "validation")
"""Groups whose charts have the tokens trained on as their axis instead of the step."""

logger = logging.getLogger(__name__)


def choose_mode(setting: Literal["auto", "cloud", "local", "offline", "disabled"]) -> tuple[Mode, str]:
    """Return SwanLab's mode and the reason for it, without network access and without asking the user.

    Args:
        setting: `tracking.mode`. ``auto`` uses SwanLab's own mode (SWANLAB_MODE, `swanlab offline`, ...) if one is set.
            Otherwise it is ``cloud`` with an API key (SWANLAB_API_KEY, or saved by `swanlab login`), ``local`` if the
            dashboard is installed, and ``offline`` without either.

    Raises:
        UserError: the mode is ``cloud`` without an API key or ``local`` without the dashboard, or SwanLab's own
            settings are invalid.
    """
    if setting == "disabled":
        return "disabled", "tracking.mode is disabled"
    try:
        swanlab_settings = _settings()
    except UserError:
        raise
    except Exception as error:  # the installation is broken, or SwanLab's files cannot be read
        return "disabled", f"SwanLab cannot be used: {one_line(repr(error))}"
    has_key = bool(swanlab_settings.api_key)
    if has_key:
        learn_value(swanlab_settings.api_key)
    has_dashboard = importlib.util.find_spec("swanboard") is not None
    name, mode = "tracking.mode", setting
    if setting == "auto":
        if "mode" not in swanlab_settings.model_fields_set:
            if has_key:
                return "cloud", "SwanLab has an API key"
            if has_dashboard:
                return "local", "no API key, but the dashboard is installed"
            return "offline", "no API key, and the dashboard is not installed"
        name, mode = "SWANLAB_MODE", {"online": "cloud"}.get(swanlab_settings.mode, swanlab_settings.mode)
    if mode == "cloud" and not has_key:
        remedy = f"set SWANLAB_API_KEY, run `{program('swanlab')} login`, or choose offline"
        raise UserError(name, mode, "needs an API key, and there is none", remedy)
    if mode == "local" and not has_dashboard:
        remedy = f"{python()} -m pip install 'swanlab[dashboard]', or choose offline"
        raise UserError(name, mode, "needs the dashboard, which is not installed", remedy)
    return cast(Mode, mode), f"{name} is {mode}"


class SwanLab(Tracker):
    """A run in SwanLab.

    If the cloud refuses the key or cannot be reached, a warning says so and the run is logged offline under its id.
    SwanLab's handler of Ctrl-C and its excepthook are kept out of this process, and of the data it can collect about
    the machine, it collects only the hardware and its load.

    Args:
        mode: from `choose_mode`; ``disabled`` tracks nothing.
        reason: why this mode was chosen.
        project: project in SwanLab: letters, digits and ``_-+.``, at most 100 characters.
        workspace: workspace in SwanLab: letters, digits and ``_-``, at most 25 characters; None for the key's default.
        log_dir: folder for SwanLab's files on this machine.
    """

    def __init__(self, mode: Mode, reason: str, project: str, workspace: str | None, log_dir: Path) -> None:
        self.description = f"{mode} ({reason})"
        self._mode, self._project, self._workspace = mode, project, workspace
        self._log_dir = log_dir.absolute()
        self._run: Any = None
        self._is_ending = threading.Event()

    @classmethod
    def from_settings(cls, settings: Tracking, log_dir: Path) -> "SwanLab":
        """Return the tracker for these settings; errors as in `choose_mode`."""
        mode, reason = choose_mode(settings.mode)
        return cls(mode, reason, settings.project, settings.workspace, log_dir)

    @override
    def start(self, run: TrackedRun, report_failure: Callable[[str], None]) -> None:
        if self._mode == "disabled":
            self.how_to_watch = IN_METRICS_FILE
            return
        values = {
            "log_dir": self._log_dir,
            "interactive": False,
            "project": {"name": self._project, "workspace": self._workspace},
            "experiment": {
                "name": run.name,
                "color": _color(run.id) if self._mode == "local" else None,
                **_restart_marks(run),
            },
            "run": {"id": run.id, "resume": "allow"},
            "terminal": {"proxy_type": "none"},
            # A command line and the address of a git remote may hold passwords; listing the packages starts a process.
            "probe": {"runtime": False, "git": False, "requirements": False, "conda": False},
        }
        # SwanLab shows None as an empty dict.
        shown = {name: "null" if value is None else value for name, value in run.settings.items()}
        _settings(**values)  # refuses wrong names before any folder is created or any network is used
        make_log_folder(self._log_dir)
        with _unchanged_excepthook():
            if self._mode == "cloud":
                try:
                    self._run = _start_in_cloud(values, shown)
                except TimeoutError:  # from the disk, which an offline run would need as well
                    raise
                except Exception as error:
                    problem = one_line(str(error))
                    logger.warning(
                        "tracking: SwanLab's cloud refused the run or cannot be reached, so offline: %s", problem
                    )
            if self._run is None:
                self._run = _init("local" if self._mode == "local" else "offline", values, shown)
        if self._run.mode == "online":
            self.how_to_watch, self.how_to_complete = self._run.url, _sync_command(self._run)
        elif self._mode == "local":
            self.how_to_watch = f"{program('swanlab')} watch {shlex.quote(str(self._log_dir))}"
        else:
            self.how_to_watch = _sync_command(self._run)
        for group in _GROUPS_BY_TOKENS:
            # With step_sync, SwanLab would drop a number that comes without its tokens.
            self._run.define_metric(f"{group}/*", x_axis=TOKENS_SEEN, section_name=group, step_sync=False)
        _report_logged_errors(report_failure)
        threading.Thread(target=self._flush_regularly, name="SwanLab flush", daemon=True).start()

    @override
    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self._log(dict(values), step)

    @override
    def log_texts(self, name: str, texts: Mapping[str, str], step: int) -> None:
        self._log({name: [_swanlab().Text(text, caption=caption) for caption, text in texts.items()]}, step)

    @override
    def log_images(self, name: str, images: Mapping[str, Image], step: int) -> None:
        self._log({name: [_swanlab().Image(image, caption=caption) for caption, image in images.items()]}, step)

    @override
    def finish(self, ending: Ending) -> None:
        self._is_ending.set()
        if self._mode == "disabled" or not _swanlab().has_run():
            return
        run = _swanlab().get_run()
        atexit.unregister(run._handle_atexit)  # SwanLab would end the run again at exit; it has no public name for this
        if ending == Ending.SUPERSEDED and run.mode == "online":
            _flush(run)  # and no word to the cloud, where the run belongs to the newer attempt
            return
        error = None if ending == Ending.DONE else ending.value
        if self._mode == "local" and ending == Ending.STOPPED:
            error = None  # the dashboard shows every run that has an error text as crashed
        with _unchanged_excepthook():
            run.finish(state=_STATES[ending], error=error)

    def _flush_regularly(self) -> None:
        while not self._is_ending.wait(_FLUSH_SECONDS):
            _flush(self._run)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if self._run is not None:
            self._run.log(values, step=step)


_STATES = {
    Ending.DONE: "success",
    Ending.STOPPED: "aborted",
    Ending.FAILED: "crashed",
    Ending.SUPERSEDED: "aborted",
}
"""How an attempt ended → state that SwanLab has for it."""


def _flush(run: Any) -> None:
    """Write to disk what SwanLab keeps in memory; it has no public name for this. SwanLab reports a full disk."""
    store = run._core._store
    if store is not None:
        with contextlib.suppress(OSError, ValueError, AssertionError):  # the last two: it is closed at this moment
            store.ensure_flushed()


def _restart_marks(run: TrackedRun) -> dict[str, Any]:
    """Return SwanLab's settings that tell a later attempt from a new run: a tag, and a description unless there is one.

    The tags and the description that SWANLAB_TAGS and SWANLAB_DESCRIPTION give are kept.
    """
    if run.attempt == 1:
        return {}
    given = _settings().experiment
    description = given.description or f"attempt {run.attempt}, continued after step {run.step}"
    return {"tags": [*given.tags[: _MOST_TAGS - 1], f"attempt {run.attempt}"], "description": description}


def _start_in_cloud(values: dict[str, Any], config: dict[str, Any]) -> Any:
    """Return a new or continued run in SwanLab's cloud."""
    # `init` would log in too, but it leaves an empty folder if the login fails.
    _swanlab().login(timeout=_LOGIN_SECONDS)
    return _init("online", values, config)


def _init(mode: Literal["online", "local", "offline"], values: dict[str, Any], config: dict[str, Any]) -> Any:
    """Return SwanLab's run, started in this mode with these of SwanLab's settings and this configuration to show."""
    try:
        return _swanlab().init(settings=_settings(**values, mode=mode), config=config)
    except BaseException:
        if _swanlab().has_run():  # ending a half-started run at exit would fail for the same reason as its start
            atexit.unregister(_swanlab().get_run()._handle_atexit)
        raise


def _report_logged_errors(report_failure: Callable[[str], None]) -> None:
    """Report the errors that SwanLab catches itself and writes only to its own log.

    They are no longer written to that log, because its disk may be the cause of the error.
    """

    def report(record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return True
        report_failure(record.getMessage().strip().rpartition("\n")[2])
        return False

    logging.getLogger(_SWANLAB_LOGGER).addFilter(report)


@contextlib.contextmanager
def _unchanged_excepthook() -> Iterator[None]:
    """Restore `sys.excepthook` at the end of the block."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


def _swanlab() -> Any:
    """Return the module swanlab, without its messages on the console."""
    # SwanLab's debug output holds the API key that `swanlab login` has saved.
    os.environ.pop("SWANLAB_DEBUG", None)
    import swanlab
    from swanlab.sdk.internal.pkg import console

    console.c.quiet = True  # its messages are read from its log
    return swanlab


_OWN_SETTINGS = {
    ("log_dir",): "tracking.log_dir",
    ("project", "name"): "tracking.project",
    ("project", "workspace"): "tracking.workspace",
    ("experiment", "name"): "run.name",
}
"""Place in SwanLab's settings → the setting of ours that gives its value."""


def _settings(**values: Any) -> Any:
    """Return SwanLab's settings: `values`, completed from SwanLab's environment variables and files.

    Raises:
        UserError: SwanLab refuses a value.
    """
    try:
        return _swanlab().Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = tuple(str(part) for part in first["loc"])
        # The value of a setting that is not ours is not shown, because it may be the API key.
        name = _OWN_SETTINGS.get(location, "_".join(("swanlab", *location)).upper())
        value = first["input"] if location in _OWN_SETTINGS else None
        raise UserError(name, value, f"not taken by SwanLab: {first['msg']}", "change it") from None


def _sync_command(run: Any) -> str:
    return f"{program('swanlab')} sync --id {run.id} {shlex.quote(str(run.dir))}"


def _color(run_id: str) -> str:
    """Return a colour that depends only on the run id and is dark enough for a white page, as ``#rrggbb``."""
    hue = hashlib.sha256(run_id.encode()).digest()[0] / 256
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.42, 0.65))
