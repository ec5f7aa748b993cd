"""The version of this program, with the git revision."""

import os
import subprocess
from pathlib import Path

from job import __version__

VARIABLE = "WIKILLM_REVISION"
"""Environment variable with the revision. The image sets it, because it has no repository."""


def code_version(folder: Path = Path(__file__).parent.parent) -> str:
    """Return the version, and the git revision that the image records or the checkout has: ``0.1.0+1f2e3d4c5b6a``."""
    revision = os.environ.get(VARIABLE)
    if not revision and (folder / ".git").exists():
        describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            revision = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            revision = None  # git is not installed, or the checkout belongs to another user.
    return f"{__version__}+{revision}" if revision else __version__
