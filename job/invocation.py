"""Commands as they are printed: they work where they are pasted, with no virtual environment active.

Needs nothing but the standard library, even of an old Python: `job.installed` uses it.
"""

import shlex
import sys
from pathlib import Path


def command(*words: str, module: str = "job") -> str:
    """Return ``.venv/bin/python -m job WORDS``, quoted for a shell, with the interpreter that runs this process."""
    return shlex.join([python(), "-m", module, *words])


def python() -> str:
    """Return the path of this process' interpreter, from the working directory if it lies below that."""
    return shown(Path(sys.executable or "python3"))


def program(name: str) -> str:
    """Return the path of a program that was installed with this interpreter; its name alone if there is none."""
    path = Path(sys.executable).with_name(name)
    return shlex.quote(shown(path)) if path.is_file() else name


def shown(path: Path) -> str:
    """Return a path from the working directory if it lies below that, else as it is."""
    try:
        below = path.relative_to(Path.cwd())
    except (ValueError, OSError):  # it lies elsewhere, or the working directory is gone
        return str(path)
    return str(below) if len(below.parts) > 1 else f"./{below}"
