"""A folder of launch/kubernetes, rendered as `kubectl apply -k` would, against the settings and the entrypoint.

The settings are those of the pods: the ConfigMap's, and what stands in `args`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from job import config as settings
from job import storage
from job.config import Config
from job.data.manifest import Manifest
from job.errors import EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED
from job.preflight.findings import Findings
from job.preflight.target import KUBERNETES_FOLDER, Target
from job.redaction import is_secret_variable, redacted_urls
from launch.checks.pods import Pods, quantity, render, tree

PLACEHOLDER = "registry.example.com/"
"""Registry of images that `make set-image` has not written yet."""
_SHARED_MEMORY_BYTES = 2**30


def check_kubernetes(
    findings: Findings, config: Config, folder: Path, config_path: str | None
) -> tuple[Target, Config] | None:
    """The world that the rendered folder makes and the settings in its pods; None if it cannot be rendered or prepares.

    Args:
        findings: takes the rows.
        config: the settings that the check was asked for.
        folder: one of those in launch/kubernetes that can be applied.
        config_path: the file of the settings, for what to do about it.
    """
    with findings.guard("manifests"):
        pods = render(folder)
        findings.right("manifests", f"{folder}: {', '.join(one.get('kind', '?') for one in pods.documents)}")
        in_pods = _check_settings(findings, config, pods, config_path)
        _check_image(findings, pods)
        if pods.trainjob is None:
            _check_completions(findings, pods)
            _check_meeting(findings, pods)
        else:
            _check_trainjob(findings, pods)
        _check_restarts(findings, pods)
        _check_secrets(findings, in_pods, pods)
        _check_places(findings, in_pods)
        if pods.command == "prepare":
            return None
        _check_shared_memory(findings, pods)
        processes = in_pods.train.processes or pods.processes
        if pods.gpus and processes > pods.gpus:
            remedy = f"set train.processes to null, or the limit of nvidia.com/gpu to {processes}"
            findings.wrong("GPUs", f"{pods.gpus} of a pod for {processes} processes", remedy)
        elif not pods.gpus:
            findings.unsure("GPUs", "the pods ask for none: they train on the CPU", "set the limit of nvidia.com/gpu")
        target = Target(
            name=f"Kubernetes, {folder.name}",
            nodes=pods.nodes,
            gpus=pods.gpus,
            processes=processes,
            memory_bytes=quantity(tree(pods.container, "resources", "limits").get("memory")),
            seconds=pods.job.get("activeDeadlineSeconds"),
            grace_seconds=pods.pod.get("terminationGracePeriodSeconds", 30),
        )
        return target, in_pods
    return None


def check_scratch(findings: Findings, config: Config, folder: Path, manifest: Manifest, checkpoint_bytes: int) -> None:
    """Room on the pods' disk for the shards in use and a checkpoint that is loaded."""
    with findings.guard("scratch"):
        volume = render(folder).volume_at("/scratch")
        if volume is None:
            findings.wrong("scratch", "nothing is mounted at /scratch", "mount an emptyDir there (see base/job.yaml)")
            return
        size = quantity(tree(volume, "emptyDir").get("sizeLimit"))
        shards = sum(shard.size for shard in manifest.train + manifest.validation)
        needed = min(int(config.data.cache_bytes), shards) + checkpoint_bytes
        found = f"{needed / 2**30:,.1f} GiB needed for shards and a checkpoint"
        if size is None:
            findings.right("scratch", found)
        else:
            remedy = f"set sizeLimit of the volume to {-(-needed // 2**30)}Gi or more, or data.cache_bytes to less"
            findings.judge("scratch", size >= needed, f"{found}, the volume has {size / 2**30:,.1f} GiB", remedy)


# ---- Its parts ----


def _check_settings(findings: Findings, config: Config, pods: Pods, config_path: str | None) -> Config:
    """The settings in the pods; a row says where they are not those that were checked."""
    name, remedy = "settings of the pods", "let `args` be: train --config /etc/wikillm/config.yaml"
    words = [str(word) for word in pods.container.get("args") or []]
    if pods.command not in ("train", "prepare"):
        findings.wrong(name, f"args begin with {words[:1]}, and train and prepare are what this checks", remedy)
        return config
    path, overrides = None, []
    for key, value in _options(words[1:]):
        if key == "config":
            path = value
        else:
            overrides.append((key, value))
    texts = {
        f"{mount}/{key}": text
        for mount, volume in _config_maps(pods)
        for key, text in next(
            (one.get("data", {}) for one in pods.documents
             if one["kind"] == "ConfigMap" and one["metadata"]["name"] == volume), {}
        ).items()
    }  # fmt: skip
    if path not in texts:
        findings.wrong(name, f"--config {path} is no file of a ConfigMap that is mounted: {sorted(texts)}", remedy)
        return config
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(texts[path])
        file.flush()
        in_pods = settings.load(file.name, overrides)
    ours, theirs = (one.model_dump(mode="json") for one in (config, in_pods))
    overridden = {key for key, _ in overrides}
    different = [
        f"{section}.{key}"
        for section, values in ours.items()
        if section != "check"  # how to check, which the pods don't do
        for key in values
        if values[key] != theirs[section][key] and f"{section}.{key}" not in overridden
    ]
    if different:
        remedy = f"cp {config_path or 'your file'} {KUBERNETES_FOLDER / 'base' / 'config.yaml'}, or check with that one"
        findings.wrong(name, f"other than those checked here: {', '.join(different[:5])}", remedy)
    else:
        findings.right(name, "those checked here" + (f", and {' '.join(words[3:])}" if overrides else ""))
    return in_pods


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        yield name, value if equals else next(rest, "")


