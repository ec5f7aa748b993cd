"""Test with the `skypilot` package how it reads launch/skypilot.yaml and its header, and which exit codes it recovers.

skypilot needs about ninety packages with its own pins, so `make test-skypilot` creates an environment for it.
"""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.launcher.environment import detect_environment, part_of_array, port_of

pytestmark = [pytest.mark.skypilot, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
SPEC = "launch/skypilot.yaml"
SKYPILOT = Path(os.environ.get("SKYPILOT", REPOSITORY / ".venv-skypilot" / "bin" / "python"))
SECRETS = "--secret AWS_ACCESS_KEY_ID --secret AWS_SECRET_ACCESS_KEY --env AWS_ENDPOINT_URL"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a key", "AWS_SECRET_ACCESS_KEY": "a secret", "AWS_ENDPOINT_URL": "https://s3.here"}


def header() -> dict[str, list[str]]:
    """Return the commands of the header as lists of words by label; a second command with a label gets a number."""
    commands: dict[str, list[str]] = {}
    for line in (REPOSITORY / SPEC).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#   (\w+) +(sky .*?)(?:   .*)?$", line):
            name = match[1] if match[1] not in commands else f"{match[1]} 2"
            commands[name] = shlex.split(match[2].replace("SECRETS", SECRETS))
    return commands


def read(folder: Path, *commands: list[str]) -> dict[str, Any]:
    """Return how the package reads `commands`, with `folder` as the home folder."""
    done = subprocess.run(
        [SKYPILOT, Path(__file__).with_name("read_task.py")],
        input=json.dumps(commands),
        env=os.environ | CREDENTIALS | {"HOME": str(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read(tmp_path_factory.mktemp("home"), *header().values())


@pytest.fixture(scope="module")
def tasks(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: task for name, task in zip(header(), answer["commands"], strict=True) if task}


def test_header_commands_are_valid_and_make_the_described_tasks(
    tasks: dict[str, dict[str, Any]],
) -> None:
    assert list(header()) == ["Prepare", "Apply", "Logs", "Stop", "Apply 2", "Logs 2", "Stop 2"]
    assert {name: (task["nodes"], task["accelerators"], task["spot"]) for name, task in tasks.items()} == {
        "Prepare": (16, None, True),
        "Apply": (1, {"A100": 1}, True),
        "Apply 2": (1, {"A100": 1}, False),
    }
    spec = yaml.safe_load((REPOSITORY / SPEC).read_text(encoding="utf-8"))
    for name, task in tasks.items():
        command = "prepare" if name == "Prepare" else "train"
        assert task["config"]["envs"] == {"COMMAND": command, "AWS_ENDPOINT_URL": CREDENTIALS["AWS_ENDPOINT_URL"]}
        assert task["config"]["secrets"].keys() == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        assert f"docker:{task['image']}" == spec["resources"]["image_id"]
        assert task["overrides"] == {"docker": {"run_options": ["--user=root", "--env=HOME=/root"]}}


def test_only_a_checkpointed_job_is_recovered(answer: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    for name in ("Prepare", "Apply"):
        for codes, recovered in zip(answer["codes"], tasks[name]["decisions"], strict=True):
            assert recovered == (75 in codes), codes
    assert {70, 78} <= {code for codes in answer["codes"] for code in codes}


def test_launcher_reads_the_variables_that_skypilot_sets(answer: dict[str, Any]) -> None:
    values = ["1", "2", "10.1.0.4\n10.1.0.9", "0", answer["job"]]
    environment = dict(zip(answer["variables"], values, strict=True)) | {"CUDA_VISIBLE_DEVICES": "", "HOME": "/root"}
    detected = detect_environment(environment)
    assert (detected.kind, detected.node_rank, detected.nodes, detected.processes) == ("SkyPilot", 1, 2, 1)
    assert detected.job_id == answer["job"]
    assert detected.rendezvous == ("10.1.0.4", port_of(answer["job"]))
    assert part_of_array(environment) == (1, 2)


WRONG = {
    # Changes of the text that make it wrong, and what the error must name.
    ("recover_on_exit_codes", "recover_on_exit_code"): "recover_on_exit_code",
    ("[75]", "[750]"): "750",
    ("use_spot", "use_spots"): "use_spots",
    ("run_options", "run_option"): "run_option",
    ("secrets:", "secret:"): "secret",
    ("configs/wiki-123m.yaml", "configs/of-nobody.yaml"): "configs/of-nobody.yaml",
}


def test_package_refuses_unknown_fields_and_values(tmp_path: Path) -> None:
    text = (REPOSITORY / SPEC).read_text(encoding="utf-8")
    commands = []
    for number, (old, new) in enumerate(WRONG):
        assert old in text
        wrong = tmp_path / f"{number}.yaml"
        wrong.write_text(text.replace(old, new), encoding="utf-8")
        commands.append(["sky", "jobs", "launch", str(wrong), *shlex.split(SECRETS)])
    for named, refused in zip(WRONG.values(), read(tmp_path, *commands)["commands"], strict=True):
        assert named in refused["error"]
