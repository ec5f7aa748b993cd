"""The packages that a notebook installs into the platform's Python: the locked versions, and the platform's torch."""

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

from launch.locked_versions import locked_versions

TORCH_COMPANIONS = ("torchvision", "torchaudio")
"""Packages that fit one version of torch only. `job` does not need them, but transformers imports them if they are
there, so they must go if torch is replaced."""


class Packages(NamedTuple):
    """What to install, and what happens to torch."""

    requirements: list[str]
    """Requirements of the project."""
    constraints: list[str]
    """One exact version for each package, as pip's constraints."""
    replaces_torch: bool
    reason: str
    """One line about torch, for the user."""


def installed_torch() -> str | None:
    """Return the version of the platform's torch, such as ``2.11.0+cu128``; None if it has none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def choose_packages(repository: Path, torch: str | None) -> Packages:
    """Return what to install from the folder of the repository beside the platform's torch of this version."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements: list[str] = project["dependencies"]
    locked = locked_versions(repository)
    exact = [f"{name}=={version}" for name, version in locked.items()]
    [wanted] = [requirement for text in requirements if (requirement := Requirement(text)).name == "torch"]
    if torch is not None and wanted.specifier.contains(torch, prereleases=True):
        others = [line for line in exact if not line.startswith("torch==")]
        return Packages(requirements, [*others, f"torch=={torch}"], False, f"torch: {torch} of this platform is kept")
    reason = "there is none on this platform" if torch is None else f"{torch} of this platform is too old"
    return Packages(requirements, exact, True, f"torch: {reason} ({wanted}): {locked['torch']} is installed")
