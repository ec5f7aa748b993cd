"""Tests of launch/kubernetes/components: each component, rendered with each folder for which it is meant."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster
import kubernetes_validate
import pytest
import yaml
from cluster import FOLDERS, OVERLAYS, RESTARTED_AS_ONE, Manifest, Pod
from schemas import MODELS, NEWEST, OLDEST, known_fields

from job.launcher.environment import detect_environment

TRAINING = tuple(folder for folder in OVERLAYS if folder != "prepare")
SEVERAL_NODES = tuple(folder for folder in TRAINING if folder != "single")
NOT_SPOT = tuple(folder for folder in TRAINING if folder != "spot")
"""All training folders but `spot`, which selects nodes by the labels of other clouds."""
COMPONENTS = {path.parent.name: path for path in sorted((FOLDERS / "components").glob("*/kustomization.yaml"))}
RenderWith = Callable[..., list[Manifest]]


@pytest.fixture
def render_with(tmp_path: Path) -> RenderWith:
    """A function that renders a folder with components, as base/kustomization.yaml describes, and validates it."""

    def render(folder: str, *components: str, **changes: Any) -> list[Manifest]:
        if folder in RESTARTED_AS_ONE:
            copy = Path(shutil.copytree(FOLDERS, tmp_path / "kubernetes"))
            file = copy / folder / "kustomization.yaml"
            tree = yaml.safe_load(file.read_text())
            tree["components"] += [f"../components/{name}" for name in components]
            file.write_text(yaml.safe_dump(tree | changes))
            rendered = cluster.render(copy / folder)
        else:
            changes |= {"components": [f"components/{name}" for name in components], "transformers": ["wiring"]}
            rendered = cluster.render_changed(tmp_path / "own", folder, {}, **changes)
        for manifest in rendered:
            assert manifest["kind"] not in MODELS or known_fields(manifest) == manifest
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(cluster.job_of(rendered), version, strict=True)
        first, *_ = pods = cluster.pods_of(cluster.job_of(rendered))
        for pod in pods:
            rendezvous = detect_environment(pod.environment({"wikillm": {}})).rendezvous
            assert rendezvous is None or rendezvous.address == first.address
        return rendered

    return render


def pod_of(manifests: list[Manifest]) -> Pod:
    return cluster.pods_of(cluster.job_of(manifests))[0]


def limits_of(manifests: list[Manifest]) -> Manifest:
    limits: Manifest = pod_of(manifests).container["resources"]["limits"]
    return limits


def test_header_of_base_names_every_component() -> None:
    header = (FOLDERS / "base" / "kustomization.yaml").read_text().partition("apiVersion:")[0]
    assert all(name in header for name in COMPONENTS.keys() - {"of-a-job"})
    assert len(COMPONENTS) == 12


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_component_that_would_change_nothing_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing selected by Job"):
        cluster.render_changed(tmp_path / "own", folder, {}, components=["components/tencent"])
    for name, path in COMPONENTS.items():
        assert name == "of-a-job" or yaml.safe_load(path.read_text())["components"] == ["../of-a-job"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_kueue_gets_its_queue_and_may_end_pods_on_dead_nodes(folder: str, render_with: RenderWith) -> None:
    changed = render_with(folder, "kueue")
    queued = [
        manifest["kind"]
        for manifest in changed
        if "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {})
    ]
    assert queued == [{"jobset": "JobSet", "trainjob": "TrainJob"}.get(folder, "Job")]
    template = cluster.job_of(changed)["spec"]["template"]
    assert template["metadata"]["annotations"] == {"kueue.x-k8s.io/safe-to-forcefully-delete": "true"}


@pytest.mark.parametrize("folder", SEVERAL_NODES)
def test_volcano_places_all_pods_or_none(folder: str, render_with: RenderWith) -> None:
    changed = render_with(folder, "volcano", nameSuffix="-two")
    group, job = cluster.only("PodGroup", changed), cluster.job_of(changed)
    assert group["apiVersion"] == "scheduling.volcano.sh/v1beta1"
    assert group["metadata"]["name"] == "wikillm-two"
    assert group["spec"] == {"minMember": job["spec"]["completions"], "queue": "default"}
    assert job["spec"]["template"]["metadata"]["annotations"] == {"scheduling.k8s.io/group-name": "wikillm-two"}
    assert pod_of(changed).spec["schedulerName"] == "volcano"


def test_components_added_inside_a_folder_keep_its_patches(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FOLDERS, tmp_path / "kubernetes"))
    file = copy / "multi-node" / "kustomization.yaml"
    text = file.read_text().replace("value: 2 # EDIT", "value: 5 # EDIT")
    file.write_text(f"{text}components: [../components/volcano, ../components/rdma]\n")
    changed = cluster.render(copy / "multi-node")
    assert cluster.only("PodGroup", changed)["spec"]["minMember"] == 5
    assert limits_of(changed)["nvidia.com/gpu"] == 8
    assert limits_of(changed)["rdma/hca_shared_devices_a"] == 1


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pull_secret_service_account_and_limits_are_added(
    folder: str, manifests: list[Manifest], render_with: RenderWith
) -> None:
    changed = render_with(folder, "image-pull-secret", "service-account", "optional-secret", "cpu-limit")
    pod, before = pod_of(changed), pod_of(manifests)
    assert pod.spec["imagePullSecrets"] == [{"name": "registry"}]
    assert pod.spec["serviceAccountName"] == "wikillm"
    assert pod.spec["automountServiceAccountToken"] is False
    with pytest.raises(AssertionError, match="CreateContainerConfigError"):
        before.environment({})
    assert "WIKILLM_SCRATCH" in pod.environment({})
    cpus = pod.container["resources"]["requests"]["cpu"]
    limits = {name: str(value) for name, value in limits_of(changed).items()}
    assert limits == {name: str(value) for name, value in limits_of(manifests).items()} | {"cpu": cpus}


@pytest.mark.parametrize("folder", NOT_SPOT)
def test_nodes_are_selected_by_the_label_of_the_cloud(folder: str, render_with: RenderWith) -> None:
    assert pod_of(render_with(folder, "aliyun", "tencent", "huawei")).spec["nodeSelector"] == {
        "aliyun.accelerator/nvidia_name": "NVIDIA-A100-SXM4-80GB",
        "node.tke.cloud.tencent.com/accelerator-type": "gpu",
        "accelerator": "nvidia-v100",
    }


@pytest.mark.parametrize("folder", SEVERAL_NODES)
@pytest.mark.parametrize(
    ("component", "resources"),
    [
        ("rdma", {"rdma/hca_shared_devices_a": 1}),
        ("efa", {"vpc.amazonaws.com/efa": 4, "hugepages-2Mi": "5120Mi"}),
    ],
)
def test_interconnect_adds_devices_and_allows_locked_memory(
    component: str, resources: Manifest, folder: str, manifests: list[Manifest], render_with: RenderWith
) -> None:
    changed = render_with(folder, component)
    assert limits_of(changed) == limits_of(manifests) | resources
    assert pod_of(changed).container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
