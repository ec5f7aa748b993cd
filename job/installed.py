"""Tells whether this interpreter can run the program; needs nothing but the standard library, even of an old Python."""

import sys
from importlib.util import find_spec
from pathlib import Path

from job.invocation import shown

OLDEST_PYTHON = (3, 11)
"""As `requires-python` in pyproject.toml."""
PACKAGES = (
    *("accelerate", "datasets", "deepspeed", "fastokens", "fsspec", "huggingface_hub", "matplotlib", "numpy"),
    *("orjson", "packaging", "psutil", "pyarrow", "pydantic", "requests", "rich", "s3fs", "safetensors", "swanlab"),
    *("tokenizers", "torch", "transformers", "yaml", "zstandard"),
)
"""What the dependencies in pyproject.toml are imported as."""
_SHOWN = 3


def problem():  # type: ignore[no-untyped-def]  # an old Python refuses the annotation
    """One line that says what this interpreter lacks and which one to use; empty if it lacks nothing."""
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
        remedy = f"use {shown(own)} -m job, which `make setup` has made"
    else:
        remedy = f"run `make setup` in {folder}, then use {shown(own)} -m job"
    return f"python: {sys.executable!r}: {lacks}; {remedy}"
