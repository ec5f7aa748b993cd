"""Run launch/skypilot.yaml in two containers as SkyPilot starts them: the nodes prepare and then train together."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import yaml

from job import storage
from job.data.tokenizer import train_tokenizer
from job.demo.server import S3Server
from job.demo.walk import SAMPLE
from job.runs.metrics_file import read_metrics
from tests.image.stand_in import REPOSITORY, build_image, engine
from tests.small_run import ALONE, CONTEXT_LENGTH, MODEL

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

TASK = yaml.safe_load((REPOSITORY / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
NODES, STEPS = 2, 12
# Two addresses of this machine, because the containers share its network.
ADDRESSES = "127.0.0.1\n127.0.0.2"
_SECONDS = 400


@dataclass(frozen=True)
class Cluster:
    """One container for each node, in which root runs an idle shell."""

    command: list[str]
    containers: list[str]
    variables: dict[str, str]

    def run(self, task: str, **variables: str) -> list[str]:
        """Run the task's `run` script on each node and return the outputs; all must exit with 0."""
        started = []
        for rank, container in enumerate(self.containers):
            skypilot_variables = {
                "NODE_RANK": rank,
                "NUM_NODES": NODES,
                "NODE_IPS": ADDRESSES,
                "NUM_GPUS_PER_NODE": 0,
                "TASK_ID": task,
            }
            environment = (
                TASK["envs"]
                | self.variables
                | {f"SKYPILOT_{name}": f"{value}" for name, value in skypilot_variables.items()}
            )
            exports = "".join(
                f"export {name}={shlex.quote(value)}\n" for name, value in (environment | variables).items()
            )
            words = ["exec", "--user=0", container, "bash", "--login", "-c", f"cd ~\n{exports}{TASK['run']}"]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen([*self.command, *words], stdout=pipe, stderr=subprocess.STDOUT, text=True))
        outputs = [process.communicate(timeout=_SECONDS)[0] for process in started]
        assert [process.returncode for process in started] == [0] * NODES, "\n\n".join(outputs)
        return outputs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("skypilot")
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    train_tokenizer(texts, 400, folder / "tokenizer")
    [target] = TASK["file_mounts"]
    with engine() as docker:
        # The options of sky/provision/docker_utils.py, without those for /dev/fuse, GPUs, AppArmor and SYS_ADMIN.
        options = ["--detach", "--interactive", "--tty", "--env=LC_ALL=C.UTF-8", "--env=LANG=C.UTF-8"]
        options += [*TASK["config"]["docker"]["run_options"], "--net=host", "--entrypoint=/bin/bash"]
        options.append(build_image(docker))
        containers = [docker("run", *options).stdout.strip() for _ in range(NODES)]
        try:
            bucket = s3_server.create_bucket("skypilot")
            settings = folder / "settings.yaml"
            settings.write_text(yaml.safe_dump(small_run(bucket)), encoding="utf-8")
            for container in containers:
                docker("cp", str(settings), f"{container}:{target.replace('~', '/root')}")
                docker("cp", str(folder / "tokenizer"), f"{container}:/root/tokenizer")
            yield Cluster(docker.command, containers, s3_server.environment | {"BUCKET": bucket})
        finally:
            docker("rm", "--force", "--volumes", *containers)


def small_run(bucket: str) -> dict[str, dict[str, object]]:
    train = {"precision": "fp32", "context_length": CONTEXT_LENGTH, "micro_batch_size": 2, "global_batch_size": 8}
    train |= {"max_steps": STEPS, "warmup_steps": 2, "log_every": 1, **ALONE}
    data = {"source": "job/demo/sample.jsonl", "shards": f"{bucket}/shards", "slice_bytes": 2**15}
    return {
        "run": {"output": f"{bucket}/run"},
        "data": data | {"validation_fraction": 0.1},
        "tokenizer": {"source": "/root/tokenizer"},
        "model": MODEL,
        "train": train,
        "generate": {"max_new_tokens": 4},
        "tracking": {"mode": "disabled"},
    }


def test_nodes_each_prepare_a_part_and_train_one_run(cluster: Cluster) -> None:
    cluster.run("sky-managed-1_prepare_1-0", COMMAND="prepare")
    bucket = cluster.variables["BUCKET"]
    assert storage.exists(f"{bucket}/shards/manifest.json")

    first, _ = cluster.run("sky-managed-1_wikillm_2-0")
    assert f"step {STEPS}/{STEPS}" in first
    assert [row["step"] for row in read_metrics(f"{bucket}/run") if "train/loss" in row] == list(range(1, STEPS + 1))
    [attempt] = storage.list_files(f"{bucket}/run/attempts")
    assert "sky-managed-1_wikillm_2-0" in storage.read_bytes(attempt.url).decode()
