"""Mistakes planted in settings, store, data and launch files; `check` must name each one and what to do about it."""

import pytest
import yaml
from planting import (
    Plant,
    attempts_without_progress,
    both,
    checkpoints_without_run_record,
    damaged,
    damaged_checkpoints,
    edit,
    environment,
    existing_stop_file,
    gpus,
    kubernetes_job,
    options,
    output_below_a_file,
    run_with_another_tokenizer,
    spec,
    store_clock_off_by,
    target_of,
    wiring,
    with_large_shard,
)
from preflight_workspace import HERE, KUBERNETES, MULTI_NODE, OVERLAYS, SLURM, SWANLAB, TRAINJOB, Workspace, gpu
from small_run import REPOSITORY

from job.preflight import store
from job.preflight.findings import UNSURE, WRONG, Finding

LARGE_MODEL = {"model__hidden_size": 1024, "model__num_hidden_layers": 24, "train__context_length": 2048}

MISTAKES: dict[str, tuple[str | None, Plant, str, str]] = {
    # name of the mistake: (place, or "deep" for check --deep here; how it is planted; row; part of the remedy)
    # settings
    "global batch not divisible by the processes": (
        HERE, options(train__global_batch_size=5, train__processes=2), "global batch", "train.global_batch_size"),
    "hidden size not divisible by the heads": (HERE, options(model__num_attention_heads=3), "model", "set it to 30"),
    "minimum learning rate above the peak": (HERE, options(train__min_learning_rate=1.0), "learning rate", "lower"),
    "decay steps of a cosine": (HERE, options(train__decay_steps=5), "learning rate", "train.schedule to wsd"),
    "cloud tracking without an API key": (
        HERE, both(options(tracking__mode="cloud"), environment(SWANLAB_API_KEY=None)),
        "tracking", "SWANLAB_API_KEY"),
    "stop file that exists": (HERE, existing_stop_file, "stop file", "delete it"),
    "cache smaller than the shuffle buffer": (
        HERE, both(damaged("manifest.json", with_large_shard), options(data__cache_bytes="1MiB")),
        "shard cache", "data.cache_bytes"),
    "time limit too short for a checkpoint": (
        HERE, options(train__max_time="4s"), "time limit", "train.max_time"),
    # store
    "no credentials": (
        HERE, both(environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_EC2_METADATA_DISABLED="true"),
                   lambda workspace: workspace.environment(HOME=str(workspace.folder))),
        "credentials", "AWS_ACCESS_KEY_ID"),
    "wrong secret key": (HERE, environment(AWS_SECRET_ACCESS_KEY="secret-but-wrong"), "store", "AWS_SECRET_ACCESS_KEY"),
    "bucket that does not exist": (HERE, options(run__output="s3://no-such-bucket/run"), "store", "create it"),
    "endpoint that does not exist": (
        HERE, options(store__endpoint_url="http://nowhere.invalid"), "store", "URL of an S3 service"),
    "clock that is 20 minutes slow": (HERE, store_clock_off_by(-1200), "clock", "set this machine's clock"),
    "read-only output": (
        HERE, options(run__output="https://example.com/run"), "output writable", "s3://"),
    "output below a file": (HERE, output_below_a_file, "output writable", "correct the path"),
    # data
    "data set not prepared yet": (
        HERE, lambda workspace: workspace.set(data__shards=f"{workspace.bucket}/none"),
        "data set", "python -m job prepare"),
    "corpus that does not exist": (
        HERE, lambda workspace: workspace.set(data__shards=f"{workspace.bucket}/none", data__source="./nowhere.jsonl"),
        "corpus", "correct the path"),
    "missing shard": (HERE, damaged(r"train/", lambda content: None), "shards", "job prepare"),
    "shard of wrong length": (HERE, damaged(r"train/", lambda content: content[:-8]), "shards", "job prepare"),
    "shard with one wrong bit": (
        "deep", damaged(r"train/", lambda content: bytes([content[0] ^ 1]) + content[1:]), "shards", "job prepare"),
    "damaged manifest": (HERE, damaged("manifest.json", lambda content: content[:-40]), "data set", "job prepare"),
    "tokenizer that did not make the shards": (
        HERE, damaged("tokenizer.json", lambda content: content.replace(b'"dropout":', b'"dropout" :')),
        "tokenizer", "prepare again"),
    "no tokenizer beside the shards": (
        HERE, damaged("tokenizer.json", lambda content: None), "tokenizer", "prepare again"),
    # the existing run
    "existing run of another model": (
        HERE, lambda workspace: workspace.begin_run(model={}), "run", "choose another run.output"),
    "existing run with another global batch": (
        HERE, lambda workspace: workspace.begin_run(global_batch_size=8), "run", "choose another run.output"),
    "existing run with another tokenizer": (HERE, run_with_another_tokenizer, "run", "choose another run.output"),
    "checkpoints without run.json": (HERE, checkpoints_without_run_record, "run", "restore run.json"),
    "only damaged checkpoints": (HERE, damaged_checkpoints, "run", "--train.resume never"),
    "attempts without progress": (HERE, attempts_without_progress, "run", "train.max_attempts_without_progress"),
    "start checkpoint that does not exist": (
        HERE, lambda workspace: workspace.set(train__resume=f"{workspace.bucket}/none"), "run", "name the folder"),
    # this machine
    "incomplete launcher variables": (HERE, environment(RANK="0"), "place", "torchrun"),
    "several nodes without an address": (HERE, environment(WIKILLM_NODES="2"), "place", "MASTER_ADDR"),
    "no GPU driver": (
        HERE, gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9),
        "GPUs", "nvidia-smi"),
    "GPU without bf16": (
        HERE, both(gpus(gpu(name="Tesla V100-SXM2-32GB", capability="7.0")), options(train__precision="bf16")),
        "precision", "auto, which is fp16 here"),
    "more processes than GPUs": (
        HERE, both(gpus(gpu()), options(train__processes=2)), "GPUs", "set train.processes to 1"),
    "GPU with a torch without CUDA": (HERE, gpus(gpu()), "driver", "CUDA build"),
    "NCCL interface that does not exist": (
        HERE, both(gpus(gpu()), environment(
            WIKILLM_NODES="2", WIKILLM_NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
            NCCL_NET="Socket", NCCL_SOCKET_IFNAME="bond9")),
        "between nodes", "set NCCL_SOCKET_IFNAME"),
    "micro-batch too large for 24 GB": (
        HERE, both(gpus(gpu()), options(**LARGE_MODEL, train__micro_batch_size=32)),
        "GPU memory", "train.micro_batch_size to "),
    "more checkpoints than the disk holds": (
        HERE, lambda workspace: workspace.set(run__output=str(workspace.folder / "run"), checkpoint__keep=10**9),
        "disk for checkpoints", "free space"),
    # Slurm
    "Slurm: store on this machine only": (
        SLURM, lambda workspace: workspace.monkeypatch.setattr(store, "_LOOPBACK", ("127.",)),
        "endpoint", "from the nodes"),
    "Slurm: no warning signal": (SLURM, edit("slurm.sh", r"^#SBATCH --signal.*\n", ""), "warning", "--signal=B:USR1@"),
    "Slurm: warning not sent to the script": (SLURM, edit("slurm.sh", "B:USR1", "USR1"), "warning", "--signal=B:USR1@"),
    "Slurm: warning without a trap": (SLURM, edit("slurm.sh", "B:USR1", "B:USR2"), "warning", "--signal=B:USR1@"),
    "Slurm: warning longer than the time limit": (
        SLURM, edit("slurm.sh", "--time=[0-9:]*", "--time=5"), "warning", "--time"),
    "Slurm: warning shorter than stop_deadline": (
        SLURM, edit("slurm.sh", r"USR1@\d+", "USR1@60"), "time to stop", "give 320 s"),
    "Slurm: invalid time limit": (SLURM, edit("slurm.sh", "--time=[0-9:]*", "--time=1d"), "script", "days-hours"),
    "Slurm: global batch not divisible by the GPUs": (
        SLURM, edit("slurm.sh", r"--nodes=\d+ ", "--nodes=3 "), "global batch", "train.global_batch_size"),
    "Slurm: one task per GPU": (
        SLURM, edit("slurm.sh", "--ntasks-per-node=1", "--ntasks-per-node=8"), "tasks", "--ntasks-per-node=1"),
    "Slurm: placeholder image": (
        SLURM, environment(RUNTIME="apptainer"), "image", "make build push set-image"),
    "Slurm: unknown container runtime": (SLURM, environment(RUNTIME="docker"), "image", "apptainer"),
    "Slurm: no requeue": (SLURM, edit("slurm.sh", "scontrol requeue", "echo"), "requeue", "slurm.sh"),
    "Slurm: srun waits forever for a dead node": (SLURM, edit("slurm.sh", " --wait=[^ )]+", ""), "requeue", "--wait"),
    "Slurm: Windows line endings": (SLURM, edit("slurm.sh", "$", "\r"), "script", "sed -i"),
    "Slurm: two contradicting GPU requests": (
        SLURM, edit("slurm.sh", r"^#SBATCH --gpus-per-node=1", "#SBATCH --gres=gpu:2\n#SBATCH --gpus-per-node=1"),
        "GPUs", "keep #SBATCH --gpus-per-node=N alone"),
    "Slurm: micro-batch too large for the GPU's type": (
        SLURM, both(edit("slurm.sh", r"^#SBATCH --gpus-per-node=1 ", "#SBATCH --gpus-per-node=rtx4090:1 "),
                    options(**LARGE_MODEL, train__micro_batch_size=32)),
        "GPU memory", "train.micro_batch_size to "),
    "Slurm: bf16 on a GPU's type without it": (
        SLURM, both(edit("slurm.sh", r"^#SBATCH --gpus-per-node=1 ", "#SBATCH --gpus-per-node=t4:1 "),
                    options(train__precision="bf16")),
        "precision", "fp16 here"),
    "Slurm: more processes than GPUs": (SLURM, options(train__processes=4), "GPUs", "--gpus-per-node"),
    # Kubernetes
    "Kubernetes: placeholder image": (
        KUBERNETES, edit("kubernetes/base/kustomization.yaml", "registry.internal", "registry.example.com"),
        "image", "make build push set-image"),
    "Kubernetes: different settings in the pods": (
        KUBERNETES, edit("kubernetes/base/config.yaml", "warmup_steps: 5", "warmup_steps: 6"),
        "settings of the pods", "cp configs/mine.yaml"),
    "Kubernetes: unknown setting": (
        KUBERNETES, edit("kubernetes/base/config.yaml", "warmup_steps: 5", "warm_up_steps: 5"),
        "manifests", "warmup_steps"),
    "Kubernetes: parallelism below completions": (
        MULTI_NODE, wiring(target_of("Job", "spec.parallelism"), ""), "nodes", "parallelism"),
    "Kubernetes: wrong WIKILLM_NODES": (
        MULTI_NODE, wiring("name=WIKILLM_NODES", "name=WIKILLM_SCRATCH"), "nodes", "WIKILLM_NODES"),
    "Kubernetes: pods without ranks": (
        MULTI_NODE, kubernetes_job("completionMode: Indexed", "completionMode: NonIndexed"), "nodes", "Indexed"),
    "Kubernetes: Service that is not headless": (
        MULTI_NODE, edit("kubernetes/base/service.yaml", "clusterIP: None.*", "type: ClusterIP"),
        "rendezvous", "clusterIP: None"),
    "Kubernetes: no rendezvous address": (
        MULTI_NODE, wiring("name=MASTER_ADDR", "name=MASTER_PORT"), "rendezvous", "-0.wikillm"),
    "Kubernetes: global batch not divisible by the GPUs": (
        MULTI_NODE, options(train__global_batch_size=24), "global batch", "train.global_batch_size"),
    "Kubernetes: grace period shorter than stop_deadline": (
        KUBERNETES, kubernetes_job("(terminationGracePeriodSeconds:).*", r"\1 30"), "time to stop", "stop_deadline"),
    "Kubernetes: retry after exit code 78": (
        KUBERNETES, kubernetes_job(r"values: \[70, 78\]", "values: [70]"), "exit codes", "podFailurePolicy"),
    "Kubernetes: exit code 75 counted as a crash": (
        KUBERNETES, kubernetes_job(r"values: \[75\]", "values: [76]"), "exit codes", "podFailurePolicy"),
    "Kubernetes: drained node counted as a crash": (
        KUBERNETES, kubernetes_job("type: DisruptionTarget", "type: PodScheduled"), "exit codes", "podFailurePolicy"),
    "Kubernetes: restartPolicy OnFailure": (
        KUBERNETES, kubernetes_job("restartPolicy: Never.*", "restartPolicy: OnFailure"), "exit codes", "Never"),
    "Kubernetes: no credentials": (
        KUBERNETES, kubernetes_job(r"envFrom:\n *- secretRef:\n.*\n", "envFrom: []\n"), "secrets", "secretRef"),
    "Kubernetes: secret key in the manifest": (
        KUBERNETES, kubernetes_job(
            r"( *)- name: WIKILLM_SCRATCH",
            r"\1- name: AWS_SECRET_ACCESS_KEY\n\1  value: secret-but-written-down\n\1- name: WIKILLM_SCRATCH"),
        "secrets", "put it into a Secret"),
    "Kubernetes: no shared memory for several GPUs": (
        MULTI_NODE, kubernetes_job("medium: Memory", 'medium: ""'), "shared memory", "medium: Memory"),
    "Kubernetes: scratch volume smaller than the shards": (
        KUBERNETES, kubernetes_job("sizeLimit: 60Gi", "sizeLimit: 64k"), "scratch", "sizeLimit"),
    "Kubernetes: output on the pod's disk": (
        KUBERNETES, options(run__output="data/run"), "run.output", "s3://"),
    "Kubernetes: unknown folder": ("kubernetes/two-nodes", options(), "manifests", "multi-node"),
    "Kubernetes: TrainJob without a trainer": (
        TRAINJOB,
        both(edit("kubernetes/trainjob/trainjob.yaml", r"  trainer:\n    numNodes: 1\n", ""),
             edit("kubernetes/trainjob/job-into-trainjob.yaml", target_of("TrainJob", "spec.trainer.numNodes"), "")),
        "nodes", "trainer: {numNodes"),
    "Kubernetes: container that the Trainer does not find": (
        TRAINJOB, edit("kubernetes/trainjob/job-into-trainjob.yaml", "value: node", "value: wikillm"),
        "nodes", "name-of-the-container"),
    "Kubernetes: overlay that cannot be rendered": (
        KUBERNETES, edit("kubernetes/single/kustomization.yaml", "path: /spec", "path: /nothing/here"),
        "manifests", "correct what it names"),
    # SwanLab
    "SwanLab: two GPUs": (SWANLAB, spec("combo: .*", "combo: H800-2"), "spec", "swanlab.yaml"),
    "SwanLab: unknown key in the spec": (SWANLAB, spec("entry:", "command:"), "spec", "swanlab.yaml"),
    "SwanLab: entry script that does not exist": (
        SWANLAB, lambda workspace: (workspace.folder / "launch/swanlab_task.py").unlink(),
        "spec", "correct it"),
    "SwanLab: two processes": (SWANLAB, options(train__processes=2), "GPUs", "train.processes to null"),
    "SwanLab: more time than a task has": (SWANLAB, options(train__max_time="5h"), "train.max_time", "3h50m"),
    "SwanLab: shards on this machine": (
        SWANLAB, options(data__shards="data/shards"), "data.shards", "launch.swanlab upload"),
    "SwanLab: volume missing in the spec": (
        SWANLAB, options(data__shards="/data/WIKI_CN"), "data.shards", "spec.volumes"),
    "SwanLab: volume with another name": (
        SWANLAB, both(options(data__shards="/data/WIKI_CN"),
                      spec(r"volumes: \[\].*", "volumes: [{name: NEWS, id: abc123}]")),
        "data.shards", "/data/NEWS"),
    "SwanLab: output on the task's disk": (SWANLAB, options(run__output="data/run"), "run.output", "s3://"),
    "SwanLab: no API key": (SWANLAB, environment(SWANLAB_API_KEY=None), "API key", "swanlab login"),
    "SwanLab: micro-batch too large for an RTX 3090": (
        SWANLAB, both(spec("combo: .*", "combo: RTX3090-1"), options(**LARGE_MODEL, train__micro_batch_size=32)),
        "GPU memory", "train.micro_batch_size to "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_check_names_the_mistake_and_the_remedy(workspace: Workspace, mistake: str) -> None:
    place, plant, name, remedy = MISTAKES[mistake]
    deep, place = place == "deep", None if place == "deep" else place
    plant(workspace)
    rows = workspace.rows(place, deep)
    caught = [row for row in rows if row.mark == WRONG and row.name == name]
    assert caught, rows
    assert remedy in caught[0].remedy, caught
    assert not any("secret-but" in f"{row.found}{row.remedy}" for row in rows)


def test_at_least_forty_mistakes_are_planted_in_all_places() -> None:
    places = [place for place, *_ in MISTAKES.values()]
    assert len(places) >= 40
    assert all(places.count(place) >= 10 for place in (HERE, SLURM, SWANLAB))
    assert places.count(KUBERNETES) + places.count(MULTI_NODE) >= 10


# ---- Without a mistake ----


@pytest.mark.parametrize("place", [HERE, SLURM, *OVERLAYS, SWANLAB])
def test_correct_settings_pass_in_every_place(workspace: Workspace, place: str | None) -> None:
    assert [row for row in workspace.rows(place, deep=True) if row.mark == WRONG] == []


FOR_A_CLUSTER = ("wiki-54m", "wiki-110m", "wiki-123m")
FOR_ONE_MACHINE = ("demo", "laptop")


def test_every_preset_is_for_a_cluster_or_for_one_machine() -> None:
    assert {path.stem for path in (REPOSITORY / "configs").glob("*.yaml")} == {*FOR_A_CLUSTER, *FOR_ONE_MACHINE}


def wrong_rows_with_shipped_settings(workspace: Workspace, place: str, preset: str) -> list[Finding]:
    """Check the settings of a preset for a cluster, on the tests' data set."""
    tree = yaml.safe_load((REPOSITORY / "configs" / f"{preset}.yaml").read_text(encoding="utf-8"))
    tree["run"], tree["tracking"] = workspace.tree["run"], workspace.tree["tracking"]
    tree["data"]["shards"] = workspace.data.shards
    # The tests' data set is small: without max_steps the run would be shorter than its warm-up.
    tree["train"]["max_steps"] = 300
    workspace.tree = tree
    workspace.set()
    return [row for row in workspace.rows(place) if row.mark == WRONG]


@pytest.mark.parametrize(
    ("place", "preset"),
    [*((place, "wiki-123m") for place in (SLURM, *OVERLAYS)), *((SLURM, preset) for preset in FOR_A_CLUSTER[:2])],
)
def test_shipped_settings_pass_in_every_place(workspace: Workspace, place: str, preset: str) -> None:
    assert wrong_rows_with_shipped_settings(workspace, place, preset) == []


def test_pods_without_secret_may_use_their_service_account(workspace: Workspace) -> None:
    own = workspace.folder / "launch/kubernetes/own"
    own.mkdir()
    components = [f"../components/{name}" for name in ("optional-secret", "service-account")]
    resources = {"resources": ["../multi-node"], "components": components, "transformers": ["../wiring"]}
    (own / "kustomization.yaml").write_text(yaml.safe_dump(resources))
    [row] = [row for row in workspace.rows("kubernetes/own") if row.name == "secrets"]
    assert row.mark == UNSURE
    assert "the service account wikillm" in row.found
