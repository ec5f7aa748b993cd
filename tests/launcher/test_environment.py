"""Tests of environment detection, with variables that launchers really set (Slurm's: version 22.05, two nodes)."""

import os
import time
from pathlib import Path

import pytest

from job.errors import UserError
from job.launcher.environment import Environment, Rendezvous, detect_environment, first_host, part_of_array, port_of
from job.runs.world import World

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HOME": "/home/someone"}
SLURM_JOB = {"SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
SLURM_STEP = SLURM_JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
}
ONE_NODE_STEP = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
INDEXED_JOB = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "1",
    "WIKILLM_NODES": "4",
    "WIKILLM_JOB_ID": "wiki",
    "MASTER_ADDR": "wiki-0.wiki",
}
TRAINER = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "2",
    "PET_NNODES": "3",
    "PET_NODE_RANK": "2",
    "PET_NPROC_PER_NODE": "8",
    "PET_MASTER_ADDR": "one-node-0-0.one",
    "PET_MASTER_PORT": "29400",
}
SKYPILOT = {
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_IPS": "10.1.0.4\n10.1.0.9",
    "SKYPILOT_NUM_GPUS_PER_NODE": "0",
    "SKYPILOT_TASK_ID": "sky-managed-2026-11-28-10-15-20-123456_wikillm_17-0",
}
SKYPILOT_PORT = port_of(SKYPILOT["SKYPILOT_TASK_ID"])
ONE_SKYPILOT_NODE = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_IPS": "10.1.0.4"}
BY_HAND = {"WIKILLM_NODES": "2", "WIKILLM_NODE_RANK": "1", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.5",
    "MASTER_PORT": "29500",
}


def at(**environment: str) -> Environment:
    return detect_environment(NO_GPU | environment)


@pytest.mark.parametrize(
    ("environment", "kind", "nodes", "rendezvous"),
    [
        ({}, "this machine", (0, 1), None),
        (BY_HAND, "several nodes", (1, 2), ("10.0.0.5", 29500)),
        (BY_HAND | {"MASTER_ADDR": "fd00::1"}, "several nodes", (1, 2), ("fd00::1", 29500)),
        (BY_HAND | {"MASTER_ADDR": "[fd00::1]"}, "several nodes", (1, 2), ("fd00::1", 29500)),
        (SLURM_STEP, "Slurm", (1, 2), ("gpu003", port_of("42.0"))),
        (SLURM_STEP | {"MASTER_ADDR": "ib0-gpu003", "MASTER_PORT": "3333"}, "Slurm", (1, 2), ("ib0-gpu003", 3333)),
        (SLURM_STEP | ONE_NODE_STEP, "Slurm", (0, 1), None),
        (SLURM_JOB | {"SLURM_JOB_NUM_NODES": "1"}, "Slurm", (0, 1), None),
        (INDEXED_JOB, "Kubernetes", (1, 4), ("wiki-0.wiki", port_of("wiki"))),
        (INDEXED_JOB | {"MASTER_PORT": "29400"}, "Kubernetes", (1, 4), ("wiki-0.wiki", 29400)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "Kubernetes", (0, 1), None),
        (TRAINER, "Kubeflow Trainer", (2, 3), ("one-node-0-0.one", 29400)),
        (SKYPILOT, "SkyPilot", (1, 2), ("10.1.0.4", SKYPILOT_PORT)),
        (SKYPILOT | ONE_SKYPILOT_NODE, "SkyPilot", (0, 1), None),
        (SKYPILOT | {"MASTER_ADDR": "ib-4", "MASTER_PORT": "3333"}, "SkyPilot", (1, 2), ("ib-4", 3333)),
        (SKYPILOT | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "SkyPilot", (1, 2), ("10.1.0.4", SKYPILOT_PORT)),
        (SKYPILOT | SLURM_JOB, "SkyPilot", (1, 2), ("10.1.0.4", SKYPILOT_PORT)),
        (SKYPILOT | BY_HAND, "several nodes", (1, 2), ("10.0.0.5", 29500)),
        ({"SWANLAB_RUNTIME": "task"}, "SwanLab", (0, 1), None),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "Kaggle", (0, 1), None),
        ({"COLAB_RELEASE_TAG": "release-colab_20260601"}, "Colab", (0, 1), None),
        (INDEXED_JOB | BY_HAND, "several nodes", (1, 2), ("10.0.0.5", 29500)),
    ],
)
def test_environment_is_detected_from_its_variables(
    environment: dict[str, str], kind: str, nodes: tuple[int, int], rendezvous: tuple[str, int] | None
) -> None:
    found = at(**environment)
    assert (found.kind, (found.node_rank, found.nodes)) == (kind, nodes)
    assert found.rendezvous == (Rendezvous(*rendezvous) if rendezvous else None)
    assert found.world is None


