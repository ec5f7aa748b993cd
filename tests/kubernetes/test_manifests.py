"""What has to hold of the manifests that a schema cannot know, and the schemas."""

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
from cluster import FOLDERS, OF_ONE_JOB, RESTARTED_AS_ONE, Manifest, Pod, Render
from schemas import MODELS, NEWEST, OLDEST, known

from job import cli, config
from job.launcher.environment import Rendezvous, find_place, part_of_array
from job.model.flops import parameter_counts
from job.model.spec import ModelSpec

SECRETS = {"wikillm": {"AWS_ACCESS_KEY_ID": "a key", "AWS_SECRET_ACCESS_KEY": "a secret"}}
REPOSITORY = FOLDERS.parents[1]


def pods(manifests: list[Manifest]) -> list[Pod]:
    return cluster.pods_of(cluster.job_of(manifests))


def settings(manifests: list[Manifest]) -> tuple[str, config.Config]:
    """The command of the container and its settings, read as the entrypoint reads them."""
    [pod, *_] = pods(manifests)
    arguments = cli.parse(pod.container["args"])
    [mount] = [one for one in pod.container["volumeMounts"] if one["name"] == "config"]
    assert arguments.config_path is not None
    path = Path(arguments.config_path)
    assert str(path.parent) == mount["mountPath"]
    file = cluster.only("ConfigMap", manifests)["data"][path.name]
    return arguments.command, config.build(merged(yaml.safe_load(file), arguments.overrides))


def merged(tree: dict[str, Any], overrides: list[tuple[str, str]]) -> dict[str, Any]:
    for name, value in overrides:
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree


# ---- The schemas ----


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_object_is_valid_in_the_oldest_and_the_newest_kubernetes(manifests: list[Manifest], version: str) -> None:
    for one in [*(one for one in manifests if one["kind"] not in MODELS), cluster.job_of(manifests)]:
        kubernetes_validate.validate(one, version, strict=True)


def test_the_schema_refuses_a_field_that_is_not_there(manifests: list[Manifest]) -> None:
    job = cluster.job_of(manifests)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 390
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, NEWEST, strict=True)


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_every_field_that_is_not_kubernetes_own_is_known_by_name_and_type(folder: str) -> None:
    others = [one for one in cluster.render(FOLDERS / folder) if one["kind"] in MODELS]
    assert [one["kind"] for one in others] == (["JobSet"] if folder == "jobset" else ["TrainJob", "TrainingRuntime"])
    for one in others:
        assert known(one) == one
    tree = others[-1]["spec"] if folder == "jobset" else others[-1]["spec"]["template"]["spec"]
    tree["failurePolicy"]["rules"][0]["onJobFailureReason"] = ["PodFailurePolicy"]
    assert known(others[-1]) != others[-1]


