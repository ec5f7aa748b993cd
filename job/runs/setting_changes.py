"""The settings that differ between two starts of a run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from job.config import Config
from job.setting_kinds import AUTO

_AS_RECORDED = ("train.strategy", "train.precision", "train.micro_batch_size", "train.device")
"""Settings whose value ``auto`` takes over what the attempt before has computed with, so that nothing changes."""
Settings = Mapping[str, Any]
"""All settings, as `config.to_dict` returns them: a mapping of section names to mappings."""


@dataclass(frozen=True)
class Change:
    """A setting whose value differs from the one before."""

    name: str
    """Dotted name, such as ``train.learning_rate``."""
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {shown(self.before)} → {shown(self.now)}"


def changes(before: Settings, now: Settings) -> list[Change]:
    """Return every setting that differs. A setting missing from `before` counts as having had its default value.

    If `before` is empty, as in a record without settings, nothing differs.
    """
    return list(_changes(before, now)) if before else []


def _changes(before: Settings, now: Settings) -> Iterator[Change]:
    defaults = Config().model_dump(mode="json")
    for section, values in now.items():
        earlier_values = before.get(section, {})
        if not isinstance(values, dict) or not isinstance(earlier_values, dict):
            continue
        for key, value in values.items():
            earlier = earlier_values.get(key, defaults.get(section, {}).get(key))
            if earlier != value and (f"{section}.{key}" not in _AS_RECORDED or value != AUTO):
                yield Change(f"{section}.{key}", earlier, value)


def shown(value: Any) -> str:
    """Return the value of a setting as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
