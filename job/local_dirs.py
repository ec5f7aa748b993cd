"""The scratch folder: a private folder on a disk of this node, for files that can be made or fetched again.

    /scratch                  shared, often root's with mode 1777; WIKILLM_SCRATCH, SLURM_TMPDIR or TMPDIR names it
    /scratch/wikillm-10001    private to this user, mode 0700; made or checked at every start
        shards  inductor  triton  huggingface  matplotlib  home  swanlog

Compiled code from this folder is executed, and training reads shards from it, but everybody can guess its name. The
folder is therefore refused unless it belongs to this user and nobody else can write to it. `use_scratch` checks this at
the start of each command, and makes the libraries keep their caches in it.
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
_LIBRARY_FOLDERS = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
}
"""Caches of compiled code and of fonts. Inductor's default is /tmp/torchinductor_<user>, into which other users can put
code; Matplotlib warns where its default in the home folder cannot be written."""
_CREDENTIALS = {
    "AWS_SHARED_CREDENTIALS_FILE": ".aws/credentials",
    "AWS_CONFIG_FILE": ".aws/config",
    "NETRC": ".netrc",
}


def scratch_folder(environment: Mapping[str, str] = os.environ) -> tuple[Path, str]:
    """Return this user's scratch folder, and the variable that decides it with the reason. Creates nothing."""
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
    """Make or check the scratch folder, and set the variables that make libraries keep their caches in it.

    Variables that the user has set are kept. Call this before the libraries are imported; child processes inherit the
    variables.

    Args:
        say: called with a line if HOME is replaced.
        environment: the environment variables, which are changed in place.

    Returns:
        The scratch folder.

    Raises:
        UserError: the folder cannot be made, or is not private to this user.
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
        if hub is not None and _is_folder(hub):  # It has the models fetched before, and the token.
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
        if source.startswith("TMPDIR"):  # Child processes have a home now, but must find the same scratch folder.
            environment[VARIABLE] = str(folder)
        if former and readable is not None:
            say(f"HOME: {former!r} cannot be written: {new} is used as the home folder")
    return folder


def private_folder(folder: Path, setting: str) -> Path:
    """Make `folder` with mode 0700, and missing folders above it; or check that an existing one is private.

    Existing folders above it are not checked: they may belong to root and be writable by everybody, like /tmp. If
    others can read `folder`, or its group can write to it, their rights are removed. If everybody can write to it, it
    is refused, because somebody may already have put files there.

    Args:
        folder: the folder to make or check.
        setting: the variable or setting that decides where it is, for error messages.

    Returns:
        The absolute path of the folder.

    Raises:
        UserError: the folder cannot be made, is a symbolic link or not a folder, belongs to another user, or is
            writable by everybody.
    """
    folder = folder.absolute()
    name = setting if "." in setting else VARIABLE
    remedy = f"remove it, or set {name} to a folder on a local disk where you can make folders"
    missing: list[Path] = []
    for ancestor in (folder, *folder.parents):
        if os.path.lexists(ancestor):
            break
        missing.append(ancestor)
    for path in reversed(missing or [folder]):
        if fault := _make_or_check(path):
            raise UserError(setting, str(path), fault, remedy)
    return folder


def _make_or_check(folder: Path) -> str:
    """Make a folder, or check it. Returns what is wrong with it; empty if nothing is."""
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
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            return _wrong_owner(status)
        if status.st_mode & stat.S_IWOTH:
            return f"everybody can write to this folder (mode {stat.S_IMODE(status.st_mode):04o}, expected 0700)"
        if status.st_mode & 0o077:
            with suppress(OSError):
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode) & ~0o077)
            if (status := os.fstat(descriptor)).st_mode & 0o077:
                return f"the mode of this folder stays {stat.S_IMODE(status.st_mode):04o}, expected 0700"
    finally:
        os.close(descriptor)
    return ""


def _wrong_owner(status: os.stat_result) -> str:
    return f"this folder belongs to uid {status.st_uid}, not to you (uid {os.geteuid()})"


def _why_not_opened(folder: Path, error: OSError) -> str:
    try:
        status = folder.lstat()
    except OSError:
        return f"this folder cannot be opened: {error.strerror}"
    if stat.S_ISLNK(status.st_mode):
        return f"this is a symbolic link of uid {status.st_uid}, expected a folder of yours (mode 0700)"
    if not stat.S_ISDIR(status.st_mode):
        return f"this is a file of uid {status.st_uid}, expected a folder"
    if status.st_uid != os.geteuid():
        return _wrong_owner(status)
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
    except KeyError:  # Clusters run pods under a uid that has no entry in /etc/passwd.
        return None


def _usable_home(environment: Mapping[str, str]) -> Path | None:
    """Return the home folder if this user can write to it and not everybody can; else None."""
    home = _home(environment)
    if home is None or not _is_folder(home) or not os.access(home, os.W_OK | os.X_OK) or _is_open_to_all(home):
        return None
    return home


def _is_folder(path: Path) -> bool:
    with suppress(OSError):  # The path may be in a folder of another user.
        return path.is_dir()
    return False


def _is_open_to_all(folder: Path) -> bool:
    return _is_folder(folder) and bool(folder.stat().st_mode & stat.S_IWOTH)


def _is_trusted_file(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_uid in (0, os.getuid())
    except OSError:
        return False


# ---- Defaults of settings ----


def cache_folder(setting: str | None) -> Path:
    """Return the folder of the shards and tokenizers in use: `data.cache_dir`, or its default if that is None."""
    return Path(setting).expanduser() if setting else scratch_folder()[0] / "shards"


def log_folder(setting: str | None) -> Path:
    """Return `tracking.log_dir`: where trackers keep their files, by default ``swanlog`` in the working directory.

    With WIKILLM_SCRATCH set, it is ``swanlog`` in the scratch folder.
    """
    if setting:
        return Path(setting).expanduser()
    return scratch_folder()[0] / "swanlog" if os.environ.get(VARIABLE) else Path("swanlog")


def loading_folder(setting: str | None) -> Path:
    """Return the folder for downloaded checkpoints: `checkpoint.scratch_dir`, or its default if that is None."""
    if setting:
        return Path(setting).expanduser()
    return scratch_folder()[0] if os.environ.get(VARIABLE) else Path(gettempdir())