def _config_maps(pods: Pods) -> Iterator[tuple[str, str]]:
    """Where a ConfigMap is mounted, and its name."""
    for mount in pods.container.get("volumeMounts") or []:
        volume = pods.volume_at(mount["mountPath"])
        if volume is not None and "configMap" in volume:
            yield mount["mountPath"].rstrip("/"), volume["configMap"]["name"]


def _check_image(findings: Findings, pods: Pods) -> None:
    image = str(pods.container.get("image"))
    if image.startswith(PLACEHOLDER) or "/" not in image:
        findings.wrong("image", f"{image} is a placeholder", "make build push set-image")
    elif "@sha256:" not in image and image.rpartition(":")[2] in ("latest", image):
        findings.unsure("image", f"{image} may be another one tomorrow", "make set-image, which writes its digest")
    else:
        findings.right("image", image)


def _check_completions(findings: Findings, pods: Pods) -> None:
    name, job = "nodes", pods.job
    nodes, at_once = job.get("completions"), job.get("parallelism", 1)
    told = str(tree(pods.environment, "WIKILLM_NODES").get("value"))
    if job.get("completionMode") != "Indexed":
        findings.wrong(name, "the Job is not Indexed: no pod knows its rank", "set completionMode: Indexed")
    elif nodes != at_once:
        found = f"{nodes} completions, but {at_once} at one time: the others would be waited for in vain"
        findings.wrong(name, found, "let `wiring` set parallelism, or set it to the number of completions")
    elif told != str(nodes):
        found = f"{nodes} completions, but WIKILLM_NODES is {told}"
        findings.wrong(name, found, "let `wiring` set WIKILLM_NODES, or set it to the number of completions")
    else:
        findings.right(name, f"{nodes} pods with {pods.gpus} GPUs each")


def _check_meeting(findings: Findings, pods: Pods) -> None:
    """Pods of several nodes find the first one by the name that a headless Service gives it."""
    if (pods.job.get("completions") or 1) == 1:
        return
    name, subdomain = "rendezvous", pods.pod.get("subdomain")
    address = str(tree(pods.environment, "MASTER_ADDR").get("value"))
    if pods.jobset is not None:
        services = [tree(pods.jobset, "network").get("subdomain")]
        subdomain = subdomain or services[0]
    else:
        services = [
            one["metadata"]["name"]
            for one in pods.documents
            if one["kind"] == "Service" and one["spec"].get("clusterIP") == "None"
        ]
    if subdomain not in services:
        found = f"the pods' subdomain is {subdomain}, headless Services are {', '.join(map(str, services)) or 'none'}"
        findings.wrong(name, found, "let `wiring` set it to the Service's name, and keep clusterIP: None")
    elif not address.endswith(f"-0.{subdomain}"):
        found = f"MASTER_ADDR is {address}, which is not the name of the first pod"
        findings.wrong(name, found, f"let `wiring` set it: $(JOB_NAME)-0.{subdomain}")
    elif not {"MASTER_PORT", "WIKILLM_JOB_ID"} & pods.environment.keys():
        findings.wrong(name, "neither MASTER_PORT nor WIKILLM_JOB_ID is set", "set them as base/job.yaml does")
    else:
        findings.right(name, address)


def _check_trainjob(findings: Findings, pods: Pods) -> None:
    """The Trainer tells the nodes their places, where it finds the container and the TrainJob has a `trainer`."""
    assert pods.trainjob is not None
    name, trainer = "nodes", pods.trainjob.get("trainer")
    if trainer is None:
        remedy = "give it one: trainer: {numNodes: ...}, as trainjob/trainjob.yaml has it"
        findings.wrong(name, "the TrainJob has no trainer: no node is told its place", remedy)
    elif pods.container.get("name") != "node":
        found = f"the container is called {pods.container.get('name')}, and the Trainer looks for `node`"
        findings.wrong(name, found, "keep the transformer name-of-the-container of trainjob/")
    else:
        findings.right(name, f"{pods.nodes} pods with {pods.gpus} GPUs each; the Trainer tells them where they meet")


