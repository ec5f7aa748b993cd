"""Check a rendered folder of launch/kubernetes against the settings and the entrypoint.

The settings used in the pods are those of the ConfigMap, with the overrides in the container's `args`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from job import config as settings
from job import storage
from job.config import Config
from job.data.cache_quota import most_cached_bytes
from job.data.manifest import Manifest
from job.errors import EXIT_NO_PROGRESS, EXIT_REFUSED, EXIT_STOPPED
from job.preflight.findings import Findings
from job.preflight.target import KUBERNETES_FOLDER, SHARED_MEMORY_BYTES, Target
from job.redaction import is_secret_variable, redacted_urls
from launch.checks.pods import Pods, quantity, render, tree

PLACEHOLDER = "registry.example.com/"
"""Registry in an image name that `make set-image` has not replaced yet."""


def check_kubernetes(
    findings: Findings, config: Config, folder: Path, config_path: str | None
) -> tuple[Target, Config] | None:
    """Check a folder; return the nodes that it requests and the settings in its pods.

    Returns None if the folder cannot be rendered, or if its pods run `prepare` instead of `train`.

    Args:
        findings: receives one row for each check.
        config: the settings given to the check.
        folder: a folder of launch/kubernetes that can be applied.
        config_path: the file with the settings, shown in remedies.
    """
    with findings.guard("manifests"):
        pods = render(folder)
        kinds = ", ".join(document.get("kind", "?") for document in pods.documents)
        findings.right("manifests", f"{folder}: {kinds}")
        in_pods = _check_settings(findings, config, pods, config_path)
        _check_image(findings, pods)
        if pods.trainjob is None:
            _check_completions(findings, pods)
            _check_rendezvous(findings, pods)
        else:
            _check_trainjob(findings, pods)
        _check_restarts(findings, pods)
        _check_secrets(findings, in_pods, pods)
        _check_locations(findings, in_pods)
        if pods.command == "prepare":
            return None
        _check_shared_memory(findings, pods)
        processes = in_pods.train.processes or pods.processes
        if pods.gpus and processes > pods.gpus:
            remedy = f"set train.processes to null, or the limit of nvidia.com/gpu to {processes}"
            findings.wrong("GPUs", f"{pods.gpus} GPUs in each pod for {processes} training processes", remedy)
        elif not pods.gpus:
            found = "the pods request no GPU, so they train on the CPU"
            findings.unsure("GPUs", found, "set the limit of nvidia.com/gpu")
        target = Target(
            name=f"Kubernetes, {folder.name}",
            nodes=pods.nodes,
            gpus_per_node=pods.gpus,
            processes_per_node=processes,
            memory_bytes=quantity(tree(pods.container, "resources", "limits").get("memory")),
            time_limit_seconds=pods.job.get("activeDeadlineSeconds"),
            grace_seconds=pods.pod.get("terminationGracePeriodSeconds", 30),
        )
        return target, in_pods
    return None


def check_scratch(findings: Findings, config: Config, folder: Path, manifest: Manifest, checkpoint_bytes: int) -> None:
    """Check that the pods' scratch volume has room for the cached shards and one checkpoint that is being loaded."""
    with findings.guard("scratch"):
        volume = render(folder).volume_at("/scratch")
        if volume is None:
            findings.wrong("scratch", "no volume is mounted at /scratch", "mount an emptyDir there (see base/job.yaml)")
            return
        limit_bytes = quantity(tree(volume, "emptyDir").get("sizeLimit"))
        needed_bytes = most_cached_bytes(manifest, int(config.data.cache_bytes)) + checkpoint_bytes
        found = f"{needed_bytes / 2**30:,.1f} GiB needed for shards and a checkpoint"
        if limit_bytes is None:
            findings.right("scratch", found)
        else:
            remedy = f"set sizeLimit of the volume to {-(-needed_bytes // 2**30)}Gi or more, or reduce data.cache_bytes"
            found += f", the volume has {limit_bytes / 2**30:,.1f} GiB"
            findings.judge("scratch", limit_bytes >= needed_bytes, found, remedy)


# ---- Single checks ----


def _check_settings(findings: Findings, config: Config, pods: Pods, config_path: str | None) -> Config:
    """Return the settings in the pods; add a row that tells how they differ from the settings given to the check."""
    name, remedy = "settings of the pods", "set `args` to: train --config /etc/wikillm/config.yaml"
    words = [str(word) for word in pods.container.get("args") or []]
    if pods.command not in ("train", "prepare"):
        findings.wrong(name, f"args begin with {words[:1]}, but this check knows only train and prepare", remedy)
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
            (document.get("data", {}) for document in pods.documents
             if document["kind"] == "ConfigMap" and document["metadata"]["name"] == volume), {}
        ).items()
    }  # fmt: skip
    if path not in texts:
        found = f"--config {path} is not a file of a mounted ConfigMap (files: {', '.join(sorted(texts)) or 'none'})"
        findings.wrong(name, found, remedy)
        return config
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(texts[path])
        file.flush()
        in_pods = settings.load(file.name, overrides)
    given, used = (settings_tree.model_dump(mode="json") for settings_tree in (config, in_pods))
    overridden = {key for key, _ in overrides}
    different = [
        f"{section}.{key}"
        for section, values in given.items()
        if section != "check"  # These settings are for this command. The pods do not use them.
        for key in values
        if values[key] != used[section][key] and f"{section}.{key}" not in overridden
    ]
    if different:
        pod_config = KUBERNETES_FOLDER / "base" / "config.yaml"
        remedy = f"cp {config_path or 'your file'} {pod_config}, or check with --config {pod_config}"
        findings.wrong(name, f"different from the settings checked here: {', '.join(different[:5])}", remedy)
    else:
        added = f", with {' '.join(words[3:])}" if overrides else ""
        findings.right(name, f"the settings checked here{added}")
    return in_pods


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        yield name, value if equals else next(rest, "")


