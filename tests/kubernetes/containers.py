"""The pods of a Job as real containers: each with the files, user, rights and signals that its spec asks for.

All are on this machine's network, so a pod is told from another by a loopback address, to which the others' hosts files
give the names that the Service would publish.
"""

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster import Manifest, Pod, bytes_of, job_of, only, pods_of, service_of
from controllers import Failed, JobController

from tests.image.stand_in import Engine

_PATIENCE_SECONDS = 400
_BACK_OFF_SCALE = 1 / 20
"""Of the seconds for which the Job's controller waits before it starts a pod again."""
_SCHEDULERS = {"affinity", "tolerations"}
"""Fields that only choose the node."""
_POD = {
    *("automountServiceAccountToken", "containers", "enableServiceLinks", "restartPolicy", "securityContext"),
    *("subdomain", "terminationGracePeriodSeconds", "volumes"),
}
_CONTAINER = {
    "args",
    "env",
    "envFrom",
    "image",
    "imagePullPolicy",
    "name",
    "resources",
    "securityContext",
    "volumeMounts",
}


def options_of(
    pod: Pod, folder: Path, hosts: Mapping[str, str], config_maps: Mapping[str, Mapping[str, str]], secrets: Any
) -> list[str]:
    """What `docker run` needs to make the pod's container.

    Args:
        pod: an assertion fails if it has a field that is not done here.
        folder: takes what is in its volumes.
        hosts: an address for each name.
        config_maps: their files, by their names.
        secrets: their variables, by their names.
    """
    container, spec = pod.container, pod.spec
    assert spec.keys() <= _POD | _SCHEDULERS, spec.keys()
    assert container.keys() <= _CONTAINER, container.keys()
    assert spec["restartPolicy"] == "Never"
    # Nothing of the cluster is put into the pod that is not here.
    assert not spec["enableServiceLinks"] and not spec["automountServiceAccountToken"]
    options = ["--network=host", f"--hostname={pod.hostname}", "--pull=never"]
    options += [f"--add-host={name}:{address}" for name, address in hosts.items()]
    options += [f"--env={name}={value}" for name, value in pod.environment(secrets).items()]
    options += _rights(spec["securityContext"], container["securityContext"])
    assert container["resources"]["limits"].keys() == {"memory"}, "there is nothing else here"
    options += [f"--memory={bytes_of(container['resources']['limits']['memory'])}"]
    options += _mounts(pod, folder, config_maps, spec["securityContext"]["fsGroup"])
    return [*options, container["image"], *container["args"]]


def _rights(pod: Manifest, container: Manifest) -> list[str]:
    assert pod == {
        "runAsNonRoot": True,
        "runAsUser": pod["runAsUser"],
        "fsGroup": pod["fsGroup"],
        "seccompProfile": {"type": "RuntimeDefault"},  # which a container has unless it is told otherwise
    }
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    who = [f"--user={pod['runAsUser']}", f"--group-add={pod['fsGroup']}"]
    return [*who, "--security-opt=no-new-privileges", "--read-only", "--cap-drop=ALL"]


def _mounts(pod: Pod, folder: Path, config_maps: Mapping[str, Mapping[str, str]], group: int) -> list[str]:
    volumes = {one["name"]: one for one in pod.spec["volumes"]}
    options = []
    for mount in pod.container["volumeMounts"]:
        volume, path = volumes[mount["name"]], mount["mountPath"]
        source = folder / mount["name"]
        if "configMap" in volume:
            source.mkdir(parents=True, exist_ok=True)
            for name, content in config_maps[volume["configMap"]["name"]].items():
                (source / name).write_text(content)
        elif volume["emptyDir"].get("medium") == "Memory":
            options += [f"--tmpfs={path}:rw,nosuid,nodev,mode=1777,size={bytes_of(volume['emptyDir']['sizeLimit'])}"]
            continue
        else:
            for one in (source, source / mount.get("subPath", "")):
                one.mkdir(parents=True, exist_ok=True)
                one.chmod(0o2777)
        options += [f"--volume={source / mount.get('subPath', '')}:{path}{':ro' if mount.get('readOnly') else ''}"]
    return options


@dataclass
class Ended:
    """One pod that has ended."""

    index: int
    exit_code: int
    is_disrupted: bool


