"""The checks of another place come with launch/: this is the only code of `job` that loads it, and does without."""

import importlib

from job.config import Config
from job.data.manifest import Manifest
from job.preflight.findings import Findings
from job.preflight.target import Target

_CHECKS = "launch.checks"


def check_elsewhere(
    findings: Findings,
    config: Config,
    place: str,
    config_path: str | None,
    manifest: Manifest | None,
    checkpoint_bytes: int | None,
) -> tuple[Target | None, Config]:
    """Return the nodes that a place gives and the settings that hold there, as `launch.checks.check_place` does.

    Where launch/ is not there, as in the image, a row says that only what is the same in every place was checked.
    """
    try:
        checks = importlib.import_module(_CHECKS)
    except ModuleNotFoundError as error:
        if error.name not in (_CHECKS, _CHECKS.partition(".")[0]):
            raise
        found = f"the checks of {place} are not available here: they come with the folder launch/, which is missing"
        findings.unsure(place, found, "run this command in a checkout of the repository as well")
        return None, config
    checked: tuple[Target | None, Config] = checks.check_place(
        findings, config, place, config_path, manifest, checkpoint_bytes
    )
    return checked
