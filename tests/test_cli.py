"""The command line: parsing, which settings file is read, and the errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from job import config as settings
from job.cli import COMMANDS, DEMO_CONFIG, main, parse
from job.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_REFUSED, UserError
from job.invocation import command, suggesting_config


def job(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m job` with these arguments."""
    variables = os.environ | {"PYTHONPATH": str(Path.cwd())} | environment
    command = [sys.executable, "-m", "job", *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_setting_with_its_default_and_unit(command: str) -> None:
    shown = job(command, "--help").stdout
    for setting in settings.settings():
        line = next(line for line in shown.splitlines() if line.startswith(f"  --{setting.name} "))
        assert f"default {setting.default}" in line
        assert not setting.unit or re.search(f"(in|of) {setting.unit}", line)
        assert setting.meaning in shown


@pytest.mark.parametrize(("command", "first"), [("generate", "generate"), ("tokenizer", "data"), ("train", "run")])
def test_help_of_a_command_begins_with_its_own_settings(command: str, first: str) -> None:
    shown = re.findall(r"^  --(\w+)\.", job(command, "--help").stdout, re.M)
    own = [section for section in shown if section in COMMANDS[command].sections]
    assert shown[0] == first and shown[: len(own)] == own
    assert sorted(shown) == sorted(setting.name.partition(".")[0] for setting in settings.settings())


def test_help_names_a_settings_file_only_where_one_is_read() -> None:
    assert "train --config FILE [--section.key value ...]" in job("train", "--help").stdout
    assert "init [--section.key value ...]" in job("init", "--help").stdout


def test_help_lists_the_commands() -> None:
    shown = job("--help").stdout
    assert all(command in shown for command in COMMANDS)


def test_print_config_prints_effective_settings_and_exits() -> None:
    shown = job("train", "--config", "configs/demo.yaml", "--train.epochs=3", "--print-config")
    assert shown.returncode == 0
    assert shown.stdout == settings.to_yaml(settings.load("configs/demo.yaml", [("train.epochs", "3")]))


def test_option_value_may_follow_a_blank_or_an_equals_sign() -> None:
    parsed = parse(["train", "--config", "a.yaml", "--train.epochs=3", "--train.seed", "-1"])
    assert (parsed.config_path, parsed.overrides) == ("a.yaml", [("train.epochs", "3"), ("train.seed", "-1")])


# ---- Which settings file is read ----


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a job.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JOB_CONFIG", raising=False)
    tree = {"train": {"epochs": 7}, "generate": {"temperature": 0.5}, "evaluate": {"every": 5}, "data": {"seed": 3},
            "tokenizer": {"vocab_size": 300}, "run": {"output": "s3://wikillm/x"}}  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "other.yaml").write_text("train: {epochs: 9}")
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Return the epochs in the settings that a command prints, and its standard error."""
    code = main([*words, "--print-config"])
    shown = capsys.readouterr()
    assert code == EXIT_DONE, shown.err
    return yaml.safe_load(shown.out)["train"]["epochs"], shown.err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS if name not in ("demo", "init"))], ids=str)
def test_every_command_reads_job_yaml_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert printed(capsys, *command) == (7, "settings: job.yaml (in the working directory)\n")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS if name not in ("demo", "init"))], ids=str)
def test_config_option_beats_job_config_which_beats_job_yaml(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("JOB_CONFIG", "other.yaml")
    assert printed(capsys, *command) == (9, "settings: other.yaml (JOB_CONFIG)\n")
    assert printed(capsys, *command, "--config", "job.yaml") == (7, "")
    monkeypatch.setenv("JOB_CONFIG", "")
    assert printed(capsys, *command) == (settings.Config().train.epochs, "")


def test_demo_ignores_job_yaml_and_job_config(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = settings.load(str(DEMO_CONFIG)).train.epochs
    assert printed(capsys, "demo") == (own, "")
    monkeypatch.setenv("JOB_CONFIG", "other.yaml")
    assert printed(capsys, "demo") == (own, "")
    assert printed(capsys, "demo", "--config", "other.yaml") == (9, "")


def test_missing_settings_file_error_names_job_config(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOB_CONFIG", "none.yaml")
    assert main(["check"]) == EXIT_REFUSED
    assert "JOB_CONFIG: 'none.yaml': no such file; presets are in configs/\n" in capsys.readouterr().err


def test_empty_command_line_needs_a_settings_file(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "job.yaml").unlink()
    assert main([]) == EXIT_REFUSED
    expected = "--config: is missing, JOB_CONFIG is not set, and there is no job.yaml in this folder; name a preset of"
    assert capsys.readouterr().err.startswith(expected)
    assert printed(capsys) == (settings.Config().train.epochs, "")


def test_default_command_is_train() -> None:
    parsed = parse(["--config", "a.yaml", "--train.epochs=3", "--print-config"])
    assert (parsed.command, parsed.config_path, parsed.overrides, parsed.wants_config) == (
        "train", "a.yaml", [("train.epochs", "3")], True,
    )  # fmt: skip


def test_printed_settings_can_be_read_and_hold_no_password(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-config", "--data.source", "https://me:hunter2@example.org/a.jsonl"]) == EXIT_DONE
    shown = capsys.readouterr().out
    (folder / "again.yaml").write_text(shown)
    assert "hunter2" not in shown
    assert settings.to_yaml(settings.load("again.yaml")) == shown


# ---- Ctrl-C ----


@pytest.mark.parametrize(
    ("imported", "words"),
    [("yaml", ["train"]), ("rich", ["--help"]), ("pydantic", ["evaluate"]), ("torch", ["generate"])],
)
def test_ctrl_c_during_the_imports_ends_without_a_traceback(tmp_path: Path, imported: str, words: list[str]) -> None:
    # A test run in the background ignores SIGINT, and so does its child process at first.
    press = "signal.signal(signal.SIGINT, signal.default_int_handler)\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / f"{imported}.py").write_text(f"import os, signal\n{press}")
    ended = job(*words, cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (EXIT_INTERRUPTED, "", "")


# ---- Commands in messages ----

MESSAGES = {
    "prepare": (["--data.worker", "0/2"], "job tokenizer"),
    "train": ([], "job prepare"),
    "generate": ([], "job train"),
    "check": ([], "job prepare"),
}
"""For each command: words with which it prints a command, and which it is."""


@pytest.fixture
def empty(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the same settings in job.yaml and other.yaml: a corpus, and nothing made of it."""
    (folder / "wiki.jsonl").write_text('{"text": "一"}\n')
    (folder / "job.yaml").write_text("data: {source: wiki.jsonl}\ntokenizer: {source: ./new}\n")
    (folder / "other.yaml").write_bytes((folder / "job.yaml").read_bytes())
    # These would change how this process handles signals.
    monkeypatch.setattr("job.launcher.signals.hold", lambda: None)
    monkeypatch.setattr("job.commands.StopRequests", lambda: None)
    monkeypatch.setattr("job.preflight.check._LOG_WIDTH", 2000)  # Each row of `check` on one line.
    return folder