@dataclass
class RunningJob:
    """A Job whose pods run as containers, each replaced when it ends as the Job's controller decides."""

    docker: Engine
    manifests: list[Manifest]
    folder: Path
    secrets: Mapping[str, Mapping[str, str]]
    network: int
    """The pods' addresses are 127.0.<network>.<index + 1>."""
    ended: list[Ended] = field(default_factory=list)
    failed: Failed | None = None

    def __post_init__(self) -> None:
        job = job_of(self.manifests)
        self._name = f"{job['metadata']['name']}-{self.folder.name}"
        self.pods = pods_of(job, uid=self._name)
        self._controller = JobController(job)
        assert service_of(self.manifests)["spec"]["publishNotReadyAddresses"]
        self._hosts: dict[str, str] = {}
        for pod in self.pods:
            self._hosts |= dict.fromkeys((pod.hostname, pod.address), f"127.0.{self.network}.{pod.index + 1}")
        settings = only("ConfigMap", self.manifests)
        self._config_maps = {settings["metadata"]["name"]: settings["data"]}
        self._changed = threading.Condition()
        self._lines: list[list[str]] = [[] for _ in self.pods]
        self._current: list[str | None] = [None for _ in self.pods]
        self._dead: set[str] = set()
        self._is_over = False
        self._threads = [threading.Thread(target=self._keep, args=(pod,), daemon=True) for pod in self.pods]

    def _keep(self, pod: Pod) -> None:
        """One pod after the other at an index, until it has succeeded or the Job has failed."""
        for attempt in range(1000):
            name = f"{self._name}-{pod.index}-{attempt}"
            options = options_of(pod, self.folder / name, self._hosts, self._config_maps, self.secrets)
            with subprocess.Popen(
                [*self.docker.command, "run", "--rm", f"--name={name}", *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                with self._changed:
                    self._current[pod.index] = name
                    self._lines[pod.index].append(f"---- {name} ----")
                assert process.stdout is not None
                for line in process.stdout:
                    with self._changed:
                        self._lines[pod.index].append(line.rstrip())
                        self._changed.notify_all()
            with self._changed:
                if is_dead := name in self._dead:
                    self._changed.wait_for(lambda: self._controller.is_replaced(pod.index) or self._is_done)
                ended = Ended(pod.index, process.returncode, is_dead)
                self.ended.append(ended)
                self._current[pod.index] = None
                others: list[int] = []
                if ended.exit_code != 0 and self.failed is None:
                    if not is_dead:
                        self.failed = self._controller.pod_failed(pod.index, ended.exit_code)
                    others = [one.index for one in self.pods if self.failed and self._current[one.index]]
                self._changed.notify_all()
                is_last = self._is_done or ended.exit_code == 0
            for other in others:
                self.delete(other)
            if is_last:
                return
            with self._changed:
                wait = self._controller.back_off_seconds(pod.index) * _BACK_OFF_SCALE
                if self._changed.wait_for(lambda: self._is_done, wait):
                    return

    @property
    def _is_done(self) -> bool:
        """Whether no pod is started any more."""
        return self._is_over or self.failed is not None

    # ---- What a test does ----

    def delete(self, index: int) -> None:
        """As `kubectl delete pod`: SIGTERM, the grace period, SIGKILL."""
        grace = self.pods[index].spec["terminationGracePeriodSeconds"]
        if (name := self._current[index]) is not None:  # it may have ended by itself just now
            self.docker("stop", f"--time={grace}", name, timeout=grace + 60, check=False)

    def lose_node(self, index: int) -> None:
        """The pod's node dies: nothing runs there any more, and the pod is `Terminating` until `put_out_of_service`."""
        with self._changed:
            name = self._current[index]
            assert name is not None
            self._dead.add(name)
            self._controller.node_died(index)
        self.docker("kill", "--signal=KILL", name)

    def put_out_of_service(self, index: int) -> None:
        """As `kubectl taint node ... node.kubernetes.io/out-of-service=nodeshutdown:NoExecute`."""
        with self._changed:
            self.failed = self._controller.node_is_out_of_service(index)
            self._changed.notify_all()

    def starts(self, index: int) -> int:
        """How many pods the index has had so far."""
        with self._changed:
            return sum(line.startswith("---- ") for line in self._lines[index])

    def await_line(self, index: int, pattern: str, after: int = 0) -> int:
        """The number of the first line of that pod's log, `after` others, that begins like `pattern`."""
        return self._await(lambda: self._find(index, pattern, after), f"no line like {pattern!r} in pod {index}")

    def _find(self, index: int, pattern: str, after: int) -> int | None:
        lines = self._lines[index]
        return next((at + 1 for at in range(after, len(lines)) if re.match(pattern, lines[at])), None)

    def wait(self) -> None:
        """Until the Job is complete or has failed."""
        self._await(lambda: None if any(one.is_alive() for one in self._threads) else True, "the Job does not end")

    def _await(self, found: Callable[[], Any], complaint: str) -> Any:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with self._changed:
            while (value := found()) is None:
                assert time.monotonic() < deadline, f"{complaint}:\n{self.told()}"
                alive = any(one.is_alive() for one in self._threads)
                self._changed.wait(1)
                assert alive or found() is not None, f"{complaint}, and all have ended:\n{self.told()}"
            return value

    def told(self) -> str:
        """All that the pods have said."""
        return "\n".join(f"pod {index}: {line}" for index, lines in enumerate(self._lines) for line in lines)

    @contextmanager
    def running(self) -> Iterator["RunningJob"]:
        """Starts the pods; at the end nothing of them is left."""
        try:
            for thread in self._threads:
                thread.start()
            yield self
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
                left = [name for name in self._current if name is not None]
            for name in left:
                self.docker("rm", "--force", name, check=False)
            for thread in self._threads:
                thread.join(60)
