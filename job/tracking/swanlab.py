"""Where a run is watched: SwanLab, through accelerate's tracker. Training waits for it for seconds, and needs it never.

A run keeps one id through all restarts, and what becomes of that depends on the mode:

cloud    one experiment, continued: steps that it has already are kept as they are, later ones are added.
local    each start is an experiment of its own in the dashboard, named `run`, `run-2`, ...: SwanLab cannot add to one.
         All have the colour that belongs to the id, so that a chart of the project shows them as one curve. Stop and
         Delete there end the tracking, not the training; its table shows each number one column too far right.
offline  each start leaves a folder `run-<time>-<id>`. `swanlab sync --id <id> FOLDER`, oldest folder first, makes them
         one experiment; without `--id` each becomes a new one. The dashboard does not show them.

Nothing of it can fail or hold up a run: every call is made by a thread of its own, and what goes wrong there costs one
warning. Only what a person has set wrongly is refused, before the first step.

A folder of any mode can be synced: a cloud run that lost the network too, then with `--start-step 0`, which fills gaps.
SwanLab writes the last kilobytes of a folder when the run ends; after a kill, only metrics.jsonl has them.
"""

import atexit
import colorsys
import contextlib
import errno
import hashlib
import importlib.util
import io
import logging
import os
import secrets
import shlex
import string
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from pydantic import ValidationError

from job.errors import UserError, one_line
from job.invocation import program, python
from job.redaction import learn_value, redacted

if TYPE_CHECKING:
    from accelerate import Accelerator

Mode = Literal["cloud", "local", "offline", "disabled"]
Result = TypeVar("Result")

START_SECONDS = 60.0
"""Longest wait for the cloud at the start; SwanLab's login ends by itself after 16 s (port closed) or 46 s (silent)."""
FINISH_SECONDS = 15.0
"""Longest wait for what is not uploaded yet at the end: a job that was told to stop has little time."""
_LOGIN_SECONDS = 5
_SWANLAB_LOGGER = "swanlab.internal"
_ID_LENGTH = 21
"""Older servers take ids of this length alone, newer ones any of 1 to 64."""

_LONGEST_QUEUE = 10_000
"""Calls that wait for SwanLab; it hangs where there are more."""
_UNTRACKED = "in metrics.jsonl alone"

logger = logging.getLogger(__name__)


def new_run_id() -> str:
    """A random id that no other run has, of lower-case letters and digits, as SwanLab takes it."""
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(_ID_LENGTH))


def choose_mode(setting: Literal["auto", "cloud", "local", "offline", "disabled"]) -> tuple[Mode, str]:
    """The mode to track in, and why; decided from the environment and SwanLab's files, without network or prompt.

    Args:
        setting: `tracking.mode`. ``auto`` follows SwanLab's own mode (SWANLAB_MODE, `swanlab offline`, ...) if one is
            set; else it is ``cloud`` with an API key (SWANLAB_API_KEY, or saved by `swanlab login`), ``local`` with
            the dashboard installed, and ``offline`` without either.

    Raises:
        UserError: the cloud is asked for without a key, the dashboard is but is not installed, or SwanLab's own
            settings are not valid.
    """
    if setting == "disabled":
        return "disabled", "tracking.mode is disabled"
    try:
        swanlab_settings = _settings()
    except UserError:
        raise
    except Exception as error:  # it is not installed as it should be, or its files cannot be read
        return "disabled", f"SwanLab cannot be used: {one_line(repr(error))}"
    has_key = bool(swanlab_settings.api_key)
    if has_key:
        learn_value(swanlab_settings.api_key)
    has_dashboard = importlib.util.find_spec("swanboard") is not None
    name, wanted = "tracking.mode", setting
    if setting == "auto":
        if "mode" not in swanlab_settings.model_fields_set:
            if has_key:
                return "cloud", "SwanLab has an API key"
            if has_dashboard:
                return "local", "no API key, but the dashboard is installed"
            return "offline", "no API key, and the dashboard is not installed"
        name, wanted = "SWANLAB_MODE", {"online": "cloud"}.get(swanlab_settings.mode, swanlab_settings.mode)
    if wanted == "cloud" and not has_key:
        remedy = f"set SWANLAB_API_KEY, run `{program('swanlab')} login`, or choose offline"
        raise UserError(name, wanted, "needs an API key, and there is none", remedy)
    if wanted == "local" and not has_dashboard:
        remedy = f"{python()} -m pip install 'swanlab[dashboard]', or choose offline"
        raise UserError(name, wanted, "needs the dashboard, which is not installed", remedy)
    return cast(Mode, wanted), f"{name} is {wanted}"


