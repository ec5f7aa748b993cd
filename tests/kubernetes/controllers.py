"""What becomes of a Job or JobSet whose pods end, or whose nodes die: stand-ins for Kubernetes' controllers.

As in Kubernetes, a pod of a dead node is `Terminating` and not replaced until it has failed, and an index waits longer
after each pod that has failed, also after those that are not counted.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from cluster import Manifest

_FIRST_BACK_OFF_SECONDS, _LONGEST_BACK_OFF_SECONDS = 10, 600


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
    ignored: Counter[int] = field(default_factory=Counter)
    """Pods that have failed and were not counted, by completion index."""
    terminating: set[int] = field(default_factory=set)
    """Indexes whose pod cannot end, because its node has died."""

    def pod_failed(self, index: int, exit_code: int | None, is_disrupted: bool = False) -> Failed | None:
        """Of a pod that ended with a code other than 0, or with none; None: another one takes its place."""
        spec = self.job["spec"]
        for number, rule in enumerate(spec["podFailurePolicy"]["rules"]):
            why = self._match(rule, index, exit_code, is_disrupted)
            if why and rule["action"] == "Ignore":
                self.ignored[index] += 1
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

    def _match(self, rule: Manifest, index: int, exit_code: int | None, is_disrupted: bool) -> str | None:
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

    def back_off_seconds(self, index: int) -> float:
        """How long after its last pod has failed the index gets the next one."""
        failed = self.failures + self.ignored
        times = failed[index] if "backoffLimitPerIndex" in self.job["spec"] else failed.total()
        return 0 if not times else min(_FIRST_BACK_OFF_SECONDS * 2 ** (times - 1), _LONGEST_BACK_OFF_SECONDS)

    # ---- A node that has died ----

    def node_died(self, index: int) -> None:
        """Five minutes later its pod has DisruptionTarget and is deleted, and nobody says that its container ended."""
        assert self.job["spec"]["podReplacementPolicy"] == "Failed"
        self.terminating.add(index)

    def is_replaced(self, index: int) -> bool:
        """Whether the index gets a new pod in place of the one that it had."""
        return index not in self.terminating

    def delete_by_force(self, index: int) -> None:
        """Changes nothing: the pod has the Job's finalizer until it has failed, and it is still said to run."""

    def node_is_out_of_service(self, index: int) -> Failed | None:
        """The node has the taint, or its object is gone: the collector of pods declares the pod as failed."""
        self.terminating.remove(index)
        return self.pod_failed(index, None, is_disrupted=True)


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