def suggested(capsys: pytest.CaptureFixture[str], command: str, *words: str) -> str:
    """Return the words after ``python`` of the first command in the messages of a command that is refused."""
    more, found = MESSAGES[command]
    assert main([command, *more, *words]) == EXIT_REFUSED
    shown = "".join(capsys.readouterr())
    match = re.search(rf"`\S+ -m ({found}[^`]*)`", shown)
    assert match, shown
    return match[1]


@pytest.mark.parametrize("command", MESSAGES)
def test_command_in_a_message_reads_the_settings_file_that_was_named(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    found = MESSAGES[command][1]
    assert suggested(capsys, command, "--config", "other.yaml") == f"{found} --config other.yaml"
    assert suggested(capsys, command, "--config", "job.yaml") == suggested(capsys, command) == found
    monkeypatch.setenv("JOB_CONFIG", "other.yaml")
    assert suggested(capsys, command) == found, "the next command reads JOB_CONFIG too"
    assert suggested(capsys, command, "--config", "job.yaml") == f"{found} --config job.yaml"


def test_child_process_prints_the_same_command() -> None:
    program = [sys.executable, "-c", "from job.invocation import command; print(command('prepare'))"]
    with suggesting_config("a b.yaml"):
        shown = subprocess.run(program, capture_output=True, text=True, check=True).stdout
        assert shown == f"{command('prepare')}\n"
        assert command("prepare").endswith(" -m job prepare --config 'a b.yaml'")
        assert command("train", "--config", "c.yaml").endswith(" -m job train --config c.yaml")
        assert command("upload", module="launch.swanlab").endswith(" upload")
    assert command("prepare").endswith(" -m job prepare")


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "command: 'trian': unknown command; did you mean train?"),
        (["EVAL"], "command: 'EVAL': unknown command; did you mean evaluate?"),
        (["chat"], "command: 'chat': unknown command; did you mean generate?"),
        (["Export"], "command: 'Export': unknown command; `train` writes the model to final/ in run.output"),
        (["xyz"], f"command: 'xyz': unknown command; commands are {', '.join(COMMANDS)}"),
        (["train", "--train.epochs"], "--train.epochs: needs a value; write --train.epochs VALUE"),
        (
            ["train", "now"],
            "command line: 'now': `train` takes no arguments without a name; write settings as --section.key value; "
            "see --help",
        ),
        (
            ["train", "train.max_steps=5"],
            "command line: 'train.max_steps=5': `train` takes no arguments without a name; write --train.max_steps 5; "
            "see --help",
        ),
        (
            ["train", "train.max_steps", "5"],
            "command line: 'train.max_steps': `train` takes no arguments without a name; write --train.max_steps "
            "VALUE; see --help",
        ),
        (
            ["evaluate", "data/run"],
            "command line: 'data/run': `evaluate` takes no arguments without a name; write --evaluate.model data/run; "
            "see --help",
        ),
        (["train", "--epocs", "3"], "epocs: unknown setting; did you mean train.epochs?"),
        (["train", "--epocs"], "epocs: unknown setting; did you mean train.epochs?"),
        (["train", "--zzzz", "--train.epochs", "3"], "zzzz: unknown setting; see --help for all settings"),
        (
            ["train", "--bf16", "--seq-len", "8", "--train.epochs", "3"],
            "settings: 2 mistakes: (1) bf16: unknown setting; did you mean train.precision, which is auto, bf16, "
            "fp16, tf32 or fp32? (2) seq-len: unknown setting; did you mean train.context_length?",
        ),
        (["check", "--plase", "slurm"], "plase: unknown setting; did you mean --place?"),
    ],
)
def test_wrong_command_line_gives_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == EXIT_REFUSED
    assert capsys.readouterr() == ("", f"{said}\n")