def test_process_started_by_torchrun_is_a_worker() -> None:
    found = at(**TORCHRUN)
    assert (found.kind, found.world) == ("torchrun", World(5, 1, 8, 4))


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        # Missing.
        (SLURM_JOB, "SLURM_STEP_ID"),
        (SLURM_STEP | {"SLURM_STEP_ID": "4294967290"}, "SLURM_STEP_ID"),
        (SLURM_STEP | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST"),
        ({"JOB_COMPLETION_INDEX": "0"}, "WIKILLM_NODES"),
        ({"WIKILLM_NODES": "2"}, "WIKILLM_NODE_RANK"),
        ({"WIKILLM_NODE_RANK": "0"}, "WIKILLM_NODES"),
        (INDEXED_JOB | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
        (INDEXED_JOB | {"WIKILLM_JOB_ID": ""}, "MASTER_PORT"),
        (BY_HAND | {"MASTER_PORT": ""}, "MASTER_PORT"),
        ({name: TRAINER[name] for name in TRAINER if name != "PET_MASTER_ADDR"}, "PET_MASTER_ADDR"),
        ({name: TRAINER[name] for name in TRAINER if name != "PET_NODE_RANK"}, "PET_NODE_RANK"),
        ({name: TORCHRUN[name] for name in TORCHRUN if name != "LOCAL_RANK"}, "LOCAL_RANK"),
        ({name: SKYPILOT[name] for name in SKYPILOT if name != "SKYPILOT_NODE_RANK"}, "SKYPILOT_NODE_RANK"),
        ({name: SKYPILOT[name] for name in SKYPILOT if name != "SKYPILOT_NUM_NODES"}, "SKYPILOT_NUM_NODES"),
        ({name: SKYPILOT[name] for name in SKYPILOT if name != "SKYPILOT_NODE_IPS"}, "SKYPILOT_NODE_IPS"),
        ({name: SKYPILOT[name] for name in SKYPILOT if name != "SKYPILOT_TASK_ID"}, "MASTER_PORT"),
        # Contradictory.
        (SKYPILOT | {"SKYPILOT_NODE_RANK": "2"}, "SKYPILOT_NODE_RANK"),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "3"}, "SKYPILOT_NODE_IPS"),
        (SKYPILOT | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, "SKYPILOT_NODE_IPS"),
        (SKYPILOT | {"SKYPILOT_NUM_GPUS_PER_NODE": "8", "CUDA_VISIBLE_DEVICES": "0,1"}, "SKYPILOT_NUM_GPUS_PER_NODE"),
        (SKYPILOT | {"SKYPILOT_NUM_GPUS_PER_NODE": "A100"}, "SKYPILOT_NUM_GPUS_PER_NODE"),
        (SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "16"}, "SLURM_STEP_NUM_TASKS"),
        (SLURM_STEP | {"SLURM_NODEID": "2"}, "SLURM_NODEID"),
        (INDEXED_JOB | {"JOB_COMPLETION_INDEX": "4"}, "JOB_COMPLETION_INDEX"),
        (BY_HAND | {"WIKILLM_NODE_RANK": "2"}, "WIKILLM_NODE_RANK"),
        (BY_HAND | {"WIKILLM_NODES": "0"}, "WIKILLM_NODES"),
        (TORCHRUN | {"RANK": "8"}, "RANK"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_SIZE"),
        # Not a number.
        (BY_HAND | {"WIKILLM_NODE_RANK": "first"}, "WIKILLM_NODE_RANK"),
        (BY_HAND | {"MASTER_PORT": "0"}, "MASTER_PORT"),
        (BY_HAND | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        # Not an address that other nodes can use.
        (BY_HAND | {"MASTER_ADDR": "fe80::1%eth0"}, "MASTER_ADDR"),
        (BY_HAND | {"MASTER_ADDR": "10.0.0.5:29500"}, "MASTER_ADDR"),
        (BY_HAND | {"MASTER_ADDR": "tcp://10.0.0.5"}, "MASTER_ADDR"),
        (SLURM_STEP | {"MASTER_ADDR": "the first"}, "MASTER_ADDR"),
        (TRAINER | {"PET_NPROC_PER_NODE": "0"}, "PET_NPROC_PER_NODE"),
        (TRAINER | {"PET_NPROC_PER_NODE": "cpu"}, "PET_NPROC_PER_NODE"),
        (TRAINER | {"PET_NPROC_PER_NODE": "gpu"}, "PET_NPROC_PER_NODE"),
        (TRAINER | {"PET_NPROC_PER_NODE": "eight"}, "PET_NPROC_PER_NODE"),
    ],
)
def test_missing_or_contradictory_variable_is_refused_and_named(environment: dict[str, str], named: str) -> None:
    with pytest.raises(UserError) as error:
        at(**environment)
    assert error.value.setting == named


