"""The program as a person starts it: a printed command works where it is pasted, with no virtual environment active."""

import shlex
import sys
from pathlib import Path


def command(*words: str, module: str = "job") -> str:
    """``.venv/bin/python -m job WORDS``, quoted for a shell, with the interpreter that runs this process."""
    return shlex.join([python(), "-m", module, *words])


def python() -> str:
    """The path of this process' interpreter, from the working directory where it lies below that."""
    return _shown(Path(sys.executable or "python3"))


def program(name: str) -> str:
    """The path of a program that was installed with this interpreter; the name alone where there is none."""
    path = Path(sys.executable).with_name(name)
    return shlex.quote(_shown(path)) if path.is_file() else name


def _shown(path: Path) -> str:
    try:
        below = path.relative_to(Path.cwd())
    except (ValueError, OSError):  # it lies elsewhere, or the working directory is gone
        return str(path)
    return str(below) if len(below.parts) > 1 else f"./{below}"
