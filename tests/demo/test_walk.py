"""The demonstration from end to end, with fewer steps: the commands a user types, on an S3 server of its own."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from printed_commands import REASONS, blocks_of, checkout, fresh_shell, run_in_fresh_shell
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.recovery  # `make demo` comes first wherever the project is set up

SETTINGS = {
    "train.max_steps": "40",
    "train.log_every": "5",
    "checkpoint.every": "20",
    "evaluate.every": "20",
    "generate.max_new_tokens": "8",
}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which it ran, a checkout, and what it said."""
    folder = checkout(tmp_path_factory.mktemp("demo"))
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    # Whatever a user has set for S3, or has in job.yaml, must not get in the way.
    (folder / "job.yaml").write_text("run: {output: data/elsewhere}\n")
    variables = {name: value for name, value in os.environ.items() if name != "JOB_CONFIG"}
    variables |= {"AWS_PROFILE": "nobody", "AWS_ENDPOINT_URL": "http://nowhere"}
    ended = subprocess.run(
        [".venv/bin/python", "-m", "job", "demo", *words],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder, ended.stdout


def test_training_is_stopped_half_way_and_goes_on_from_there(walked: tuple[Path, str]) -> None:
    stopped = re.search(r"stopped after step (\d+), checkpointed", walked[1])
    assert stopped and 20 <= int(stopped[1]) < 40
    assert re.search(rf"from +│ +s3://wikillm/runs/demo/checkpoints/step-{int(stopped[1]):08d}", walked[1])
    assert "step 40/40 | loss" in walked[1]


def test_the_loss_falls(walked: tuple[Path, str]) -> None:
    losses = [float(loss) for loss in re.findall(r"\| loss ([\d.]+) \|", walked[1])]
    assert losses[-1] < losses[0] - 0.3


def test_it_leaves_a_model_that_transformers_loads_and_a_picture_of_the_loss(walked: tuple[Path, str]) -> None:
    output = walked[0] / "demo-output"
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    assert model.config.vocab_size == len(tokenizer)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_line_shows_the_servers_secret(walked: tuple[Path, str]) -> None:
    settings = json.loads((walked[0] / "demo-output" / "s3" / "server.json").read_text())
    assert settings["secret_key"] not in walked[1]
    assert settings["access_key"] not in walked[1]


def test_lines_are_plain_where_there_is_no_terminal(walked: tuple[Path, str]) -> None:
    assert "\x1b" not in walked[1]
    assert "\r" not in walked[1]


def test_the_commands_it_ends_with_work_in_a_fresh_shell(walked: tuple[Path, str]) -> None:
    lines = last_commands(walked[1])
    assert len(lines) == 4
    for line in lines:
        command, _, note = line.partition("  # ")
        if note.startswith("needs: "):
            assert note.removeprefix("needs: ") in REASONS
        elif note == "until Ctrl-C":
            show_until_it_answers(command, walked[0])
        else:
            assert run_in_fresh_shell(command, walked[0])


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_what_the_pages_do_with_its_model_is_among_its_last_commands(walked: tuple[Path, str], page: str) -> None:
    known = [shlex.split(line, comments=True) for line in last_commands(walked[1])]
    (block,) = (one for one in blocks_of(page) if one.after)
    assert all(shlex.split(line) in known for line in block.commands.splitlines())


def last_commands(printed: str) -> list[str]:
    """The commands that the demonstration ends with."""
    return [line.strip() for line in printed.partition("what to try next\n")[2].splitlines()]


def show_until_it_answers(command: str, folder: Path) -> None:
    """Runs a command that shows something until it is interrupted, which it is once it says where."""
    words = fresh_shell(f"exec {command}", folder)
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "http://" in line:
                break
        process.terminate()  # Ctrl-C is ignored by what a shell starts in the background
        said += process.stdout.readlines()
    assert any("http://" in line for line in said), "".join(said)
