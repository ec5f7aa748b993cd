"""Names the setting or variable that a URL or path in an error message comes from."""

import os
import shutil
from pathlib import Path

from job.config import Config
from job.errors import SOME_DISK, UserError
from job.local_dirs import VARIABLE

_FULL_BYTES = 2**16
"""Free bytes below which a disk counts as full; the file that failed may have been removed since."""


def name_setting(config: Config, error: UserError) -> UserError:
    """Return an error about a URL or path with the name of the setting or variable that holds it.

    An error about anything else is returned unchanged.
    """
    values = [(f"{section}.{key}", value) for section, group in config for key, value in group]
    locations = [(name, value) for name, value in values if isinstance(value, str) and value]
    locations += [(VARIABLE, os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    temporary = os.environ.get("TMPDIR") or "/tmp"
    if error.setting == SOME_DISK:
        candidates = (*locations, ("TMPDIR", temporary))
        full = [(name, location) for name, location in candidates if "/" in location and _is_on_full_disk(location)]
        name, location = full[-1] if full else (error.setting, None)
        return UserError(name, location, error.expected, error.remedy)
    locations.append(("TMPDIR", f"{temporary}/wikillm-"))  # The program's temporary folders have this prefix.
    origins = [(name, location) for name, location in locations if _is_below(error.setting, location)]
    if not origins:
        return error
    name, _ = max(origins, key=lambda origin: len(origin[1]))
    return UserError(name, error.setting, error.expected, error.remedy)


def _is_below(path: str, location: str) -> bool:
    if "/" in location and path.startswith(location):
        return True
    return f"{path}/".startswith(f"{location.removeprefix('file://').rstrip('/')}/")


def _is_on_full_disk(location: str) -> bool:
    if "://" in location.removeprefix("file://"):
        return False
    path = Path(location.removeprefix("file://")).expanduser().absolute()
    existing = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    return shutil.disk_usage(existing).free < _FULL_BYTES
