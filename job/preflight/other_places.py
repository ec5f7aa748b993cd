"""Checks of places other than this machine; they are part of launch/, which `job` never imports directly.

The image has no launch/. There, a row says that these checks are not available.
"""

import importlib
from types import ModuleType

from job.config import Config
from job.data.manifest import Manifest
from job.preflight.findings import Findings
from job.preflight.target import Target

_CHECKS = "launch.checks"


def check_other_place(
    findings: Findings,
    config: Config,
    place: str,
    config_path: str | None,
    manifest: Manifest | None,
    checkpoint_bytes: int | None,
) -> tuple[Target | None, Config]:
    """Return the nodes that a place gives and the settings that hold there, as `launch.checks.check_place` does.

    The target is None, and the settings are `config`, if launch/ is missing.
    """
    checks = _load_checks()
    if checks is None:
        found = f"the checks of {place} are not available here: they are in the folder launch/, which is missing"
        findings.unsure(place, found, "run this command also in a checkout of the repository")
        return None, config
    checked: tuple[Target | None, Config] = checks.check_place(
        findings, config, place, config_path, manifest, checkpoint_bytes
    )
    return checked


def makes_data_set(place: str) -> bool:
    """Return True if the job of this place runs `prepare`, as `launch.checks.makes_data_set` says."""
    checks = _load_checks()
    return checks is not None and bool(checks.makes_data_set(place))


def _load_checks() -> ModuleType | None:
    """Import the checks by their name; None if launch/ is missing."""
    try:
        return importlib.import_module(_CHECKS)
    except ModuleNotFoundError as error:
        if error.name not in (_CHECKS, _CHECKS.partition(".")[0]):
            raise
        return None
