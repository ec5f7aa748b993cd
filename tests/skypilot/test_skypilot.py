"""The `skypilot` package reads launch/skypilot.yaml and the commands in its header, and decides what is recovered.

It brings ninety packages with pins of its own: `make test-skypilot` makes a virtual environment for it.
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

from job.launcher.environment import find_place, part_of_array, port_of

pytestmark = [pytest.mark.skypilot, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
SPEC = "launch/skypilot.yaml"
SKYPILOT = Path(os.environ.get("SKYPILOT", REPOSITORY / ".venv-skypilot" / "bin" / "python"))
SECRETS = "--secret AWS_ACCESS_KEY_ID --secret AWS_SECRET_ACCESS_KEY --env AWS_ENDPOINT_URL"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "a key", "AWS_SECRET_ACCESS_KEY": "a secret", "AWS_ENDPOINT_URL": "https://s3.here"}


def header() -> dict[str, list[str]]:
    """The commands of the header as words, by what stands before them; a second one of a kind has a number."""
    found: dict[str, list[str]] = {}
    for line in (REPOSITORY / SPEC).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#   (\w+) +(sky .*?)(?:   .*)?$", line):
            name = match[1] if match[1] not in found else f"{match[1]} 2"
            found[name] = shlex.split(match[2].replace("SECRETS", SECRETS))
    return found


def read(folder: Path, *commands: list[str]) -> dict[str, Any]:
    """What the package makes of `commands`, in a home of its own."""
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
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read(tmp_path_factory.mktemp("home"), *header().values())


@pytest.fixture(scope="module")
def tasks(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: one for name, one in zip(header(), told["commands"], strict=True) if one}


def test_every_command_of_the_header_is_one_of_skypilot_and_makes_the_task_that_it_says(
    tasks: dict[str, dict[str, Any]],
) -> None:
    assert list(header()) == ["Prepare", "Apply", "Logs", "Stop", "Apply 2", "Logs 2", "Stop 2"]
    assert {name: (one["nodes"], one["accelerators"], one["spot"]) for name, one in tasks.items()} == {
        "Prepare": (16, None, True),
        "Apply": (1, {"A100": 1}, True),
        "Apply 2": (1, {"A100": 1}, False),
    }
    spec = yaml.safe_load((REPOSITORY / SPEC).read_text(encoding="utf-8"))
    for name, one in tasks.items():
        command = "prepare" if name == "Prepare" else "train"
        assert one["config"]["envs"] == {"COMMAND": command, "AWS_ENDPOINT_URL": CREDENTIALS["AWS_ENDPOINT_URL"]}
        assert one["config"]["secrets"].keys() == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        assert f"docker:{one['image']}" == spec["resources"]["image_id"]
        assert one["overrides"] == {"docker": {"run_options": ["--user=root", "--env=HOME=/root"]}}


def test_only_a_checkpointed_job_is_recovered(told: dict[str, Any], tasks: dict[str, dict[str, Any]]) -> None:
    for name in ("Prepare", "Apply"):
        for codes, recovered in zip(told["codes"], tasks[name]["decisions"], strict=True):
            assert recovered == (75 in codes), codes
    assert {70, 78} <= {code for codes in told["codes"] for code in codes}


def test_the_launcher_reads_the_variables_that_skypilot_sets(told: dict[str, Any]) -> None:
    values = ["1", "2", "10.1.0.4\n10.1.0.9", "0", told["job"]]
    environment = dict(zip(told["variables"], values, strict=True)) | {"CUDA_VISIBLE_DEVICES": "", "HOME": "/root"}
    place = find_place(environment)
    assert (place.kind, place.node_rank, place.nodes, place.processes) == ("SkyPilot", 1, 2, 1)
    assert place.job_id == told["job"]
    assert place.rendezvous == ("10.1.0.4", port_of(told["job"]))
    assert part_of_array(environment) == (1, 2)


WRONG = {
    # What the text becomes, and what is named; none of it is known or right.
    ("recover_on_exit_codes", "recover_on_exit_code"): "recover_on_exit_code",
    ("[75]", "[750]"): "750",
    ("use_spot", "use_spots"): "use_spots",
    ("run_options", "run_option"): "run_option",
    ("secrets:", "secret:"): "secret",
    ("configs/wiki-123m.yaml", "configs/of-nobody.yaml"): "configs/of-nobody.yaml",
}


def test_the_package_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    text = (REPOSITORY / SPEC).read_text(encoding="utf-8")
    commands = []
    for number, (old, new) in enumerate(WRONG):
        assert old in text
        wrong = tmp_path / f"{number}.yaml"
        wrong.write_text(text.replace(old, new), encoding="utf-8")
        commands.append(["sky", "jobs", "launch", str(wrong), *shlex.split(SECRETS)])
    for named, refused in zip(WRONG.values(), read(tmp_path, *commands)["commands"], strict=True):
        assert named in refused["error"]
