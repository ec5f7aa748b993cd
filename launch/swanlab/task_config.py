"""Load the config of a task and check that it can work there: one GPU, at most 4 hours, no lasting disk."""

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from job import config as settings
from job.config import Config
from job.errors import UserError
from job.invocation import command
from job.launcher.environment import SWANLAB_MAX_TIME
from job.preflight.target import SWANLAB_VOLUMES
from job.storage import is_remote
from launch.swanlab.secret_scan import find_secret
from launch.swanlab.spec import Spec

_LOCATION_SETTINGS = ("run.output", "data.shards", "train.resume", "train.stop_file")
"""Settings of `job train` that may be a URL of an object store."""
_STORE_VARIABLES = {
    "store.endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "store.region": ("AWS_DEFAULT_REGION", "AWS_REGION"),
}


def load_task_config(
    path: str | None,
    overrides: Sequence[tuple[str, str]],
    spec: Spec,
    has_credentials: bool,
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """Load the settings of a task from a file and overrides.

    If the task uses an object store, the store's address and region are taken from this machine's environment unless
    they are set, because the task does not have this environment.

    Args:
        path: a YAML file.
        overrides: dotted names and values, as typed.
        spec: the spec of the task.
        has_credentials: True if credentials for an object store are sent with the task.
        environment: environment of this machine.

    Raises:
        UserError: a setting is wrong, contains a secret, or cannot work in a task.
    """
    config = settings.load(path, overrides)
    if path is None:
        raise UserError("--config", None, "is not set", "presets are in configs/")
    _check_no_secrets(config, environment)
    locations = {name: value for name in _LOCATION_SETTINGS if (value := _value(config, name)) is not None}
    in_store = [name for name, value in locations.items() if value.startswith("s3://")]
    if in_store and not has_credentials:
        raise UserError(
            in_store[0],
            locations[in_store[0]],
            "a task has no credentials for an object store",
            "use a volume (/data/...), or send credentials: see --with-credentials in `submit --help`",
        )
    if in_store:
        config = settings.load(path, [*_store_overrides(config, environment), *overrides])
    check_shards(config, spec)
    check_max_time(config)
    check_processes(config)
    return config


def check_max_time(config: Config) -> None:
    """Raise UserError if `train.max_time` is longer than a task may train."""
    max_time = config.train.max_time
    if max_time is not None and max_time.seconds > SWANLAB_MAX_TIME.seconds:
        expected = f"a task ends after 4 hours, setup included: expected at most {SWANLAB_MAX_TIME}"
        remedy = f"set it to {SWANLAB_MAX_TIME}, or to null, which uses this limit"
        raise UserError("train.max_time", str(max_time), expected, remedy)


def check_processes(config: Config) -> None:
    """Raise UserError if `train.processes` asks for more than the one GPU of a task."""
    if config.train.processes not in (None, 1):
        raise UserError("train.processes", config.train.processes, "a task has one GPU", "set train.processes to null")


def check_shards(config: Config, spec: Spec) -> None:
    """Raise UserError if `data.shards` is a folder that the task does not have."""
    shards = config.data.shards
    if is_remote(shards):
        return
    if PurePosixPath(SWANLAB_VOLUMES) not in PurePosixPath(shards.removeprefix("file://")).parents:
        upload = command("upload", module="launch.swanlab")
        remedy = f"upload the folder with `{upload}`, and set data.shards to {SWANLAB_VOLUMES}NAME"
        raise UserError("data.shards", shards, "is a folder on this machine, which a task cannot read", remedy)
    if not spec.spec.volumes:
        expected = f"lists no data set, but data.shards is {shards}"
        raise UserError("spec.volumes", None, expected, "add the data set with its id to spec.volumes")


def _value(config: Config, name: str) -> str | None:
    section, _, key = name.partition(".")
    value: str | None = getattr(getattr(config, section), key)
    return value


def _store_overrides(config: Config, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the store settings that are not set in `config` but in this machine's environment."""
    return [
        (name, environment[variable])
        for name, variables in _STORE_VARIABLES.items()
        if _value(config, name) is None
        for variable in [candidate for candidate in variables if environment.get(candidate)][:1]
    ]


def _check_no_secrets(config: Config, environment: Mapping[str, str]) -> None:
    for section, group in config:
        for key, value in group:
            if isinstance(value, str) and (found := find_secret(value, environment)) is not None:
                remedy = "remove it, because uploads may be visible to others"
                raise UserError(f"{section}.{key}", None, f"contains what looks like {found[1]}", remedy)
