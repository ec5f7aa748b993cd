"""Two pods of the rendered manifests train together as containers, lose one of them, and end with the same weights."""

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
from small_run import STEPS, DataSet, checkpoint_urls, free_port, prepare_sample, stored, write_settings

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
    """One of the folders as a user of a small cluster without GPUs changes it."""
    container = {
        "name": "wikillm",
        "resources": {
            "requests": {"cpu": "1", "memory": "3Gi"},
            "limits": {"memory": "3Gi", "nvidia.com/gpu": None},
        },
        "env": [
            {"name": "MASTER_PORT", "value": str(free_port())},  # all pods are on one network here,
            {"name": "OMP_NUM_THREADS", "value": "1"},  # and on the same cores
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
def data_set(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return prepare_sample(s3_server, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def start(
    docker: Engine, image: str, data_set: DataSet, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Start:
    """A Job made from one of the folders, for settings of a small run; each on addresses of its own."""
    networks = count(1)

    def start(base: str, output: str, nodes: int = 2, **changes: dict[str, Any]) -> RunningJob:
        folder = tmp_path_factory.mktemp(base)
        settings = yaml.safe_load(write_settings(folder, data_set, output).read_text())
        # Those of the place: one process where there is no GPU, and shards below the home folder.
        del settings["train"]["processes"], settings["data"]["cache_dir"]
        for section, values in changes.items():
            settings[section] = settings.get(section, {}) | values
        manifests = rendered(base, folder / "own", settings, image, nodes)
        secrets = {"wikillm": {name: os.environ[name] for name in KEYS if name in os.environ}}
        return RunningJob(docker, manifests, folder, secrets, next(networks))

    return start


@pytest.fixture(scope="module")
def undisturbed(start: Start, s3_server: S3Server) -> str:
    """The output of a run of two pods that nobody disturbs."""
    output = f"{s3_server.create_bucket('undisturbed-pods')}/run"
    with start("multi-node", output).running() as job:
        job.wait()
    assert sorted((one.index, one.exit_code) for one in job.ended) == [(0, EXIT_DONE), (1, EXIT_DONE)], job.told()
    return output


def same_end(output: str, undisturbed: str) -> None:
    """Weights, moments and the loss of every step are to the bit those of the other run."""
    ends = [open_checkpoint(checkpoint_urls(one)[-1]) for one in (output, undisturbed)]
    assert [end.state.step for end in ends] == [STEPS, STEPS]
    sums = [{name: file.sha256 for name, file in end.files.items() if "safetensors" in name} for end in ends]
    assert len(sums[0]) == 3
    assert sums[0] == sums[1]
    losses = [[row["train/loss"] for row in read_metrics(one)] for one in (output, undisturbed)]
    assert len(losses[0]) == STEPS
    assert losses[0] == losses[1]


def test_two_pods_are_one_run(undisturbed: str) -> None:
    [number] = Attempts(undisturbed).numbers()
    attempt = Attempts(undisturbed).read(number)
    assert attempt is not None
    assert (attempt.host, attempt.ended) == ("wikillm-0", "done")


@pytest.mark.parametrize("deleted", [0, 1])
def test_a_deleted_pod_lets_the_group_save_and_start_again_and_nothing_is_lost(
    deleted: int, start: Start, bucket: str, undisturbed: str
) -> None:
    output = f"{bucket}/run"
    with start("multi-node", output).running() as job:
        job.await_line(0, r"step 5/")
        job.delete(deleted)
        job.wait()
    codes = sorted((one.index, one.exit_code) for one in job.ended)
    assert codes == [(0, EXIT_DONE), (0, EXIT_STOPPED), (1, EXIT_DONE), (1, EXIT_STOPPED)], job.told()
    assert job.failed is None
    saved = [open_checkpoint(url).state.step for url in checkpoint_urls(output)]
    assert 5 <= saved[0] < STEPS
    assert read_metrics(output)[saved[0]]["step"] == saved[0] + 1, "the second start went on after the checkpoint"
    same_end(output, undisturbed)


def test_a_node_that_dies_ends_the_group_which_goes_on_when_it_is_put_out_of_service(
    start: Start, bucket: str, undisturbed: str
) -> None:
    output = f"{bucket}/run"
    with start("multi-node", output, checkpoint={"every": 5}).running() as job:
        job.await_line(0, r"step 20/")
        job.lose_node(1)
        job.await_line(0, r"---- .*-0-1 ----")  # the healthy pod has ended, and another one waits in its place
        assert (job.starts(0), job.starts(1)) == (2, 1), job.told()
        job.put_out_of_service(1)
        job.wait()
    assert (1, 137, True) in [(one.index, one.exit_code, one.is_disrupted) for one in job.ended]
    assert [one.exit_code for one in job.ended[-2:]] == [EXIT_DONE, EXIT_DONE], job.told()
    same_end(output, undisturbed)


def test_a_bad_setting_fails_the_job_and_no_pod_is_started_again(start: Start, bucket: str) -> None:
    with start("multi-node", f"{bucket}/run", train={"global_batch_size": 7}).running() as job:
        job.wait()
    assert job.failed is not None and job.failed.reason == "PodFailurePolicy"
    assert "exit code 78 matching FailJob rule" in job.failed.message
    assert {one.exit_code for one in job.ended} == {EXIT_REFUSED}
    assert len(job.ended) <= 2


def test_an_array_of_pods_prepares_what_one_process_does(start: Start, bucket: str, data_set: DataSet) -> None:
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
    assert sorted((one.index, one.exit_code) for one in job.ended) == [(0, 0), (1, 0), (2, 0)], job.told()
    assert load_manifest(f"{bucket}/shards").fingerprint == data_set.manifest.fingerprint
    made, expected = (
        {url.removeprefix(folder): content for url, content in stored(folder).items() if url.endswith(".bin")}
        for folder in (f"{bucket}/shards", data_set.shards)
    )
    assert len(expected) > 3
    assert made == expected
