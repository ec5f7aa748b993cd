"""A folder on a disk of this node for what can be lost, private to this user.

    /scratch                  shared, often root's with mode 1777: what WIKILLM_SCRATCH, SLURM_TMPDIR or TMPDIR names
    /scratch/wikillm-10001    this user's, mode 0700: made or checked at every start
        shards  inductor  triton  huggingface  home  swanlog

Compiled code from this folder is executed and shards from it are trained on, and anybody can guess its name. So it is
refused unless it belongs to this user and nobody else can write to it. `use_scratch` does that at the start of each
command, and has the libraries keep their caches inside.
"""

import os
import pwd
import stat
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir

from job.errors import UserError

VARIABLE = "WIKILLM_SCRATCH"
_LIBRARY_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
"""Caches of compiled code. By default Inductor's is /tmp/torchinductor_<user>, where others can put code."""
_CREDENTIALS = {
    "AWS_SHARED_CREDENTIALS_FILE": ".aws/credentials",
    "AWS_CONFIG_FILE": ".aws/config",
    "NETRC": ".netrc",
}


def scratch_folder(environment: Mapping[str, str] = os.environ) -> tuple[Path, str]:
    """Return this user's scratch folder and the variable that decides it, with the reason; nothing is made."""
    for name in (VARIABLE, "SLURM_TMPDIR"):
        if environment.get(name):
            return _of_this_user(environment[name]), name
    if "SLURM_JOB_ID" in environment:
        base = environment.get("TMPDIR") or "/tmp"
        return _of_this_user(base), "TMPDIR: under Slurm the nodes share a user's home"
    if environment.get("XDG_CACHE_HOME"):
        return Path(environment["XDG_CACHE_HOME"], "wikillm").absolute(), "XDG_CACHE_HOME"
    if (home := _usable_home(environment)) is not None:
        return home / ".cache" / "wikillm", "HOME: the user's cache folder"
    return _of_this_user(environment.get("TMPDIR") or gettempdir()), "TMPDIR: there is no home that can be used"


def use_scratch(say: Callable[[str], object], environment: MutableMapping[str, str] = os.environ) -> Path:
    """Make or check the scratch folder, and set the variables by which libraries put their caches into it.

    A user's own settings win. Call it before the libraries are imported; child processes inherit the variables.

    Args:
        say: told when HOME is replaced.
        environment: the variables, which are changed.

    Raises:
        UserError: the folder is not this user's alone.
    """
    folder, source = scratch_folder(environment)
    setting = source.partition(":")[0]
    private_folder(folder, setting)
    wanted = {name: folder / child for name, child in _LIBRARY_FOLDERS.items()}
    if environment.get("TRITON_HOME"):
        del wanted["TRITON_CACHE_DIR"]
    home = _usable_home(environment)
    readable = _home(environment) if home is None else home
    if readable is not None and (_is_open_to_all(readable) or not _is_folder(readable)):
        readable = None
    if home is None:
        for name, child in _CREDENTIALS.items():
            if readable is not None and not environment.get(name) and _is_trusted_file(readable / child):
                environment[name] = str(readable / child)
    hub = None if readable is None else readable / ".cache" / "huggingface"
    if not environment.get("HF_HOME") and not environment.get("XDG_CACHE_HOME"):
        if hub is not None and _is_folder(hub):  # models that were fetched before, and the token
            if home is None:
                environment["HF_HOME"] = str(hub)
        elif home is None or not source.startswith("HOME"):
            wanted["HF_HOME"] = folder / "huggingface"
    for name, path in wanted.items():
        if not environment.get(name):
            environment[name] = str(private_folder(path, setting))
    private_folder(folder / "shards", setting)
    if home is None:
        former, new = environment.get("HOME"), private_folder(folder / "home", setting)
        environment["HOME"] = str(new)
        if source.startswith("TMPDIR"):  # child processes have a home, and are to find the same folder all the same
            environment[VARIABLE] = str(folder)
        if former and readable is not None:
            say(f"HOME: {former!r} cannot be written: {new} is used as the home folder")
    return folder


