"""The learning rate as a function of the step: a linear warm-up, then a cosine, a line, or a plateau and a line."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

from job.config import Train
from job.data.batching import optimizer_steps
from job.runs.setting_changes import Settings

_SCHEDULE_SETTINGS = ("epochs", "max_steps", "learning_rate", "min_learning_rate", "warmup_steps", "decay_steps")
_EARLIER: Settings = {"schedule": "cosine", "decay_steps": None}
"""Values of runs of earlier versions, whose records do not have these settings."""


def learning_rate(
    step: int,
    *,
    schedule: str,
    peak: float,
    minimum: float,
    warmup_steps: int,
    decay_steps: int | None,
    total_steps: int,
) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    After a linear warm-up over `warmup_steps`, the rate is `peak`. Then it falls to `minimum`, which the step after the
    last one would have. It depends on the step alone, so checkpoints hold no state of it.

    * ``cosine``: half a cosine, which begins right after the warm-up (Loshchilov and Hutter 2017, arXiv:1608.03983,
      without restarts).
    * ``linear``: a straight line, which begins right after the warm-up.
    * ``wsd`` (warm-up, stable, decay; Hu et al. 2024, arXiv:2404.06395): the peak, then a straight line (Hägele et al.
      2024, arXiv:2405.18392). The last `decay_length` steps, and no others, have a rate between peak and minimum.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    last_at_peak = warmup_steps
    if schedule == "wsd":
        last_at_peak = total_steps - decay_length(decay_steps, warmup_steps, total_steps) - 1
    done = min(1.0, max(0, step - last_at_peak) / max(1, total_steps - last_at_peak))
    if schedule == "cosine":
        return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * done))
    return peak - (peak - minimum) * done


def default_decay(total_steps: int) -> int:
    """Return the length of the decay of ``wsd`` if `train.decay_steps` is null: 20 % of all steps, rounded up.

    Hägele et al. 2024 (arXiv:2405.18392) use 20 %.
    """
    return -(-total_steps // 5)


def decay_length(decay_steps: int | None, warmup_steps: int, total_steps: int) -> int:
    """Return the number of steps in the decay of ``wsd``: what is set or the default, at most what the warm-up leaves.

    Args:
        decay_steps: the value of `train.decay_steps`.
        warmup_steps: steps of the warm-up.
        total_steps: steps of the run.
    """
    wanted = default_decay(total_steps) if decay_steps is None else decay_steps
    return max(0, min(wanted, total_steps - warmup_steps))


def steps_before_decay(train: Train, total_steps: int) -> int | None:
    """Return the step after which the decay of ``wsd`` begins, which is the last one that a longer run has in common.

    It is None for other schedules, and if the decay is empty or begins with the first step.
    """
    return _steps_before_decay(train.schedule, train.decay_steps, train.warmup_steps, total_steps)


def _steps_before_decay(schedule: str, decay_steps: int | None, warmup_steps: int, total_steps: int) -> int | None:
    length = decay_length(decay_steps, warmup_steps, total_steps)
    return total_steps - length if schedule == "wsd" and 0 < length < total_steps else None


def begins_decay(step: int, decay_after: int | None, decays_after: Sequence[int]) -> bool:
    """Return True if a decay of ``wsd`` begins with the step after `step`.

    It begins later than planned if the settings changed when the planned step was already done.

    Args:
        step: steps that are done.
        decay_after: the step after which the decay should begin, from `steps_before_decay`.
        decays_after: steps after which earlier decays began.
    """
    return decay_after is not None and (step == decay_after or (step > decay_after and not decays_after))


def extension(train: Train, steps: int, sequences_per_epoch: int) -> str:
    """Return the options with which a run of `steps` steps becomes twice as long, as they are typed.

    Args:
        train: settings of the run.
        steps: steps of the run.
        sequences_per_epoch: sequences of an epoch.
    """
    epochs = math.ceil(2 * steps * train.global_batch_size / sequences_per_epoch)
    more_epochs = f" --train.epochs {epochs}" if epochs > train.epochs else ""
    return f"--train.max_steps {2 * steps}{more_epochs}"


def describe(train: Train, total_steps: int) -> str:
    """Return the schedule and its parts, such as ``wsd: 200 warm-up, 9,000 stable, 2,300 decay steps``."""
    warmup_steps = min(train.warmup_steps, total_steps)
    decay_steps = total_steps - warmup_steps
    if train.schedule == "wsd":
        decay_steps = decay_length(train.decay_steps, train.warmup_steps, total_steps)
    parts = {"warm-up": warmup_steps, "stable": total_steps - warmup_steps - decay_steps, "decay": decay_steps}
    return f"{train.schedule}: {', '.join(f'{count:,} {name}' for name, count in parts.items() if count)} steps"


# ---- Changes of the schedule ----


def change_of_schedule(
    before: Settings, train: Train, sequences_per_epoch: int, step: int, decays_after: Sequence[int] = ()
) -> str | None:
    """Return one line that says what changed settings do to the learning rate; None if it stays as it was.

    Args:
        before: settings of the attempt before.
        train: settings of this attempt.
        sequences_per_epoch: sequences of an epoch, which is the same in all attempts of a run.
        step: steps that are done.
        decays_after: steps after which decays of ``wsd`` have begun, `TrainingState.decays_after`.
    """
    now = train.model_dump(mode="json")
    was, planned = (_plan(one, sequences_per_epoch) for one in (now | _recorded(before.get("train")), now))
    rest = range(step, planned.steps)
    changed = next((one for one in rest if f"{was.rate(one):.2e}" != f"{planned.rate(one):.2e}"), None)
    if changed is None and was[:3] == planned[:3]:
        return None
    clauses = [f"is {planned.schedule} instead of {was.schedule}"] if was.schedule != planned.schedule else []
    clauses.append(f"ends at step {planned.steps:,}")
    if was.steps != planned.steps:
        clauses[-1] += f" instead of {was.steps:,}"
    if planned.decay_after is not None and was.decay_after != planned.decay_after:
        clauses.append(f"decays after step {planned.decay_after:,}")
        if was.decay_after is not None:
            clauses[-1] += f" instead of {was.decay_after:,}"
    *first, end = clauses
    plan = f"{', '.join(first)} and {end}" if first else end
    line = f"the schedule {plan}: "
    if changed is None:
        line += "the learning rates up to there stay as they were"
    else:
        rates = f"is {planned.rate(changed):.2e}, it would have been {was.rate(changed):.2e}"
        until = "" if changed == step else f"up to step {changed:,} nothing changes; "
        line += f"{until}the learning rate of step {changed + 1:,} {rates}"
    if decays_after:
        began = f"step {decays_after[-1]:,}"
        line += (
            f"; the decay since {began} stays in the weights: to continue without it, set train.resume to the "
            f"checkpoint of {began}, which is kept"
        )
    return line


def _recorded(train: Any) -> dict[str, Any]:
    """Return the schedule's settings in a record; values of a damaged one are left out."""
    if not isinstance(train, dict):
        return {}
    values = {**_EARLIER, **train}
    found = {key: values[key] for key in _SCHEDULE_SETTINGS if isinstance(values.get(key), int | float)}
    found |= {key: None for key in ("max_steps", "decay_steps") if values.get(key, 0) is None}
    if values["schedule"] in get_args(Train.model_fields["schedule"].annotation):
        found["schedule"] = values["schedule"]
    return found


class _Planned(NamedTuple):
    """The part of a schedule that the line about a changed schedule shows."""

    schedule: str
    steps: int
    decay_after: int | None
    rate: Callable[[int], float]
    """Learning rate of the step after so many steps."""


def _plan(train: Settings, sequences_per_epoch: int) -> _Planned:
    """Return what the settings plan."""
    sequences = train["epochs"] * sequences_per_epoch
    steps, _ = optimizer_steps(sequences, train["global_batch_size"], train["max_steps"])
    schedule, warmup_steps, decay_steps = train["schedule"], train["warmup_steps"], train["decay_steps"]
    rate = partial(
        learning_rate,
        schedule=schedule,
        peak=train["learning_rate"],
        minimum=train["min_learning_rate"],
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        total_steps=steps,
    )
    return _Planned(schedule, steps, _steps_before_decay(schedule, decay_steps, warmup_steps, steps), rate)