def test_ipv6_rendezvous_is_written_with_brackets() -> None:
    assert str(Rendezvous("fd00::1", 29500)) == "[fd00::1]:29500"
    assert str(Rendezvous("10.0.0.5", 29500)) == "10.0.0.5:29500"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("n[007,9-11],m2", "n007"),
        ("gpu003,gpu005", "gpu003"),
        ("r1n[03-04]-ib", "r1n03-ib"),
        ("r[1-2]n[01-10]", "r1n01"),
        ("", ""),
    ],
)
def test_first_host_of_slurm_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_job_ports_avoid_the_ephemeral_range_and_rarely_collide() -> None:
    ports = [port_of(f"{job}.0") for job in range(1000)]
    assert all(20000 <= port < 30000 for port in ports)
    assert len(set(ports)) > 900


def test_one_process_per_gpu_and_one_without_gpus() -> None:
    environments = [at(CUDA_VISIBLE_DEVICES=visible) for visible in ("", "3", "0,1,2,3", "-1")]
    assert [found.gpus.number for found in environments] == [0, 1, 4, 0]
    facts = [{fact.what: fact.value for fact in found.facts} for found in environments]
    assert [values["processes of a node"] for values in facts] == ["1", "1", "4", "1"]
    assert at(**SKYPILOT).processes == 1
    for gpus in ("0,1", "0,1,2,3"):  # A task may have only a part of a machine's GPUs.
        assert at(**SKYPILOT | {"SKYPILOT_NUM_GPUS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": gpus}).processes == 2


@pytest.mark.parametrize(
    ("requested", "gpus", "processes", "value", "source"),
    [
        ("8", "", 8, "8", "PET_NPROC_PER_NODE"),
        ("auto", "0,1", None, "2", "PET_NPROC_PER_NODE=auto: one for each GPU"),
        ("auto", "", None, "1", "PET_NPROC_PER_NODE=auto: one, since there are no GPUs"),
        ("gpu", "0,1", None, "2", "PET_NPROC_PER_NODE=gpu: one for each GPU"),
        ("", "0,1", None, "2", "one for each GPU"),
    ],
)
def test_processes_requested_by_kubeflow_trainer_are_used(
    requested: str, gpus: str, processes: int | None, value: str, source: str
) -> None:
    found = at(**TRAINER | {"PET_NPROC_PER_NODE": requested, "CUDA_VISIBLE_DEVICES": gpus})
    assert found.processes == processes
    assert ("processes of a node", value, source) in found.facts


def test_time_limit_of_each_scheduler() -> None:
    assert at().ends_at is None
    assert at(**SKYPILOT).ends_at is None
    soon = int(time.time()) + 600
    assert at(**SLURM_STEP, SLURM_JOB_END_TIME=str(soon)).ends_at == soon
    swanlab = at(SWANLAB_RUNTIME="task").ends_at
    assert swanlab is not None
    assert 3.5 * 3600 < swanlab - time.time() < 4 * 3600


