"""Formats commands for printing, so that a user can paste them without activating a virtual environment.

The commands read the settings file that this command line has named.

Imports only the standard library, and runs on an old Python too, because `job.installed` uses it.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CONFIG_VARIABLE = "WIKILLM_SUGGESTED_CONFIG"
"""Variable with the settings file that was named with --config; child processes print commands too."""


@contextmanager
def suggesting_config(path: "str | None") -> "Iterator[None]":
    """Add ``--config PATH`` to the commands that `command` returns in the ``with`` block; None: add nothing."""
    before = os.environ.pop(_CONFIG_VARIABLE, None)
    if path is not None:
        os.environ[_CONFIG_VARIABLE] = path
    try:
        yield
    finally:
        os.environ.pop(_CONFIG_VARIABLE, None)
        if before is not None:
            os.environ[_CONFIG_VARIABLE] = before


def command(*words: str, module: str = "job") -> str:
    """Return ``.venv/bin/python -m job WORDS``, quoted for a shell, with the interpreter that runs this process.

    The settings file that this command line has named is added, unless the words name one.
    """
    path = os.environ.get(_CONFIG_VARIABLE)
    config_words = ["--config", path] if path and module == "job" and "--config" not in words else []
    return shlex.join([python(), "-m", module, *words, *config_words])


def python() -> str:
    """Return the path of this process's interpreter, relative to the working directory if it is below it."""
    return shown(Path(sys.executable or "python3"))


def program(name: str) -> str:
    """Return the path of a program installed with this interpreter; only its name if it is not installed."""
    path = Path(sys.executable).with_name(name)
    return shlex.quote(shown(path)) if path.is_file() else name


def shown(path: Path) -> str:
    """Return a path relative to the working directory if it is below it; otherwise unchanged."""
    try:
        below = path.relative_to(Path.cwd())
    except (ValueError, OSError):  # The path is elsewhere, or the working directory no longer exists.
        return str(path)
    return str(below) if len(below.parts) > 1 else f"./{below}"
