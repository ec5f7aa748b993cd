"""What `python -m job check --place` finds out about a place from its files in this folder.

    slurm.py        slurm.sh
    kubernetes.py   the folders of kubernetes/, as pods.py renders them
    swanlab.py      swanlab.yaml and the account

`job.preflight.other_places` loads this by its name; the image has no launch/, and does without.
"""

from job.config import Config
from job.data.manifest import Manifest
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
    """Check the files of a place; return the nodes that they ask for, and the settings that hold there.

    Args:
        findings: takes the rows.
        config: all settings.
        place: ``slurm``, ``kubernetes``, ``kubernetes/<folder>`` or ``swanlab``.
        config_path: the file of the settings, for what to do about it.
        manifest: of the data set, if there is one.
        checkpoint_bytes: of one checkpoint, if that is known.
    """
    kind, _, folder = place.partition("/")
    if kind == "slurm":
        from launch.checks.slurm import DEFAULT_CONFIG, check_slurm

        if config_path is None:
            found = f"none is named: {SLURM_SCRIPT} takes {DEFAULT_CONFIG}, and these are the defaults"
            findings.unsure("config", found, "name it with --config")
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
