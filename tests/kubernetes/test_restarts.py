"""Tests of restarts: pods that end, crash, are removed or lose their nodes, with stand-ins for the controllers."""

import cluster
import pytest
from cluster import FOLDERS, RESTARTED_AS_ONE, Manifest, pods
from controllers import Failed, JobController, JobSetController

from job.config import Duration
from job.errors import EXIT_FAILED, EXIT_STOPPED

JOBS_OF_SEVERAL_NODES = ("multi-node", "spot")
"""Folders whose Job restarts each pod separately."""


class Group:
    """All pods of a run, which end together and restart together."""

    def __init__(self, manifests: list[Manifest]) -> None:
        self._job = cluster.job_of(manifests)
        self._jobs = JobController(self._job)
        jobset = cluster.jobset_of(manifests)
        self._jobset = JobSetController(jobset) if jobset else None

    def restarts_after(self, exit_code: int, disrupted: tuple[int, ...] = ()) -> bool:
        """End all pods with this exit code and return True if the run restarts.

        Args:
            exit_code: the exit code of all pods.
            disrupted: indexes of pods whose nodes were removed.
        """
        for pod in cluster.pods_of(self._job):
            failed = self._jobs.pod_failed(pod.index, exit_code, pod.index in disrupted)
            if failed is None:
                continue
            if self._jobset is None:
                return False
            self._jobs = JobController(self._job)
            return self._jobset.job_failed(failed)
        return True


@pytest.mark.parametrize("code", [70, 78])
def test_exit_codes_for_a_person_do_not_restart(manifests: list[Manifest], code: int) -> None:
    assert not Group(manifests).restarts_after(code)


def test_checkpointed_run_restarts_without_a_limit(manifests: list[Manifest]) -> None:
    group = Group(manifests)
    assert all(group.restarts_after(75) for _ in range(5000))


def test_removed_nodes_do_not_count_as_crashes(manifests: list[Manifest]) -> None:
    group = Group(manifests)
    everywhere = tuple(pod.index for pod in pods(manifests))
    assert all(group.restarts_after(137, disrupted=everywhere) for _ in range(5000))


def test_crashes_are_counted_by_group_up_to_a_limit(folder: str, manifests: list[Manifest]) -> None:
    group, times = Group(manifests), 0
    while group.restarts_after(1):
        times += 1
    assert times == (1000 if folder == "spot" else 6)


