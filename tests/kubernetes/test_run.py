"""Run pods of the rendered manifests as containers: runs that lose a pod or a node end with the same weights."""

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import cluster
import pytest
import yaml
from cluster import Manifest
from containers import RunningJob
from small_run import STEPS, DataSet, checkpoint_urls, free_port, stored, write_settings

from job import storage
from job.data.manifest import load_manifest
from job.demo.server import S3Server
from job.demo.walk import SAMPLE
from job.errors import EXIT_DONE, EXIT_REFUSED, EXIT_STOPPED
from job.runs.attempts import Attempts
from job.runs.checkpoint import open_checkpoint
from job.runs.metrics_file import read_metrics
from tests.image.stand_in import Engine, build_image, engine

pytestmark = [pytest.mark.kubernetes, pytest.mark.timeout(900)]

KEYS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
Start = Callable[..., RunningJob]


def rendered(base: str, folder: Path, settings: dict[str, Any], image: str, nodes: int) -> list[Manifest]:
    """Render one of the folders with the changes for a small cluster without GPUs."""
    container = {
        "name": "wikillm",
        "resources": {
            "requests": {"cpu": "1", "memory": "3Gi"},
            "limits": {"memory": "3Gi", "nvidia.com/gpu": None},
        },
        "env": [
            {"name": "MASTER_PORT", "value": str(free_port())},  # All pods share one network here.
            {"name": "OMP_NUM_THREADS", "value": "1"},  # They also share the same cores.
        ],
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "any"},
        "spec": {"completions": nodes, "template": {"spec": {"containers": [container]}}},
    }
    name, _, tag = image.rpartition(":")
    return cluster.render_changed(
        folder,
        base,
        settings,
        images=[{"name": cluster.IMAGE, "newName": name, "newTag": tag}],
        patches=[{"target": {"kind": "Job"}, "patch": yaml.safe_dump(job)}],
        transformers=["wiring"],
    )


@pytest.fixture(scope="module")
def docker() -> Iterator[Engine]:
    with engine() as started:
        yield started


@pytest.fixture(scope="module")
def image(docker: Engine) -> str:
    return build_image(docker)


