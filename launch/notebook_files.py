"""The files that a session of a notebook leaves for the next one, and how the next one finds and copies them."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

RUN, SHARDS, TOKENIZER, TRACKER = "run", "shards", "tokenizer", "swanlog"
"""Folders of a session's output."""
SESSION = "wikillm-session.json"
"""File that marks a folder as the output of a session, and counts the sessions of a run."""
_DEPTHS = ("*", "*/*", "*/*/*")
"""Where Kaggle mounts an output below /kaggle/input: NAME, or notebooks/USER/NAME."""
_COPYING = ".copying"


class FoundSession(NamedTuple):
    """The output of an earlier session."""

    number: int
    """Number of the session, counted from 1."""
    folders: tuple[Path, ...]
    """Its folders that are to be copied."""


class FoundMarkers(NamedTuple):
    """The files below a folder that mark outputs of earlier sessions."""

    numbers: dict[Path, int]
    """Number of the session for each marker that can be used."""
    damaged: dict[Path, str]
    """Reason why each of the other markers cannot be used."""


def find_markers(inputs: Path) -> FoundMarkers:
    """Return the markers of earlier sessions below `inputs`."""
    found = FoundMarkers({}, {})
    for path in (path for depth in _DEPTHS for path in inputs.glob(f"{depth}/{SESSION}")):
        try:
            found.numbers[path] = _read_number(path)
        except OSError as error:
            found.damaged[path] = f"it cannot be read: {error.strerror}"
        except ValueError:
            found.damaged[path] = 'it is damaged: expected {"session": 1}, or a higher number'
    return found


def _read_number(marker: Path) -> int:
    """Return the number in a marker; raise ValueError if it has none."""
    content = json.loads(marker.read_text(encoding="utf-8"))
    number = content.get("session") if isinstance(content, dict) else None
    if type(number) is not int or number < 1:
        raise ValueError("no number of a session")
    return number


def find_session(numbers: Mapping[Path, int], keep: Path) -> FoundSession | None:
    """Return the newest of the sessions with these markers and numbers; None if there are none.

    Its folders that `keep` already has are left out: the notebook was run again in the same session.
    """
    if not numbers:
        return None
    newest = max(numbers, key=lambda path: (numbers[path], path))
    names = (RUN, SHARDS, TOKENIZER, TRACKER)
    folders = [newest.parent / name for name in names if not (keep / name).exists()]
    return FoundSession(numbers[newest], tuple(folder for folder in folders if folder.is_dir()))


def write_session(keep: Path, number: int) -> None:
    """Mark `keep` as the output of session `number`, unless it is marked already."""
    keep.mkdir(parents=True, exist_ok=True)
    if not (keep / SESSION).exists():
        (keep / SESSION).write_text(json.dumps({"session": number}) + "\n", encoding="utf-8")


def copy_folder(source: Path, target: Path) -> int:
    """Copy a folder, so that it exists only when it is whole, and return its bytes.

    Modes are not copied, because those of a read-only folder would make the copy read-only too. Files whose names
    begin with a dot are unfinished and left out. An older copy is replaced.
    """
    partial = target.with_name(target.name + _COPYING)
    shutil.rmtree(partial, ignore_errors=True)
    merge_folder(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return folder_bytes(target)


def merge_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder into another one, and delete none there. Each of them is replaced by a whole one.

    Modes and unfinished files are left out as in `copy_folder`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not path.name.startswith("."):
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = place.with_name(f".{place.name}{_COPYING}")
            shutil.copyfile(path, partial)
            partial.replace(place)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
