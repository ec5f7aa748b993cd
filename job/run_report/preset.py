"""How a run's settings differ from the nearest preset of configs/, and the command that trains it again."""

import shlex
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from job import config as settings
from job.errors import UserError
from job.runs.setting_changes import Change, changes, shown

_PRESETS = Path(__file__).parents[2] / "configs"
_PLACES = (
    "run.",
    "store.",
    "tracking.",
    "data.source",
    "data.shards",
    "data.cache_",
    "data.worker",
    "tokenizer.source",
    "train.resume",
    "train.stop_file",
    "checkpoint.scratch_dir",
    "evaluate.model",
    "generate.model",
)
"""Beginnings of the settings that say where something is. They differ in every run, so they do not tell which preset a
run comes from."""


class Origin(NamedTuple):
    """The preset that a run's settings are nearest to."""

    preset: str
    """Path in the repository, such as ``configs/demo.yaml``; empty: the defaults, because there are no presets here."""
    differences: list[Change]
    """The settings whose values differ, those of places last."""


def origin_of(config: Mapping[str, Any]) -> Origin:
    """Return the preset from which the fewest settings differ; settings that name places do not count."""
    candidates = [Origin(name, changes(preset, config)) for name, preset in _presets().items()]
    nearest = min(candidates, key=lambda origin: sum(not is_place(change.name) for change in origin.differences))
    return nearest._replace(differences=sorted(nearest.differences, key=lambda change: is_place(change.name)))


@cache
def _presets() -> dict[str, dict[str, Any]]:
    """Return the settings of each preset by its path, and the defaults with an empty path."""
    found = {}
    for path in sorted(_PRESETS.glob("*.yaml")):
        with suppress(UserError):  # Somebody is editing it.
            found[f"configs/{path.name}"] = settings.to_dict(settings.load(str(path)))
    return found | {"": settings.to_dict(settings.Config())}


def reproduction(origin: Origin) -> list[str]:
    """Return the commands that prepare the data and train with the same settings."""
    return [_command("prepare", origin, ("store.", "data.", "tokenizer.")), _command("train", origin, ("",))]


def _command(name: str, origin: Origin, beginnings: tuple[str, ...]) -> str:
    words = ["python", "-m", "job", name, *(["--config", origin.preset] if origin.preset else [])]
    for change in origin.differences:
        if change.name.startswith(beginnings):
            words += [f"--{change.name}", shown(change.now)]
    return shlex.join(words)


def is_place(name: str) -> bool:
    """Return True if the setting with this dotted name says where something is."""
    return name.startswith(_PLACES)
