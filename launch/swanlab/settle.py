"""The config as it can work in a task: one GPU, four hours, no environment, no disk that outlives it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from job import config as settings
from job.config import Config, Duration
from job.errors import UserError
from job.invocation import command
from job.storage import is_remote
from launch.swanlab.leaks import secret_in
from launch.swanlab.spec import Spec

MAX_TIME = Duration("3h50m")
"""What a run may take of a task's 4 hours; where train.max_time is null, the entrypoint sets the same itself."""
VOLUMES = PurePosixPath("/data")
"""Where a data set is mounted."""
_READ = ("run.output", "data.shards", "train.resume", "train.stop_file")
"""Those settings of `job train` that may name a place."""
_ENVIRONMENT = {
    "store.endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "store.region": ("AWS_DEFAULT_REGION", "AWS_REGION"),
}


def settle(
    path: str | None,
    overrides: Sequence[tuple[str, str]],
    spec: Spec,
    has_credentials: bool,
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """The settings of a file with overrides; where the store is, they take from this machine's environment as well.

    Args:
        path: a YAML file.
        overrides: dotted names and values, as typed.
        spec: of the task.
        has_credentials: whether those of an object store go with it.
        environment: of this machine.

    Raises:
        UserError: the config is wrong, holds a secret, or cannot work in a task.
    """
    config = settings.load(path, overrides)
    if path is None:
        raise UserError("--config", None, "is not set", "presets are in configs/")
    _refuse_secrets(config, environment)
    places = {name: value for name in _READ if (value := _value(config, name)) is not None}
    stored = [name for name, value in places.items() if value.startswith("s3://")]
    if stored and not has_credentials:
        raise UserError(
            stored[0],
            places[stored[0]],
            "a task has no credentials for an object store",
            "give a volume (/data/...), or see --with-credentials in `submit --help`",
        )
    if stored:
        config = settings.load(path, [*_from_environment(config, environment), *overrides])
    _refuse_shards_elsewhere(config, spec)
    if config.train.max_time is not None and config.train.max_time.seconds > MAX_TIME.seconds:
        expected = f"a task ends after 4 hours: expected {MAX_TIME} at most, or null for just that"
        raise UserError("train.max_time", str(config.train.max_time), expected)
    if config.train.processes not in (None, 1):
        raise UserError("train.processes", config.train.processes, "a task has one GPU", "set it to 1, or to null")
    return config


def _value(config: Config, name: str) -> str | None:
    section, _, key = name.partition(".")
    value: str | None = getattr(getattr(config, section), key)
    return value


def _from_environment(config: Config, environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """What the store's settings are here, where the environment says so and they do not."""
    return [
        (name, environment[variable])
        for name, variables in _ENVIRONMENT.items()
        if _value(config, name) is None
        for variable in [one for one in variables if environment.get(one)][:1]
    ]


def _refuse_secrets(config: Config, environment: Mapping[str, str]) -> None:
    for section, group in config:
        for key, value in group:
            if isinstance(value, str) and (found := secret_in(value, environment)) is not None:
                remedy = "take it out: what is uploaded may be seen by others"
                raise UserError(f"{section}.{key}", None, f"holds what looks like {found[1]}", remedy)


def _refuse_shards_elsewhere(config: Config, spec: Spec) -> None:
    shards = config.data.shards
    if is_remote(shards):
        return
    if VOLUMES not in PurePosixPath(shards.removeprefix("file://")).parents:
        remedy = f"upload it with `{command('upload', module='launch.swanlab')}` and give /data/NAME"
        raise UserError("data.shards", shards, "is a folder of this machine", remedy)
    if not spec.spec.volumes:
        raise UserError("spec.volumes", None, f"names no data set, but data.shards is {shards}", "put its id there")
