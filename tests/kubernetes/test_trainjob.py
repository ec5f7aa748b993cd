"""What Kubeflow Trainer makes of `trainjob`, and what the entrypoint makes of the environment of its nodes."""

from typing import Any

import cluster
import pytest
from cluster import FOLDERS, Manifest, Pod
from trainer import jobset_of_trainjob

from job.errors import UserError
from job.launcher.environment import Rendezvous, find_place

SECRETS = {"wikillm": {"AWS_ACCESS_KEY_ID": "a key"}}


def pods(manifests: list[Manifest]) -> list[Pod]:
    return cluster.pods_of(cluster.job_of(manifests))


@pytest.fixture
def manifests() -> list[Manifest]:
    return cluster.render(FOLDERS / "trainjob")


def trainer_of(manifests: list[Manifest]) -> dict[str, Any]:
    trainer: dict[str, Any] = cluster.only("TrainJob", manifests)["spec"]["trainer"]
    return trainer


def test_a_node_learns_its_place_from_the_trainer_alone(manifests: list[Manifest]) -> None:
    ours = {one["name"] for one in pods(manifests)[0].container["env"] if not one["name"].startswith("PET_")}
    assert ours == {"WIKILLM_JOB_ID", "WIKILLM_SCRATCH"}
    for pod in pods(manifests):
        environment = pod.environment(SECRETS)
        place = find_place(environment | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
        assert environment["PET_NPROC_PER_NODE"] == "auto", "as long as the pods ask for GPUs"
        assert (place.kind, place.node_rank, place.nodes, place.gpus.number) == ("Kubeflow Trainer", pod.index, 2, 8)
        assert place.rendezvous == Rendezvous("wikillm-node-0-0.wikillm", 29500)
        assert cluster.service_of(manifests)["metadata"]["name"] == "wikillm"


def test_a_number_of_processes_in_the_trainjob_is_taken(manifests: list[Manifest]) -> None:
    trainer_of(manifests)["numProcPerNode"] = 4
    assert find_place(pods(manifests)[1].environment(SECRETS)).processes == 4


def test_pods_without_gpus_get_as_many_processes_as_the_trainer_counts_cpus(manifests: list[Manifest]) -> None:
    [replicated] = cluster.only("TrainingRuntime", manifests)["spec"]["template"]["spec"]["replicatedJobs"]
    [container] = replicated["template"]["spec"]["template"]["spec"]["containers"]
    container["resources"] = {"requests": {"cpu": "3"}, "limits": {"memory": "4Gi"}}
    assert find_place(pods(manifests)[0].environment(SECRETS)).processes == 3


def test_without_a_trainer_no_node_is_told_its_place_and_none_begins_alone(manifests: list[Manifest]) -> None:
    del cluster.only("TrainJob", manifests)["spec"]["trainer"]
    with pytest.raises(UserError, match="WIKILLM_NODES"):
        find_place(pods(manifests)[0].environment(SECRETS))


@pytest.mark.parametrize(
    ("path", "value"),
    [(("replicas",), 2), (("template", "metadata", "labels"), {}), (("name",), "workers")],
)
def test_the_stand_in_refuses_a_runtime_that_the_trainer_would_not_take(
    manifests: list[Manifest], path: tuple[str, ...], value: Any
) -> None:
    runtime = cluster.only("TrainingRuntime", manifests)
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises((AssertionError, KeyError)):
        jobset_of_trainjob(cluster.only("TrainJob", manifests), runtime)
