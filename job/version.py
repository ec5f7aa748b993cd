"""Which code this is."""

import os
import subprocess
from pathlib import Path

from job import __version__

VARIABLE = "WIKILLM_REVISION"
"""Set in the image, which has no repository."""


def code_version(folder: Path = Path(__file__).parent.parent) -> str:
    """The version, and the git revision where the image or a checkout tells it: ``0.1.0+1f2e3d4c5b6a-dirty``."""
    revision = os.environ.get(VARIABLE)
    if not revision and (folder / ".git").exists():
        describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        try:
            revision = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a checkout that is somebody else's
            revision = None
    return f"{__version__}+{revision}" if revision else __version__
