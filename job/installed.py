"""Checks that this interpreter can run the program. Needs only the standard library, and runs on an old Python too."""

import sys
from importlib.util import find_spec
from pathlib import Path

from job.invocation import shown

OLDEST_PYTHON = (3, 11)
"""Oldest supported Python, the same as `requires-python` in pyproject.toml."""
PACKAGES = (
    *("accelerate", "datasets", "deepspeed", "fastokens", "fsspec", "huggingface_hub", "jinja2", "matplotlib", "numpy"),
    *("orjson", "packaging", "psutil", "pyarrow", "pydantic", "requests", "rich", "s3fs", "safetensors", "swanlab"),
    *("tokenizers", "torch", "transformers", "yaml", "zstandard"),
)
"""Import names of the dependencies in pyproject.toml."""
_SHOWN = 3
"""Missing packages that the message names."""


def problem():  # type: ignore[no-untyped-def]  # An old Python refuses the annotation.
    """Return one line that says what this interpreter lacks and which one to use; empty if it lacks nothing."""
    if sys.platform == "win32":
        return f"python: {sys.executable!r}: is a Python for Windows, and Linux or macOS is needed; use it inside WSL 2"
    if sys.version_info < OLDEST_PYTHON:
        lacks = "is Python {}.{}, and {}.{} or later is needed".format(*sys.version_info[:2], *OLDEST_PYTHON)
    else:
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if not missing:
            return ""
        others = f" and {len(missing) - _SHOWN} more packages" if len(missing) > _SHOWN else ""
        lacks = f"does not have {', '.join(missing[:_SHOWN])}{others}"
    folder = Path(__file__).absolute().parent.parent
    own = folder / ".venv" / "bin" / "python"
    is_running = Path(sys.prefix) == own.parent.parent
    if own.exists() and not is_running:
        remedy = f"use {shown(own)} -m job, which `make setup` has created"
    else:
        remedy = f"run `make setup` in {folder}, then use {shown(own)} -m job"
    return f"python: {sys.executable!r}: {lacks}; {remedy}"
