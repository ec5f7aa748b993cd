"""Check the launch files for `python -m job check --place PLACE`.

    slurm.py        checks slurm.sh
    kubernetes.py   checks the folders of kubernetes/, which pods.py renders
    swanlab.py      checks swanlab.yaml and the account

`job.preflight.other_places` imports this package by its name, because `job` must also work without launch/, which the
image does not contain.
"""

from job.config import Config
from job.data.manifest import Manifest
from job.errors import UserError
from job.preflight.findings import Findings
from job.preflight.target import KUBERNETES_FOLDER, SLURM_SCRIPT, SWANLAB_SPEC, Target


def check_place(
    findings: Findings,
    config: Config,
    place: str,
    config_path: str | None,
    manifest: Manifest | None,
    checkpoint_bytes: int | None,
) -> tuple[Target | None, Config]:
    """Check the launch files of a place; return the nodes that they request and the settings used there.

    Args:
        findings: receives one row for each check.
        config: the settings.
        place: ``slurm``, ``kubernetes``, ``kubernetes/<folder>`` or ``swanlab``.
        config_path: the file with the settings, shown in remedies.
        manifest: manifest of the data set, if it exists.
        checkpoint_bytes: size of one checkpoint, if it is known.
    """
    kind, _, folder = place.partition("/")
    if kind == "slurm":
        from launch.checks.slurm import DEFAULT_CONFIG, check_slurm

        if config_path is None:
            found = f"no file is given: the defaults were checked, but {SLURM_SCRIPT} uses {DEFAULT_CONFIG}"
            findings.unsure("config", found, "give the file with --config")
        return check_slurm(findings, config, SLURM_SCRIPT), config
    if kind == "swanlab":
        from launch.checks.swanlab import check_swanlab

        return check_swanlab(findings, config, SWANLAB_SPEC), config
    from launch.checks.kubernetes import check_kubernetes, check_scratch

    path = KUBERNETES_FOLDER / (folder or "single")
    target, in_pods = check_kubernetes(findings, config, path, config_path) or (None, config)
    if target is not None and manifest is not None and checkpoint_bytes is not None:
        check_scratch(findings, in_pods, path, manifest, checkpoint_bytes)
    return target, in_pods


def makes_data_set(place: str) -> bool:
    """Return True if the Job of ``kubernetes/<folder>`` runs `prepare`, which makes the data set that training needs.

    Return False if the folder cannot be rendered: `check_place` says why.
    """
    from launch.checks.pods import render

    kind, _, folder = place.partition("/")
    try:
        return kind == "kubernetes" and render(KUBERNETES_FOLDER / (folder or "single")).command == "prepare"
    except (UserError, OSError):
        return False
