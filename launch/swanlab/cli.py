"""The commands of `python -m launch.swanlab`, and one line for whatever is wrong."""

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
from job.report import make_console
from launch.swanlab.bundle import REPOSITORY, Bundle, make_bundle
from launch.swanlab.cos import CodeStore, UploadFailed
from launch.swanlab.rounds import BY_HAND, run_until_done
from launch.swanlab.service import Service, find_account
from launch.swanlab.settle import settle
from launch.swanlab.spec import Spec, load_spec
from launch.swanlab.upload import upload

SPEC = REPOSITORY / "launch" / "swanlab.yaml"
_LOG_WIDTH = 200


class _Parser(argparse.ArgumentParser):
    """One line in place of usage and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError("command line", None, message, f"see {self.prog} --help")


def main(argv: Sequence[str]) -> int:
    """Runs a command line; returns the exit code."""
    try:
        arguments, rest = _parser().parse_known_args(argv)
        if rest and arguments.run is not _submit:
            raise UserError("command line", rest[0], f"`{arguments.command}` does not take it", "see --help")
        arguments.run(arguments, rest)
        return EXIT_DONE
    except (UserError, NoProgress) as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except OSError as error:  # the service or a store, which may come back
        sys.stderr.write(f"{error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("what was submitted goes on: see `list`, and `stop`\n")
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(f"{python()} -m launch.swanlab", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, run: Callable[..., None], about: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    submit = command("submit", _submit, "sends code and config as a task")
    submit.usage = f"{submit.prog} --config FILE [--section.key value ...] [options]"
    submit.add_argument("--spec", type=Path, default=SPEC, metavar="FILE", help="launch/swanlab.yaml unless given")
    submit.add_argument("--dry-run", action="store_true", help="shows what would be sent, and sends nothing")
    submit.add_argument(
        "--until-done", action="store_true", help="waits, and sends it again until the run in run.output is complete"
    )
    submit.add_argument(
        "--with-credentials",
        metavar="NAME,...",
        default="",
        help="environment variables that go into the bundle, for the task to reach an object store. SwanLab warns not "
        "to upload anything secret: give temporary keys (AWS_SESSION_TOKEN), for nothing but run.output",
    )
    command("list", _list, "the newest tasks")
    for name, run, about in (("status", _status, "one task"), ("stop", _stop, "stops a task")):
        command(name, run, about).add_argument("id")
    command("queue", _queue, "how many tasks wait for a GPU")
    data = command("upload", _upload, "uploads a file or folder as a data set, to be mounted below /data/")
    data.add_argument("path", type=Path)
    data.add_argument("--name", help="of the data set, and of its folder in /data/; the path's own unless given")
    data.add_argument("--desc", help="for people")
    data.add_argument("--resume", metavar="ID", help="goes on with a data set whose upload was cut off")
    return parser


def _submit(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    given = job_cli.parse(["train", *rest])
    if given.words or given.wants_help or given.wants_config:
        raise UserError("command line", None, "expected --config FILE and --section.key value", "see submit --help")
    spec, credentials = load_spec(arguments.spec), _credentials(arguments.with_credentials)
    path, named_by = job_cli.find_config(given)
    if named_by != "--config":
        _say(f"settings: {path} ({named_by})")
    config = settle(path, given.overrides, spec, bool(credentials))
    if arguments.until_done:
        _check_can_go_on(config)
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
        _say(f"task {cuid} submitted: {command('status', cuid, module='launch.swanlab')}")
        return
    storage.configure(storage.StoreOptions(**config.store.model_dump()))
    sent: list[str] = []

    def start() -> str:
        cuid, path = _start(service, store, bundle, spec)
        sent.append(path)
        return cuid

    def clear_away() -> None:
        if credentials:
            _delete(store, sent[-1])

    limit = config.train.max_attempts_without_progress
    run_until_done(service, start, clear_away, config.run.output, limit, _say)


def _check_can_go_on(config: Config) -> None:
    if not storage.is_remote(config.run.output):
        remedy = "give s3://bucket/runs/one, and --with-credentials"
        raise UserError("run.output", config.run.output, "is gone with the task: nothing to go on from", remedy)
    if config.train.resume == "never":
        raise UserError("train.resume", "never", "every task would begin at step 0", "set it to auto")


def _start(service: Service, store: CodeStore, bundle: Bundle, spec: Spec) -> tuple[str, str]:
    """Sends the bundle and starts a task with it; returns the task's id and the bundle's path."""
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
        _say(f"the bundle with the credentials stays: {error}; revoke them")


def _credentials(names: str) -> dict[str, str]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if not os.environ.get(name):
            raise UserError("--with-credentials", name, "is not set in this environment")
    return {name: os.environ[name] for name in wanted}


def _warn(config: Config, credentials: dict[str, str]) -> None:
    if not storage.is_remote(config.run.output):
        _say(f"run.output is {config.run.output}, on the task's disk: checkpoints and model are gone when it ends")
    if credentials:
        _say(f"in the bundle, where others may see them: {', '.join(credentials)}")
    if "AWS_SECRET_ACCESS_KEY" in credentials and "AWS_SESSION_TOKEN" not in credentials:
        _say("these keys do not end by themselves: better temporary ones, for nothing but run.output")


def _show(bundle: Bundle, config: Config, spec: Spec) -> None:
    """What would be sent."""
    table = Table("file", "bytes", title="the bundle", title_justify="left")
    for path, content in bundle.files.items():
        table.add_row(path, f"{len(content):,}")
    _print(table)
    for path, reason in bundle.excluded.items():
        _say(f"not sent: {path} ({reason})")
    metadata, work = spec.metadata, spec.spec
    volumes = ", ".join(f"{volume.id} ({volume.name or 'no name'})" for volume in work.volumes) or "none"
    rows = {
        "task": metadata.name,
        "what for": metadata.desc or "",
        "GPU": metadata.combo or "the service's choice",
        "runs": f"python{work.python} {work.entry}",
        "volume": volumes,
        "data": config.data.shards,
        "output": config.run.output,
        "longest": config.train.max_time or "3h50m, as the place says",
        "files": f"{len(bundle.files)}, {sum(map(len, bundle.files.values())):,} bytes, {len(bundle.zip()):,} as zip",
    }
    table = Table(title="the task", title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    _print(table)


def _list(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    table = Table("id", "name", "status", "GPU", "started", "ended", "dashboard")
    for one in Service(find_account()).tasks():
        table.add_row(one.cuid, one.name, one.status, one.combo, one.started, one.finished, one.page)
    _print(table)


def _status(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    table = Table(show_header=False)
    for name, value in vars(Service(find_account()).task(arguments.id)).items():
        if value:
            table.add_row(name, value)
    _print(table)


def _stop(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    Service(find_account()).stop(arguments.id, BY_HAND)
    _say(f"task {arguments.id} is told to stop")


def _queue(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    _say(f"{Service(find_account()).queuing()} tasks wait for a GPU")


def _upload(arguments: argparse.Namespace, rest: Sequence[str]) -> None:
    name = arguments.name or arguments.path.resolve().name
    service = Service(find_account())
    store = CodeStore(service.store_keys)
    cuid = upload(service, store, arguments.path, name, arguments.desc, arguments.resume, _say)
    _say(f"uploaded; put this below `volumes:` in launch/swanlab.yaml, and give --data.shards /data/{name}")
    _say(f"    - name: {name}\n      id: {cuid}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _print(table: Table) -> None:
    make_console(_LOG_WIDTH).print(table)
