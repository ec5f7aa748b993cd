"""The command line, as a person types it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from job import config as settings
from job.cli import COMMANDS, DEMO_CONFIG, main, parse
from job.errors import EXIT_DONE, EXIT_REFUSED, UserError


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


# ---- Which file of settings ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the settings of every command in job.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JOB_CONFIG", raising=False)
    tree = {"train": {"epochs": 7}, "generate": {"temperature": 0.5}, "evaluate": {"every": 5}, "data": {"seed": 3},
            "tokenizer": {"vocab_size": 300}, "run": {"output": "s3://wikillm/x"}}  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "other.yaml").write_text("train: {epochs: 9}")
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The epochs in the settings that a command prints, and what it says on standard error."""
    code = main([*words, "--print-config"])
    shown = capsys.readouterr()
    assert code == EXIT_DONE, shown.err
    return yaml.safe_load(shown.out)["train"]["epochs"], shown.err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS if name != "demo")], ids=str)
def test_every_command_reads_job_yaml_here_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert printed(capsys, *command) == (7, "settings: job.yaml (in the working directory)\n")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS if name != "demo")], ids=str)
def test_job_config_wins_over_job_yaml_and_config_over_both(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("JOB_CONFIG", "other.yaml")
    assert printed(capsys, *command) == (9, "settings: other.yaml (JOB_CONFIG)\n")
    assert printed(capsys, *command, "--config", "job.yaml") == (7, "")
    monkeypatch.setenv("JOB_CONFIG", "")
    assert printed(capsys, *command) == (settings.Config().train.epochs, "")


def test_the_demonstration_keeps_to_its_own_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings.load(str(DEMO_CONFIG)).train.epochs
    assert printed(capsys, "demo") == (own, "")
    monkeypatch.setenv("JOB_CONFIG", "other.yaml")
    assert printed(capsys, "demo") == (own, "")
    assert printed(capsys, "demo", "--config", "other.yaml") == (9, "")


def test_a_file_that_is_not_there_is_named_by_what_names_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_CONFIG", "none.yaml")
    assert main(["check"]) == EXIT_REFUSED
    assert "JOB_CONFIG: 'none.yaml': no such file; presets are in configs/\n" in capsys.readouterr().err


def test_nothing_at_all_trains_only_by_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "job.yaml").unlink()
    assert main([]) == EXIT_REFUSED
    expected = "--config: is not set, and neither is JOB_CONFIG, and there is no job.yaml here; presets are in configs/"
    assert capsys.readouterr().err.startswith(expected)
    assert printed(capsys) == (settings.Config().train.epochs, "")


def test_the_command_that_is_not_named_is_train() -> None:
    found = parse(["--config", "a.yaml", "--train.epochs=3", "--print-config"])
    assert (found.command, found.config_path, found.overrides, found.wants_config) == (
        "train", "a.yaml", [("train.epochs", "3")], True,
    )  # fmt: skip


def test_printed_settings_read_back_and_hold_no_password(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", "--data.source", "https://me:hunter2@example.org/a.jsonl"]) == EXIT_DONE
    shown = capsys.readouterr().out
    (folder / "again.yaml").write_text(shown)
    assert "hunter2" not in shown
    assert settings.to_yaml(settings.load("again.yaml")) == shown


# ---- What is wrong ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "command: 'trian': unknown command; did you mean train?"),
        (["EVAL"], "command: 'EVAL': unknown command; did you mean evaluate?"),
        (["xyz"], f"command: 'xyz': unknown command; commands are {', '.join(COMMANDS)}"),
        (["train", "--train.epochs"], "train.epochs: expected a value after it"),
        (["train", "now"], "command line: 'now': `train` takes no words; see --help"),
        (["train", "--epocs", "3"], "epocs: unknown setting; did you mean train.epochs?"),
        (["train", "--epocs"], "epocs: unknown setting; did you mean train.epochs?"),
        (["train", "--zzzz", "--train.epochs", "3"], "zzzz: unknown setting; see --help for all of them"),
        (
            ["train", "--bf16", "--seq-len", "8", "--train.epochs", "3"],
            "settings: 2 mistakes: (1) bf16: unknown setting; did you mean train.precision, which is bf16, tf32 or "
            "fp32? (2) seq-len: unknown setting; did you mean train.context_length?",
        ),
        (["check", "--plase", "slurm"], "plase: unknown setting; did you mean --place?"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == EXIT_REFUSED
    assert capsys.readouterr() == ("", f"{said}\n")


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
    assert parse(["train", "--deep"]).options == {}


@pytest.mark.parametrize("words", [["--mfu", "half"], ["--price", "0"], ["--deep=yes"], ["--place"]])
def test_an_option_with_a_wrong_value_is_named(words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(["check", *words])
    assert error.value.setting.lstrip("-") == words[0].lstrip("-").partition("=")[0]
