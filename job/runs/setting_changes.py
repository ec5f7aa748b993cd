"""What is different in this start of a run from the one before: its settings, and what they do to the schedule."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from job.config import Config
from job.data.batching import optimizer_steps
from job.training.schedule import learning_rate

_SCHEDULE = ("epochs", "max_steps", "learning_rate", "min_learning_rate", "warmup_steps")
Settings = Mapping[str, Any]
"""All settings as `config.to_dict` gives them: a mapping of sections."""


@dataclass(frozen=True)
class Change:
    """A setting with another value than before."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.before)} → {_shown(self.now)}"


def changes(before: Settings, now: Settings) -> list[Change]:
    """Every setting that differs; one that an earlier version did not have had its default."""
    return list(_changes(before, now)) if before else []


def _changes(before: Settings, now: Settings) -> Iterator[Change]:
    defaults = Config().model_dump(mode="json")
    for section, values in now.items():
        earlier = before.get(section, {})
        if not isinstance(values, dict) or not isinstance(earlier, dict):
            continue
        for key, value in values.items():
            was = earlier.get(key, defaults.get(section, {}).get(key))
            if was != value:
                yield Change(f"{section}.{key}", was, value)


def change_of_schedule(before: Settings, config: Config, windows_per_epoch: int, step: int) -> str | None:
    """One line that says what other settings do to the learning rate; None if they leave it as it was.

    Args:
        before: settings of the start before.
        config: those of this one.
        windows_per_epoch: sequences of an epoch, which stays the same in a run.
        step: steps that are done.
    """
    now = config.train.model_dump(mode="json")
    earlier = now | _numbers(before.get("train"))
    (steps_before, rate_before), (steps, rate) = (_at(step, one, windows_per_epoch) for one in (earlier, now))
    if (steps_before, rate_before) == (steps, rate):
        return None
    end = f"ends at step {steps:,}"
    if steps_before != steps:
        end += f" instead of {steps_before:,}"
    return f"the schedule {end}: the learning rate of step {step + 1:,} is {rate:.2e}, it was to be {rate_before:.2e}"


def _numbers(train: Any) -> dict[str, Any]:
    """The settings of the schedule in a record, which may be damaged."""
    values = train if isinstance(train, dict) else {}
    found: dict[str, Any] = {key: values[key] for key in _SCHEDULE if isinstance(values.get(key), int | float)}
    return found | ({"max_steps": None} if values.get("max_steps", 0) is None else {})


def _at(step: int, train: Settings, windows_per_epoch: int) -> tuple[int, float]:
    """The number of steps, and the learning rate of the step after `step`."""
    windows = train["epochs"] * windows_per_epoch
    steps, _ = optimizer_steps(windows, train["global_batch_size"], train["max_steps"])
    rate = learning_rate(
        step,
        peak=train["learning_rate"],
        minimum=train["min_learning_rate"],
        warmup_steps=train["warmup_steps"],
        total_steps=steps,
    )
    return steps, rate


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