def _config_maps(pods: Pods) -> Iterator[tuple[str, str]]:
    """Yield the mount path and the name of each mounted ConfigMap."""
    for mount in pods.container.get("volumeMounts") or []:
        volume = pods.volume_at(mount["mountPath"])
        if volume is not None and "configMap" in volume:
            yield mount["mountPath"].rstrip("/"), volume["configMap"]["name"]


def _check_image(findings: Findings, pods: Pods) -> None:
    image = str(pods.container.get("image"))
    if image.startswith(PLACEHOLDER) or "/" not in image:
        findings.wrong("image", f"{image} is a placeholder", "make build push set-image")
    elif "@sha256:" not in image and image.rpartition(":")[2] in ("latest", image):
        found = f"{image} has no digest, so a later push may replace it"
        findings.unsure("image", found, "make set-image, which writes the digest")
    else:
        findings.right("image", image)


def _check_completions(findings: Findings, pods: Pods) -> None:
    name, job = "nodes", pods.job
    nodes, parallelism = job.get("completions"), job.get("parallelism", 1)
    nodes_variable = str(tree(pods.environment, "WIKILLM_NODES").get("value"))
    if job.get("completionMode") != "Indexed":
        findings.wrong(name, "the Job is not Indexed, so no pod knows its rank", "set completionMode: Indexed")
    elif nodes != parallelism:
        found = f"{nodes} completions, but parallelism is {parallelism}: pods would wait for others that never start"
        findings.wrong(name, found, "let `wiring` set parallelism, or set it to the number of completions")
    elif nodes_variable != str(nodes):
        found = f"{nodes} completions, but WIKILLM_NODES is {nodes_variable}"
        findings.wrong(name, found, "let `wiring` set WIKILLM_NODES, or set it to the number of completions")
    else:
        findings.right(name, f"{nodes} pods with {pods.gpus} GPUs each")


def _check_rendezvous(findings: Findings, pods: Pods) -> None:
    """Check that the pods of several nodes find the first pod by the name that a headless Service gives it."""
    if (pods.job.get("completions") or 1) == 1:
        return
    name, subdomain = "rendezvous", pods.pod.get("subdomain")
    address = str(tree(pods.environment, "MASTER_ADDR").get("value"))
    if pods.jobset is not None:
        services = [tree(pods.jobset, "network").get("subdomain")]
        subdomain = subdomain or services[0]
    else:
        services = [
            document["metadata"]["name"]
            for document in pods.documents
            if document["kind"] == "Service" and document["spec"].get("clusterIP") == "None"
        ]
    if subdomain not in services:
        headless = ", ".join(map(str, services)) or "none"
        found = f"the pods' subdomain is {subdomain}, which is not a headless Service (headless Services: {headless})"
        findings.wrong(name, found, "let `wiring` set it to the Service's name, and keep clusterIP: None")
    elif not address.endswith(f"-0.{subdomain}"):
        found = f"MASTER_ADDR is {address}, which is not the name of the first pod"
        findings.wrong(name, found, f"let `wiring` set it, or set it to $(JOB_NAME)-0.{subdomain}")
    elif not {"MASTER_PORT", "WIKILLM_JOB_ID"} & pods.environment.keys():
        findings.wrong(name, "neither MASTER_PORT nor WIKILLM_JOB_ID is set", "set them as in base/job.yaml")
    else:
        findings.right(name, address)


def _check_trainjob(findings: Findings, pods: Pods) -> None:
    """Check that the Trainer will set the nodes' ranks: that needs a `trainer` and a container named `node`."""
    assert pods.trainjob is not None
    name, trainer = "nodes", pods.trainjob.get("trainer")
    if trainer is None:
        remedy = "add trainer: {numNodes: ...}, as in trainjob/trainjob.yaml"
        findings.wrong(name, "the TrainJob has no trainer, so no node gets its rank", remedy)
    elif pods.container.get("name") != "node":
        found = f"the container is named {pods.container.get('name')}, but the Trainer looks for `node`"
        findings.wrong(name, found, "keep the transformer name-of-the-container of trainjob/")
    else:
        findings.right(name, f"{pods.nodes} pods with {pods.gpus} GPUs each; the Trainer sets ranks and rendezvous")


