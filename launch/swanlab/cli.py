"""Send code and one config to SwanLab's GPUs as a task, follow the task, and upload data sets."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.table import Table

from job import cli as job_cli
from job import storage
from job.config import Config
from job.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, NoProgress, UserError
from job.invocation import command, python
from job.launcher.environment import SWANLAB_MAX_TIME
from job.preflight.target import SWANLAB_VOLUMES
from job.report import make_console
from launch.swanlab.bundle import REPOSITORY, Bundle, make_bundle
from launch.swanlab.cos import CodeStore, UploadFailed
from launch.swanlab.resubmit import STOPPED_BY_USER, run_until_done
from launch.swanlab.service import Service, find_account
from launch.swanlab.spec import Spec, load_spec
from launch.swanlab.task_config import load_task_config
from launch.swanlab.upload import upload_data_set

SPEC = REPOSITORY / "launch" / "swanlab.yaml"
_LOG_WIDTH = 200
"""Characters of a printed line where the output is not a terminal."""


class _Parser(argparse.ArgumentParser):
    """Argument parser that raises UserError instead of printing its usage and exiting with code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", None, message, f"see {self.prog} --help")


def main(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    try:
        arguments, rest = _parser().parse_known_args(argv)
        if rest and arguments.run is not _submit:
            name = arguments.command
            raise UserError("command line", rest[0], f"unknown argument of `{name}`", f"see {name} --help")
        arguments.run(arguments, rest)
        return EXIT_DONE
    except (UserError, NoProgress) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except OSError as error:  # The service or a store failed, which may be temporary.
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("interrupted, but submitted tasks go on: see `list`, and stop them with `stop`\n")
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(f"{python()} -m launch.swanlab", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def add_command(name: str, run: Callable[..., None], about: str) -> argparse.ArgumentParser:
        command_parser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command_parser.set_defaults(run=run)
        return command_parser

    submit = add_command("submit", _submit, "send code and config as a task")
    submit.usage = f"{submit.prog} --config FILE [--section.key value ...] [options]"
    submit.add_argument(
        "--spec", type=Path, default=SPEC, metavar="FILE", help="task spec (default: launch/swanlab.yaml)"
    )
    submit.add_argument("--dry-run", action="store_true", help="show what would be sent, and send nothing")
    submit.add_argument(
        "--until-done",
        action="store_true",
        help="wait for the task to end, and submit again until the run in run.output is complete",
    )
    submit.add_argument(
        "--with-credentials",
        metavar="NAME,...",
        default="",
        help="environment variables to put into the bundle, so that the task can reach an object store. SwanLab warns "
        "not to upload anything secret: use temporary keys (with AWS_SESSION_TOKEN) that reach run.output only",
    )
    add_command("list", _list, "list the newest tasks")
    for name, run, about in (("status", _status, "show one task"), ("stop", _stop, "stop a task")):
        add_command(name, run, about).add_argument("id", help="id of the task, as `submit` and `list` print it")
    add_command("queue", _queue, "show how many tasks wait for a GPU")
    data = add_command("upload", _upload, "upload a file or folder as a data set, which tasks find below /data/")
    data.add_argument("path", type=Path, help="file or folder to upload")
    data.add_argument("--name", help="name of the data set and of its folder in /data/ (default: the name of the path)")
    data.add_argument("--desc", help="description, shown to people")
    data.add_argument("--resume", metavar="ID", help="continue the upload of the data set with this id")
    return parser


def _submit(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    given = job_cli.parse(["train", *rest])
    if given.words or given.wants_help or given.wants_config:
        expected = "expected only --config FILE and settings such as --section.key value"
        raise UserError("command line", None, expected, "see submit --help")
    spec, credentials = load_spec(arguments.spec), _credentials(arguments.with_credentials)
    path, named_by = job_cli.find_config(given)
    if named_by != "--config":
        _write_line(f"settings: {path} ({named_by})")
    config = load_task_config(path, given.overrides, spec, bool(credentials))
    if arguments.until_done:
        _check_can_resume(config)
    account = None if arguments.dry_run else find_account()
    secrets = os.environ | ({"SWANLAB_API_KEY": account.key} if account else {})
    bundle = make_bundle(config, arguments.spec, spec, credentials, environment=secrets)
    if account is None:
        _show(bundle, config, spec)
        return
    _warn(config, credentials)
    service = Service(account)
    store = CodeStore(service.store_keys)
    if not arguments.until_done:
        cuid, _ = _start(service, store, bundle, spec)
        _write_line(f"task {cuid} submitted; to follow it: {command('status', cuid, module='launch.swanlab')}")
        return
    storage.configure(storage.StoreOptions(**config.store.model_dump()))
    bundle_paths: list[str] = []

    def start() -> str:
        cuid, path = _start(service, store, bundle, spec)
        bundle_paths.append(path)
        return cuid

    def clean_up() -> None:
        if credentials:
            _delete(store, bundle_paths[-1])

    limit = config.train.max_attempts_without_progress
    run_until_done(service, start, clean_up, config.run.output, limit, _write_line)


def _check_can_resume(config: Config) -> None:
    """Raise UserError if the next task could not continue the run."""
    if not storage.is_remote(config.run.output):
        remedy = "set it to a URL such as s3://bucket/runs/one, and add --with-credentials"
        raise UserError("run.output", config.run.output, "is deleted with the task, so no other could resume", remedy)
    if config.train.resume == "never":
        raise UserError("train.resume", "never", "every task would start at step 0", "set it to auto")


def _start(service: Service, store: CodeStore, bundle: Bundle, spec: Spec) -> tuple[str, str]:
    """Send the bundle and start a task with it; return the task's id and the bundle's path."""
    path = f"tasks/{time.time_ns() // 1_000_000}.zip"
    store.write(path, bundle.zip())
    task: dict[str, Any] = {
        "src": store.key(path),
        "index": spec.spec.entry,
        "python": f"python{spec.spec.python}",
        "name": spec.metadata.name,
        "desc": spec.metadata.desc,
        "combo": spec.metadata.combo,
        "datasets": [volume.id for volume in spec.spec.volumes],
    }
    return service.start({name: value for name, value in task.items() if value}), path


def _delete(store: CodeStore, path: str) -> None:
    try:
        store.delete(path)
    except UploadFailed as error:
        _write_line(f"the bundle with the credentials was not deleted: {error}; revoke the credentials")


def _credentials(names: str) -> dict[str, str]:
    variables = [name.strip() for name in names.split(",") if name.strip()]
    for name in variables:
        if not os.environ.get(name):
            raise UserError("--with-credentials", name, "is not set in this environment", "set it, or remove its name")
    return {name: os.environ[name] for name in variables}


def _warn(config: Config, credentials: dict[str, str]) -> None:
    if not storage.is_remote(config.run.output):
        _write_line(
            f"warning: run.output {config.run.output} is on the task's disk: checkpoints and model are deleted with it"
        )
    if credentials:
        _write_line(f"warning: the bundle contains {', '.join(credentials)}, which may be visible to others")
    if "AWS_SECRET_ACCESS_KEY" in credentials and "AWS_SESSION_TOKEN" not in credentials:
        _write_line("warning: these keys do not expire: use temporary keys that reach run.output only")


def _show(bundle: Bundle, config: Config, spec: Spec) -> None:
    """Print the files and the task that would be sent."""
    table = Table("file", "bytes", title="the bundle", title_justify="left")
    for path, content in bundle.files.items():
        table.add_row(path, f"{len(content):,}")
    _print(table)
    for path, reason in bundle.excluded.items():
        _write_line(f"not sent: {path} ({reason})")
    metadata, task = spec.metadata, spec.spec
    volumes = ", ".join(f"{volume.id} ({volume.name or 'no name'})" for volume in task.volumes) or "none"
    rows = {
        "task": metadata.name,
        "description": metadata.desc or "",
        "GPU": metadata.combo or "the service's choice",
        "command": f"python{task.python} {task.entry}",
        "volume": volumes,
        "data": config.data.shards,
        "output": config.run.output,
        "time limit": config.train.max_time or f"{SWANLAB_MAX_TIME} (limit of a SwanLab task)",
        "files": f"{len(bundle.files)}, {sum(map(len, bundle.files.values())):,} bytes, {len(bundle.zip()):,} as zip",
    }
    table = Table(title="the task", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    _print(table)


def _list(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    table = Table("id", "name", "status", "GPU", "started", "ended", "dashboard")
    for task in Service(find_account()).tasks():
        table.add_row(task.cuid, task.name, task.status, task.combo, task.started, task.finished, task.page)
    _print(table)


def _status(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    table = Table(show_header=False)
    for name, value in vars(Service(find_account()).task(arguments.id)).items():
        if value:
            table.add_row(name, value)
    _print(table)


def _stop(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    Service(find_account()).stop(arguments.id, STOPPED_BY_USER)
    _write_line(f"task {arguments.id} was asked to stop")


def _queue(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    _write_line(f"{Service(find_account()).queue_length()} tasks wait for a GPU")


def _upload(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    name = arguments.name or arguments.path.resolve().name
    service = Service(find_account())
    store = CodeStore(service.store_keys)
    cuid = upload_data_set(service, store, arguments.path, name, arguments.desc, arguments.resume, _write_line)
    folder = f"{SWANLAB_VOLUMES}{name}"
    _write_line(f"uploaded; add this under `volumes:` in launch/swanlab.yaml, and submit with --data.shards {folder}")
    _write_line(f"    - name: {name}\n      id: {cuid}")


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _print(table: Table) -> None:
    make_console(_LOG_WIDTH).print(table)
