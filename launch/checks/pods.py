"""Render a folder of launch/kubernetes and find its Job, also inside a JobSet or the runtime of a TrainJob.

kubectl or kustomize renders it, because the result follows from the base, the patches and the wiring. Users who apply
the folder have one of the two programs.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

from job.errors import UserError
from job.preflight.target import KUBERNETES_FOLDER

_RENDER_SECONDS = 60
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "": 1}
Tree = dict[str, Any]


@dataclass(frozen=True)
class Pods:
    """The parts of a rendered folder that the checks read."""

    documents: list[Tree]
    job: Tree
    """Spec of the Job."""
    jobset: Tree | None = None
    """Spec of the JobSet, or of the JobSet that the Trainer makes from a TrainJob; None for a plain Job."""
    trainjob: Tree | None = None
    """Spec of the TrainJob, if there is one."""

    @property
    def pod(self) -> Tree:
        """Spec of the pod."""
        return tree(self.job, "template", "spec")

    @property
    def container(self) -> Tree:
        """The container that runs the entrypoint."""
        return next(iter(self.pod.get("containers") or [{}]))

    @property
    def command(self) -> str | None:
        """First argument of the entrypoint, such as ``train``; None without arguments."""
        return next(iter(self.container.get("args") or []), None)

    @property
    def environment(self) -> dict[str, Tree]:
        """Entries of the container's `env` by the name of the variable."""
        return {variable["name"]: variable for variable in self.container.get("env") or []}

    @property
    def nodes(self) -> int:
        """Number of pods."""
        counts = (tree(self.trainjob or {}, "trainer").get("numNodes"), self.job.get("completions"))
        return int(next((count for count in counts if count), 1))

    @property
    def gpus(self) -> int:
        """Number of GPUs of each pod."""
        return int(tree(self.container, "resources", "limits").get("nvidia.com/gpu", 0))

    @property
    def processes(self) -> int:
        """Number of training processes of each pod, unless `train.processes` is set."""
        return int(tree(self.trainjob or {}, "trainer").get("numProcPerNode") or max(1, self.gpus))

    def volume_at(self, path: str) -> Tree | None:
        """Return the volume that is mounted at `path`; None if there is none."""
        names = {mount["mountPath"]: mount["name"] for mount in self.container.get("volumeMounts") or []}
        return next((volume for volume in self.pod.get("volumes") or [] if volume["name"] == names.get(path)), None)


def render(folder: Path) -> Pods:
    """Render a folder.

    Raises:
        UserError: there is no such folder, it cannot be rendered, or the result contains no Job.
    """
    if not (folder / "kustomization.yaml").is_file():
        raise UserError(
            "--place",
            f"kubernetes/{folder.name}",
            "no such folder",
            f"choose one of {', '.join(_applicable_folders())}",
        )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    programs = (("kubectl", "kustomize"), ("kustomize", "build"))
    command = next(([program, word] for name, word in programs if (program := shutil.which(name, path=path))), None)
    if command is None:
        raise UserError("PATH", None, "contains neither kubectl nor kustomize", "install kubectl 1.27 or later")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=_RENDER_SECONDS, check=False)
    if done.returncode:
        raise UserError(str(folder), None, f"cannot be rendered: {done.stderr.strip()}", "correct what it names")
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    specs = {document.get("kind"): document.get("spec") for document in documents}
    if "Job" in specs:
        return Pods(documents, specs["Job"])
    trainjob = specs.get("TrainJob")
    jobset = specs.get("JobSet") if trainjob is None else tree(specs.get("TrainingRuntime") or {}, "template", "spec")
    jobs = (jobset or {}).get("replicatedJobs") or []
    if jobset is None or not jobs:
        expected = "it renders to no Job, JobSet, or TrainJob with a TrainingRuntime"
        raise UserError(str(folder), None, expected, f"choose one of {', '.join(_applicable_folders())}")
    return Pods(documents, jobs[0]["template"]["spec"], jobset, trainjob)


def _applicable_folders() -> list[str]:
    """Return the names of the folders that can be applied: those that use the wiring. The others are parts of them."""
    kustomizations = {
        path.parent.name: yaml.safe_load(path.read_text()) for path in KUBERNETES_FOLDER.glob("*/kustomization.yaml")
    }
    return sorted(
        name for name, content in kustomizations.items() if "../wiring" in (content.get("transformers") or [])
    )


def tree(root: Tree, *path: str) -> Tree:
    """Return the mapping below these keys; empty if a key is missing."""
    for key in path:
        root = root.get(key) or {}
    return root


def quantity(text: object) -> int | None:
    """Return the bytes of a Kubernetes quantity such as ``32Gi``; None if `text` is not a quantity."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i|[kMGT]|)", str(text))
    return None if match is None else int(Decimal(match[1]) * _UNITS[match[2]])