def private_folder(folder: Path, setting: str) -> Path:
    """Make `folder` with mode 0700, and missing folders above it, or check that it is this user's alone.

    The folders above that exist already are not checked: they may be root's and open to all, as /tmp is. A folder of
    this user's that others can read, or its group write, is closed to them; one that everybody can write is refused,
    since nobody knows what was put there.

    Args:
        folder: which.
        setting: the variable or setting that decides where it is, for the error.

    Returns:
        The folder's absolute path.

    Raises:
        UserError: it cannot be made, is a symbolic link or no folder, belongs to another user, or all can write to it.
    """
    folder = folder.absolute()
    name = setting if "." in setting else VARIABLE
    remedy = f"remove it, or set {name} to a folder on a local disk where you can make folders"
    missing: list[Path] = []
    for one in (folder, *folder.parents):
        if os.path.lexists(one):
            break
        missing.append(one)
    for one in reversed(missing or [folder]):
        if wrong := _claim(one):
            raise UserError(setting, str(one), wrong, remedy)
    return folder


def _claim(folder: Path) -> str:
    """Make a folder, or check it; return what is wrong with it."""
    try:
        with suppress(FileExistsError):
            folder.mkdir(0o700)
    except OSError as error:
        return f"this folder cannot be made: {error.strerror}"
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return _why_not_opened(folder, error)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            return _belongs_to(found)
        if found.st_mode & stat.S_IWOTH:
            return f"everybody can write to this folder (mode {stat.S_IMODE(found.st_mode):04o}, expected 0700)"
        if found.st_mode & 0o077:
            with suppress(OSError):
                os.fchmod(descriptor, stat.S_IMODE(found.st_mode) & ~0o077)
            if (found := os.fstat(descriptor)).st_mode & 0o077:
                return f"the mode of this folder stays {stat.S_IMODE(found.st_mode):04o}, expected 0700"
    finally:
        os.close(descriptor)
    return ""


def _belongs_to(found: os.stat_result) -> str:
    return f"this folder belongs to uid {found.st_uid}, not to you (uid {os.geteuid()})"


def _why_not_opened(folder: Path, error: OSError) -> str:
    try:
        found = folder.lstat()
    except OSError:
        return f"this folder cannot be opened: {error.strerror}"
    if stat.S_ISLNK(found.st_mode):
        return f"this is a symbolic link of uid {found.st_uid}, expected a folder of yours (mode 0700)"
    if not stat.S_ISDIR(found.st_mode):
        return f"this is no folder but a file of uid {found.st_uid}"
    if found.st_uid != os.geteuid():
        return _belongs_to(found)
    return f"this folder cannot be opened: {error.strerror}"


def _of_this_user(base: str) -> Path:
    name = f"wikillm-{os.getuid()}"
    folder = Path(base).absolute()
    return folder if folder.name == name else folder / name


def _home(environment: Mapping[str, str]) -> Path | None:
    if environment.get("HOME"):
        return Path(environment["HOME"]).absolute()
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:  # a uid without an entry, as clusters give to pods
        return None


def _usable_home(environment: Mapping[str, str]) -> Path | None:
    """Return the home folder if files can be kept there and not everybody can put files there."""
    home = _home(environment)
    if home is None or not _is_folder(home) or not os.access(home, os.W_OK | os.X_OK) or _is_open_to_all(home):
        return None
    return home


def _is_folder(path: Path) -> bool:
    with suppress(OSError):  # it is in a folder of another user
        return path.is_dir()
    return False


def _is_open_to_all(folder: Path) -> bool:
    return _is_folder(folder) and bool(folder.stat().st_mode & stat.S_IWOTH)


def _is_trusted_file(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_uid in (0, os.getuid())
    except OSError:
        return False


# ---- What the settings' defaults mean ----


def cache_folder(setting: str | None) -> Path:
    """`data.cache_dir`: where shards and tokenizers in use are kept."""
    return Path(setting).expanduser() if setting else scratch_folder()[0] / "shards"


def log_folder(setting: str | None) -> Path:
    """`tracking.log_dir`: where SwanLab keeps its files; in the working directory unless WIKILLM_SCRATCH is set."""
    if setting:
        return Path(setting).expanduser()
    return scratch_folder()[0] / "swanlog" if os.environ.get(VARIABLE) else Path("swanlog")


def loading_folder(setting: str | None) -> Path:
    """`checkpoint.scratch_dir`: where a checkpoint is put when it is loaded, in a folder with a random name."""
    if setting:
        return Path(setting).expanduser()
    return scratch_folder()[0] if os.environ.get(VARIABLE) else Path(gettempdir())