def _check_restarts(findings: Findings, pods: Pods) -> None:
    """What the Job makes of the exit codes."""
    name, remedy = "exit codes", "take the podFailurePolicy of base/job.yaml"
    rules = tree(pods.job, "podFailurePolicy").get("rules") or []
    done_by = {
        int(code): rule["action"]
        for rule in reversed(rules)
        if tree(rule, "onExitCodes").get("operator") == "In"
        for code in rule["onExitCodes"]["values"]
    }
    disrupted = next(
        (rule["action"] for rule in rules
         for condition in rule.get("onPodConditions") or [] if condition["type"] == "DisruptionTarget"), None
    )  # fmt: skip
    again = "Ignore" if pods.jobset is None else "FailJob"  # a JobSet starts its Job again itself
    ends = [code for code in (EXIT_NO_PROGRESS, EXIT_REFUSED) if done_by.get(code) != "FailJob"]
    if pods.pod.get("restartPolicy") != "Never":
        findings.wrong(name, f"restartPolicy is {pods.pod.get('restartPolicy')}: codes are not seen", "set it to Never")
    elif ends:
        findings.wrong(name, f"{ends[0]} would be tried again, and cannot help", remedy)
    elif done_by.get(EXIT_STOPPED) != again:
        found = f"{EXIT_STOPPED} (checkpointed, start it again) has action {done_by.get(EXIT_STOPPED)}, not {again}"
        findings.wrong(name, found, remedy)
    elif disrupted != again:
        findings.wrong(name, f"a node that is drained (DisruptionTarget) has action {disrupted}, not {again}", remedy)
    else:
        findings.right(name, "70 and 78 end the Job; 75 and drained nodes start again and don't count")


def _check_secrets(findings: Findings, config: Config, pods: Pods) -> None:
    name, environment = "secrets", pods.environment
    plain = [key for key, one in environment.items() if is_secret_variable(key) and one.get("value")]
    references = [one["secretRef"] for one in pods.container.get("envFrom") or [] if "secretRef" in one]
    references += [ref for one in environment.values() if (ref := tree(one, "valueFrom", "secretKeyRef"))]
    secrets = sorted({one["name"] for one in references if not one.get("optional")})
    account = pods.pod.get("serviceAccountName")
    on_s3 = any(url.startswith("s3://") for url in (config.run.output, config.data.shards))
    values = [(f"{section}.{key}", value) for section, group in config for key, value in group]
    if in_urls := [key for key, value in values if isinstance(value, str) and redacted_urls(value) != value]:
        found = f"{', '.join(in_urls)}: the URL has a password or signature, and whoever reads the ConfigMap sees it"
        findings.unsure(name, found, "take a URL without one, or one whose signature ends soon")
    if plain:
        remedy = "put it into a Secret (see base/secret.example.env), and a new one: this one was written down"
        findings.wrong(name, f"{', '.join(plain)} stands in the manifest", remedy)
    elif on_s3 and not (secrets or references or account):
        findings.wrong(name, "no Secret gives the pods credentials", "add envFrom: secretRef, as base/job.yaml has it")
    elif on_s3 and not secrets:
        found = f"without a Secret the pods have what the service account {account or 'default'} or the node is given"
        findings.unsure(name, found, "make sure that it may read and write the store: kubectl describe serviceaccount")
    elif secrets:
        findings.right(
            name, f"from {', '.join(secrets)}, which has to be in the namespace: kubectl get secret {secrets[0]}"
        )


def _check_places(findings: Findings, config: Config) -> None:
    for setting, url in (("run.output", config.run.output), ("data.shards", config.data.shards)):
        if not storage.is_remote(url):
            found = f"{setting}: {url} is a folder of the pod, and gone with it"
            findings.wrong(setting, found, "give an s3:// URL, or mount a volume that all pods share there")


def _check_shared_memory(findings: Findings, pods: Pods) -> None:
    if pods.gpus <= 1:
        return
    name, volume = "shared memory", pods.volume_at("/dev/shm")
    empty = tree(volume or {}, "emptyDir")
    size = quantity(empty.get("sizeLimit"))
    remedy = "mount an emptyDir with medium: Memory and sizeLimit: 8Gi at /dev/shm"
    if empty.get("medium") != "Memory":
        findings.wrong(name, f"/dev/shm has 64 MiB for {pods.gpus} GPUs", remedy)
    elif size is not None and size < _SHARED_MEMORY_BYTES:
        findings.wrong(name, f"/dev/shm has {size / 2**20:.0f} MiB for {pods.gpus} GPUs", remedy)
    else:
        findings.right(name, "in memory" + ("" if size is None else f", {size / 2**30:.0f} GiB"))
