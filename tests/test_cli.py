"""The command line, as a person types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from job import config as settings
from job.cli import COMMANDS, parse
from job.errors import UserError


def job(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m job` with these words."""
    variables = os.environ | {"PYTHONPATH": str(Path.cwd())} | environment
    command = [sys.executable, "-m", "job", *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_setting_with_its_default_and_unit(command: str) -> None:
    shown = job(command, "--help").stdout
    for one in settings.settings():
        line = next(line for line in shown.splitlines() if line.startswith(f"  --{one.name} "))
        assert f"default {one.default}" in line
        assert not one.unit or f"in {one.unit}" in line
        assert one.meaning in shown


def test_help_lists_the_commands() -> None:
    shown = job("--help").stdout
    assert all(command in shown for command in COMMANDS)


def test_print_config_prints_the_settings_that_hold_and_ends() -> None:
    shown = job("train", "--config", "configs/demo.yaml", "--train.epochs=3", "--print-config")
    assert shown.returncode == 0
    assert shown.stdout == settings.to_yaml(settings.load("configs/demo.yaml", [("train.epochs", "3")]))


def test_options_are_taken_with_a_blank_or_an_equals_sign() -> None:
    found = parse(["train", "--config", "a.yaml", "--train.epochs=3", "--train.seed", "-1"])
    assert (found.config_path, found.overrides) == ("a.yaml", [("train.epochs", "3"), ("train.seed", "-1")])


def test_with_no_argument_it_trains_by_job_yaml_or_the_file_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JOB_CONFIG", raising=False)
    assert (parse([]).command, parse([]).config_path) == ("train", "job.yaml")
    monkeypatch.setenv("JOB_CONFIG", "other.yaml")
    assert parse([]).config_path == "other.yaml"
    ended = job(cwd=tmp_path, JOB_CONFIG="other.yaml")
    assert (ended.returncode, ended.stderr) == (78, "--config: 'other.yaml': no such file; presets are in configs/\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "command: 'trian': unknown command; did you mean train?"),
        (["train", "--train.epochs"], "train.epochs: expected a value after it"),
        (["train", "now"], "command line: 'now': `train` takes no words; see --help"),
        (["train", "--epocs", "3"], "epocs: unknown setting; did you mean train.epochs?"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(words)
    assert str(caught.value) == said


def test_a_mistake_ends_with_exit_code_78_and_one_line_and_no_traceback() -> None:
    ended = job("train", "--train.learnin_rate", "1e-3")
    assert ended.returncode == 78
    assert ended.stderr == "train.learnin_rate: unknown setting; did you mean train.learning_rate?\n"
    assert ended.stdout == ""


def test_help_comes_without_waiting_for_the_libraries() -> None:
    probe = (
        "import sys; from job.cli import main; main(['train', '--help']); "
        "print(sorted({'torch', 'transformers', 's3fs'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.endswith("[]\n")


# ---- Options of one command ----


def test_an_option_of_a_command_is_its_own() -> None:
    arguments = parse(["check", "--place", "slurm", "--deep", "--mfu=0.4", "--price", "2.5", "--config", "x.yaml"])
    assert arguments.options == {"place": "slurm", "deep": True, "mfu": 0.4, "price_per_gpu_hour": 2.5}
    assert arguments.config_path == "x.yaml"
    with pytest.raises(UserError, match="unknown setting"):
        parse(["train", "--deep"])


@pytest.mark.parametrize("words", [["--mfu", "half"], ["--price", "0"], ["--deep=yes"], ["--place"]])
def test_an_option_with_a_wrong_value_is_named(words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(["check", *words])
    assert error.value.setting.lstrip("-") == words[0].lstrip("-").partition("=")[0]
