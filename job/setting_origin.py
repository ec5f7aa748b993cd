"""Which setting or variable a URL or path in an error comes from."""

import os
import shutil
from pathlib import Path

from job.config import Config
from job.errors import SOME_DISK, UserError
from job.local_dirs import VARIABLE

_FULL_BYTES = 2**16
"""A disk with less than this is full: what failed to be written may have been removed since."""


def name_setting(config: Config, error: UserError) -> UserError:
    """An error about a URL or path, told with the setting or variable that it comes from; any other error as it is."""
    values = [(f"{section}.{key}", value) for section, group in config for key, value in group]
    places = [(name, value) for name, value in values if isinstance(value, str) and value]
    places += [(VARIABLE, os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    temporary = os.environ.get("TMPDIR") or "/tmp"
    if error.setting == SOME_DISK:
        full = [(name, place) for name, place in (*places, ("TMPDIR", temporary)) if "/" in place and _is_full(place)]
        name, place = full[-1] if full else (error.setting, None)
        return UserError(name, place, error.expected, error.remedy)
    places.append(("TMPDIR", f"{temporary}/wikillm-"))  # as the program names its temporary folders
    origins = [(name, place) for name, place in places if _is_below(error.setting, place)]
    if not origins:
        return error
    name, _ = max(origins, key=lambda origin: len(origin[1]))
    return UserError(name, error.setting, error.expected, error.remedy)


def _is_below(path: str, place: str) -> bool:
    if "/" in place and path.startswith(place):
        return True
    return f"{path}/".startswith(f"{place.removeprefix('file://').rstrip('/')}/")


def _is_full(place: str) -> bool:
    if "://" in place.removeprefix("file://"):
        return False
    path = Path(place.removeprefix("file://")).expanduser().absolute()
    there = next((one for one in (path, *path.parents) if one.exists()), path)
    return shutil.disk_usage(there).free < _FULL_BYTES
