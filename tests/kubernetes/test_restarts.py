"""What becomes of a run whose pods end, crash, are taken away or lose their nodes."""

import cluster
import pytest
from cluster import FOLDERS, RESTARTED_AS_ONE, Manifest, Pod
from controllers import Failed, JobController, JobSetController

from job.config import Duration
from job.errors import EXIT_FAILED, EXIT_STOPPED

OF_SEVERAL_NODES = ("multi-node", "spot")
"""Folders whose Job starts each pod again by itself."""


def pods(manifests: list[Manifest]) -> list[Pod]:
    return cluster.pods_of(cluster.job_of(manifests))


class Group:
    """All pods of a run, which end together and, where it goes on, start together."""

    def __init__(self, manifests: list[Manifest]) -> None:
        self._job = cluster.job_of(manifests)
        self._jobs = JobController(self._job)
        jobset = cluster.jobset_of(manifests)
        self._jobset = JobSetController(jobset) if jobset else None

    def goes_on_after(self, exit_code: int, disrupted: tuple[int, ...] = ()) -> bool:
        """All end with this code; the nodes of some have been taken away."""
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
def test_what_a_person_has_to_look_at_is_not_started_again(manifests: list[Manifest], code: int) -> None:
    assert not Group(manifests).goes_on_after(code)


def test_a_run_that_has_saved_is_started_again_as_often_as_it_takes(manifests: list[Manifest]) -> None:
    group = Group(manifests)
    assert all(group.goes_on_after(75) for _ in range(5000))


def test_a_node_that_was_taken_away_does_not_count(manifests: list[Manifest]) -> None:
    group = Group(manifests)
    everywhere = tuple(pod.index for pod in pods(manifests))
    assert all(group.goes_on_after(137, disrupted=everywhere) for _ in range(5000))


def test_crashes_are_counted_by_group_and_end_the_run_after_some(folder: str, manifests: list[Manifest]) -> None:
    group, times = Group(manifests), 0
    while group.goes_on_after(1):
        times += 1
    assert times == (1000 if folder == "spot" else 6)


def test_pods_are_started_by_the_job_alone_one_after_the_other(manifests: list[Manifest]) -> None:
    spec = cluster.job_of(manifests)["spec"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "a failure policy works with no other"
    assert spec["podReplacementPolicy"] == "Failed", "a failure policy works with no other"
    [container] = spec["template"]["spec"]["containers"]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule.get("onExitCodes", container).get("containerName", container["name"]) == container["name"]


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
@pytest.mark.parametrize(("code", "is_disrupted"), [(75, False), (78, False), (1, False), (137, True)])
def test_in_a_jobset_the_end_of_one_pod_is_that_of_all(folder: str, code: int, is_disrupted: bool) -> None:
    job = cluster.job_of(cluster.render(FOLDERS / folder))
    assert JobController(job).pod_failed(1, code, is_disrupted) is not None


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_the_messages_that_the_jobset_reads_are_told_from_others(folder: str) -> None:
    jobset = cluster.jobset_of(cluster.render(FOLDERS / folder))
    assert jobset is not None
    controller = JobSetController(jobset)
    wording = "Container node for pod ns/wikillm-node-0-1-x failed with exit code {} matching FailJob rule at index 0"
    assert not controller.job_failed(Failed("PodFailurePolicy", wording.format(78)))
    assert not controller.job_failed(Failed("PodFailurePolicy", wording.format(70)))
    assert controller.job_failed(Failed("PodFailurePolicy", wording.format(75)))
    assert controller.restarts == 0


def test_what_has_ended_is_cleared_away_after_days(folder: str, manifests: list[Manifest]) -> None:
    if folder == "trainjob":  # which has no such field, and would make its JobSet anew
        assert not [path for path, _ in cluster.walk(manifests) if path.endswith("ttlSecondsAfterFinished")]
        return
    [owner] = [one for one in manifests if one["kind"] in ("Job", "JobSet")]
    assert owner["spec"]["ttlSecondsAfterFinished"] >= 24 * 3600


# ---- The wait for the next pod ----


def test_an_index_waits_twice_as_long_after_each_pod_that_has_failed_whether_it_counts_or_not() -> None:
    controller = JobController(cluster.job_of(cluster.render(FOLDERS / "multi-node")))
    waits = [controller.back_off_seconds(0)]
    for code in (75, 1, 75, 75, 75, 75, 75, 75):
        assert controller.pod_failed(0, code) is None
        waits.append(controller.back_off_seconds(0))
    assert waits == [0, 10, 20, 40, 80, 160, 320, 600, 600]
    assert controller.back_off_seconds(1) == 0, "each index has a count of its own"


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_a_job_that_is_made_anew_for_each_start_never_waits(folder: str) -> None:
    manifests = cluster.render(FOLDERS / folder)
    assert Group(manifests).goes_on_after(EXIT_STOPPED)
    assert JobController(cluster.job_of(manifests)).back_off_seconds(0) == 0


# ---- A node that has died ----


def node_timeout_seconds(manifests: list[Manifest]) -> float:
    args = pods(manifests)[0].container["args"]
    return Duration(args[args.index("--train.node_timeout") + 1]).seconds


@pytest.fixture
def controller(folder: str) -> JobController:
    """Of a Job whose node 1 has died; the pods of the other nodes have noticed that and ended."""
    controller = JobController(cluster.job_of(cluster.render(FOLDERS / folder)))
    controller.node_died(1)
    assert controller.pod_failed(0, EXIT_FAILED) is None
    return controller


@pytest.mark.parametrize("folder", OF_SEVERAL_NODES)
def test_the_pod_of_a_dead_node_is_not_replaced_also_when_it_is_deleted_by_force(controller: JobController) -> None:
    assert controller.is_replaced(0)
    assert not controller.is_replaced(1)
    controller.delete_by_force(1)
    assert not controller.is_replaced(1)


@pytest.mark.parametrize("folder", OF_SEVERAL_NODES)
def test_a_dead_node_that_is_put_out_of_service_is_no_crash_and_its_pod_is_replaced(controller: JobController) -> None:
    assert controller.node_is_out_of_service(1) is None
    assert controller.is_replaced(1)
    assert (controller.failures[1], controller.back_off_seconds(1)) == (0, 10)


@pytest.mark.parametrize("folder", ["multi-node"])
def test_gpus_that_wait_for_a_dead_node_are_free_after_some_hours_but_not_before_a_person_could_look(
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
    assert "an hour each time, six times, and then the Job fails" in header.replace("\n# ", " ")


def test_the_command_that_ends_the_pods_of_a_dead_node_is_where_each_folder_of_training_says(folder: str) -> None:
    if folder != "prepare":  # whose other pods go on
        assert "When a node dies: see base/kustomization.yaml" in (FOLDERS / folder / "kustomization.yaml").read_text()
    header = (FOLDERS / "base" / "kustomization.yaml").read_text()
    taint = "node.kubernetes.io/out-of-service"
    assert f"kubectl taint node NODE {taint}=nodeshutdown:NoExecute" in header
    assert f"kubectl taint node NODE {taint}-" in header


def test_no_pod_tolerates_that_its_node_is_out_of_service(manifests: list[Manifest]) -> None:
    for one in pods(manifests)[0].spec.get("tolerations", []):
        assert one.get("key"), "it would tolerate every taint"
        assert not one["key"].startswith("node.kubernetes.io/")
