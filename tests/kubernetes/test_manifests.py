"""Tests of the rendered manifests: schemas, names and numbers that must agree, security, and what a user may change."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster
import kubernetes_validate
import pytest
import yaml
from cluster import FOLDERS, OF_ONE_JOB, RESTARTED_AS_ONE, Manifest, Render, pods
from schemas import MODELS, NEWEST, OLDEST, known_fields

from job import cli, config
from job.launcher.environment import Rendezvous, detect_environment, part_of_array
from job.model.flops import parameter_counts
from job.model.spec import ModelSpec

SECRETS = {"wikillm": {"AWS_ACCESS_KEY_ID": "a key", "AWS_SECRET_ACCESS_KEY": "a secret"}}
REPOSITORY = FOLDERS.parents[1]


def settings(manifests: list[Manifest]) -> tuple[str, config.Config]:
    """Return the container's command and its settings, read as the entrypoint reads them."""
    [pod, *_] = pods(manifests)
    arguments = cli.parse(pod.container["args"])
    [mount] = [mount for mount in pod.container["volumeMounts"] if mount["name"] == "config"]
    assert arguments.config_path is not None
    path = Path(arguments.config_path)
    assert str(path.parent) == mount["mountPath"]
    file = cluster.only("ConfigMap", manifests)["data"][path.name]
    return arguments.command, config.build(with_overrides(yaml.safe_load(file), arguments.overrides))


def with_overrides(tree: dict[str, Any], overrides: list[tuple[str, str]]) -> dict[str, Any]:
    for name, value in overrides:
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree


# ---- Schemas ----


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_are_valid_in_oldest_and_newest_kubernetes(manifests: list[Manifest], version: str) -> None:
    standard = [manifest for manifest in manifests if manifest["kind"] not in MODELS]
    for manifest in [*standard, cluster.job_of(manifests)]:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_schema_refuses_an_unknown_field(manifests: list[Manifest]) -> None:
    job = cluster.job_of(manifests)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 390
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, NEWEST, strict=True)


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_fields_of_jobset_and_trainer_are_known(folder: str) -> None:
    others = [manifest for manifest in cluster.render(FOLDERS / folder) if manifest["kind"] in MODELS]
    kinds = [manifest["kind"] for manifest in others]
    assert kinds == (["JobSet"] if folder == "jobset" else ["TrainJob", "TrainingRuntime"])
    for manifest in others:
        assert known_fields(manifest) == manifest
    tree = others[-1]["spec"] if folder == "jobset" else others[-1]["spec"]["template"]["spec"]
    tree["failurePolicy"]["rules"][0]["onJobFailureReason"] = ["PodFailurePolicy"]
    assert known_fields(others[-1]) != others[-1]


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_jobset_values_are_documented_ones(folder: str) -> None:
    jobset = cluster.jobset_of(cluster.render(FOLDERS / folder))
    assert jobset is not None
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert set(rule["onJobFailureReasons"]) <= {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "ttlSecondsAfterFinished" not in job, "the Job would be deleted before its JobSet"
    assert job["template"]["spec"].get("subdomain", jobset["metadata"]["name"]) == cluster.subdomain_of(jobset)


# ---- Names and numbers ----


def test_all_names_are_valid_dns_names(manifests: list[Manifest]) -> None:
    names = [manifest["metadata"]["name"] for manifest in manifests] + [pod.hostname for pod in pods(manifests)]
    spec = pods(manifests)[0].spec
    names += [spec["subdomain"], *(item["name"] for item in spec["volumes"] + spec["containers"])]
    for name in names:
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name), name


def test_no_placeholder_is_left(manifests: list[Manifest]) -> None:
    for path, value in cluster.walk(manifests):
        assert value not in ("JOB", "SERVICE", "COMPLETIONS", "RUNTIME"), path


def test_requests_are_not_below_limits(manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    requests, limits = pod.container["resources"]["requests"], pod.container["resources"]["limits"]
    assert re.fullmatch(r"[1-9]\d*m?", requests["cpu"])
    assert cluster.bytes_of(requests["memory"]) == cluster.bytes_of(limits["memory"]), "the pod would be evicted first"
    volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod.spec["volumes"]}
    assert volumes["shared-memory"]["medium"] == "Memory"
    shared = cluster.bytes_of(volumes["shared-memory"]["sizeLimit"])
    assert shared < cluster.bytes_of(limits["memory"]) / 2, "shared memory counts as memory of the container"
    assert shared >= 1 << 30 or "nvidia.com/gpu" not in limits
    assert cluster.bytes_of(volumes["scratch"]["sizeLimit"]) <= cluster.bytes_of(requests["ephemeral-storage"])