@pytest.fixture(scope="module")
def start(
    docker: Engine, image: str, data_set: DataSet, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Start:
    """A function that makes a Job from one of the folders, with a small run's settings and its own addresses."""
    networks = count(1)

    def start(base: str, output: str, nodes: int = 2, **changes: dict[str, Any]) -> RunningJob:
        folder = tmp_path_factory.mktemp(base)
        settings = yaml.safe_load(write_settings(folder, data_set, output).read_text())
        # Use the environment's defaults: one process without a GPU, and shards below the home folder.
        del settings["train"]["processes"], settings["data"]["cache_dir"]
        for section, values in changes.items():
            settings[section] = settings.get(section, {}) | values
        manifests = rendered(base, folder / "own", settings, image, nodes)
        secrets = {"wikillm": {name: os.environ[name] for name in KEYS if name in os.environ}}
        return RunningJob(docker, manifests, folder, secrets, next(networks))

    return start


@pytest.fixture(scope="module")
def undisturbed(start: Start, s3_server: S3Server) -> str:
    """The output of an undisturbed run of two pods."""
    output = f"{s3_server.create_bucket('undisturbed-pods')}/run"
    with start("multi-node", output).running() as job:
        job.wait()
    assert sorted((pod.index, pod.exit_code) for pod in job.ended) == [(0, EXIT_DONE), (1, EXIT_DONE)], job.output()
    return output


def assert_same_end(output: str, undisturbed: str) -> None:
    """Assert that weights, optimizer state and the loss of every step equal those of the other run bit by bit."""
    ends = [open_checkpoint(checkpoint_urls(run)[-1]) for run in (output, undisturbed)]
    assert [end.state.step for end in ends] == [STEPS, STEPS]
    sums = [{name: file.sha256 for name, file in end.files.items() if "safetensors" in name} for end in ends]
    assert len(sums[0]) == 3
    assert sums[0] == sums[1]
    losses = [[row["train/loss"] for row in read_metrics(run)] for run in (output, undisturbed)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]


def test_two_pods_make_one_run(undisturbed: str) -> None:
    [number] = Attempts(undisturbed).numbers()
    attempt = Attempts(undisturbed).read(number)
    assert attempt is not None
    assert (attempt.host, attempt.ended) == ("wikillm-0", "done")


@pytest.mark.parametrize("deleted", [0, 1])
def test_deleted_pod_restarts_the_group_without_losing_steps(
    deleted: int, start: Start, bucket: str, undisturbed: str
) -> None:
    output = f"{bucket}/run"
    with start("multi-node", output).running() as job:
        job.await_line(0, r"step 5/")
        job.delete(deleted)
        job.wait()
    codes = sorted((pod.index, pod.exit_code) for pod in job.ended)
    assert codes == [(0, EXIT_DONE), (0, EXIT_STOPPED), (1, EXIT_DONE), (1, EXIT_STOPPED)], job.output()
    assert job.failed is None
    saved = [open_checkpoint(url).state.step for url in checkpoint_urls(output)]
    assert 5 <= saved[0] < STEPS
    assert read_metrics(output)[saved[0]]["step"] == saved[0] + 1, "the second start continued after the checkpoint"
    assert_same_end(output, undisturbed)


def test_run_continues_when_a_dead_node_is_put_out_of_service(start: Start, bucket: str, undisturbed: str) -> None:
    output = f"{bucket}/run"
    with start("multi-node", output, checkpoint={"every": 5}).running() as job:
        job.await_line(0, r"step 20/")
        job.lose_node(1)
        job.await_line(0, r"---- .*-0-1 ----")  # The healthy pod has ended, and its replacement waits.
        assert (job.starts(0), job.starts(1)) == (2, 1), job.output()
        job.put_out_of_service(1)
        job.wait()
    assert (1, 137, True) in [(pod.index, pod.exit_code, pod.is_disrupted) for pod in job.ended]
    assert [pod.exit_code for pod in job.ended[-2:]] == [EXIT_DONE, EXIT_DONE], job.output()
    assert_same_end(output, undisturbed)


def test_bad_setting_fails_the_job_without_restarts(start: Start, bucket: str) -> None:
    with start("multi-node", f"{bucket}/run", train={"global_batch_size": 7}).running() as job:
        job.wait()
    assert job.failed is not None and job.failed.reason == "PodFailurePolicy"
    assert "exit code 78 matching FailJob rule" in job.failed.message
    assert {pod.exit_code for pod in job.ended} == {EXIT_REFUSED}
    assert len(job.ended) <= 2


def test_pods_prepare_the_same_shards_as_one_process(start: Start, bucket: str, data_set: DataSet) -> None:
    storage.write_bytes(f"{bucket}/corpus/sample.jsonl", SAMPLE.read_bytes())
    changes = {
        "data": {
            "source": f"{bucket}/corpus/sample.jsonl",
            "shards": f"{bucket}/shards",
            "slice_bytes": data_set.recipe.slice_bytes,
        },
        "tokenizer": {"source": f"{data_set.shards}/tokenizer"},
    }
    with start("prepare", f"{bucket}/run", nodes=3, **changes).running() as job:
        job.wait()
    assert sorted((pod.index, pod.exit_code) for pod in job.ended) == [(0, 0), (1, 0), (2, 0)], job.output()
    assert load_manifest(f"{bucket}/shards").fingerprint == data_set.manifest.fingerprint
    made, expected = (
        {url.removeprefix(folder): content for url, content in stored(folder).items() if url.endswith(".bin")}
        for folder in (f"{bucket}/shards", data_set.shards)
    )
    assert len(expected) > 3
    assert made == expected
