"""What a cluster makes of a manifest: pods with names, labels and environment; what becomes of a Job whose pods end.

Stand-ins for the controllers of Jobs and JobSets and for the kubelet, of which there are none to be had in a test. They
do what Kubernetes documents, for the fields that our manifests use, and refuse those that they don't know.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
Render = Callable[..., list[Manifest]]
"""As `render_changed`, without its first argument."""

KUBECTL = Path(sys.executable).parent / "kubectl"
FOLDERS = Path(__file__).parents[2] / "launch" / "kubernetes"
IMAGE = yaml.safe_load((FOLDERS / "base" / "kustomization.yaml").read_text())["images"][0]["newName"]
"""The name that the manifests have for it, without a tag."""
OF_ONE_JOB = ("single", "multi-node", "prepare", "spot")
"""The folders that make a Job; `jobset` makes a JobSet."""
OVERLAYS = (*OF_ONE_JOB, "jobset")


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


def job_of(manifests: list[Manifest]) -> Manifest:
    """The Job; of a JobSet the one that its controller creates, with the name and labels that it gets from there."""
    if any(one["kind"] == "Job" for one in manifests):
        return only("Job", manifests)
    jobset = only("JobSet", manifests)
    [replicated] = jobset["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 1
    name = f"{jobset['metadata']['name']}-{replicated['name']}-0"
    spec = replicated["template"]["spec"]
    labels = {
        "jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"],
        "jobset.sigs.k8s.io/jobset-uid": "uid-of-the-jobset",
    }
    template = spec["template"] | {"metadata": {"labels": spec["template"]["metadata"]["labels"] | labels}}
    template["spec"] = template["spec"] | {"subdomain": jobset["spec"]["network"]["subdomain"]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels},
        "spec": spec | {"template": template},
    }


def service_of(manifests: list[Manifest]) -> Manifest:
    """The headless Service; of a JobSet the one that its controller creates."""
    if any(one["kind"] == "Service" for one in manifests):
        return only("Service", manifests)
    jobset = only("JobSet", manifests)
    network = jobset["spec"]["network"]
    assert network["enableDNSHostnames"]
    return {
        "metadata": {"name": network["subdomain"]},
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
            found |= secrets[source["secretRef"]["name"]]
        for one in self.container["env"]:
            found[one["name"]] = self._value(one, found)
        return found | {"JOB_COMPLETION_INDEX": str(self.index), "HOSTNAME": self.hostname}

    def _value(self, variable: Manifest, known: Mapping[str, str]) -> str:
        if "value" in variable:
            return re.sub(r"\$\(([^)]+)\)", lambda found: known.get(found[1], found[0]), variable["value"])
        path = re.fullmatch(r"metadata\.labels\['(.+)'\]", variable["valueFrom"]["fieldRef"]["fieldPath"])
        assert path is not None, variable
        return self.labels.get(path[1], "")


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


# ---- What becomes of a Job whose pods end ----


@dataclass(frozen=True)
class Failed:
    """Why a Job is not done any more, as its condition says."""

    reason: str
    message: str


@dataclass
class JobController:
    """Stands in for the controller of Jobs: hears how each pod ended, and says whether the Job has failed by that."""

    job: Manifest
    failures: Counter[int] = field(default_factory=Counter)
    """Pods that have failed and were counted, by completion index."""

    def pod_failed(self, index: int, exit_code: int, is_disrupted: bool = False) -> Failed | None:
        """Of a pod that ended with a code other than 0; None: another one takes its place."""
        spec = self.job["spec"]
        for number, rule in enumerate(spec["podFailurePolicy"]["rules"]):
            why = self._match(rule, index, exit_code, is_disrupted)
            if why and rule["action"] == "Ignore":
                return None
            if why:
                assert rule["action"] == "FailJob", rule
                return Failed("PodFailurePolicy", f"{why} matching FailJob rule at index {number}")
        self.failures[index] += 1
        if "backoffLimitPerIndex" in spec:
            over = [one for one, times in self.failures.items() if times > spec["backoffLimitPerIndex"]]
            if len(over) > spec["maxFailedIndexes"]:
                return Failed(
                    "MaxFailedIndexesExceeded", "Job has exceeded the specified maximal number of failed indexes"
                )
        elif self.failures.total() > spec["backoffLimit"]:
            return Failed("BackoffLimitExceeded", "Job has reached the specified backoff limit")
        return None

    def _match(self, rule: Manifest, index: int, exit_code: int, is_disrupted: bool) -> str | None:
        name = self.job["metadata"]["name"]
        if "onPodConditions" in rule:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            return f"Pod default/{name}-{index}-x7k2p has condition DisruptionTarget" if is_disrupted else None
        codes = rule["onExitCodes"]
        assert codes["operator"] == "In"
        if exit_code not in codes["values"]:
            return None
        where = f"Container {codes['containerName']} for pod default/{name}-{index}-x7k2p"
        return f"{where} failed with exit code {exit_code}"


@dataclass
class JobSetController:
    """Stands in for the controller of JobSets: hears how its Job failed, and says whether all of it starts anew."""

    jobset: Manifest
    restarts: int = 0
    """That were counted."""

    def job_failed(self, failed: Failed) -> bool:
        """True: all Jobs are created anew; False: the JobSet has failed."""
        policy = self.jobset["spec"]["failurePolicy"]
        action = next((rule["action"] for rule in policy["rules"] if self._matches(rule, failed)), "RestartJobSet")
        if action == "RestartJobSetAndIgnoreMaxRestarts":
            return True
        self.restarts += action == "RestartJobSet"
        return action == "RestartJobSet" and self.restarts <= policy["maxRestarts"]

    @staticmethod
    def _matches(rule: Manifest, failed: Failed) -> bool:
        reasons, patterns = rule.get("onJobFailureReasons", []), rule.get("onJobFailureMessagePatterns", [])
        return (not reasons or failed.reason in reasons) and (
            not patterns or any(re.search(pattern, failed.message) for pattern in patterns)
        )


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
