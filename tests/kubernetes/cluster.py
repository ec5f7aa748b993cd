"""What a cluster makes of a manifest: a JobSet of a TrainJob, a Job of that, pods with names, labels and environment.

Stand-ins for the controllers that do so, which cannot run in a test. They do what is documented for the fields that our
manifests use, and refuse those that they don't know. What becomes of pods that end is in `controllers`.
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
"""As `render_changed`, without its first argument."""

KUBECTL = Path(sys.executable).parent / "kubectl"
FOLDERS = Path(__file__).parents[2] / "launch" / "kubernetes"
IMAGE = yaml.safe_load((FOLDERS / "base" / "kustomization.yaml").read_text())["images"][0]["newName"]
"""The name that the manifests have for it, without a tag."""
OF_ONE_JOB = ("single", "multi-node", "prepare", "spot")
"""The folders that make a Job; of the others, `jobset` makes a JobSet and `trainjob` a TrainJob."""
RESTARTED_AS_ONE = ("jobset", "trainjob")
OVERLAYS = (*OF_ONE_JOB, *RESTARTED_AS_ONE)


def render(folder: Path) -> list[Manifest]:
    """What `kubectl apply -k` would send to the cluster."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def render_changed(folder: Path, base: str, settings: Manifest, **changes: Any) -> list[Manifest]:
    """What a folder of a user's own renders to, which changes one of ours and lies anywhere.

    Args:
        folder: is made.
        base: the name of ours.
        settings: of the run, in place of ours.
        changes: fields of kustomization.yaml; folders of ours are named as `base`.
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
    """The one object of its kind."""
    [found] = [one for one in manifests if one["kind"] == kind]
    return found


def jobset_of(manifests: list[Manifest]) -> Manifest | None:
    """The JobSet, or the one that the Trainer makes of a TrainJob; None where the manifests make a Job."""
    kinds = {one["kind"] for one in manifests}
    if "TrainJob" in kinds:
        return jobset_of_trainjob(only("TrainJob", manifests), only("TrainingRuntime", manifests))
    return only("JobSet", manifests) if "JobSet" in kinds else None


def subdomain_of(jobset: Manifest) -> str:
    """The name of the Service that its controller creates: the JobSet's own, unless it has another."""
    name: str = jobset["spec"]["network"].get("subdomain", jobset["metadata"]["name"])
    return name


def job_of(manifests: list[Manifest]) -> Manifest:
    """The Job; of a JobSet the one that its controller creates, with the name and labels that it gets from there."""
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
    """The headless Service; of a JobSet the one that its controller creates."""
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
    """A pod as the Job's controller creates it for a completion index."""

    index: int
    hostname: str
    labels: dict[str, str]
    spec: Manifest

    @property
    def address(self) -> str:
        """Its name for other pods of the namespace, where its Service publishes it."""
        return f"{self.hostname}.{self.spec['subdomain']}"

    @property
    def container(self) -> Manifest:
        [container] = self.spec["containers"]
        assert isinstance(container, dict)
        return container

    def environment(self, secrets: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """What its container finds there, without the image's own."""
        found = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        for source in self.container.get("envFrom", []):
            name, optional = source["secretRef"]["name"], source["secretRef"].get("optional", False)
            assert optional or name in secrets, "CreateContainerConfigError"
            found |= secrets.get(name, {})
        for one in self.container["env"]:
            found[one["name"]] = self._value(one, found)
        return found | {"JOB_COMPLETION_INDEX": str(self.index), "HOSTNAME": self.hostname}

    def _value(self, variable: Manifest, known: Mapping[str, str]) -> str:
        if "value" in variable:
            return re.sub(r"\$\(([^)]+)\)", lambda found: known.get(found[1], found[0]), variable["value"])
        path = re.fullmatch(
            r"metadata\.(?:labels|annotations)\['(.+)'\]", variable["valueFrom"]["fieldRef"]["fieldPath"]
        )
        assert path is not None, variable
        return self.labels.get(path[1], "")  # the index is a label and an annotation


def pods_of(job: Manifest, uid: str = "uid-of-the-job") -> list[Pod]:
    """The pods of an Indexed Job, one for each of its completions."""
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


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether all labels of the selector are there."""
    return selector.items() <= labels.items()


# ---- What stands anywhere in a manifest ----


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field below `node`, as its dotted path and its value."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield f"{path}.{key}", value
        yield from walk(value, f"{path}.{key}")


def bytes_of(quantity: str | int) -> int:
    """A quantity of memory or disk."""
    found = re.fullmatch(r"([1-9]\d*)(|Ki|Mi|Gi|Ti)", str(quantity))
    assert found is not None, f"{quantity!r} is no whole number of bytes, Ki, Mi, Gi or Ti"
    return int(found[1]) * 1024 ** ("", "Ki", "Mi", "Gi", "Ti").index(found[2])
