"""What is added for one kind of cluster: each component, rendered with each folder that it is for."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster
import kubernetes_validate
import pytest
import yaml
from cluster import FOLDERS, OVERLAYS, RESTARTED_AS_ONE, Manifest, Pod
from schemas import MODELS, NEWEST, OLDEST, known

from job.launcher.environment import find_place

TRAINING = tuple(folder for folder in OVERLAYS if folder != "prepare")
SEVERAL_NODES = tuple(folder for folder in TRAINING if folder != "single")
NOT_SPOT = tuple(folder for folder in TRAINING if folder != "spot")
"""`spot` chooses nodes by the labels of other clouds."""
COMPONENTS = {path.parent.name: path for path in sorted((FOLDERS / "components").glob("*/kustomization.yaml"))}
Added = Callable[..., list[Manifest]]


@pytest.fixture
def added(tmp_path: Path) -> Added:
    """What a folder renders to with components, which are added as base/kustomization.yaml says; it is valid."""

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
        for one in rendered:
            assert one["kind"] not in MODELS or known(one) == one
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(cluster.job_of(rendered), version, strict=True)
        first, *_ = found = cluster.pods_of(cluster.job_of(rendered))
        for pod in found:
            meets = find_place(pod.environment({"wikillm": {}})).rendezvous
            assert meets is None or meets.address == first.address
        return rendered

    return render


def pod_of(manifests: list[Manifest]) -> Pod:
    return cluster.pods_of(cluster.job_of(manifests))[0]


def limits_of(manifests: list[Manifest]) -> Manifest:
    limits: Manifest = pod_of(manifests).container["resources"]["limits"]
    return limits


def test_every_component_is_named_where_a_user_looks_for_it() -> None:
    header = (FOLDERS / "base" / "kustomization.yaml").read_text().partition("apiVersion:")[0]
    assert all(name in header for name in COMPONENTS.keys() - {"of-a-job"})
    assert len(COMPONENTS) == 12


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_a_component_that_would_change_nothing_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="nothing selected by Job"):
        cluster.render_changed(tmp_path / "own", folder, {}, components=["components/tencent"])
    for name, path in COMPONENTS.items():
        assert name == "of-a-job" or yaml.safe_load(path.read_text())["components"] == ["../of-a-job"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_kueue_finds_its_queue_at_what_it_admits_and_may_end_the_pod_of_a_dead_node(folder: str, added: Added) -> None:
    changed = added(folder, "kueue")
    queued = [one["kind"] for one in changed if "kueue.x-k8s.io/queue-name" in one["metadata"].get("labels", {})]
    assert queued == [{"jobset": "JobSet", "trainjob": "TrainJob"}.get(folder, "Job")]
    template = cluster.job_of(changed)["spec"]["template"]
    assert template["metadata"]["annotations"] == {"kueue.x-k8s.io/safe-to-forcefully-delete": "true"}


@pytest.mark.parametrize("folder", SEVERAL_NODES)
def test_volcano_places_all_pods_of_a_run_or_none(folder: str, added: Added) -> None:
    changed = added(folder, "volcano", nameSuffix="-two")
    group, job = cluster.only("PodGroup", changed), cluster.job_of(changed)
    assert group["apiVersion"] == "scheduling.volcano.sh/v1beta1"
    assert group["metadata"]["name"] == "wikillm-two"
    assert group["spec"] == {"minMember": job["spec"]["completions"], "queue": "default"}
    assert job["spec"]["template"]["metadata"]["annotations"] == {"scheduling.k8s.io/group-name": "wikillm-two"}
    assert pod_of(changed).spec["schedulerName"] == "volcano"


def test_what_is_added_in_the_folder_itself_is_not_undone_by_its_own_changes(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(FOLDERS, tmp_path / "kubernetes"))
    file = copy / "multi-node" / "kustomization.yaml"
    text = file.read_text().replace("value: 2 # EDIT", "value: 5 # EDIT")
    file.write_text(f"{text}components: [../components/volcano, ../components/rdma]\n")
    changed = cluster.render(copy / "multi-node")
    assert cluster.only("PodGroup", changed)["spec"]["minMember"] == 5
    assert limits_of(changed)["nvidia.com/gpu"] == 8
    assert limits_of(changed)["rdma/hca_shared_devices_a"] == 1


@pytest.mark.parametrize("folder", OVERLAYS)
def test_a_cluster_asks_for_secrets_an_account_and_limits_or_has_no_secret(
    folder: str, manifests: list[Manifest], added: Added
) -> None:
    changed = added(folder, "image-pull-secret", "service-account", "optional-secret", "cpu-limit")
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
def test_nodes_are_chosen_by_the_label_that_the_cloud_sets(folder: str, added: Added) -> None:
    assert pod_of(added(folder, "aliyun", "tencent", "huawei")).spec["nodeSelector"] == {
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
def test_an_interconnect_is_added_to_the_gpus_and_memory_may_be_locked(
    component: str, resources: Manifest, folder: str, manifests: list[Manifest], added: Added
) -> None:
    changed = added(folder, component)
    assert limits_of(changed) == limits_of(manifests) | resources
    assert pod_of(changed).container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}