def test_only_the_job_restarts_pods_and_one_after_the_other(manifests: list[Manifest]) -> None:
    spec = cluster.job_of(manifests)["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy requires this value"
    assert spec["podReplacementPolicy"] == "Failed", "podFailurePolicy requires this value"
    [container] = spec["template"]["spec"]["containers"]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", container).get("containerName", container["name"]) == container["name"]


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
@pytest.mark.parametrize(("code", "is_disrupted"), [(75, False), (78, False), (1, False), (137, True)])
def test_end_of_one_pod_in_a_jobset_ends_all(folder: str, code: int, is_disrupted: bool) -> None:
    job = cluster.job_of(cluster.render(FOLDERS / folder))
    assert JobController(job).pod_failed(1, code, is_disrupted) is not None


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_jobset_recognizes_the_failure_messages_by_exit_code(folder: str) -> None:
    jobset = cluster.jobset_of(cluster.render(FOLDERS / folder))
    assert jobset is not None
    controller = JobSetController(jobset)
    wording = "Container node for pod ns/wikillm-node-0-1-x failed with exit code {} matching FailJob rule at index 0"
    assert not controller.job_failed(Failed("PodFailurePolicy", wording.format(78)))
    assert not controller.job_failed(Failed("PodFailurePolicy", wording.format(70)))
    assert controller.job_failed(Failed("PodFailurePolicy", wording.format(75)))
    assert controller.restarts == 0


def test_ended_runs_are_deleted_after_some_days(folder: str, manifests: list[Manifest]) -> None:
    if folder == "trainjob":  # A TrainJob has no such field, and would create its JobSet again.
        assert not [path for path, _ in cluster.walk(manifests) if path.endswith("ttlSecondsAfterFinished")]
        return
    [owner] = [manifest for manifest in manifests if manifest["kind"] in ("Job", "JobSet")]
    assert owner["spec"]["ttlSecondsAfterFinished"] >= 24 * 3600


# ---- The wait before the next pod ----


def test_wait_of_an_index_doubles_after_each_failed_pod() -> None:
    controller = JobController(cluster.job_of(cluster.render(FOLDERS / "multi-node")))
    waits = [controller.back_off_seconds(0)]
    for code in (75, 1, 75, 75, 75, 75, 75, 75):
        assert controller.pod_failed(0, code) is None
        waits.append(controller.back_off_seconds(0))
    assert waits == [0, 10, 20, 40, 80, 160, 320, 600, 600]
    assert controller.back_off_seconds(1) == 0, "each index has its own count"


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_job_recreated_for_each_start_never_waits(folder: str) -> None:
    manifests = cluster.render(FOLDERS / folder)
    assert Group(manifests).restarts_after(EXIT_STOPPED)
    assert JobController(cluster.job_of(manifests)).back_off_seconds(0) == 0


# ---- Dead nodes ----


def node_timeout_seconds(manifests: list[Manifest]) -> float:
    args = pods(manifests)[0].container["args"]
    return Duration(args[args.index("--train.node_timeout") + 1]).seconds


@pytest.fixture
def controller(folder: str) -> JobController:
    """The controller of a Job whose node 1 has died and whose other pod has noticed this and ended."""
    controller = JobController(cluster.job_of(cluster.render(FOLDERS / folder)))
    controller.node_died(1)
    assert controller.pod_failed(0, EXIT_FAILED) is None
    return controller


@pytest.mark.parametrize("folder", JOBS_OF_SEVERAL_NODES)
def test_pod_of_a_dead_node_is_not_replaced_even_if_force_deleted(controller: JobController) -> None:
    assert controller.is_replaced(0)
    assert not controller.is_replaced(1)
    controller.delete_by_force(1)
    assert not controller.is_replaced(1)


@pytest.mark.parametrize("folder", JOBS_OF_SEVERAL_NODES)
def test_out_of_service_node_is_no_crash_and_its_pod_is_replaced(controller: JobController) -> None:
    assert controller.node_is_out_of_service(1) is None
    assert controller.is_replaced(1)
    assert (controller.failures[1], controller.back_off_seconds(1)) == (0, 10)


@pytest.mark.parametrize("folder", ["multi-node"])
def test_gpus_waiting_for_a_dead_node_are_freed_after_some_hours(
    controller: JobController,
) -> None:
    waits, seconds, failed = 0, 0.0, None
    timeout = node_timeout_seconds(cluster.render(FOLDERS / "multi-node"))
    while failed is None:
        seconds += controller.back_off_seconds(0) + timeout
        waits += 1
        failed = controller.pod_failed(0, EXIT_FAILED)
    assert failed.reason == "MaxFailedIndexesExceeded"
    assert 4 * 3600 < seconds < 8 * 3600
    header = (FOLDERS / "base" / "kustomization.yaml").read_text()
    assert timeout == 3600 and waits == 6
    assert "an hour each time, six times. Then the Job fails" in header.replace("\n# ", " ")


def test_training_folders_refer_to_the_advice_for_dead_nodes(folder: str) -> None:
    if folder != "prepare":  # Its other pods continue without the lost one.
        text = (FOLDERS / folder / "kustomization.yaml").read_text()
        assert "base/kustomization.yaml explains what to do if a node dies" in text
    header = (FOLDERS / "base" / "kustomization.yaml").read_text()
    taint = "node.kubernetes.io/out-of-service"
    assert f"kubectl taint node NODE {taint}=nodeshutdown:NoExecute" in header
    assert f"kubectl taint node NODE {taint}-" in header


def test_no_pod_tolerates_the_out_of_service_taint(manifests: list[Manifest]) -> None:
    for toleration in pods(manifests)[0].spec.get("tolerations", []):
        assert toleration.get("key"), "it would tolerate every taint"
        assert not toleration["key"].startswith("node.kubernetes.io/")
