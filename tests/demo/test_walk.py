"""The whole demonstration with fewer steps: the commands that a user types, on its own S3 server."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from printed_commands import REASONS, blocks_of, checkout, fresh_shell, run_in_fresh_shell
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.recovery  # too slow for `make test`, and `make demo` shows the same

SETTINGS = {
    "train.max_steps": "40",
    "train.log_every": "5",
    "checkpoint.every": "20",
    "evaluate.every": "20",
    "generate.max_new_tokens": "8",
}


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the demonstration in a checkout; return the folder and what was printed."""
    folder = checkout(tmp_path_factory.mktemp("demo"))
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", value)]
    # Neither a job.yaml nor AWS variables of the user may change what the demonstration does.
    (folder / "job.yaml").write_text("run: {output: data/elsewhere}\n")
    variables = {name: value for name, value in os.environ.items() if name != "JOB_CONFIG"}
    variables |= {"AWS_PROFILE": "nobody", "AWS_ENDPOINT_URL": "http://nowhere"}
    done = subprocess.run(
        [".venv/bin/python", "-m", "job", "demo", *words],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_training_is_stopped_half_way_and_resumes_there(walked: tuple[Path, str]) -> None:
    stopped = re.search(r"stopped after step (\d+), checkpointed", walked[1])
    assert stopped and 20 <= int(stopped[1]) < 40
    assert re.search(rf"from +│ +s3://wikillm/runs/demo/checkpoints/step-{int(stopped[1]):08d}", walked[1])
    assert "step 40/40 | loss" in walked[1]


def test_report_can_be_opened_when_the_server_has_ended(walked: tuple[Path, str]) -> None:
    page = (walked[0] / "demo-output" / "report.html").read_text(encoding="utf-8")
    assert "demo-output/report.html" in walked[1] and "The data set cannot be read" not in page


def test_loss_falls(walked: tuple[Path, str]) -> None:
    losses = [float(loss) for loss in re.findall(r"\| loss ([\d.]+) \|", walked[1])]
    assert losses[-1] < losses[0] - 0.3


def test_transformers_loads_the_model_and_loss_curve_is_a_png(walked: tuple[Path, str]) -> None:
    output = walked[0] / "demo-output"
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    tokenizer = AutoTokenizer.from_pretrained(output / "final")
    assert model.config.vocab_size == len(tokenizer)
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_line_shows_the_credentials_of_the_server(walked: tuple[Path, str]) -> None:
    settings = json.loads((walked[0] / "demo-output" / "s3" / "server.json").read_text())
    assert settings["secret_key"] not in walked[1]
    assert settings["access_key"] not in walked[1]


def test_output_is_plain_text_without_a_terminal(walked: tuple[Path, str]) -> None:
    assert "\x1b" not in walked[1]
    assert "\r" not in walked[1]


def test_last_commands_work_in_a_fresh_shell(walked: tuple[Path, str]) -> None:
    lines = last_commands(walked[1])
    assert len(lines) == 4
    for line in lines:
        command, _, note = line.partition("  # ")
        if note.startswith("needs: "):
            assert note.removeprefix("needs: ") in REASONS
        elif note == "until Ctrl-C":
            interrupt_once_it_serves(command, walked[0])
        else:
            assert run_in_fresh_shell(command, walked[0])


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_commands_of_the_readme_are_among_the_last_commands(walked: tuple[Path, str], page: str) -> None:
    known = [shlex.split(line, comments=True) for line in last_commands(walked[1])]
    (block,) = (block for block in blocks_of(page) if block.after)
    assert all(shlex.split(line) in known for line in block.commands.splitlines())


def last_commands(printed: str) -> list[str]:
    """Return the commands that the demonstration prints at its end."""
    return [line.strip() for line in printed.partition("what to try next\n")[2].splitlines()]


def interrupt_once_it_serves(command: str, folder: Path) -> None:
    """Run a command that serves a page until it is interrupted, and end it when it has printed the address."""
    words = fresh_shell(f"exec {command}", folder)
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "http://" in line:
                break
        process.terminate()  # a process that a shell starts in the background ignores Ctrl-C
        lines += process.stdout.readlines()
    assert any("http://" in line for line in lines), "".join(lines)
