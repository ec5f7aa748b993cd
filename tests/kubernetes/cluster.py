"""Render manifests and derive what a cluster makes from them: the JobSet, the Job, and pods with their environment.

The functions stand in for Kubernetes' controllers, which cannot run in a test. They do what is documented for the
fields that our manifests use, and refuse other fields. Restarts are in `controllers`.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from trainer import jobset_of_trainjob

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]
"""Type of `render_changed` without its first argument."""

KUBECTL = Path(sys.executable).parent / "kubectl"
FOLDERS = Path(__file__).parents[2] / "launch" / "kubernetes"
IMAGE = yaml.safe_load((FOLDERS / "base" / "kustomization.yaml").read_text())["images"][0]["newName"]
"""Name of the image in the rendered manifests, without a tag."""
OF_ONE_JOB = ("single", "multi-node", "prepare", "spot")
"""Folders that render to a Job."""
RESTARTED_AS_ONE = ("jobset", "trainjob")
"""Folders that render to a JobSet and a TrainJob."""
OVERLAYS = (*OF_ONE_JOB, *RESTARTED_AS_ONE)


def render(folder: Path) -> list[Manifest]:
    """Return the manifests that `kubectl apply -k` would send to the cluster."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def render_changed(folder: Path, base: str, settings: Manifest, **changes: Any) -> list[Manifest]:
    """Render a user's own folder that changes one of our folders.

    Args:
        folder: path of the user's folder, which is created.
        base: name of our folder.
        settings: settings of the run, which replace ours.
        changes: fields of the user's kustomization.yaml. Our folders are given by name, as in `base`.
    """
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, allow_unicode=True))

    def path_of(name: str) -> str:
        return os.path.relpath(FOLDERS / name, folder)

    for key in changes.keys() & {"transformers", "components"}:
        changes[key] = [path_of(name) for name in changes[key]]
    own_settings = {
        "name": "wikillm-config-prepare" if base == "prepare" else "wikillm-config",
        "behavior": "replace",
        "files": ["config.yaml"],
    }
    kustomization = {"resources": [path_of(base)], "configMapGenerator": [own_settings], **changes}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return render(folder)


def only(kind: str, manifests: list[Manifest]) -> Manifest:
    """Return the only manifest of this kind."""
    [manifest] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return manifest


def jobset_of(manifests: list[Manifest]) -> Manifest | None:
    """Return the JobSet, also the one that the Trainer makes from a TrainJob; None if the manifests make a Job."""
    kinds = {manifest["kind"] for manifest in manifests}
    if "TrainJob" in kinds:
        return jobset_of_trainjob(only("TrainJob", manifests), only("TrainingRuntime", manifests))
    return only("JobSet", manifests) if "JobSet" in kinds else None


def subdomain_of(jobset: Manifest) -> str:
    """Return the name of the Service that the JobSet controller creates: by default the JobSet's name."""
    name: str = jobset["spec"]["network"].get("subdomain", jobset["metadata"]["name"])
    return name


def job_of(manifests: list[Manifest]) -> Manifest:
    """Return the Job; for a JobSet the Job that its controller creates, with its name and labels."""
    jobset = jobset_of(manifests)
    if jobset is None:
        return only("Job", manifests)
    [replicated] = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
    spec = replicated["template"]["spec"]
    labels = {
        "jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"],
        "jobset.sigs.k8s.io/jobset-uid": "uid-of-the-jobset",
    }
    metadata = spec["template"]["metadata"]
    template = spec["template"] | {"metadata": metadata | {"labels": metadata["labels"] | labels}}
    template["spec"] = template["spec"] | {"subdomain": subdomain_of(jobset)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": spec | {"template": template},
    }


def service_of(manifests: list[Manifest]) -> Manifest:
    """Return the headless Service; for a JobSet the Service that its controller creates."""
    jobset = jobset_of(manifests)
    if jobset is None:
        return only("Service", manifests)
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"]
    return {
        "metadata": {"name": subdomain_of(jobset)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": network["publishNotReadyAddresses"],
            "selector": {"jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"]},
        },
    }


# ---- Pods ----


@dataclass(frozen=True)
class Pod:
    """A pod as the Job controller creates it for a completion index."""

    index: int
    hostname: str
    labels: dict[str, str]
    spec: Manifest

    @property
    def address(self) -> str:
        """DNS name of the pod for other pods in the namespace, which its Service publishes."""
        return f"{self.hostname}.{self.spec['subdomain']}"

    @property
    def container(self) -> Manifest:
        [container] = self.spec["containers"]
        assert isinstance(container, dict)
        return container

    def environment(self, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Return the container's environment variables, without those of the image.

        Args:
            secrets: variables by name for each Secret of the namespace.
        """
        variables = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        for source in self.container.get("envFrom", []):
            name, optional = source["secretRef"]["name"], source["secretRef"].get("optional", False)
            assert optional or name in secrets, "CreateContainerConfigError"
            variables |= secrets.get(name, {})
        for entry in self.container["env"]:
            variables[entry["name"]] = self._value(entry, variables)
        return variables | {"JOB_COMPLETION_INDEX": str(self.index), "HOSTNAME": self.hostname}

    def _value(self, variable: Manifest, known: Mapping[str, str]) -> str:
        if "value" in variable:
            return re.sub(r"\$\(([^)]+)\)", lambda match: known.get(match[1], match[0]), variable["value"])
        path = re.fullmatch(
            r"metadata\.(?:labels|annotations)\['(.+)'\]", variable["valueFrom"]["fieldRef"]["fieldPath"]
        )
        assert path is not None, variable
        return self.labels.get(path[1], "")  # The completion index is both a label and an annotation.


def pods_of(job: Manifest, uid: str = "uid-of-the-job") -> list[Pod]:
    """Return the pods of an Indexed Job, one for each completion."""
    name, spec = job["metadata"]["name"], job["spec"]
    assert spec["completionMode"] == "Indexed"
    labels = spec["template"]["metadata"]["labels"] | {
        "batch.kubernetes.io/job-name": name,
        "batch.kubernetes.io/controller-uid": uid,
    }
    return [
        Pod(
            index,
            f"{name}-{index}",
            labels | {"batch.kubernetes.io/job-completion-index": str(index)},
            spec["template"]["spec"],
        )
        for index in range(spec["completions"])
    ]


def pods(manifests: list[Manifest]) -> list[Pod]:
    """Return the pods that the manifests make, one for each node."""
    return pods_of(job_of(manifests))


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Return True if `labels` contain all labels of the selector."""
    return selector.items() <= labels.items()


# ---- Reading manifests ----


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every field below `node`."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield f"{path}.{key}", value
        yield from walk(value, f"{path}.{key}")


def bytes_of(quantity: str | int) -> int:
    """Return the bytes of a quantity of memory or disk."""
    match = re.fullmatch(r"([1-9]\d*)(|Ki|Mi|Gi|Ti)", str(quantity))
    assert match is not None, f"{quantity!r} is not a whole number of bytes, Ki, Mi, Gi or Ti"
    return int(match[1]) * 1024 ** ("", "Ki", "Mi", "Gi", "Ti").index(match[2])