def test_scratch_volume_fits_the_shards_and_two_checkpoints(manifests: list[Manifest]) -> None:
    _, chosen = settings(manifests)
    parameters = parameter_counts(ModelSpec(**chosen.model.model_dump()), vocab_size=151_936).total
    volumes = pods(manifests)[0].spec["volumes"]
    [scratch] = [volume["emptyDir"] for volume in volumes if volume["name"] == "scratch"]
    needed_bytes = int(chosen.data.cache_bytes) + 2 * 12 * parameters
    assert cluster.bytes_of(scratch["sizeLimit"]) >= needed_bytes


def test_only_training_gets_gpus_and_tolerates_gpu_nodes(folder: str, manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    gpus = pod.container["resources"]["limits"].get("nvidia.com/gpu", 0)
    tolerations = pod.spec.get("tolerations", [])
    tolerated = {item["key"]: item["effect"] for item in tolerations if "effect" in item}
    if folder == "prepare":
        assert not gpus and not tolerated
    else:
        assert isinstance(gpus, int) and gpus >= 1
        assert tolerated == {"nvidia.com/gpu": "NoSchedule"}


# ---- References between the manifests ----


def test_volumes_and_mounts_match(manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    volumes = {volume["name"]: volume for volume in pod.spec["volumes"]}
    mounts = pod.container["volumeMounts"]
    assert {mount["name"] for mount in mounts} == volumes.keys()
    assert len({mount["mountPath"] for mount in mounts}) == len(mounts)
    assert volumes["config"]["configMap"]["name"] == cluster.only("ConfigMap", manifests)["metadata"]["name"]
    writable = {mount["mountPath"]: mount["name"] for mount in mounts if not mount.get("readOnly")}
    assert writable == {"/scratch": "scratch", "/tmp": "scratch", "/dev/shm": "shared-memory"}


def test_service_and_policy_select_only_the_pods_of_this_job(folder: str, manifests: list[Manifest]) -> None:
    policy = cluster.only("NetworkPolicy", manifests)["spec"]
    [source] = [peer for rule in policy["ingress"] for peer in rule["from"]]
    selectors = (
        cluster.service_of(manifests)["spec"]["selector"],
        policy["podSelector"]["matchLabels"],
        source["podSelector"]["matchLabels"],
    )
    others = cluster.render(FOLDERS / ("single" if folder == "prepare" else "prepare"))
    for selector in selectors:
        assert selector
        assert all(cluster.selects(selector, pod.labels) for pod in pods(manifests))
        assert not any(cluster.selects(selector, pod.labels) for pod in pods(others))


def test_all_pods_can_resolve_the_first_pod_before_it_is_ready(manifests: list[Manifest]) -> None:
    service = cluster.service_of(manifests)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    first, *_ = all_pods = pods(manifests)
    for pod in all_pods:
        assert pod.spec["subdomain"] == service["metadata"]["name"]
        environment = pod.environment(SECRETS)
        trainer = "PET_" if "PET_NNODES" in environment else ""
        assert environment[f"{trainer}MASTER_ADDR"] == first.address
        for port in service["spec"].get("ports", []):
            assert environment["MASTER_PORT"] == str(port["port"])


def test_number_of_nodes_is_the_same_everywhere(manifests: list[Manifest]) -> None:
    spec = cluster.job_of(manifests)["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == len(pods(manifests))
    for pod in pods(manifests):
        environment = pod.environment(SECRETS)
        nodes = [environment[name] for name in ("WIKILLM_NODES", "PET_NNODES") if name in environment]
        assert nodes == [str(spec["completions"])]


# ---- The entrypoint in the pods ----


def test_entrypoint_detects_node_rank_and_number_of_nodes(folder: str, manifests: list[Manifest]) -> None:
    all_pods = pods(manifests)
    for pod in all_pods:
        detected = detect_environment(pod.environment(SECRETS))
        kind = "Kubeflow Trainer" if folder == "trainjob" else "Kubernetes"
        assert (detected.kind, detected.node_rank, detected.nodes) == (kind, pod.index, len(all_pods))
        rendezvous = None if folder == "single" else Rendezvous(all_pods[0].address, 29500)
        assert detected.rendezvous == rendezvous
        assert detected.job_id == ("uid-of-the-jobset" if folder in RESTARTED_AS_ONE else "uid-of-the-job")
        assert detected.scratch == Path("/scratch", f"wikillm-{os.getuid()}")


def test_every_variable_of_the_pods_is_read_somewhere(manifests: list[Manifest]) -> None:
    container = pods(manifests)[0].container
    sources = "".join(path.read_text() for path in (REPOSITORY / "job").rglob("*.py"))
    values = " ".join(variable.get("value", "") for variable in container["env"])
    for name in (variable["name"] for variable in container["env"]):
        assert f'"{name}"' in sources or f"$({name})" in values, name


def test_settings_are_those_of_the_preset(folder: str, manifests: list[Manifest]) -> None:
    command, chosen = settings(manifests)
    assert command == ("prepare" if folder == "prepare" else "train")
    preset = config.load(str(REPOSITORY / "configs" / "wiki-123m.yaml"), [])
    expected, found = config.to_dict(preset), config.to_dict(chosen)
    for section, key in (("train", "node_timeout"), ("checkpoint", "stop_deadline"), ("checkpoint", "every_minutes")):
        expected[section][key] = found[section][key]  # These are specific to Kubernetes.
    assert found == expected


def test_grace_period_is_enough_for_the_last_checkpoint(folder: str, manifests: list[Manifest]) -> None:
    _, chosen = settings(manifests)
    grace = pods(manifests)[0].spec["terminationGracePeriodSeconds"]
    if folder != "prepare":  # `prepare` has no checkpoint to save.
        assert grace >= chosen.checkpoint.stop_deadline.seconds + 30
    if folder == "spot":
        assert grace <= 120, "no cloud waits longer"
        assert chosen.checkpoint.every_minutes is not None


# ---- Security ----


def test_pods_fulfil_the_restricted_pod_security_profile(manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    forbidden = {"hostNetwork", "hostPID", "hostIPC", "hostPort", "hostProcess", "privileged", "procMount", "sysctls"}
    assert not [path for path, _ in cluster.walk(pod.spec) if path.rpartition(".")[2] in forbidden]
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
    assert all(volume.keys() - {"name"} <= allowed for volume in pod.spec["volumes"])
    of_pod, of_container = pod.spec["securityContext"], pod.container["securityContext"]
    assert of_pod["runAsNonRoot"] is True and of_pod["runAsUser"] >= 10000
    assert of_pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert of_container["allowPrivilegeEscalation"] is False
    assert of_container["capabilities"] == {"drop": ["ALL"]}


def test_only_scratch_is_writable_and_no_token_is_mounted(manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    assert pod.container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod.spec["automountServiceAccountToken"] is False
    assert pod.spec["enableServiceLinks"] is False
    [mount] = [mount for mount in pod.container["volumeMounts"] if mount["name"] == "config"]
    assert mount["readOnly"] is True


def test_manifests_contain_no_secret_and_pods_read_one(manifests: list[Manifest]) -> None:
    assert not [manifest for manifest in manifests if manifest["kind"] == "Secret"]
    container = pods(manifests)[0].container
    assert container["envFrom"] == [{"secretRef": {"name": "wikillm"}}]
    names = [variable["name"] for variable in container["env"]]
    assert not [name for name in names if re.search("KEY|SECRET|TOKEN|PASSWORD", name)]


def test_example_secret_has_no_values_and_only_known_names() -> None:
    lines = (FOLDERS / "base" / "secret.example.env").read_text().splitlines()
    variables = [line for line in lines if line and not line.startswith("#")]
    assert all(line.endswith("=") for line in variables)
    sources = "".join(path.read_text() for path in (REPOSITORY / "job").rglob("*.py"))
    for name in (line.removesuffix("=") for line in variables):
        assert re.search(rf"\b{name}\b", sources), name


# ---- Changes that a user makes ----


def assert_numbers_and_names_agree(manifests: list[Manifest], nodes: int, name: str) -> None:
    all_pods = pods(manifests)
    assert len(all_pods) == nodes
    assert cluster.service_of(manifests)["metadata"]["name"] == name
    policy = cluster.only("NetworkPolicy", manifests)["spec"]["podSelector"]["matchLabels"]
    for pod in all_pods:
        assert cluster.selects(cluster.service_of(manifests)["spec"]["selector"], pod.labels)
        assert cluster.selects(policy, pod.labels)
        detected = detect_environment(pod.environment(SECRETS))
        assert (detected.node_rank, detected.nodes) == (pod.index, nodes)
        assert detected.rendezvous == Rendezvous(all_pods[0].address, 29500)
        assert all_pods[0].address.endswith(f"-0.{name}")


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """A copy of all folders for a test to edit."""
    return Path(shutil.copytree(FOLDERS, tmp_path / "kubernetes"))


def edit(file: Path, pattern: str, replacement: str) -> None:
    text, times = re.subn(pattern, replacement, file.read_text())
    assert times == 1, f"{pattern!r} matches {times} times in {file}"
    file.write_text(text)


@pytest.mark.parametrize("folder", ["multi-node", "spot", *RESTARTED_AS_ONE])
def test_number_of_nodes_is_set_in_one_place(folder: str, edited: Path) -> None:
    edit(edited / "multi-node" / "kustomization.yaml", r"value: \d+(?= # EDIT: nodes)", "value: 5")
    assert_numbers_and_names_agree(cluster.render(edited / folder), 5, "wikillm")


def test_number_of_prepare_pods_is_set_in_one_place(edited: Path) -> None:
    edit(edited / "prepare" / "kustomization.yaml", r"value: \d+(?= # EDIT: pods)", "value: 3")
    all_pods = pods(cluster.render(edited / "prepare"))
    assert [part_of_array(pod.environment(SECRETS)) for pod in all_pods] == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("folder", ["multi-node", "spot", *RESTARTED_AS_ONE])
def test_name_is_set_in_one_place(folder: str, edited: Path) -> None:
    edit(edited / folder / "kustomization.yaml", r"kind: Kustomization\n", "kind: Kustomization\nnameSuffix: -two\n")
    assert_numbers_and_names_agree(cluster.render(edited / folder), 2, "wikillm-two")


def test_commented_name_suffix_works_when_uncommented(edited: Path) -> None:
    edit(edited / "single" / "kustomization.yaml", "# nameSuffix", "nameSuffix")
    changed = cluster.render(edited / "single")
    assert cluster.only("Job", changed)["metadata"]["name"] == "wikillm-two"
    assert [pod.address for pod in pods(changed)] == ["wikillm-two-0.wikillm-two"]


@pytest.mark.parametrize("folder", OF_ONE_JOB)
def test_two_runs_at_the_same_time_share_nothing(folder: str, render_changed: Render) -> None:
    ours, theirs = (
        cluster.render(FOLDERS / folder),
        render_changed(folder, {}, nameSuffix="-two", transformers=["wiring"]),
    )
    names = [{(manifest["kind"], manifest["metadata"]["name"]) for manifest in run} for run in (ours, theirs)]
    assert not names[0] & names[1]
    for run, other in ((ours, theirs), (theirs, ours)):
        selector = cluster.only("Service", run)["spec"]["selector"]
        assert all(cluster.selects(selector, pod.labels) for pod in pods(run))
        assert not any(cluster.selects(selector, pod.labels) for pod in pods(other))


def test_image_is_set_in_one_place(folder: str, manifests: list[Manifest], render_changed: Render) -> None:
    assert pods(manifests)[0].container["image"].startswith(cluster.IMAGE)
    if folder not in RESTARTED_AS_ONE:
        digest = f"sha256:{'0' * 64}"
        image = {"name": cluster.IMAGE, "newName": "127.0.0.1:5000/own", "digest": digest}
        changed = render_changed(folder, {}, images=[image])
        assert pods(changed)[0].container["image"] == f"127.0.0.1:5000/own@{digest}"


def test_other_settings_get_a_config_map_with_another_name(
    folder: str, manifests: list[Manifest], render_changed: Render
) -> None:
    changed = render_changed(folder, {"run": {"output": "s3://mine/run"}})
    ours, theirs = (cluster.only("ConfigMap", rendered)["metadata"]["name"] for rendered in (manifests, changed))
    assert ours != theirs
    [volume] = [volume for volume in pods(changed)[0].spec["volumes"] if volume["name"] == "config"]
    assert volume["configMap"]["name"] == theirs
    assert settings(changed)[1].run.output == "s3://mine/run"


# ---- Header comments ----


def header_of(folder: str) -> dict[str, list[str]]:
    """Return the kubectl commands in the header of a folder's kustomization.yaml, by their label (such as Apply)."""
    commands: dict[str, list[str]] = {}
    for line in header_lines(folder):
        if found := re.match(r"#   (\w+)  +(kubectl .*)", line):
            commands[found[1]] = re.findall(r"kubectl [^;#]*", found[2])
    return commands


def header_lines(folder: str) -> Iterator[str]:
    for line in (FOLDERS / folder / "kustomization.yaml").read_text().splitlines():
        if not line.startswith("#"):
            return
        yield line


def test_header_of_each_folder_has_working_commands(folder: str, manifests: list[Manifest]) -> None:
    commands = header_of(folder)
    assert commands.keys() >= {"Apply", "Check", "Logs", "Stop"}
    assert commands["Apply"] == [f"kubectl apply -k launch/kubernetes/{folder}"]
    assert commands["Stop"] == [f"kubectl delete -k launch/kubernetes/{folder}"]
    names = {f"{manifest['kind'].lower()}/{manifest['metadata']['name']}" for manifest in manifests}
    text = "\n".join(header_lines(folder))
    assert set(re.findall(r"\b(?:job|jobset|trainjob)/[\w-]+", text)) <= names
    selectors = re.findall(r"-l (\S+?)[;\s]", text + "\n")
    assert selectors
    for selector in selectors:
        labels = dict(label.split("=") for label in selector.split(","))
        assert any(cluster.selects(labels, pod.labels) for pod in pods(manifests)), selector