def test_mistake_exits_with_78_and_one_line_without_traceback() -> None:
    ended = job("train", "--train.learnin_rate", "1e-3")
    assert ended.returncode == 78
    assert ended.stderr == "train.learnin_rate: unknown setting; did you mean train.learning_rate?\n"
    assert ended.stdout == ""


def test_help_does_not_import_the_libraries() -> None:
    probe = (
        "import sys; from job.cli import main; main(['train', '--help']); "
        "print(sorted({'torch', 'transformers', 's3fs'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.endswith("[]\n")


# ---- Options that only one command has ----


def test_option_belongs_to_one_command_only() -> None:
    arguments = parse(["check", "--place", "slurm", "--deep", "--mfu=0.4", "--price", "2.5", "--config", "x.yaml"])
    assert arguments.options == {"place": "slurm", "deep": True, "mfu": 0.4, "price_per_gpu_hour": 2.5}
    assert arguments.config_path == "x.yaml"
    assert parse(["train", "--deep"]).options == {}


@pytest.mark.parametrize("words", [["--mfu", "half"], ["--price", "0"], ["--deep=yes"], ["--place"]])
def test_wrong_option_value_error_names_the_option(words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(["check", *words])
    assert error.value.setting.lstrip("-") == words[0].lstrip("-").partition("=")[0]
