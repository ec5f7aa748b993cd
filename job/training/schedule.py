"""The learning rate as a function of the step."""

import math


def learning_rate(step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Linear warm-up from 0 over `warmup_steps`, then half a cosine down to `minimum` at `total_steps`
    (Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts). Being a function of the step alone, it has no
    state that a checkpoint would have to carry.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * done))