@pytest.mark.parametrize("folder", RESTARTED_AS_ONE)
def test_values_of_the_jobset_are_those_that_its_documentation_lists(folder: str) -> None:
    jobset = cluster.jobset_of(cluster.render(FOLDERS / folder))
    assert jobset is not None
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
        assert set(rule["onJobFailureReasons"]) <= {"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "ttlSecondsAfterFinished" not in job, "the Job would go away below its JobSet"
    assert job["template"]["spec"].get("subdomain", jobset["metadata"]["name"]) == cluster.subdomain_of(jobset)


# ---- Names and numbers ----


def test_names_are_names_of_dns_and_those_of_the_pods_as_well(manifests: list[Manifest]) -> None:
    named = [one["metadata"]["name"] for one in manifests] + [pod.hostname for pod in pods(manifests)]
    spec = pods(manifests)[0].spec
    named += [spec["subdomain"], *(one["name"] for one in spec["volumes"] + spec["containers"])]
    for name in named:
        assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", name), name


def test_no_placeholder_is_left(manifests: list[Manifest]) -> None:
    for path, value in cluster.walk(manifests):
        assert value not in ("JOB", "SERVICE", "COMPLETIONS", "RUNTIME"), path


def test_a_pod_asks_for_no_less_than_it_may_use(manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    requests, limits = pod.container["resources"]["requests"], pod.container["resources"]["limits"]
    assert re.fullmatch(r"[1-9]\d*m?", requests["cpu"])
    assert cluster.bytes_of(requests["memory"]) == cluster.bytes_of(limits["memory"]), "it would be evicted first"
    volumes = {one["name"]: one.get("emptyDir", {}) for one in pod.spec["volumes"]}
    assert volumes["shared-memory"]["medium"] == "Memory"
    shared = cluster.bytes_of(volumes["shared-memory"]["sizeLimit"])
    assert shared < cluster.bytes_of(limits["memory"]) / 2, "it counts as memory of the container"
    assert shared >= 1 << 30 or "nvidia.com/gpu" not in limits
    assert cluster.bytes_of(volumes["scratch"]["sizeLimit"]) <= cluster.bytes_of(requests["ephemeral-storage"])


def test_the_scratch_volume_takes_the_shards_and_two_checkpoints(manifests: list[Manifest]) -> None:
    _, chosen = settings(manifests)
    parameters = parameter_counts(ModelSpec(**chosen.model.model_dump()), vocab_size=151_936).total
    [scratch] = [one["emptyDir"] for one in pods(manifests)[0].spec["volumes"] if one["name"] == "scratch"]
    needed = int(chosen.data.cache_bytes) + 2 * 12 * parameters
    assert cluster.bytes_of(scratch["sizeLimit"]) >= needed


def test_training_gets_gpus_and_may_stand_on_their_nodes_and_preparing_does_not(
    folder: str, manifests: list[Manifest]
) -> None:
    pod = pods(manifests)[0]
    gpus = pod.container["resources"]["limits"].get("nvidia.com/gpu", 0)
    tolerated = {one["key"]: one["effect"] for one in pod.spec.get("tolerations", []) if "effect" in one}
    if folder == "prepare":
        assert not gpus and not tolerated
    else:
        assert isinstance(gpus, int) and gpus >= 1
        assert tolerated == {"nvidia.com/gpu": "NoSchedule"}


# ---- How the parts refer to each other ----


def test_what_is_mounted_is_there_and_all_of_it_is_mounted(manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    volumes = {one["name"]: one for one in pod.spec["volumes"]}
    mounts = pod.container["volumeMounts"]
    assert {one["name"] for one in mounts} == volumes.keys()
    assert len({one["mountPath"] for one in mounts}) == len(mounts)
    assert volumes["config"]["configMap"]["name"] == cluster.only("ConfigMap", manifests)["metadata"]["name"]
    written = {one["mountPath"]: one["name"] for one in mounts if not one.get("readOnly")}
    assert written == {"/scratch": "scratch", "/tmp": "scratch", "/dev/shm": "shared-memory"}


def test_the_service_and_the_policy_select_the_pods_of_this_job_and_of_no_other(
    folder: str, manifests: list[Manifest]
) -> None:
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


def test_the_first_pod_is_found_by_the_name_that_all_have_for_it_before_it_is_ready(manifests: list[Manifest]) -> None:
    service = cluster.service_of(manifests)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    first, *_ = found = pods(manifests)
    for pod in found:
        assert pod.spec["subdomain"] == service["metadata"]["name"]
        environment = pod.environment(SECRETS)
        trainer = "PET_" if "PET_NNODES" in environment else ""
        assert environment[f"{trainer}MASTER_ADDR"] == first.address
        for port in service["spec"].get("ports", []):
            assert environment["MASTER_PORT"] == str(port["port"])


def test_the_number_of_nodes_is_the_same_everywhere(manifests: list[Manifest]) -> None:
    spec = cluster.job_of(manifests)["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == spec["completions"] == len(pods(manifests))
    for pod in pods(manifests):
        environment = pod.environment(SECRETS)
        told = [environment[name] for name in ("WIKILLM_NODES", "PET_NNODES") if name in environment]
        assert told == [str(spec["completions"])]


# ---- What the entrypoint makes of it ----


def test_the_entrypoint_finds_out_which_node_of_how_many_it_is(folder: str, manifests: list[Manifest]) -> None:
    found = pods(manifests)
    for pod in found:
        place = find_place(pod.environment(SECRETS))
        kind = "Kubeflow Trainer" if folder == "trainjob" else "Kubernetes"
        assert (place.kind, place.node_rank, place.nodes) == (kind, pod.index, len(found))
        meets = None if folder == "single" else Rendezvous(found[0].address, 29500)
        assert place.rendezvous == meets
        assert place.job_id == ("uid-of-the-jobset" if folder in RESTARTED_AS_ONE else "uid-of-the-job")
        assert place.scratch == Path("/scratch", f"wikillm-{os.getuid()}")


def test_the_pods_have_no_variable_that_nothing_reads(manifests: list[Manifest]) -> None:
    container = pods(manifests)[0].container
    sources = "".join(path.read_text() for path in (REPOSITORY / "job").rglob("*.py"))
    values = " ".join(one.get("value", "") for one in container["env"])
    for name in (one["name"] for one in container["env"]):
        assert f'"{name}"' in sources or f"$({name})" in values, name


def test_the_settings_are_those_of_the_preset(folder: str, manifests: list[Manifest]) -> None:
    command, chosen = settings(manifests)
    assert command == ("prepare" if folder == "prepare" else "train")
    preset = config.load(str(REPOSITORY / "configs" / "wiki-123m.yaml"), [])
    expected, found = config.to_dict(preset), config.to_dict(chosen)
    for section, key in (("train", "node_timeout"), ("checkpoint", "stop_deadline"), ("checkpoint", "every_minutes")):
        expected[section][key] = found[section][key]  # these are the place's
    assert found == expected


def test_the_grace_period_is_enough_for_the_last_checkpoint(folder: str, manifests: list[Manifest]) -> None:
    _, chosen = settings(manifests)
    grace = pods(manifests)[0].spec["terminationGracePeriodSeconds"]
    if folder != "prepare":  # it has nothing to save
        assert grace >= chosen.checkpoint.stop_deadline.seconds + 30
    if folder == "spot":
        assert grace <= 120, "no cloud waits longer"
        assert chosen.checkpoint.every_minutes is not None


# ---- Security ----


def test_pods_keep_to_the_restricted_profile_of_the_pod_security_standards(manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    forbidden = {"hostNetwork", "hostPID", "hostIPC", "hostPort", "hostProcess", "privileged", "procMount", "sysctls"}
    assert not [path for path, _ in cluster.walk(pod.spec) if path.rpartition(".")[2] in forbidden]
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected"}
    assert all(one.keys() - {"name"} <= allowed for one in pod.spec["volumes"])
    whole, own = pod.spec["securityContext"], pod.container["securityContext"]
    assert whole["runAsNonRoot"] is True and whole["runAsUser"] >= 10000
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}


def test_nothing_but_scratch_can_be_written_and_no_token_is_there(manifests: list[Manifest]) -> None:
    pod = pods(manifests)[0]
    assert pod.container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod.spec["automountServiceAccountToken"] is False
    assert pod.spec["enableServiceLinks"] is False
    [mount] = [one for one in pod.container["volumeMounts"] if one["name"] == "config"]
    assert mount["readOnly"] is True


def test_no_secret_is_in_a_manifest_and_the_pods_read_one(manifests: list[Manifest]) -> None:
    assert not [one for one in manifests if one["kind"] == "Secret"]
    container = pods(manifests)[0].container
    assert container["envFrom"] == [{"secretRef": {"name": "wikillm"}}]
    assert not [one for one in container["env"] if re.search("KEY|SECRET|TOKEN|PASSWORD", one["name"])]


def test_the_example_of_a_secret_holds_none_and_names_what_is_read() -> None:
    lines = (FOLDERS / "base" / "secret.example.env").read_text().splitlines()
    variables = [line for line in lines if line and not line.startswith("#")]
    assert all(line.endswith("=") for line in variables)
    sources = "".join(path.read_text() for path in (REPOSITORY / "job").rglob("*.py"))
    for name in (line.removesuffix("=") for line in variables):
        assert re.search(rf"\b{name}\b", sources), name


# ---- What a user changes ----


def numbers_and_names_agree(manifests: list[Manifest], nodes: int, name: str) -> None:
    found = pods(manifests)
    assert len(found) == nodes
    assert cluster.service_of(manifests)["metadata"]["name"] == name
    policy = cluster.only("NetworkPolicy", manifests)["spec"]["podSelector"]["matchLabels"]
    for pod in found:
        assert cluster.selects(cluster.service_of(manifests)["spec"]["selector"], pod.labels)
        assert cluster.selects(policy, pod.labels)
        place = find_place(pod.environment(SECRETS))
        assert (place.node_rank, place.nodes) == (pod.index, nodes)
        assert place.rendezvous == Rendezvous(found[0].address, 29500)
        assert found[0].address.endswith(f"-0.{name}")


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """A copy of all folders, for a user to edit."""
    return Path(shutil.copytree(FOLDERS, tmp_path / "kubernetes"))


def edit(file: Path, pattern: str, replacement: str) -> None:
    text, times = re.subn(pattern, replacement, file.read_text())
    assert times == 1, f"{pattern!r} stands {times} times in {file}"
    file.write_text(text)


@pytest.mark.parametrize("folder", ["multi-node", "spot", *RESTARTED_AS_ONE])
def test_the_number_of_nodes_is_set_in_one_place(folder: str, edited: Path) -> None:
    edit(edited / "multi-node" / "kustomization.yaml", r"value: \d+(?= # EDIT: nodes)", "value: 5")
    numbers_and_names_agree(cluster.render(edited / folder), 5, "wikillm")


def test_the_number_of_pods_that_prepare_is_set_in_one_place(edited: Path) -> None:
    edit(edited / "prepare" / "kustomization.yaml", r"value: \d+(?= # EDIT: pods)", "value: 3")
    found = pods(cluster.render(edited / "prepare"))
    assert [part_of_array(pod.environment(SECRETS)) for pod in found] == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("folder", ["multi-node", "spot", *RESTARTED_AS_ONE])
def test_the_name_is_set_in_one_place(folder: str, edited: Path) -> None:
    edit(edited / folder / "kustomization.yaml", r"kind: Kustomization\n", "kind: Kustomization\nnameSuffix: -two\n")
    numbers_and_names_agree(cluster.render(edited / folder), 2, "wikillm-two")


def test_the_line_that_gives_a_second_run_its_name_works_as_it_stands(edited: Path) -> None:
    edit(edited / "single" / "kustomization.yaml", "# nameSuffix", "nameSuffix")
    changed = cluster.render(edited / "single")
    assert cluster.only("Job", changed)["metadata"]["name"] == "wikillm-two"
    assert [pod.address for pod in pods(changed)] == ["wikillm-two-0.wikillm-two"]


@pytest.mark.parametrize("folder", OF_ONE_JOB)
def test_two_runs_beside_each_other_have_nothing_in_common(folder: str, render_changed: Render) -> None:
    ours, theirs = (
        cluster.render(FOLDERS / folder),
        render_changed(folder, {}, nameSuffix="-two", transformers=["wiring"]),
    )
    names = [{(one["kind"], one["metadata"]["name"]) for one in run} for run in (ours, theirs)]
    assert not names[0] & names[1]
    for run, other in ((ours, theirs), (theirs, ours)):
        selector = cluster.only("Service", run)["spec"]["selector"]
        assert all(cluster.selects(selector, pod.labels) for pod in pods(run))
        assert not any(cluster.selects(selector, pod.labels) for pod in pods(other))


def test_the_image_is_set_in_one_place(folder: str, manifests: list[Manifest], render_changed: Render) -> None:
    assert pods(manifests)[0].container["image"].startswith(cluster.IMAGE)
    if folder not in RESTARTED_AS_ONE:
        digest = f"sha256:{'0' * 64}"
        image = {"name": cluster.IMAGE, "newName": "127.0.0.1:5000/own", "digest": digest}
        changed = render_changed(folder, {}, images=[image])
        assert pods(changed)[0].container["image"] == f"127.0.0.1:5000/own@{digest}"


def test_other_settings_are_a_config_map_of_another_name(
    folder: str, manifests: list[Manifest], render_changed: Render
) -> None:
    changed = render_changed(folder, {"run": {"output": "s3://mine/run"}})
    ours, theirs = (cluster.only("ConfigMap", one)["metadata"]["name"] for one in (manifests, changed))
    assert ours != theirs
    [volume] = [one for one in pods(changed)[0].spec["volumes"] if one["name"] == "config"]
    assert volume["configMap"]["name"] == theirs
    assert settings(changed)[1].run.output == "s3://mine/run"


# ---- The header ----


def header_of(folder: str) -> dict[str, list[str]]:
    """The commands at the top of a folder's kustomization.yaml, by what they are for."""
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


def test_each_folder_says_how_it_is_applied_checked_read_and_stopped(folder: str, manifests: list[Manifest]) -> None:
    commands = header_of(folder)
    assert commands.keys() >= {"Apply", "Check", "Logs", "Stop"}
    assert commands["Apply"] == [f"kubectl apply -k launch/kubernetes/{folder}"]
    assert commands["Stop"] == [f"kubectl delete -k launch/kubernetes/{folder}"]
    names = {f"{one['kind'].lower()}/{one['metadata']['name']}" for one in manifests}
    text = "\n".join(header_lines(folder))
    assert set(re.findall(r"\b(?:job|jobset|trainjob)/[\w-]+", text)) <= names
    selectors = re.findall(r"-l (\S+?)[;\s]", text + "\n")
    assert selectors
    for selector in selectors:
        wanted = dict(one.split("=") for one in selector.split(","))
        assert any(cluster.selects(wanted, pod.labels) for pod in pods(manifests)), selector