@pytest.mark.parametrize(("name", "place"), [("KAGGLE_KERNEL_RUN_TYPE", "Kaggle"), ("COLAB_RELEASE_TAG", "Colab")])
def test_notebook_platform_names_its_limit_but_no_end(name: str, place: str) -> None:
    found = at(**{name: "any", "KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert (found.kind, found.ends_at) == (place, None)
    (fact,) = [fact for fact in found.facts if fact.what == "time left"]
    assert fact.source == f"{name}: a session of {place} ends after at most 12 hours; set train.max_time"


@pytest.mark.parametrize("end", ["", "0", "1700000000", "4294967294", "4294967295", "NONE", "Unknown"])
def test_slurm_end_time_that_is_not_in_the_future_is_no_limit(end: str) -> None:
    found = at(**SLURM_STEP, SLURM_JOB_END_TIME=end)
    assert found.ends_at is None
    (fact,) = [fact for fact in found.facts if fact.what == "time left"]
    assert fact.value == "no limit is known"
    assert fact.source == f"SLURM_JOB_END_TIME is {end or 'empty'}, which is not a time in the future"


@pytest.mark.parametrize(
    ("environment", "scratch"),
    [
        ({}, "{home}/.cache/wikillm"),
        ({"XDG_CACHE_HOME": "/var/cache"}, "/var/cache/wikillm"),
        ({"WIKILLM_SCRATCH": "/scratch"}, "/scratch/wikillm-{uid}"),
        ({"WIKILLM_SCRATCH": f"/scratch/wikillm-{os.getuid()}"}, "/scratch/wikillm-{uid}"),
        (SLURM_STEP | {"SLURM_TMPDIR": "/local/42"}, "/local/42/wikillm-{uid}"),
        (SLURM_STEP | {"SLURM_TMPDIR": "/local/42", "WIKILLM_SCRATCH": "/nvme"}, "/nvme/wikillm-{uid}"),
        ({"HOME": "/nonexistent", "TMPDIR": "/local"}, "/local/wikillm-{uid}"),
    ],
)
def test_scratch_folder_is_on_a_local_disk(environment: dict[str, str], scratch: str, tmp_path: Path) -> None:
    expected = Path(scratch.format(home=tmp_path, uid=os.getuid()))
    assert at(**{"HOME": str(tmp_path)} | environment).scratch == expected


def test_slurm_scratch_folder_is_not_in_the_shared_home() -> None:
    assert at(**SLURM_STEP | {"TMPDIR": "/local"}).scratch.parent == Path("/local")


def test_facts_name_the_variables_they_come_from() -> None:
    facts = {fact.what: (fact.value, fact.source) for fact in at(**INDEXED_JOB).facts}
    assert facts["place"][0] == "Kubernetes"
    assert facts["nodes"] == (
        "this is node 1 of 4 (counted from 0)",
        "JOB_COMPLETION_INDEX, WIKILLM_NODES, MASTER_ADDR",
    )
    assert facts["job"] == ("wiki", "WIKILLM_JOB_ID")
    assert facts["GPUs of this node"] == ("0", "CUDA_VISIBLE_DEVICES")


def test_skypilot_job_id_stays_the_same_after_a_restart() -> None:
    assert at(**SKYPILOT).job_id == SKYPILOT["SKYPILOT_TASK_ID"]
    assert at(**SKYPILOT | SLURM_JOB).job_id == SKYPILOT["SKYPILOT_TASK_ID"]
    assert at(**SKYPILOT | {"WIKILLM_JOB_ID": "mine"}).job_id == "mine"


# ---- Preparing in an array ----

ARRAY = {
    "SLURM_JOB_ID": "6",
    "SLURM_ARRAY_TASK_ID": "6",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "9",
    "SLURM_ARRAY_TASK_STEP": "3",
    "SLURM_ARRAY_TASK_COUNT": "3",
}
TWO_TASKS = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({}, (0, 1)),
        ({"SLURM_JOB_ID": "6"}, (0, 1)),
        (ARRAY, (1, 3)),
        (ARRAY | TWO_TASKS, (3, 6)),
        ({"SLURM_JOB_ID": "6"} | TWO_TASKS, (1, 2)),
        (ARRAY | {"SLURM_ARRAY_TASK_MIN": "6", "SLURM_ARRAY_TASK_MAX": "6", "SLURM_ARRAY_TASK_COUNT": "1"}, (0, 1)),
        ({"JOB_COMPLETION_INDEX": "2", "WIKILLM_NODES": "5"}, (2, 5)),
        (SKYPILOT, (1, 2)),
        (SKYPILOT | ONE_SKYPILOT_NODE, (0, 1)),
        # The parts do not communicate, so they need no job id for a rendezvous port.
        ({name: SKYPILOT[name] for name in SKYPILOT if name != "SKYPILOT_TASK_ID"}, (1, 2)),
        (SKYPILOT | {"SLURM_JOB_ID": "6"}, (1, 2)),
    ],
)
def test_part_of_array_for_each_scheduler(environment: dict[str, str], part: tuple[int, int]) -> None:
    assert part_of_array(environment) == part


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (ARRAY | {"SLURM_ARRAY_TASK_STEP": "1"}, "SLURM_ARRAY_TASK_ID"),
        ({"JOB_COMPLETION_INDEX": "2"}, "WIKILLM_NODES"),
        ({"JOB_COMPLETION_INDEX": "5", "WIKILLM_NODES": "5"}, "JOB_COMPLETION_INDEX"),
        ({"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.1.0.4\n10.1.0.9"}, "SKYPILOT_NODE_RANK"),
    ],
)
def test_array_with_unclear_part_is_refused(environment: dict[str, str], named: str) -> None:
    with pytest.raises(UserError) as error:
        part_of_array(environment)
    assert error.value.setting == named