class Tracker:
    """A run in SwanLab, made by `start_tracker`; where nothing is tracked it does nothing.

    Attributes:
        how_to_watch: the command or the address that shows the run, in one line.
    """

    def __init__(self, how_to_watch: str, accelerator: "Accelerator | None" = None, thread: "_Thread | None" = None):
        self.how_to_watch = how_to_watch
        self._accelerator, self._thread = accelerator, thread
        self._has_warned = False
        if accelerator is not None:
            # SwanLab catches most of its errors itself, and tells only its own log of them.
            logging.getLogger(_SWANLAB_LOGGER).addFilter(self._hear)
            # Before SwanLab's own, which would wait for the cloud without end and call every run a success.
            atexit.register(self.finish, success=False)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Adds numbers to the charts of their names; a step that a chart has already is kept as it is."""
        self._order(lambda accelerator: accelerator.log(dict(values), step=step))

    def log_texts(self, key: str, texts: Mapping[str, str], step: int) -> None:
        """Adds continuations, each under its prompt."""

        def log(accelerator: "Accelerator") -> None:
            shown = [_swanlab().Text(redacted(text), caption=redacted(prompt)) for prompt, text in texts.items()]
            accelerator.log({key: shown}, step=step)

        self._order(log)

    def finish(self, success: bool) -> None:
        """Ends the run in SwanLab, as finished or as aborted; a restart takes it up again. Once is enough.

        To be called before `Accelerator.end_training`, which would wait for the cloud without end.
        """
        if self._accelerator is None or self._thread is None:
            return
        run = self._accelerator.get_tracker("swanlab", unwrap=True)
        accelerator, self._accelerator = self._accelerator, None
        atexit.unregister(self.finish)
        end = {"state": "success"} if success else {"state": "aborted", "error": "stopped before the last step"}

        try:
            self._thread.do(lambda: _end(run, **end), FINISH_SECONDS)
        except TimeoutError:
            if run.mode == "online" or not self._has_warned:
                logger.warning("SwanLab has not taken the whole run in time; for the rest: %s", _sync_command(run))
        except Exception as error:
            self._warn(repr(error))
        finally:
            accelerator.trackers.clear()

    def _order(self, work: "Callable[[Accelerator], None]") -> None:
        """Has `work` done by the thread, for which nobody waits."""
        if self._accelerator is None or self._thread is None:
            return
        if self._thread.waiting > _LONGEST_QUEUE:
            self._warn("it takes nothing any more")
            return
        accelerator = self._accelerator
        self._thread.order(lambda: work(accelerator)).add_done_callback(self._see)

    def _see(self, done: "Future[None]") -> None:
        if (error := done.exception()) is not None:
            self._warn(repr(error))

    def _hear(self, record: logging.LogRecord) -> bool:
        """Takes what SwanLab tells its own log; errors are not handed on, as its disk may be the problem."""
        if record.levelno < logging.ERROR:
            return True
        self._warn(record.getMessage().strip().rpartition("\n")[2])
        return False

    def _warn(self, problem: str) -> None:
        """Says what is wrong, the first time."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning("SwanLab has a problem, and what it shows may have gaps: %s", one_line(problem))


