"""Run the pods of a Job as real containers, with the files, user, rights and signals of their specs.

All containers share this machine's network, so each pod has its own loopback address. The hosts files of the containers
map the names that the Service would publish to these addresses.
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

_TIMEOUT_SECONDS = 400
_BACK_OFF_SCALE = 1 / 20
"""Factor by which the waits of the Job controller are shortened in tests."""
_SCHEDULING_FIELDS = {"affinity", "tolerations"}
"""Fields of a pod that only select the node. They are ignored."""
_POD_FIELDS = {
    *("automountServiceAccountToken", "containers", "enableServiceLinks", "restartPolicy", "securityContext"),
    *("subdomain", "terminationGracePeriodSeconds", "volumes"),
}
_CONTAINER_FIELDS = {
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
    """Return the options for `docker run` that create the pod's container.

    Args:
        pod: the pod. An assertion fails if it has a field that is not supported here.
        folder: folder for the contents of its volumes.
        hosts: address by host name.
        config_maps: files by name for each ConfigMap.
        secrets: variables by name for each Secret.
    """
    container, spec = pod.container, pod.spec
    assert spec.keys() <= _POD_FIELDS | _SCHEDULING_FIELDS, spec.keys()
    assert container.keys() <= _CONTAINER_FIELDS, container.keys()
    assert spec["restartPolicy"] == "Never"
    # With these settings the cluster adds nothing to the pod that would be missing here.
    assert not spec["enableServiceLinks"] and not spec["automountServiceAccountToken"]
    options = ["--network=host", f"--hostname={pod.hostname}", "--pull=never"]
    options += [f"--add-host={name}:{address}" for name, address in hosts.items()]
    options += [f"--env={name}={value}" for name, value in pod.environment(secrets).items()]
    options += _rights(spec["securityContext"], container["securityContext"])
    assert container["resources"]["limits"].keys() == {"memory"}, "only memory limits are supported"
    options += [f"--memory={bytes_of(container['resources']['limits']['memory'])}"]
    options += _mounts(pod, folder, config_maps, spec["securityContext"]["fsGroup"])
    return [*options, container["image"], *container["args"]]


def _rights(pod: Manifest, container: Manifest) -> list[str]:
    assert pod == {
        "runAsNonRoot": True,
        "runAsUser": pod["runAsUser"],
        "fsGroup": pod["fsGroup"],
        "seccompProfile": {"type": "RuntimeDefault"},  # This is also Docker's default.
    }
    assert container == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    user = [f"--user={pod['runAsUser']}", f"--group-add={pod['fsGroup']}"]
    return [*user, "--security-opt=no-new-privileges", "--read-only", "--cap-drop=ALL"]


def _mounts(pod: Pod, folder: Path, config_maps: Mapping[str, Mapping[str, str]], group: int) -> list[str]:
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
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
            for directory in (source, source / mount.get("subPath", "")):
                directory.mkdir(parents=True, exist_ok=True)
                directory.chmod(0o2777)
        options += [f"--volume={source / mount.get('subPath', '')}:{path}{':ro' if mount.get('readOnly') else ''}"]
    return options


@dataclass
class EndedPod:
    """A pod that has ended."""

    index: int
    exit_code: int
    is_disrupted: bool


@dataclass
class RunningJob:
    """A Job whose pods run as containers. When a pod ends, it is replaced as the Job controller decides."""

    docker: Engine
    manifests: list[Manifest]
    folder: Path
    secrets: Mapping[str, Mapping[str, str]]
    network: int
    """Third byte of the pods' addresses, which are 127.0.<network>.<index + 1>."""
    ended: list[EndedPod] = field(default_factory=list)
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
        self._threads = [threading.Thread(target=self._run_pods, args=(pod,), daemon=True) for pod in self.pods]

    def _run_pods(self, pod: Pod) -> None:
        """Run one pod after the other for an index, until one succeeds or the Job fails."""
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
                ended = EndedPod(pod.index, process.returncode, is_dead)
                self.ended.append(ended)
                self._current[pod.index] = None
                others: list[int] = []
                if ended.exit_code != 0 and self.failed is None:
                    if not is_dead:
                        self.failed = self._controller.pod_failed(pod.index, ended.exit_code)
                    others = [other.index for other in self.pods if self.failed and self._current[other.index]]
                self._changed.notify_all()
                is_last = self._is_done or ended.exit_code == 0
            for other_index in others:
                self.delete(other_index)
            if is_last:
                return
            with self._changed:
                wait = self._controller.back_off_seconds(pod.index) * _BACK_OFF_SCALE
                if self._changed.wait_for(lambda: self._is_done, wait):
                    return

    @property
    def _is_done(self) -> bool:
        """True if no more pods are started."""
        return self._is_over or self.failed is not None

    # ---- Actions of tests ----

    def delete(self, index: int) -> None:
        """Delete a pod as `kubectl delete pod` does: SIGTERM, then SIGKILL after the grace period."""
        grace = self.pods[index].spec["terminationGracePeriodSeconds"]
        if (name := self._current[index]) is not None:  # The pod may have just ended by itself.
            self.docker("stop", f"--time={grace}", name, timeout=grace + 60, check=False)

    def lose_node(self, index: int) -> None:
        """Let the pod's node die: its container is killed, and the pod is `Terminating` until `put_out_of_service`."""
        with self._changed:
            name = self._current[index]
            assert name is not None
            self._dead.add(name)
            self._controller.node_died(index)
        self.docker("kill", "--signal=KILL", name)

    def put_out_of_service(self, index: int) -> None:
        """Act as `kubectl taint node ... node.kubernetes.io/out-of-service=nodeshutdown:NoExecute`."""
        with self._changed:
            self.failed = self._controller.node_is_out_of_service(index)
            self._changed.notify_all()

    def starts(self, index: int) -> int:
        """Return the number of pods that the index has had so far."""
        with self._changed:
            return sum(line.startswith("---- ") for line in self._lines[index])

    def await_line(self, index: int, pattern: str, after: int = 0) -> int:
        """Wait for a line of the pod's log that begins with `pattern`, after line number `after`; return its number."""
        return self._await(lambda: self._find(index, pattern, after), f"no line like {pattern!r} in pod {index}")

    def _find(self, index: int, pattern: str, after: int) -> int | None:
        lines = self._lines[index]
        return next((at + 1 for at in range(after, len(lines)) if re.match(pattern, lines[at])), None)

    def wait(self) -> None:
        """Wait until the Job is complete or has failed."""
        self._await(
            lambda: None if any(map(threading.Thread.is_alive, self._threads)) else True, "the Job does not end"
        )

    def _await(self, result: Callable[[], Any], problem: str) -> Any:
        """Wait until `result` returns a value other than None and return it; fail with `problem` after a timeout."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        with self._changed:
            while (value := result()) is None:
                assert time.monotonic() < deadline, f"{problem}:\n{self.output()}"
                alive = any(map(threading.Thread.is_alive, self._threads))
                self._changed.wait(1)
                assert alive or result() is not None, f"{problem}, and all pods have ended:\n{self.output()}"
            return value

    def output(self) -> str:
        """Return the output of all pods so far."""
        return "\n".join(f"pod {index}: {line}" for index, lines in enumerate(self._lines) for line in lines)

    @contextmanager
    def running(self) -> Iterator["RunningJob"]:
        """Start the pods, and remove all their containers at the end of the block."""
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
