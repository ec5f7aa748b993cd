"""The command line: which command, which settings, and one line for whatever is wrong with either."""

import difflib
import importlib
import os
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
from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, NoProgress, UserError, disk_error
from job.invocation import python
from job.launcher import signals as stop
from job.local_dirs import use_scratch
from job.redaction import redacted
from job.setting_origin import name_setting

CONFIG_VARIABLE = "JOB_CONFIG"
_DEFAULT_CONFIG = "job.yaml"


@dataclass
class Arguments:
    """A command line, taken apart."""

    command: str
    config_path: str | None = None
    overrides: list[tuple[str, str]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    """What stands there without a name: prompts of `generate`."""
    options: dict[str, Any] = field(default_factory=dict)
    """The command's own."""
    wants_help: bool = False
    wants_config: bool = False
    is_bare: bool = False
    """Nothing at all was typed."""


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit code."""
    try:
        arguments = parse(argv)
        if arguments.wants_help:
            _print_help(arguments.command)
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
        return _run(command, config, arguments)
    except (UserError, NoProgress) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run(command: "Command", config: Config, arguments: Arguments) -> int:
    if command.is_stopped_with_care:
        stop.hold()  # before any thread is there that would not
    use_scratch(lambda line: sys.stderr.write(f"{line}\n"))  # before a library asks where its cache is
    from job import storage  # with the libraries behind it, which --help can do without

    storage.configure(storage.StoreOptions(**config.store.model_dump()))
    try:
        _say_where_temporary_files_go()
        run = getattr(importlib.import_module("job.commands"), command.name)
        if command.options:
            return int(run(config, arguments.config_path, arguments.overrides, **arguments.options))
        return int(run(config, arguments.words))
    except UserError as error:
        raise name_setting(config, error) from None
    except storage.StoreError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except Exception as error:
        if (mendable := disk_error(error)) is None:
            raise
        raise name_setting(config, mendable) from None


def _say_where_temporary_files_go() -> None:
    """Python takes another folder where TMPDIR is full, read-only or missing, and says nothing."""
    wanted = os.environ.get("TMPDIR")
    if wanted and (found := Path(tempfile.gettempdir())) != Path(wanted).absolute():
        sys.stderr.write(f"TMPDIR: {wanted!r}: cannot be written (full or read-only?); temporary files go to {found}\n")


def parse(argv: Sequence[str]) -> Arguments:
    """Takes a command line apart; where no command is named, it is `train`.

    Settings that there are not are among the overrides; `config.load` refuses all of them at once.

    Raises:
        UserError: an unknown command, a word too many, or an option without its value.
    """
    for typed in argv:
        if not _is_text(typed):
            expected = f"these bytes are no text in this locale's encoding, {sys.getfilesystemencoding()}"
            raise UserError("command line", os.fsencode(typed), expected, "set LANG to the terminal's, such as C.UTF-8")
    if argv and argv[0] in ("-h", "--help"):
        return Arguments("", wants_help=True)
    has_command = bool(argv) and not argv[0].startswith("--")
    arguments = Arguments(argv[0] if has_command else "train", is_bare=not argv)
    if arguments.command not in COMMANDS:
        close = difflib.get_close_matches(argv[0].lower(), COMMANDS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"commands are {', '.join(COMMANDS)}"
        raise UserError("command", argv[0], "unknown command", remedy)
    known = _names()
    rest = iter(argv[has_command:])
    unread: str | None = None  # a word that was looked at, and is yet to be taken apart
    while (word := next(rest, None) if unread is None else unread) is not None:
        unread = None
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
                    unread = following  # it may be the name of a switch, which takes no value
                elif following is None:
                    raise UserError(name, None, "expected a value after it")
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
    if arguments.words and arguments.command != "generate":
        raise UserError("command line", arguments.words[0], f"`{arguments.command}` takes no words", "see --help")
    return arguments


def find_config(arguments: Arguments) -> tuple[str | None, str]:
    """The file of settings and what names it: --config, or JOB_CONFIG, or job.yaml in the working directory.

    None where there is none; a command that has a file of its own reads that, or what --config names. A JOB_CONFIG that
    is set and empty means that no file is read.

    Raises:
        UserError: nothing was typed at all, and there is no file that says what to do.
    """
    if arguments.config_path is not None or COMMANDS[arguments.command].config_path is not None:
        return arguments.config_path, "--config"
    if (path := os.environ.get(CONFIG_VARIABLE)) is not None:
        if path:
            return path, CONFIG_VARIABLE
    elif Path(_DEFAULT_CONFIG).exists():
        return _DEFAULT_CONFIG, "in the working directory"
    if arguments.is_bare:
        expected = f"is not set, and neither is {CONFIG_VARIABLE}, and there is no {_DEFAULT_CONFIG} here"
        raise UserError("--config", None, expected, "presets are in configs/; --help lists the commands")
    return None, "--config"


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # Python keeps bytes that it cannot decode as half a character each
        return False
    return True


# ---- The commands ----


@dataclass(frozen=True)
class Option:
    """An option that one command alone has."""

    about: str
    kind: type = str
    """``bool``: it stands alone; ``float``: a number above 0."""
    name: str = ""
    """Of the function's argument, where it is another one."""

    def read(self, name: str, text: str) -> Any:
        """The value of what was typed.

        Raises:
            UserError: it is none.
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
    """One command: what it does, in a line, and how."""

    about: str
    name: str
    """Of the function in `job.commands`, imported when it is called: --help needs none of the libraries."""
    config_path: str | None = None
    """Read where no --config is given."""
    is_stopped_with_care: bool = False
    """It listens for requests to stop itself."""
    options: dict[str, Option] = field(default_factory=dict)


DEMO_CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"

COMMANDS = {
    "prepare": Command("raw documents, from any URL or hub -> token shards in object storage", "prepare"),
    "train": Command(
        "shards -> model, over as many processes as there are; stops and resumes safely", "train", None, True
    ),
    "evaluate": Command(
        "held-out loss in nats per token, bits per byte and bits per character", "evaluate", None, True
    ),
    "check": Command(
        "what is wrong before a GPU is paid for, and the plan: memory, hours, price",
        "check",
        options={
            "place": Option("slurm, kubernetes[/FOLDER] or swanlab: where it is to run; here if it is left out"),
            "deep": Option("read every shard and compare its sha256", bool),
            "mfu": Option("model FLOPs utilization to plan with, such as 0.4", float),
            "price": Option("dollars for a GPU and hour", float, "price_per_gpu_hour"),
        },
    ),
    "generate": Command("continues prompts with a run, a checkpoint or a model folder", "generate"),
    "tokenizer": Command("trains a byte-level BPE tokenizer on the corpus", "tokenizer"),
    "demo": Command("the whole path on this machine, with nothing but this repository", "demo", str(DEMO_CONFIG)),
}


# ---- Help ----


def _names() -> set[str]:
    return {one.name for one in settings.settings()}


def _print_help(command: str) -> None:
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    usage = {"": "COMMAND", "generate": "generate [PROMPT ...]"}.get(command, command)
    console.print(
        f"[bold]{escape(f'{python()} -m job {usage}')}[/bold] --config FILE [--section.key value ...]", highlight=False
    )
    if not command:
        for name, known in COMMANDS.items():
            console.print(f"  [bold]{name:10}[/bold] {known.about}")
        console.print(
            "\nWithout --config, each command but demo reads the file that JOB_CONFIG names, or job.yaml here.\n"
            "With no argument at all it trains by that file."
        )
    else:
        console.print(f"  {COMMANDS[command].about}")
        for name, option in COMMANDS[command].options.items():
            console.print(f"  [bold]--{name}[/bold]  {escape(option.about)}")
    console.print("  --print-config prints all settings as a commented YAML file, and ends.\n\n[bold]Settings[/bold]")
    for one in settings.settings():
        unit = f", in {one.unit}" if one.unit else ""
        console.print(f"  [bold]--{one.name}[/bold]  {escape(f'({one.kind}{unit}; default {one.default})')}")
        console.print(f"      {escape(one.meaning)}")
