"""Tests of the folder `trainjob` with a stand-in for Kubeflow Trainer: which ranks and processes its nodes get."""

from typing import Any

import cluster
import pytest
from cluster import FOLDERS, Manifest, pods
from trainer import jobset_of_trainjob

from job.errors import UserError
from job.launcher.environment import Rendezvous, detect_environment

SECRETS = {"wikillm": {"AWS_ACCESS_KEY_ID": "a key"}}


@pytest.fixture
def manifests() -> list[Manifest]:
    return cluster.render(FOLDERS / "trainjob")


def trainer_of(manifests: list[Manifest]) -> dict[str, Any]:
    trainer: dict[str, Any] = cluster.only("TrainJob", manifests)["spec"]["trainer"]
    return trainer


def test_nodes_get_their_ranks_only_from_the_trainer(manifests: list[Manifest]) -> None:
    variables = {variable["name"] for variable in pods(manifests)[0].container["env"]}
    ours = {name for name in variables if not name.startswith("PET_")}
    assert ours == {"WIKILLM_JOB_ID", "WIKILLM_SCRATCH"}
    for pod in pods(manifests):
        environment = pod.environment(SECRETS)
        detected = detect_environment(environment | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
        assert environment["PET_NPROC_PER_NODE"] == "auto", "the pods request GPUs"
        assert (detected.kind, detected.node_rank) == ("Kubeflow Trainer", pod.index)
        assert (detected.nodes, detected.gpus.number) == (2, 8)
        assert detected.rendezvous == Rendezvous("wikillm-node-0-0.wikillm", 29500)
        assert cluster.service_of(manifests)["metadata"]["name"] == "wikillm"


def test_number_of_processes_in_the_trainjob_is_used(manifests: list[Manifest]) -> None:
    trainer_of(manifests)["numProcPerNode"] = 4
    assert detect_environment(pods(manifests)[1].environment(SECRETS)).processes == 4


def test_pods_without_gpus_get_one_process_for_each_cpu(manifests: list[Manifest]) -> None:
    [replicated] = cluster.only("TrainingRuntime", manifests)["spec"]["template"]["spec"]["replicatedJobs"]
    [container] = replicated["template"]["spec"]["template"]["spec"]["containers"]
    container["resources"] = {"requests": {"cpu": "3"}, "limits": {"memory": "4Gi"}}
    assert detect_environment(pods(manifests)[0].environment(SECRETS)).processes == 3


def test_nodes_without_a_trainer_get_no_rank_and_refuse_to_start(manifests: list[Manifest]) -> None:
    del cluster.only("TrainJob", manifests)["spec"]["trainer"]
    with pytest.raises(UserError, match="WIKILLM_NODES"):
        detect_environment(pods(manifests)[0].environment(SECRETS))


@pytest.mark.parametrize(
    ("path", "value"),
    [(("replicas",), 2), (("template", "metadata", "labels"), {}), (("name",), "workers")],
)
def test_stand_in_refuses_an_invalid_runtime_like_the_trainer(
    manifests: list[Manifest], path: tuple[str, ...], value: Any
) -> None:
    runtime = cluster.only("TrainingRuntime", manifests)
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises((AssertionError, KeyError)):
        jobset_of_trainjob(cluster.only("TrainJob", manifests), runtime)
