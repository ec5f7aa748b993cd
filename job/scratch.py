"""Folders on a disk of this node, for what can be lost."""

import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import gettempdir

VARIABLE = "WIKILLM_SCRATCH"


def scratch_folder(environment: Mapping[str, str] = os.environ) -> tuple[Path, str]:
    """Where everything goes for which no setting names a folder, and what says so."""
    for name in (VARIABLE, "SLURM_TMPDIR"):
        if environment.get(name):
            return Path(environment[name]), name
    if "SLURM_JOB_ID" in environment:
        folder = Path(environment.get("TMPDIR") or "/tmp") / f"wikillm-{os.getuid()}"
        return folder, "TMPDIR: under Slurm the nodes share a user's home"
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wikillm", "the user's cache folder"


def cache_folder(setting: str | None) -> Path:
    """`data.cache_dir`: where shards and tokenizers in use are kept."""
    return Path(setting).expanduser() if setting else scratch_folder()[0] / "shards"


def log_folder(setting: str | None) -> Path:
    """`tracking.log_dir`: where SwanLab keeps its files; beside the person's other files where nothing else is said."""
    return Path(setting).expanduser() if setting else Path(os.environ.get(VARIABLE, ""), "swanlog")


def loading_folder(setting: str | None) -> Path:
    """`checkpoint.scratch_dir`: where a checkpoint is put when it is loaded."""
    return Path(setting or os.environ.get(VARIABLE) or gettempdir()).expanduser()