def start_tracker(
    accelerator: "Accelerator",
    *,
    mode: Mode,
    project: str,
    workspace: str | None,
    name: str,
    run_id: str,
    log_dir: Path,
    config: dict[str, Any],
) -> Tracker:
    """Starts or continues the run in SwanLab; every process calls it, the main one tracks.

    A cloud that refuses the key or is not reached costs a warning, and the run is logged offline under the same id.
    SwanLab's handler of Ctrl-C, its excepthook and its words on the console are kept off this process, and of what
    it can collect only the hardware and its load are.

    Args:
        accelerator: made with ``log_with="swanlab"``.
        mode: from `choose_mode`.
        project: letters, digits and ``_-+.``, at most 100.
        workspace: letters, digits and ``_-``, at most 25; None: the key's own.
        name: of the run, to people.
        run_id: from `new_run_id`, the same at every start of the run.
        log_dir: folder for what SwanLab keeps on this machine.
        config: the settings to show with the run, without secrets.

    Where it cannot be started for another reason, such as a full disk, a warning says so, and the run is not tracked.

    Raises:
        UserError: SwanLab does not take the project's, the workspace's or the run's name, or `log_dir` is a folder
            that may not be written.
    """
    if mode == "disabled" or not accelerator.is_main_process:
        return Tracker(_UNTRACKED)
    folder = log_dir.absolute()
    values = {
        "log_dir": folder,
        "interactive": False,
        "project": {"name": project, "workspace": workspace},
        "experiment": {"name": redacted(name), "color": _color(run_id) if mode == "local" else None},
        "run": {"id": run_id, "resume": "allow"},
        "terminal": {"proxy_type": "none"},
        # A command line and a remote's address may hold passwords; listing the packages starts a process.
        "probe": {"runtime": False, "git": False, "requirements": False, "conda": False},
    }
    thread = _Thread()

    def start(mode: Mode) -> Any:
        if mode == "cloud":
            # On its own, as `init` leaves an empty folder where the login fails.
            _swanlab().login(timeout=_LOGIN_SECONDS)
        settings = _settings(**values, mode="online" if mode == "cloud" else mode)
        accelerator.trackers.clear()
        try:
            accelerator.init_trackers(project, init_kwargs={"swanlab": {"settings": settings, "config": config}})
        except BaseException:
            if _swanlab().has_run():  # half begun: what makes its start fail would make its end fail when we exit
                atexit.unregister(_swanlab().get_run()._handle_atexit)
            raise
        return accelerator.get_tracker("swanlab", unwrap=True)

    def abandon() -> None:
        accelerator.trackers.clear()
        if _swanlab().has_run():
            _end(_swanlab().get_run(), state="aborted")

    def give_up(problem: str) -> Tracker:
        logger.warning("this start is not tracked, but for metrics.jsonl: %s", one_line(problem))
        accelerator.trackers.clear()
        thread.order(abandon)
        return Tracker(_UNTRACKED)

    _settings(**values)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return give_up(f"{folder}: {error.strerror}")
        raise _unwritable(folder, error.strerror or repr(error)) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(folder, os.strerror(errno.EACCES))
    if mode == "cloud":
        try:
            return Tracker(thread.do(lambda: start("cloud"), START_SECONDS).url, accelerator, thread)
        except TimeoutError as error:  # of ours, or of SwanLab's for a folder
            return give_up(str(error) or "SwanLab's cloud does not answer")
        except Exception as error:
            logger.warning("SwanLab's cloud refuses or is not reached, so offline: %s", one_line(str(error)))
            mode = "offline"
    try:
        run = thread.do(lambda: start(mode), START_SECONDS)
    except UserError:
        raise
    except Exception as error:
        return give_up(f"SwanLab does not start: {error!r}")
    watch = f"{program('swanlab')} watch {shlex.quote(str(folder))}" if mode == "local" else _sync_command(run)
    return Tracker(watch, accelerator, thread)


def _unwritable(folder: Path, why: str) -> UserError:
    return UserError("tracking.log_dir", str(folder), f"cannot be written: {why}", "name another folder")


class _Thread:
    """The thread that makes all calls of SwanLab, one order after the other.

    SwanLab takes over Ctrl-C where it is started from the main thread, waits for the cloud with no deadline, and for a
    disk that does not answer.
    """

    def __init__(self) -> None:
        self._orders: SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = SimpleQueue()
        threading.Thread(target=self._serve, name="swanlab", daemon=True).start()

    @property
    def waiting(self) -> int:
        """Orders that have not begun."""
        return self._orders.qsize()

    def order(self, work: Callable[[], Result]) -> "Future[Result]":
        """Has `work` done after what was ordered before."""
        done: Future[Result] = Future()
        self._orders.put((work, done))
        return done

    def do(self, work: Callable[[], Result], seconds: float | None = None) -> Result:
        """Has `work` done, and returns or raises what it does; TimeoutError if that takes longer than `seconds`."""
        with contextlib.redirect_stdout(io.StringIO()):
            return self.order(work).result(timeout=seconds)

    def _serve(self) -> None:
        while True:
            work, done = self._orders.get()
            hook = sys.excepthook
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)
            finally:
                sys.excepthook = hook


def _swanlab() -> Any:
    # Its debug output holds the API key that `swanlab login` has saved.
    os.environ.pop("SWANLAB_DEBUG", None)
    import swanlab
    from swanlab.sdk.internal.pkg import console

    console.c.quiet = True  # what it has to say is heard by way of its log
    return swanlab


_OURS = {
    ("log_dir",): "tracking.log_dir",
    ("project", "name"): "tracking.project",
    ("project", "workspace"): "tracking.workspace",
    ("experiment", "name"): "run.name",
}


def _settings(**values: Any) -> Any:
    """SwanLab's settings: `values`, and else what its variables and files say."""
    try:
        return _swanlab().Settings(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = tuple(str(part) for part in first["loc"])
        # The value of a setting that is not ours is not shown: it may be the key.
        name = _OURS.get(place, "_".join(("swanlab", *place)).upper())
        value = first["input"] if place in _OURS else None
        raise UserError(name, value, f"not taken by SwanLab: {first['msg']}", "change it") from None


def _end(run: Any, **how: Any) -> None:
    """Ends SwanLab's run, which SwanLab does not try again when the process ends."""
    atexit.unregister(run._handle_atexit)  # has no public name
    run.finish(**how)


def _sync_command(run: Any) -> str:
    return f"{program('swanlab')} sync --id {run.id} {shlex.quote(str(run.dir))}"


def _color(run_id: str) -> str:
    """A colour that belongs to the id, dark enough for a white page."""
    hue = hashlib.sha256(run_id.encode()).digest()[0] / 256
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.42, 0.65))