def _check_restarts(findings: Findings, pods: Pods) -> None:
    """Check what the Job does for each exit code."""
    name, remedy = "exit codes", "use the podFailurePolicy of base/job.yaml"
    rules = tree(pods.job, "podFailurePolicy").get("rules") or []
    actions = {
        int(code): rule["action"]
        for rule in reversed(rules)
        if tree(rule, "onExitCodes").get("operator") == "In"
        for code in rule["onExitCodes"]["values"]
    }
    disruption_action = next(
        (rule["action"] for rule in rules
         for condition in rule.get("onPodConditions") or [] if condition["type"] == "DisruptionTarget"), None
    )  # fmt: skip
    restart = "Ignore" if pods.jobset is None else "FailJob"  # A JobSet restarts its failed Job itself.
    not_final = [code for code in (EXIT_NO_PROGRESS, EXIT_REFUSED) if actions.get(code) != "FailJob"]
    if pods.pod.get("restartPolicy") != "Never":
        found = f"restartPolicy is {pods.pod.get('restartPolicy')}, so the Job does not see exit codes"
        findings.wrong(name, found, "set it to Never")
    elif not_final:
        findings.wrong(name, f"the Job would restart after exit code {not_final[0]}, which cannot help", remedy)
    elif actions.get(EXIT_STOPPED) != restart:
        found = f"exit code {EXIT_STOPPED} (checkpointed) has the action {actions.get(EXIT_STOPPED)}, not {restart}"
        findings.wrong(name, found, remedy)
    elif disruption_action != restart:
        found = f"a drained node (DisruptionTarget) has the action {disruption_action}, not {restart}"
        findings.wrong(name, found, remedy)
    else:
        findings.right(name, "70 and 78 end the Job; 75 and drained nodes restart it and do not count as crashes")


def _check_secrets(findings: Findings, config: Config, pods: Pods) -> None:
    name, environment = "secrets", pods.environment
    in_plain_text = [key for key, entry in environment.items() if is_secret_variable(key) and entry.get("value")]
    references = [source["secretRef"] for source in pods.container.get("envFrom") or [] if "secretRef" in source]
    references += [ref for entry in environment.values() if (ref := tree(entry, "valueFrom", "secretKeyRef"))]
    secrets = sorted({ref["name"] for ref in references if not ref.get("optional")})
    account = pods.pod.get("serviceAccountName")
    on_s3 = any(url.startswith("s3://") for url in (config.run.output, config.data.shards))
    values = [(f"{section}.{key}", value) for section, group in config for key, value in group]
    if in_urls := [key for key, value in values if isinstance(value, str) and redacted_urls(value) != value]:
        found = f"{', '.join(in_urls)}: the URL has a password or signature, visible to readers of the ConfigMap"
        findings.unsure(name, found, "use a URL without it, or with a signature that expires soon")
    if in_plain_text:
        remedy = "put it into a Secret (see base/secret.example.env), with a new value, because this one may be known"
        findings.wrong(name, f"{', '.join(in_plain_text)}: the manifest contains the value", remedy)
    elif on_s3 and not (secrets or references or account):
        findings.wrong(name, "no Secret gives the pods credentials", "add envFrom: secretRef, as in base/job.yaml")
    elif on_s3 and not secrets:
        found = f"no Secret: the pods use the rights of the service account {account or 'default'} or of the node"
        findings.unsure(name, found, "check that it may read and write the store: kubectl describe serviceaccount")
    elif secrets:
        findings.right(
            name, f"from {', '.join(secrets)}, which must exist in the namespace: kubectl get secret {secrets[0]}"
        )


def _check_locations(findings: Findings, config: Config) -> None:
    for setting, url in (("run.output", config.run.output), ("data.shards", config.data.shards)):
        if not storage.is_remote(url):
            found = f"{setting}: {url} is a folder of the pod, and is deleted with the pod"
            findings.wrong(setting, found, "use an s3:// URL, or mount a volume there that all pods share")


def _check_shared_memory(findings: Findings, pods: Pods) -> None:
    if pods.gpus <= 1:
        return
    name, volume = "shared memory", pods.volume_at("/dev/shm")
    empty_dir = tree(volume or {}, "emptyDir")
    limit_bytes = quantity(empty_dir.get("sizeLimit"))
    remedy = "mount an emptyDir with medium: Memory and sizeLimit: 8Gi at /dev/shm"
    if empty_dir.get("medium") != "Memory":
        findings.wrong(name, f"/dev/shm has 64 MiB for {pods.gpus} GPUs", remedy)
    elif limit_bytes is not None and limit_bytes < SHARED_MEMORY_BYTES:
        findings.wrong(name, f"/dev/shm has {limit_bytes / 2**20:.0f} MiB for {pods.gpus} GPUs", remedy)
    else:
        findings.right(name, "in memory" + ("" if limit_bytes is None else f", {limit_bytes / 2**30:.0f} GiB"))
