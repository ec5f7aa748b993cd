"""What a folder of launch/kubernetes comes to: the Job, also where it stands in a JobSet or a TrainJob's runtime.

Rendered by kubectl or kustomize: what a folder comes to follows from its base, its patches and the wiring. A user who
applies it has one of the two.
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
    """What is of interest in a rendered folder."""

    documents: list[Tree]
    job: Tree
    """The Job's spec."""
    jobset: Tree | None = None
    """The spec of the JobSet, or of the one that the Trainer makes of a TrainJob; None for a Job."""
    trainjob: Tree | None = None
    """The TrainJob's spec, if there is one."""

    @property
    def pod(self) -> Tree:
        """The pod's spec."""
        return tree(self.job, "template", "spec")

    @property
    def container(self) -> Tree:
        """The one that runs the entrypoint."""
        return next(iter(self.pod.get("containers") or [{}]))

    @property
    def command(self) -> str | None:
        """What the entrypoint is asked for; None if nothing is."""
        return next(iter(self.container.get("args") or []), None)

    @property
    def environment(self) -> dict[str, Tree]:
        """Its variables by name, each as it is given."""
        return {one["name"]: one for one in self.container.get("env") or []}

    @property
    def nodes(self) -> int:
        """How many pods there are."""
        counts = (tree(self.trainjob or {}, "trainer").get("numNodes"), self.job.get("completions"))
        return int(next((count for count in counts if count), 1))

    @property
    def gpus(self) -> int:
        """GPUs of a pod."""
        return int(tree(self.container, "resources", "limits").get("nvidia.com/gpu", 0))

    @property
    def processes(self) -> int:
        """Training processes of a pod, unless `train.processes` says otherwise."""
        return int(tree(self.trainjob or {}, "trainer").get("numProcPerNode") or max(1, self.gpus))

    def volume_at(self, path: str) -> Tree | None:
        """The volume that is mounted there."""
        mounts = {one["mountPath"]: one["name"] for one in self.container.get("volumeMounts") or []}
        return next((one for one in self.pod.get("volumes") or [] if one["name"] == mounts.get(path)), None)


def render(folder: Path) -> Pods:
    """What the folder renders to.

    Raises:
        UserError: there is no such folder, it cannot be rendered, or it makes nothing that runs.
    """
    if not (folder / "kustomization.yaml").is_file():
        raise UserError(
            "--place", f"kubernetes/{folder.name}", "no such folder", f"there are {', '.join(_to_be_applied())}"
        )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    programs = (("kubectl", "kustomize"), ("kustomize", "build"))
    command = next(([found, word] for name, word in programs if (found := shutil.which(name, path=path))), None)
    if command is None:
        raise UserError("PATH", None, "neither kubectl nor kustomize is there", "install kubectl 1.27 or later")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=_RENDER_SECONDS, check=False)
    if done.returncode:
        raise UserError(str(folder), None, f"cannot be rendered: {done.stderr.strip()}", "correct what it names")
    documents = [one for one in yaml.safe_load_all(done.stdout) if one]
    specs = {one.get("kind"): one.get("spec") for one in documents}
    if "Job" in specs:
        return Pods(documents, specs["Job"])
    trainjob = specs.get("TrainJob")
    jobset = specs.get("JobSet") if trainjob is None else tree(specs.get("TrainingRuntime") or {}, "template", "spec")
    jobs = (jobset or {}).get("replicatedJobs") or []
    if jobset is None or not jobs:
        expected = "it makes neither a Job, nor a JobSet, nor a TrainJob with a TrainingRuntime"
        raise UserError(str(folder), None, expected, f"take one of {', '.join(_to_be_applied())}")
    return Pods(documents, jobs[0]["template"]["spec"], jobset, trainjob)


def _to_be_applied() -> list[str]:
    """The names of the folders that can be applied: those that end with the wiring, as the others are parts of them."""
    trees = {
        path.parent.name: yaml.safe_load(path.read_text()) for path in KUBERNETES_FOLDER.glob("*/kustomization.yaml")
    }
    return sorted(name for name, whole in trees.items() if "../wiring" in (whole.get("transformers") or []))


def tree(whole: Tree, *path: str) -> Tree:
    """What is below these keys; empty where there is nothing."""
    for key in path:
        whole = whole.get(key) or {}
    return whole


def quantity(text: object) -> int | None:
    """Bytes of a quantity such as 32Gi; None where there is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i|[kMGT]|)", str(text))
    return None if found is None else int(Decimal(found[1]) * _UNITS[found[2]])
