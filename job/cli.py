"""The command line: parses it, reads the settings, runs the command, and prints every user's mistake as one line."""

import importlib
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from job import config as settings
from job import console, suggestions
from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, NoProgress, UserError, disk_error
from job.invocation import python, suggesting_config
from job.launcher import signals
from job.local_dirs import use_scratch
from job.redaction import redacted
from job.setting_origin import name_setting
from job.version import code_version

CONFIG_VARIABLE = "JOB_CONFIG"
_DEFAULT_CONFIG = "job.yaml"


@dataclass
class Arguments:
    """A parsed command line."""

    command: str
    config_path: str | None = None
    overrides: list[tuple[str, str]] = field(default_factory=list)
    """Dotted name and value of each setting on the command line."""
    words: list[str] = field(default_factory=list)
    """Positional arguments: the prompts of `generate`, or the runs of `report`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Values of the options that only this command has."""
    wants_help: bool = False
    wants_version: bool = False
    wants_config: bool = False
    is_bare: bool = False
    """True if the command line is empty."""


def main(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        arguments = parse(argv)
        if arguments.wants_help or arguments.wants_config:
            console.let_reader_leave()
        if arguments.wants_help:
            _print_help(arguments.command)
            return EXIT_DONE
        if arguments.wants_version:
            sys.stdout.write(f"wikillm {code_version()}\n")
            return EXIT_DONE
        command = COMMANDS[arguments.command]
        path, named_by = find_config(arguments)
        if named_by != "--config":
            sys.stderr.write(f"settings: {path} ({named_by})\n")
        arguments.config_path = path
        options = [f"--{name}" for name in command.options]
        config = settings.load(command.config_path if path is None else path, arguments.overrides, named_by, options)
        if arguments.wants_config:
            sys.stdout.write(redacted(settings.to_yaml(config)))
            return EXIT_DONE
        with suggesting_config(_config_to_suggest(arguments, named_by)):
            return _run(command, config, arguments)
    except (UserError, NoProgress) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(command: "Command", config: Config, arguments: Arguments) -> int:
    if command.handles_stop_signals:
        signals.hold()  # Threads inherit the blocked signals, so this comes before the first thread starts.
    use_scratch(lambda line: sys.stderr.write(f"{line}\n"))  # Libraries read these variables when they are imported.
    from job import storage

    storage.configure(storage.StoreOptions(**config.store.model_dump()))
    try:
        _warn_if_tmpdir_is_not_used()
        run = getattr(importlib.import_module("job.commands"), command.name)
        if command.options:
            words = {"words": arguments.words} if command.words else {}
            return int(run(config, arguments.config_path, arguments.overrides, **words, **arguments.options))
        return int(run(config, arguments.words))
    except UserError as error:
        raise name_setting(config, error) from None
    except storage.StoreError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except Exception as error:
        if (user_error := disk_error(error)) is None:
            raise
        raise name_setting(config, user_error) from None


def _warn_if_tmpdir_is_not_used() -> None:
    """Print where temporary files go if TMPDIR cannot be written: Python then silently uses another folder."""
    wanted = os.environ.get("TMPDIR")
    if wanted and (used := Path(tempfile.gettempdir())) != Path(wanted).absolute():
        sys.stderr.write(f"TMPDIR: {wanted!r}: cannot be written (full or read-only?); temporary files go to {used}\n")


def parse(argv: Sequence[str]) -> Arguments:
    """Parse a command line; without a command, it is `train`.

    Overrides of unknown settings are accepted here; `config.load` refuses all of them in one error.

    Raises:
        UserError: the command is unknown, there are positional arguments for a command that takes none, or an option
            has no value.
    """
    for argument in argv:
        if not _is_text(argument):
            expected = f"these bytes are not text in the encoding of this locale, {sys.getfilesystemencoding()}"
            remedy = "set LANG to the encoding of your terminal, such as C.UTF-8"
            raise UserError("command line", os.fsencode(argument), expected, remedy)
    if argv and argv[0] in ("-h", "--help"):
        return Arguments("", wants_help=True)
    if argv and argv[0] == "--version":
        return Arguments("", wants_version=True)
    has_command = bool(argv) and not argv[0].startswith("--")
    arguments = Arguments(argv[0] if has_command else "train", is_bare=not argv)
    if arguments.command not in COMMANDS:
        raise UserError("command", argv[0], "unknown command", suggestions.command_hint(argv[0], COMMANDS))
    known = {setting.name for setting in settings.settings()}
    rest = iter(argv[has_command:])
    pushed_back: str | None = None  # A word that was read as a possible value, but is parsed on its own.
    while (word := next(rest, None) if pushed_back is None else pushed_back) is not None:
        pushed_back = None
        if word in ("-h", "--help"):
            arguments.wants_help = True
        elif word == "--print-config":
            arguments.wants_config = True
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = COMMANDS[arguments.command].options.get(name)
            if option is not None and option.kind is bool and not equals:
                arguments.options[name] = True
                continue
            if not equals:
                following = next(rest, None)
                is_known = name == "config" or option is not None or name in known
                if not is_known and (following is None or following.startswith("--")):
                    pushed_back = following  # The unknown option may be meant as a switch without a value.
                elif following is None:
                    raise UserError(
                        f"--{name.removeprefix('--')}",
                        None,
                        "needs a value",
                        f"write --{name.removeprefix('--')} VALUE",
                    )
                else:
                    value = following
            if name == "config":
                arguments.config_path = value
            elif option is not None:
                arguments.options[option.name or name] = option.read(name, value)
            else:
                arguments.overrides.append((name, value))
        else:
            arguments.words.append(word)
    if arguments.words and not COMMANDS[arguments.command].words:
        expected = f"`{arguments.command}` takes no arguments without a name"
        raise UserError("command line", arguments.words[0], expected, f"{_named(arguments, known)}; see --help")
    return arguments


def _named(arguments: Arguments, known: set[str]) -> str:
    """Return how to write the first argument that has no name."""
    word = arguments.words[0]
    name, equals, value = word.partition("=")
    if name in known:
        return f"write --{name} {shlex.quote(value) if equals else 'VALUE'}"
    if arguments.command == "evaluate":
        return f"write --evaluate.model {shlex.quote(word)}"
    return "write settings as --section.key value"


def find_config(arguments: Arguments) -> tuple[str | None, str]:
    """Return the path of the settings file, and what names it: --config, JOB_CONFIG or the working directory.

    The path is None if no file is to be read, which an empty JOB_CONFIG asks for, or if the command has its own file
    and no --config is given.

    Raises:
        UserError: the command line is empty, and there is no settings file.
    """
    if not COMMANDS[arguments.command].reads_config:
        if arguments.config_path is not None:
            expected = f"`{arguments.command}` reads no settings file, it makes one"
            raise UserError("--config", arguments.config_path, expected, "name the new file with --file")
        return None, "--config"
    if arguments.config_path is not None or COMMANDS[arguments.command].config_path is not None:
        return arguments.config_path, "--config"
    if (path := os.environ.get(CONFIG_VARIABLE)) is not None:
        if path:
            return path, CONFIG_VARIABLE
    elif Path(_DEFAULT_CONFIG).exists():
        return _DEFAULT_CONFIG, "in the working directory"
    if arguments.is_bare:
        expected = f"is missing, {CONFIG_VARIABLE} is not set, and there is no {_DEFAULT_CONFIG} in this folder"
        raise UserError(
            "--config", None, expected, "name a preset of configs/ with --config; --help lists the commands"
        )
    return None, "--config"


def _config_to_suggest(arguments: Arguments, named_by: str) -> str | None:
    """Return the settings file that other commands need `--config` for; None if they read it without that."""
    is_default = arguments.config_path == _DEFAULT_CONFIG and CONFIG_VARIABLE not in os.environ
    return arguments.config_path if named_by == "--config" and not is_default else None


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # Python represents each byte that it cannot decode as a lone surrogate.
        return False
    return True


# ---- The commands ----


@dataclass(frozen=True)
class Option:
    """An option that only one command has."""

    about: str
    """The help text."""
    kind: type = str
    """``str``; ``float``: a number above 0; ``bool``: a switch without a value."""
    name: str = ""
    """Name of the command's parameter, if it differs from the option's."""

    def read(self, name: str, text: str) -> Any:
        """Return the value of the option from the text that was typed.

        Raises:
            UserError: the text is not a value of this option.
        """
        if self.kind is bool:
            raise UserError(f"--{name}", text, "takes no value")
        if self.kind is float:
            with suppress(ValueError):
                if float(text) > 0:
                    return float(text)
            raise UserError(f"--{name}", text, "expected a number above 0")
        return text


@dataclass(frozen=True)
class Command:
    """A command, as --help shows it and `main` runs it."""

    about: str
    """The help text, in one line."""
    name: str
    """Name of the function in `job.commands`, which is imported only to run it: --help stays fast without libraries."""
    config_path: str | None = None
    """Settings file that is read if no --config is given."""
    handles_stop_signals: bool = False
    """True if the command stops cleanly on SIGTERM and the like, instead of ending at once."""
    options: dict[str, Option] = field(default_factory=dict)
    """The command's own options, by name."""
    reads_config: bool = True
    """False if the command makes a settings file, so that it reads none."""
    words: str = ""
    """Positional arguments, as the help shows them; empty: it takes none."""
    sections: tuple[str, ...] = ()
    """Sections of the settings that matter most to it, which its help shows first."""


DEMO_CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"

COMMANDS = {
    "prepare": Command(
        "turn raw documents, from a folder, URL or hub, into token shards", "prepare", sections=("data", "tokenizer")
    ),
    "train": Command("train a model on token shards; stops and resumes safely", "train", None, True),
    "evaluate": Command(
        "measure the validation loss in nats per token, bits per byte and bits per character",
        "evaluate",
        None,
        True,
        sections=("evaluate",),
    ),
    "check": Command(
        "find mistakes before you pay for a GPU, and print the plan: memory, hours, price",
        "check",
        options={
            "place": Option("where it will run: slurm, kubernetes[/FOLDER] or swanlab; this machine if left out"),
            "deep": Option("read every shard and compare its sha256", bool),
            "mfu": Option("model FLOPs utilization to plan with, as a fraction of 1 such as 0.4", float),
            "price": Option("price of one GPU for one hour, in dollars", float, "price_per_gpu_hour"),
        },
    ),
    "generate": Command(
        "continue texts: PROMPTs, standard input as one text (- or a pipe), or those that you type one by one",
        "generate",
        words="[PROMPT ...]",
        sections=("generate",),
    ),
    "report": Command(
        "describe one or several runs in an HTML page and in Markdown: curves, attempts, samples, settings",
        "report",
        options={
            "to": Option("folder or URL for the files; logs/ of the run if left out, with several runs this folder")
        },
        words="[RUN ...]",
    ),
    "tokenizer": Command("train a byte-level BPE tokenizer on the corpus", "tokenizer", sections=("tokenizer", "data")),
    "init": Command(
        "look at ./data and at this machine, and write a job.yaml whose sizes fit",
        "init",
        options={"file": Option("name of the new settings file; job.yaml if left out")},
        reads_config=False,
    ),
    "demo": Command("run everything on this machine, with nothing but this repository", "demo", str(DEMO_CONFIG)),
}


# ---- Help ----


def _print_help(command: str) -> None:
    out = Console(highlight=False, emoji=False, soft_wrap=True)
    usage = f"{command} {COMMANDS[command].words}".rstrip() if command else "COMMAND"
    file = "--config FILE " if not command or COMMANDS[command].reads_config else ""
    out.print(f"[bold]{escape(f'{python()} -m job {usage}')}[/bold] {file}[--section.key value ...]", highlight=False)
    if not command:
        for name, known in COMMANDS.items():
            out.print(f"  [bold]{name:10}[/bold] {known.about}")
        out.print(
            "\nWithout --config, every command but init and demo reads the file named by JOB_CONFIG, or "
            "job.yaml here.\n"
            "Without any argument, the command is train. --version prints the version of this program."
        )
    else:
        out.print(f"  {COMMANDS[command].about}")
        for name, option in COMMANDS[command].options.items():
            out.print(f"  [bold]--{name}[/bold]  {escape(option.about)}")
    out.print("  --print-config prints all settings as a commented YAML file and exits.")
    first = COMMANDS[command].sections if command else ()
    is_of_command = {setting: setting.name.partition(".")[0] in first for setting in settings.settings()}
    of_command = [setting for setting, own in is_of_command.items() if own]
    others = [setting for setting, own in is_of_command.items() if not own]
    if of_command:
        _print_settings(out, f"Settings of `{command}`", of_command)
    _print_settings(out, "Other settings" if of_command else "Settings", others)


def _print_settings(out: Console, title: str, shown: Sequence[settings.Setting]) -> None:
    out.print(f"\n[bold]{title}[/bold]")
    for setting in shown:
        kind = escape(f"({setting.type_and_unit}; default {setting.default})")
        out.print(f"  [bold]--{setting.name}[/bold]  {kind}")
        out.print(f"      {escape(setting.meaning)}")
