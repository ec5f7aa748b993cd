"""The log line of a training step: what one watches, in 80 columns. logs/metrics.jsonl has all numbers of the step."""

import math
from collections.abc import Iterator
from typing import Any

COLUMNS = 80
"""Width of a terminal that the line fits, as long as nothing unusual happens."""
LEAST_SHOWN_WAIT = 0.02
"""Share of the time. The line shows waits for data, and standstills for checkpoints, that take more than this."""
_WIDEST_TIMES = "ETA 9.9h, save 9.9h"


def step_line(
    step: int,
    total_steps: int,
    values: dict[str, Any],
    seconds_left: float,
    seconds_to_save: float,
    batch: str = "",
    columns: int = COLUMNS,
) -> str:
    """Return the log line of a training step.

    Args:
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        values: metrics by name. Loss and gradient norm are missing if they are not finite. MFU, learning
            rate and memory are shown if there is room for them; skipped steps and long waits are shown at the end of
            the line if there are any.
        seconds_left: estimated seconds until the end of the run.
        seconds_to_save: estimated seconds until the next checkpoint; at least `seconds_left` if the next is the last.
        batch: a note on the batch of this step, such as ``3 of 32 sequences``; empty for a whole batch.
        columns: width of the terminal.
    """
    begin = f"step {step}/{total_steps} | loss {values.get('train/loss', math.nan):.4f}"
    norm = f"norm {_short_norm(values.get('train/gradient_norm', math.inf))}"
    rate = f"{short_number(values['speed/tokens_per_second'])} tok/s"
    times = f"ETA {short_time(seconds_left)}"
    times += f", save {short_time(seconds_to_save)}" if seconds_to_save < seconds_left else ""
    parts = [begin, norm, rate]
    # The widest step and times, so that either all lines of a run have a number or none.
    room = columns - len(" | ".join([*parts, _WIDEST_TIMES])) - len(str(total_steps)) + len(str(step))
    for number in _if_there_is_room(values):
        room -= len(" | ") + len(number)
        if room >= 0:
            parts.append(number)
    return " | ".join([*parts, times, *_unusual(values, batch)])


def _if_there_is_room(values: dict[str, Any]) -> Iterator[str]:
    if "speed/mfu" in values:
        yield f"MFU {values['speed/mfu']:.0%}"
    yield f"lr {values['train/learning_rate']:.2e}"
    yield f"{values['memory/peak_gib']:.1f} GiB"


def _unusual(values: dict[str, Any], batch: str) -> Iterator[str]:
    if values["train/skipped_steps"]:
        yield f"skipped {values['train/skipped_steps']}"
    for name, words in (("speed/data_wait", "data wait"), ("speed/stall", "stall")):
        if values[name] > LEAST_SHOWN_WAIT:
            yield f"{words} {values[name]:.1%}"
    if batch:
        yield batch


def short_number(number: float) -> str:
    """Return a number of at least 0 in at most six characters: ``4,681``, ``45.4k``, ``1.2M``."""
    for unit, size, least in (("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e3, 1e4)):
        if number >= least:
            return f"{number / size:.1f}{unit}"
    return f"{number:,.0f}"


def short_time(seconds: float) -> str:
    """Return a length of time in about four characters: ``45s``, ``12m``, ``2.4h``, ``10d``."""
    for unit, size, least in (("d", 86400, 48 * 3600), ("h", 3600, 100 * 60), ("m", 60, 100)):
        if seconds >= least:
            amount = seconds / size
            return f"{amount:.0f}{unit}" if unit == "m" or amount >= 10 else f"{amount:.1f}{unit}"
    return f"{max(0.0, seconds):.0f}s"


def _short_norm(norm: float) -> str:
    if norm < 0.1:
        return f"{norm:.1g}"
    return f"{norm:.2f}" if norm < 10 else f"{norm:.3g}"
