"""Stand-ins for Kubernetes' controllers of Jobs and JobSets, which decide about restarts when pods end or nodes die.

As in Kubernetes, a pod of a dead node is `Terminating` and is not replaced until it has failed. The wait of an index
grows after each failed pod, also after those that do not count as crashes.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from cluster import Manifest

_FIRST_BACK_OFF_SECONDS, _MAX_BACK_OFF_SECONDS = 10, 600


@dataclass(frozen=True)
class Failed:
    """Why a Job has failed, as in its condition."""

    reason: str
    message: str


@dataclass
class JobController:
    """Stand-in for the Job controller: it is told how each pod ended, and decides whether the Job has failed."""

    job: Manifest
    failures: Counter[int] = field(default_factory=Counter)
    """Number of failed pods that count as crashes, by completion index."""
    ignored: Counter[int] = field(default_factory=Counter)
    """Number of failed pods that do not count, by completion index."""
    terminating: set[int] = field(default_factory=set)
    """Indexes whose pod cannot end, because its node has died."""

    def pod_failed(self, index: int, exit_code: int | None, is_disrupted: bool = False) -> Failed | None:
        """Record a failed pod; return why the Job has failed, or None if the pod is replaced.

        Args:
            index: completion index of the pod.
            exit_code: a code other than 0, or None if the pod reported none.
            is_disrupted: True if the pod's node was drained, removed or lost.
        """
        spec = self.job["spec"]
        for number, rule in enumerate(spec["podFailurePolicy"]["rules"]):
            reason = self._match(rule, index, exit_code, is_disrupted)
            if reason and rule["action"] == "Ignore":
                self.ignored[index] += 1
                return None
            if reason:
                assert rule["action"] == "FailJob", rule
                return Failed("PodFailurePolicy", f"{reason} matching FailJob rule at index {number}")
        self.failures[index] += 1
        if "backoffLimitPerIndex" in spec:
            failed = [failed for failed, times in self.failures.items() if times > spec["backoffLimitPerIndex"]]
            if len(failed) > spec["maxFailedIndexes"]:
                return Failed(
                    "MaxFailedIndexesExceeded", "Job has exceeded the specified maximal number of failed indexes"
                )
        elif self.failures.total() > spec["backoffLimit"]:
            return Failed("BackoffLimitExceeded", "Job has reached the specified backoff limit")
        return None

    def _match(self, rule: Manifest, index: int, exit_code: int | None, is_disrupted: bool) -> str | None:
        name = self.job["metadata"]["name"]
        if "onPodConditions" in rule:
            assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
            return f"Pod default/{name}-{index}-x7k2p has condition DisruptionTarget" if is_disrupted else None
        codes = rule["onExitCodes"]
        assert codes["operator"] == "In"
        if exit_code not in codes["values"]:
            return None
        container = f"Container {codes['containerName']} for pod default/{name}-{index}-x7k2p"
        return f"{container} failed with exit code {exit_code}"

    def back_off_seconds(self, index: int) -> float:
        """Return the wait between the last failed pod of an index and its next pod."""
        failed = self.failures + self.ignored
        times = failed[index] if "backoffLimitPerIndex" in self.job["spec"] else failed.total()
        return 0 if not times else min(_FIRST_BACK_OFF_SECONDS * 2 ** (times - 1), _MAX_BACK_OFF_SECONDS)

    # ---- Dead nodes ----

    def node_died(self, index: int) -> None:
        """Record that a pod's node has died: its pod is being deleted, but nothing reports that its container ended."""
        assert self.job["spec"]["podReplacementPolicy"] == "Failed"
        self.terminating.add(index)

    def is_replaced(self, index: int) -> bool:
        """Return True if the index gets a new pod."""
        return index not in self.terminating

    def delete_by_force(self, index: int) -> None:
        """Force-delete a pod. This changes nothing: the Job's finalizer keeps the pod until it has failed."""

    def node_is_out_of_service(self, index: int) -> Failed | None:
        """Record that the node has the out-of-service taint or was deleted, so that its pod is marked as failed."""
        self.terminating.remove(index)
        return self.pod_failed(index, None, is_disrupted=True)


@dataclass
class JobSetController:
    """Stand-in for the JobSet controller: it is told how its Job failed, and decides whether all pods restart."""

    jobset: Manifest
    restarts: int = 0
    """Number of restarts that count."""

    def job_failed(self, failed: Failed) -> bool:
        """Return True if all Jobs are created again, or False if the JobSet has failed."""
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
