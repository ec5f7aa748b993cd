"""The preflight: mistakes planted in the settings, the store, the data and the launch files, each caught and named."""

import dataclasses
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import MODEL, REPOSITORY, DataSet, prepare_sample

from job import config as settings
from job import storage
from job.config import Config
from job.data.manifest import shard_size
from job.data.tokenizer import store_tokenizer
from job.demo.server import S3Server
from job.demo.walk import SAMPLE
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError
from job.launcher import device
from job.launcher.device import Answer
from job.model.spec import ModelSpec
from job.preflight import store
from job.preflight.check import check, preflight
from job.preflight.findings import RIGHT, UNSURE, WRONG, Finding
from job.preflight.machine import find_gpus
from job.runs.attempts import FAILED, STOPPED, Attempts
from job.runs.checkpoint import TrainingState, save_checkpoint
from job.runs.compatibility import identity_of
from job.runs.run import begin_run

PYTHON = sys.executable
"""As it is printed where it lies elsewhere than below the working directory."""
IMAGE = "registry.internal/wikillm@sha256:" + 64 * "0"


@pytest.fixture(scope="module")
def data_set(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return prepare_sample(s3_server, tmp_path_factory.mktemp("tokenizer"))


@dataclass
class Scene:
    """A folder as the repository's, with launch files and settings that are right, to spoil."""

    folder: Path
    bucket: str
    data: DataSet
    tree: dict[str, dict[str, Any]]
    monkeypatch: pytest.MonkeyPatch
    stop: list[Callable[[], None]]

    @property
    def config(self) -> Config:
        return settings.build(self.tree)

    def set(self, **values: object) -> None:
        """Settings; `__` stands for the dot."""
        for name, value in values.items():
            section, _, key = name.partition("__")
            self.tree.setdefault(section, {})[key] = value
        (self.folder / "launch/kubernetes/base/config.yaml").write_text(yaml.safe_dump(self.tree, allow_unicode=True))
        if any(name.startswith("store__") for name in values):
            self.connect()

    def environment(self, **variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                self.monkeypatch.delenv(name, raising=False)
            else:
                self.monkeypatch.setenv(name, value)
        if any(name.startswith("AWS_") for name in variables):
            self.connect()

    def edit(self, file: str, pattern: str, replacement: str) -> None:
        """Changes a file below launch/; what is not there any more is no mistake that could be planted."""
        path = self.folder / "launch" / file
        text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
        assert count, f"{pattern} is not in {file}"
        path.write_text(text)

    def own_shards(self) -> str:
        """A copy of the data set, to be damaged."""
        copy = f"{self.bucket}/shards"
        for entry in storage.list_files(self.data.shards):
            storage.write_bytes(entry.url.replace(self.data.shards, copy), storage.read_bytes(entry.url))
        self.set(data__shards=copy)
        return copy

    def begin_run(self, step: int = 10, **changes: Any) -> str:
        """A run with one checkpoint, of these settings with changes; its URL."""
        config = self.config
        spec = ModelSpec(**config.model.model_dump())
        identity = identity_of(config, spec, self.data.manifest) | changes
        run = begin_run(config.run.output, None, {})
        store_tokenizer(self.data.tokenizer, f"{config.run.output}/tokenizer")
        attempts = Attempts(config.run.output)
        attempt = attempts.claim(run.id, "a-start", None, "auto")
        attempts.update(dataclasses.replace(attempt, from_step=0, ended=STOPPED))
        state = TrainingState(run.id, attempt.number, step, 8 * step, 256 * step, identity, {})
        tensors = {key: torch.zeros(2) for key in ("param", "exp_avg", "exp_avg_sq")}
        metrics = b'{"step": 10, "speed/tokens_per_second": 1000.0}\n'
        return save_checkpoint(config.run.output, state, {"weight": tensors}, metrics).url

    def nvidia_smi(self, says: str, code: int = 0) -> None:
        """A machine with the GPUs that this program shows."""
        program = self.folder / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\nexit {code}\n")
        program.chmod(0o755)
        count = len([line for line in says.splitlines() if line[:1].isdigit()])
        self.environment(
            PATH=f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            CUDA_VISIBLE_DEVICES=",".join(map(str, range(count or 1))),
        )
        answer = Answer(tuple("a GPU" for _ in range(count)), "" if count else "no GPU", "torch of a test")
        self.monkeypatch.setattr(device, "_asked_elsewhere", lambda: answer)

    def connect(self) -> None:
        """As the command line does; only where it is another store than that of the tests, for it takes time."""
        storage.configure(storage.StoreOptions(**self.config.store.model_dump()))
        self.stop.append(lambda: storage.configure(storage.StoreOptions()))

    def rows(self, place: str | None, deep: bool = False) -> list[Finding]:
        return preflight(self.config, place, deep=deep, config_path="configs/mine.yaml").findings.rows


@pytest.fixture
def scene(data_set: DataSet, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    shutil.copytree(REPOSITORY / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    # The store of the tests is on this machine, and so are the nodes.
    monkeypatch.setattr(store, "_LOOPBACK", ())
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SWANLAB_", "WIKILLM_", "PET_"))]:
        monkeypatch.delenv(name)
    tree = {
        "run": {"output": f"{bucket}/run"},
        "data": {"shards": data_set.shards, "cache_dir": str(tmp_path / "cache")},
        "model": dict(MODEL),
        "train": {"context_length": 32, "micro_batch_size": 2, "global_batch_size": 32, "warmup_steps": 5},
        "checkpoint": {"every": 10},
        "tracking": {"mode": "disabled"},
    }
    made = Scene(tmp_path, bucket, data_set, tree, monkeypatch, [])
    made.set()
    made.environment(SWANLAB_API_KEY="key-that-nobody-may-see", SWANLAB_SAVE_DIR=str(tmp_path))
    made.edit("kubernetes/base/kustomization.yaml", r"newName: .*", f"newName: {IMAGE.partition('@')[0]}")
    made.edit("kubernetes/base/kustomization.yaml", r"newTag: .*", f"digest: {IMAGE.partition('@')[2]}")
    yield made
    for stop in made.stop:
        stop()


# ---- How they are planted ----

Spoil = Callable[[Scene], object]


def options(**values: object) -> Spoil:
    return lambda scene: scene.set(**values)


def environment(**variables: str | None) -> Spoil:
    return lambda scene: scene.environment(**variables)


def edit(file: str, pattern: str, replacement: str) -> Spoil:
    return lambda scene: scene.edit(file, pattern, replacement)


def both(*spoils: Spoil) -> Spoil:
    return lambda scene: [spoil(scene) for spoil in spoils]


def damaged(name: str, change: Callable[[bytes], bytes | None]) -> Spoil:
    """One object of the data set is another; None: there is none."""

    def spoil(scene: Scene) -> None:
        url = next(entry.url for entry in storage.list_files(scene.own_shards()) if re.search(name, entry.url))
        content = change(storage.read_bytes(url))
        storage.write_bytes(url, content) if content is not None else storage.delete([url])

    return spoil


def with_a_large_shard(manifest: bytes) -> bytes:
    content = json.loads(manifest)
    shard = content["train"][0]
    shard |= {"tokens": 10**6, "size": shard_size(10**6, shard["documents"], content["dtype"])}
    return json.dumps(content).encode()


def clock_of_the_store(seconds: float) -> Spoil:
    """A store whose clock is so far off."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET = do_PUT = answer

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() - seconds)

        def log_message(self, *_: object) -> None: ...

    def spoil(scene: Scene) -> None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        scene.stop += [server.shutdown, server.server_close]
        scene.set(store__endpoint_url=f"http://127.0.0.1:{server.server_port}")

    return spoil


def a_file_where_the_output_should_be(scene: Scene) -> None:
    (scene.folder / "file").touch()
    scene.set(run__output=str(scene.folder / "file" / "run"))


def stop_file(scene: Scene) -> None:
    storage.write_bytes(f"{scene.bucket}/stop", b"")
    scene.set(train__stop_file=f"{scene.bucket}/stop")


def another_tokenizer_in_the_run(scene: Scene) -> None:
    scene.begin_run()
    url = f"{scene.config.run.output}/tokenizer/tokenizer.json"
    storage.write_bytes(url, storage.read_bytes(url).replace(b'"dropout":', b'"dropout" :'))


def damaged_checkpoints(scene: Scene) -> None:
    storage.write_bytes(f"{scene.begin_run()}/state.json", b"{}")


def checkpoints_of_nobody(scene: Scene) -> None:
    scene.begin_run()
    storage.delete([f"{scene.config.run.output}/run.json"])


def starts_without_progress(scene: Scene) -> None:
    scene.begin_run()
    attempts = Attempts(scene.config.run.output)
    newest = attempts.newest()
    assert newest is not None
    for _ in range(3):
        attempt = attempts.claim(newest.run_id, secrets.token_hex(4), None, "auto")
        attempts.update(dataclasses.replace(attempt, from_step=10, ended=FAILED, error="out of memory"))


def gpus(*lines: str, code: int = 0) -> Spoil:
    return lambda scene: scene.nvidia_smi("\n".join(lines), code)


def gpu(index: int = 0, name: str = "NVIDIA GeForce RTX 4090", mib: int = 24564, capability: str = "8.9") -> str:
    return f"{index}, GPU-{index}0000000-1111, {name}, {mib}, 300, 580.65.06, [N/A], {capability}"


def kubernetes_job(pattern: str, replacement: str) -> Spoil:
    return edit("kubernetes/base/job.yaml", pattern, replacement)


def wiring(pattern: str, replacement: str) -> Spoil:
    """What has to agree is not made to."""
    return edit("kubernetes/wiring/replacements.yaml", pattern, replacement)


def target_of(kind: str, field: str) -> str:
    """A pattern for one target of a replacement."""
    return rf"      - select:\n          kind: {kind}\n        fieldPaths:\n          - {field}\n"


def spec(pattern: str, replacement: str) -> Spoil:
    return edit("swanlab.yaml", pattern, replacement)


LARGE = {"model__hidden_size": 1024, "model__num_hidden_layers": 24, "train__context_length": 2048}
HERE, SLURM, KUBERNETES, NODES, SWANLAB = None, "slurm", "kubernetes", "kubernetes/multi-node", "swanlab"
TRAINJOB = "kubernetes/trainjob"
OVERLAYS = tuple(f"kubernetes/{name}" for name in ("single", "multi-node", "spot", "jobset", "trainjob", "prepare"))

MISTAKES: dict[str, tuple[str | None, Spoil, str, str]] = {
    # settings
    "a batch that cannot be cut": (
        HERE, options(train__global_batch_size=5, train__processes=2), "global batch", "train.global_batch_size"),
    "a width that the heads do not divide": (HERE, options(model__num_attention_heads=3), "model", "take"),
    "a learning rate that rises": (HERE, options(train__min_learning_rate=1.0), "learning rate", "lower"),
    "the cloud without a key": (
        HERE, both(options(tracking__mode="cloud"), environment(SWANLAB_API_KEY=None)),
        "tracking", "SWANLAB_API_KEY"),
    "a stop file that is there": (HERE, stop_file, "stop file", "remove it"),
    "a cache smaller than what is shuffled": (
        HERE, both(damaged("manifest.json", with_a_large_shard), options(data__cache_bytes="1MiB")),
        "shard cache", "data.cache_bytes"),
    "a time limit shorter than a checkpoint takes": (
        HERE, options(train__max_time="4s"), "time limit", "train.max_time"),
    # store
    "no credentials": (
        HERE, both(environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_EC2_METADATA_DISABLED="true"),
                   lambda scene: scene.environment(HOME=str(scene.folder))),
        "credentials", "AWS_ACCESS_KEY_ID"),
    "a wrong key": (HERE, environment(AWS_SECRET_ACCESS_KEY="secret-but-wrong"), "store", "AWS_SECRET_ACCESS_KEY"),
    "a bucket that is not there": (HERE, options(run__output="s3://no-such-bucket/run"), "store", "create it"),
    "an address where nobody is": (
        HERE, options(store__endpoint_url="http://nowhere.invalid"), "store", "URL of an S3 service"),
    "a clock that is 20 minutes slow": (HERE, clock_of_the_store(-1200), "clock", "set this machine's clock"),
    "an output that can only be read": (
        HERE, options(run__output="https://example.com/run"), "output writable", "s3://"),
    "an output below a file": (HERE, a_file_where_the_output_should_be, "output writable", "correct the place"),
    # data
    "nothing prepared yet": (
        HERE, lambda scene: scene.set(data__shards=f"{scene.bucket}/none"), "data set", "python -m job prepare"),
    "no corpus either": (
        HERE, lambda scene: scene.set(data__shards=f"{scene.bucket}/none", data__source="./nowhere.jsonl"),
        "corpus", ".jsonl"),
    "a shard that is missing": (HERE, damaged(r"train/", lambda content: None), "shards", "job prepare"),
    "a shard of another length": (HERE, damaged(r"train/", lambda content: content[:-8]), "shards", "job prepare"),
    "a shard with one wrong bit": (
        "deep", damaged(r"train/", lambda content: bytes([content[0] ^ 1]) + content[1:]), "shards", "job prepare"),
    "a damaged manifest": (HERE, damaged("manifest.json", lambda content: content[:-40]), "data set", "job prepare"),
    "a tokenizer that did not make the shards": (
        HERE, damaged("tokenizer.json", lambda content: content.replace(b'"dropout":', b'"dropout" :')),
        "tokenizer", "prepare again"),
    "no tokenizer beside the shards": (
        HERE, damaged("tokenizer.json", lambda content: None), "tokenizer", "prepare again"),
    # the run that is there
    "a run of another model": (HERE, lambda scene: scene.begin_run(model={}), "run", "choose another run.output"),
    "a run of another batch": (
        HERE, lambda scene: scene.begin_run(global_batch_size=8), "run", "choose another run.output"),
    "a run with another tokenizer": (HERE, another_tokenizer_in_the_run, "run", "choose another run.output"),
    "checkpoints without their run": (HERE, checkpoints_of_nobody, "run", "put it back"),
    "no checkpoint that is good": (HERE, damaged_checkpoints, "run", "--train.resume never"),
    "starts that came no further": (HERE, starts_without_progress, "run", "train.max_attempts_without_progress"),
    "a checkpoint to begin from that is not there": (
        HERE, lambda scene: scene.set(train__resume=f"{scene.bucket}/none"), "run", "correct it"),
    # this machine
    "half of a launcher's variables": (HERE, environment(RANK="0"), "place", "torchrun"),
    "nodes without a rank": (HERE, environment(WIKILLM_NODES="2"), "place", "MASTER_ADDR"),
    "a driver that is not there": (
        HERE, gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9),
        "GPUs", "nvidia-smi"),
    "a GPU without bf16": (
        HERE, gpus(gpu(name="Tesla V100-SXM2-32GB", capability="7.0")), "GPUs", "train.precision fp32"),
    "more processes than GPUs": (
        HERE, both(gpus(gpu()), options(train__processes=2)), "GPUs", "set train.processes to 1"),
    "a GPU, and a torch without CUDA": (HERE, gpus(gpu()), "driver", "CUDA build"),
    "several nodes, and no such interface between them": (
        HERE, both(gpus(gpu()), environment(
            WIKILLM_NODES="2", WIKILLM_NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500",
            NCCL_NET="Socket", NCCL_SOCKET_IFNAME="bond9")),
        "between nodes", "set NCCL_SOCKET_IFNAME"),
    "a batch that no 24 GB hold": (
        HERE, both(gpus(gpu()), options(**LARGE, train__micro_batch_size=32)),
        "GPU memory", "train.micro_batch_size to "),
    "checkpoints that no disk holds": (
        HERE, lambda scene: scene.set(run__output=str(scene.folder / "run"), checkpoint__keep=10**9),
        "disk for checkpoints", "make room"),
    # Slurm
    "Slurm: a store that only this machine sees": (
        SLURM, lambda scene: scene.monkeypatch.setattr(store, "_LOOPBACK", ("127.",)), "endpoint", "from the nodes"),
    "Slurm: no warning": (SLURM, edit("slurm.sh", r"^#SBATCH --signal.*\n", ""), "warning", "--signal=B:USR1@"),
    "Slurm: a warning past the script": (SLURM, edit("slurm.sh", "B:USR1", "USR1"), "warning", "--signal=B:USR1@"),
    "Slurm: a warning that nobody traps": (SLURM, edit("slurm.sh", "B:USR1", "B:USR2"), "warning", "--signal=B:USR1@"),
    "Slurm: a warning as long as the limit": (
        SLURM, edit("slurm.sh", "--time=[0-9:]*", "--time=5"), "warning", "--time"),
    "Slurm: a warning shorter than a checkpoint may take": (
        SLURM, edit("slurm.sh", r"USR1@\d+", "USR1@60"), "time to stop", "give 320 s"),
    "Slurm: a time that is none": (SLURM, edit("slurm.sh", "--time=[0-9:]*", "--time=1d"), "script", "days-hours"),
    "Slurm: a batch that its GPUs cannot share": (
        SLURM, edit("slurm.sh", r"--nodes=\d+ ", "--nodes=3 "), "global batch", "train.global_batch_size"),
    "Slurm: a task for each GPU": (
        SLURM, edit("slurm.sh", "--ntasks-per-node=1", "--ntasks-per-node=8"), "tasks", "--ntasks-per-node=1"),
    "Slurm: an image that was never pushed": (
        SLURM, environment(RUNTIME="apptainer"), "image", "make build push set-image"),
    "Slurm: a runtime that there is not": (SLURM, environment(RUNTIME="docker"), "image", "apptainer"),
    "Slurm: never started again": (SLURM, edit("slurm.sh", "scontrol requeue", "echo"), "requeue", "slurm.sh"),
    "Slurm: a step that outlives a node": (SLURM, edit("slurm.sh", " --wait=[^ )]+", ""), "requeue", "--wait"),
    "Slurm: lines of Windows": (SLURM, edit("slurm.sh", "$", "\r"), "script", "sed -i"),
    "Slurm: GPUs asked for in two ways": (
        SLURM, edit("slurm.sh", r"^#SBATCH --gpus-per-node=1", "#SBATCH --gres=gpu:2\n#SBATCH --gpus-per-node=1"),
        "GPUs", "keep #SBATCH --gpus-per-node=N alone"),
    "Slurm: more processes than GPUs": (SLURM, options(train__processes=4), "GPUs", "--gpus-per-node"),
    # Kubernetes
    "Kubernetes: an image that was never pushed": (
        KUBERNETES, edit("kubernetes/base/kustomization.yaml", "registry.internal", "registry.example.com"),
        "image", "make build push set-image"),
    "Kubernetes: other settings in the pods": (
        KUBERNETES, edit("kubernetes/base/config.yaml", "warmup_steps: 5", "warmup_steps: 6"),
        "settings of the pods", "cp configs/mine.yaml"),
    "Kubernetes: a setting that there is not": (
        KUBERNETES, edit("kubernetes/base/config.yaml", "warmup_steps: 5", "warm_up_steps: 5"),
        "manifests", "warmup_steps"),
    "Kubernetes: fewer pods at one time than nodes": (
        NODES, wiring(target_of("Job", "spec.parallelism"), ""), "nodes", "parallelism"),
    "Kubernetes: nodes that count differently": (
        NODES, wiring("name=WIKILLM_NODES", "name=WIKILLM_SCRATCH"), "nodes", "WIKILLM_NODES"),
    "Kubernetes: pods without ranks": (
        NODES, kubernetes_job("completionMode: Indexed", "completionMode: NonIndexed"), "nodes", "Indexed"),
    "Kubernetes: a Service with an address of its own": (
        NODES, edit("kubernetes/base/service.yaml", "clusterIP: None.*", "type: ClusterIP"),
        "rendezvous", "clusterIP: None"),
    "Kubernetes: nodes that meet nowhere": (
        NODES, wiring("name=MASTER_ADDR", "name=MASTER_PORT"), "rendezvous", "-0.wikillm"),
    "Kubernetes: a batch that its GPUs cannot share": (
        NODES, options(train__global_batch_size=24), "global batch", "train.global_batch_size"),
    "Kubernetes: a grace period shorter than a checkpoint may take": (
        KUBERNETES, kubernetes_job("(terminationGracePeriodSeconds:).*", r"\1 30"), "time to stop", "stop_deadline"),
    "Kubernetes: bad settings tried again": (
        KUBERNETES, kubernetes_job(r"values: \[70, 78\]", "values: [70]"), "exit codes", "podFailurePolicy"),
    "Kubernetes: a checkpointed run counted as a crash": (
        KUBERNETES, kubernetes_job(r"values: \[75\]", "values: [76]"), "exit codes", "podFailurePolicy"),
    "Kubernetes: a drained node counted as a crash": (
        KUBERNETES, kubernetes_job("type: DisruptionTarget", "type: PodScheduled"), "exit codes", "podFailurePolicy"),
    "Kubernetes: containers restarted under the Job": (
        KUBERNETES, kubernetes_job("restartPolicy: Never.*", "restartPolicy: OnFailure"), "exit codes", "Never"),
    "Kubernetes: no credentials": (
        KUBERNETES, kubernetes_job(r"envFrom:\n *- secretRef:\n.*\n", "envFrom: []\n"), "secrets", "secretRef"),
    "Kubernetes: a key in the manifest": (
        KUBERNETES, kubernetes_job(
            r"( *)- name: WIKILLM_SCRATCH",
            r"\1- name: AWS_SECRET_ACCESS_KEY\n\1  value: secret-but-written-down\n\1- name: WIKILLM_SCRATCH"),
        "secrets", "put it into a Secret"),
    "Kubernetes: no shared memory for several GPUs": (
        NODES, kubernetes_job("medium: Memory", 'medium: ""'), "shared memory", "medium: Memory"),
    "Kubernetes: a scratch volume smaller than the shards": (
        KUBERNETES, kubernetes_job("sizeLimit: 60Gi", "sizeLimit: 64k"), "scratch", "sizeLimit"),
    "Kubernetes: an output that goes with the pod": (
        KUBERNETES, options(run__output="data/run"), "run.output", "s3://"),
    "Kubernetes: a folder that there is not": ("kubernetes/two-nodes", options(), "manifests", "multi-node"),
    "Kubernetes: a TrainJob without a trainer": (
        TRAINJOB,
        both(edit("kubernetes/trainjob/trainjob.yaml", r"  trainer:\n    numNodes: 1\n", ""),
             edit("kubernetes/trainjob/job-into-trainjob.yaml", target_of("TrainJob", "spec.trainer.numNodes"), "")),
        "nodes", "trainer: {numNodes"),
    "Kubernetes: a container that the Trainer does not find": (
        TRAINJOB, edit("kubernetes/trainjob/job-into-trainjob.yaml", "value: node", "value: wikillm"),
        "nodes", "name-of-the-container"),
    "Kubernetes: an overlay that cannot be rendered": (
        KUBERNETES, edit("kubernetes/single/kustomization.yaml", "path: /spec", "path: /nothing/here"),
        "manifests", "correct what it names"),
    # SwanLab
    "SwanLab: two GPUs": (SWANLAB, spec("combo: .*", "combo: H800-2"), "spec", "swanlab.yaml"),
    "SwanLab: a key that the service does not know": (SWANLAB, spec("entry:", "command:"), "spec", "swanlab.yaml"),
    "SwanLab: an entry that is not there": (
        SWANLAB, lambda scene: (scene.folder / "launch/swanlab_task.py").unlink(), "spec", "correct it"),
    "SwanLab: two processes": (SWANLAB, options(train__processes=2), "GPUs", "train.processes to null"),
    "SwanLab: more time than a task has": (SWANLAB, options(train__max_time="5h"), "train.max_time", "3h50m"),
    "SwanLab: shards of this machine": (
        SWANLAB, options(data__shards="data/shards"), "data.shards", "launch.swanlab upload"),
    "SwanLab: a volume that the spec does not name": (
        SWANLAB, options(data__shards="/data/WIKI_CN"), "data.shards", "spec.volumes"),
    "SwanLab: a volume of another name": (
        SWANLAB, both(options(data__shards="/data/WIKI_CN"),
                      spec(r"volumes: \[\].*", "volumes: [{name: NEWS, id: abc123}]")),
        "data.shards", "/data/NEWS"),
    "SwanLab: an output that goes with the task": (SWANLAB, options(run__output="data/run"), "run.output", "s3://"),
    "SwanLab: no API key": (SWANLAB, environment(SWANLAB_API_KEY=None), "API key", "swanlab login"),
    "SwanLab: a batch that no 3090 holds": (
        SWANLAB, both(spec("combo: .*", "combo: RTX3090-1"), options(**LARGE, train__micro_batch_size=32)),
        "GPU memory", "train.micro_batch_size to "),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_and_what_to_do_about_it(scene: Scene, mistake: str) -> None:
    place, spoil, name, remedy = MISTAKES[mistake]
    deep, place = place == "deep", None if place == "deep" else place
    spoil(scene)
    rows = scene.rows(place, deep)
    caught = [row for row in rows if row.mark == WRONG and row.name == name]
    assert caught, rows
    assert remedy in caught[0].remedy, caught
    assert not any("secret-but" in f"{row.found}{row.remedy}" for row in rows)


@pytest.mark.parametrize("place", [HERE, SLURM, *OVERLAYS, SWANLAB])
def test_what_is_right_is_called_right(scene: Scene, place: str | None) -> None:
    assert [row for row in scene.rows(place, deep=True) if row.mark == WRONG] == []


def wrong_with_the_shipped_settings(scene: Scene, place: str) -> list[Finding]:
    """Of configs/, demo.yaml is none for a cluster: it asks for two processes on one machine without a GPU."""
    assert {path.name for path in (REPOSITORY / "configs").glob("*.yaml")} == {"demo.yaml", "wiki-123m.yaml"}
    tree = yaml.safe_load((REPOSITORY / "configs" / "wiki-123m.yaml").read_text(encoding="utf-8"))
    tree["run"], tree["tracking"] = scene.tree["run"], scene.tree["tracking"]
    tree["data"]["shards"] = scene.data.shards
    tree["train"]["max_steps"] = 300  # as long as the warm-up at least: the data set of the tests is small
    scene.tree = tree
    scene.set()
    return [row for row in scene.rows(place) if row.mark == WRONG]


@pytest.mark.parametrize("place", [SLURM, *OVERLAYS])
def test_every_place_fits_the_shipped_settings_as_it_is(scene: Scene, place: str) -> None:
    assert wrong_with_the_shipped_settings(scene, place) == []


def test_pods_without_a_secret_are_named_but_may_have_credentials_of_their_account(scene: Scene) -> None:
    own = scene.folder / "launch/kubernetes/own"
    own.mkdir()
    components = [f"../components/{name}" for name in ("optional-secret", "service-account")]
    resources = {"resources": ["../multi-node"], "components": components, "transformers": ["../wiring"]}
    (own / "kustomization.yaml").write_text(yaml.safe_dump(resources))
    [row] = [row for row in scene.rows("kubernetes/own") if row.name == "secrets"]
    assert row.mark == UNSURE
    assert "the service account wikillm" in row.found


def test_there_are_forty_mistakes_and_some_of_each_place() -> None:
    places = [place for place, *_ in MISTAKES.values()]
    assert len(places) >= 40
    assert all(places.count(place) >= 10 for place in (HERE, SLURM, SWANLAB))
    assert places.count(KUBERNETES) + places.count(NODES) >= 10


# ---- What else holds ----


def marks(rows: list[Finding], name: str) -> list[str]:
    return [row.mark for row in rows if row.name == name]


def test_without_data_and_without_a_gpu_it_says_what_is_to_be_done_first(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.set(data__shards=f"{scene.bucket}/none", data__source=str(SAMPLE))
    assert check(scene.config, config_path="mine.yaml") == EXIT_REFUSED
    shown = capsys.readouterr().out
    assert re.search(rf"^✗ +data set .* run `{PYTHON} -m job prepare` first *$", shown, re.MULTILINE)
    assert re.search(r"^✓ +corpus +1 files", shown, re.MULTILINE)
    assert re.search(r"^! +GPUs +none", shown, re.MULTILINE)
    assert shown.endswith(f"not yet: {PYTHON} -m job train --config mine.yaml\n")


def test_the_plan_names_its_assumptions_and_takes_those_that_it_is_given(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(scene.config, mfu=0.4, price_per_gpu_hour=7.25, config_path="mine.yaml") == EXIT_DONE
    shown = capsys.readouterr().out
    for gpu in ("A100 80GB", "H100", "RTX 3090", "RTX 4090"):
        assert re.search(rf"^{gpu} +40% .* 7\.25 ", shown, re.MULTILINE)
    assert "parameters" in shown and "FLOPs per token" in shown
    assert shown.endswith(f"run it: {PYTHON} -m job train --config mine.yaml\n")
    assert check(scene.config) == EXIT_DONE
    assert "an assumption" in capsys.readouterr().out


TYPED = "--train.seed 3 --generate.prompts '[\"a b\"]' --run.name http://***@h"


@pytest.mark.parametrize(
    ("place", "command"),
    [
        (HERE, f"{PYTHON} -m job train --config mine.yaml {TYPED}"),
        (SLURM, f"sbatch launch/slurm.sh mine.yaml {TYPED}"),
        (NODES, "kubectl apply -k launch/kubernetes/multi-node"),
        (SWANLAB, f"{PYTHON} -m launch.swanlab submit --config mine.yaml {TYPED} --until-done --with-cred"),
    ],
)
def test_the_command_that_would_run_is_the_last_line(
    scene: Scene, capsys: pytest.CaptureFixture[str], place: str | None, command: str
) -> None:
    typed = [("train.seed", "3"), ("generate.prompts", '["a b"]'), ("run.name", "http://me:hunter2@h")]
    assert check(scene.config, place, config_path="mine.yaml", overrides=typed) == EXIT_DONE
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"run it: {command}")


def test_it_leaves_nothing_behind_and_shows_no_secret(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    outside = scene.folder / "a" / "run"
    for output in (f"{scene.bucket}/run", str(outside)):
        scene.set(run__output=output)
        check(scene.config, deep=True)
    assert storage.list_files(scene.bucket) == []
    assert not outside.parent.exists()
    shown = capsys.readouterr().out
    assert "AWS_SECRET_ACCESS_KEY" in shown
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "SWANLAB_API_KEY"):
        assert os.environ[name] not in shown


def test_a_run_that_is_there_is_planned_from_where_it_is_and_at_the_rate_it_had(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.begin_run(step=10)
    assert marks(scene.rows(HERE), "run") == [RIGHT]
    check(scene.config)
    assert re.search(r"as this run was measured +1,000 ", capsys.readouterr().out)
    scene.set(train__resume="never")
    assert marks(scene.rows(HERE), "run") == [UNSURE]


def test_the_shape_of_another_run_is_told_by_its_sizes(scene: Scene) -> None:
    scene.begin_run()
    scene.set(model__intermediate_size=64, train__warmup_steps=100_000)
    rows = scene.rows(HERE)
    (run,) = [row for row in rows if row.name == "run"]
    assert "model.intermediate_size was 48, is 64" in run.found and "hidden_size" not in run.found
    assert UNSURE in marks(rows, "schedule"), "the rules of `train` are among the rows"


def test_a_run_that_may_still_be_written_is_only_a_warning(scene: Scene) -> None:
    scene.begin_run()
    attempts = Attempts(scene.config.run.output)
    newest = attempts.newest()
    assert newest is not None
    attempts.update(dataclasses.replace(newest, ended=None))
    assert marks(scene.rows(HERE), "run") == [UNSURE]


def test_away_from_here_a_missing_key_is_no_mistake_but_nothing_is_known_of_the_store(scene: Scene) -> None:
    scene.environment(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_EC2_METADATA_DISABLED="true",
                      HOME=str(scene.folder))  # fmt: skip
    rows = scene.rows(SLURM)
    assert marks(rows, "credentials") == [UNSURE]
    assert WRONG not in [row.mark for row in rows]


def test_a_signed_url_in_a_config_map_is_named_but_not_shown(scene: Scene) -> None:
    scene.set(data__source="https://host/wiki.jsonl?X-Amz-Signature=planted")
    rows = scene.rows(KUBERNETES)
    assert marks(rows, "secrets") == [UNSURE, RIGHT]
    assert "planted" not in str(rows) and "data.source: the URL has a password or signature" in str(rows)


def test_a_place_that_there_is_not_is_refused(scene: Scene) -> None:
    with pytest.raises(UserError, match="--place: 'moon'"):
        check(scene.config, "moon")


def test_it_starts_without_the_libraries_that_take_seconds(scene: Scene) -> None:
    scene.begin_run()
    (scene.folder / "mine.yaml").write_text(yaml.safe_dump(scene.tree))
    program = (
        "import sys; from job import config; from job.preflight.check import check\n"
        "assert check(config.load('mine.yaml')) == 0\n"
        "print([name for name in ('torch', 'transformers', 'accelerate', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# ---- nvidia-smi, as it is on other machines ----


def test_gpus_are_those_that_cuda_would_see_in_its_order(scene: Scene) -> None:
    scene.nvidia_smi("\n".join([gpu(0), gpu(1, "NVIDIA H100 80GB HBM3", 81559, "9.0"), gpu(2)]))
    scene.environment(CUDA_VISIBLE_DEVICES="1,GPU-00000000")
    found, fault = find_gpus()
    assert ([one.index for one in found], fault) == (["1", "0"], "")
    assert found[0].memory_bytes == 81559 * 2**20
    scene.environment(CUDA_VISIBLE_DEVICES="0,7,1")
    found, fault = find_gpus()
    assert [one.index for one in found] == ["0"] and "7" in fault
    scene.environment(CUDA_VISIBLE_DEVICES="")
    assert find_gpus() == ([], "")


def test_what_nvidia_smi_does_not_know_is_not_known(scene: Scene) -> None:
    scene.nvidia_smi("0, GPU-0, NVIDIA GB10, [Not Supported], [N/A], 580.95.05, [Insufficient Permissions], 12.1")
    [found], fault = find_gpus()
    assert (found.memory_bytes, found.used_bytes, found.is_sliced, found.capability, fault) == (
        None, None, False, 12.1, "",
    )  # fmt: skip
    scene.nvidia_smi("0, GPU-0, NVIDIA H100 80GB HBM3, 81559, 0, 580.95.05, Enabled, 9.0")
    assert find_gpus()[0][0].is_sliced
    scene.nvidia_smi("No devices were found")
    scene.environment(CUDA_VISIBLE_DEVICES=None)
    assert find_gpus() == ([], "")


def test_an_old_nvidia_smi_is_asked_for_what_it_knows(scene: Scene) -> None:
    scene.nvidia_smi("")
    (scene.folder / "bin" / "nvidia-smi").write_text(
        "#!/bin/sh\n"
        "case $1 in *compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2;; esac\n"
        "echo '0, GPU-0, Tesla T4, 15109, 0, 450.80.02, [N/A]'\n"
    )
    [found], fault = find_gpus()
    assert (found.name, found.driver, found.capability, fault) == ("Tesla T4", "450.80.02", None, "")
