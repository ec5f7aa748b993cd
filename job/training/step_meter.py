"""Metrics of the log: loss, speed, waiting times and memory between two lines."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from job.model import gpu
from job.model.flops import mfu
from job.training.bad_steps import StepResult


@dataclass
class Interval:
    """What is measured between two lines of the log. Evaluations are not part of its time."""

    nats: Tensor | float = 0.0
    """Loss summed over this rank's targets."""
    targets: Tensor | float = 0.0
    """Targets of the global batches, without those of skipped steps."""
    steps: float = 0
    seconds: float = 0.0
    """Seconds of the steps, with the waits between them."""
    waited_seconds: float = 0.0
    """Seconds spent waiting for batches (included in `seconds`)."""
    stalled_seconds: float = 0.0
    """Seconds in which training stood still for checkpoints (not included in `seconds`)."""


class StepMeter:
    """Measures training and makes the metrics of a line of the log.

    Args:
        flops_per_token: FLOPs of one token, forward and backward.
        peak_flops: peak FLOP/s of one GPU; None: not known.
        world_size: ranks.
        device: device of the steps.
        interval: what was measured since the last line before the run was started again; its nats are those of all
            ranks.
        is_rank0: True on the rank that takes over those nats.
    """

    def __init__(
        self,
        flops_per_token: int,
        peak_flops: float | None,
        world_size: int,
        device: torch.device,
        interval: Mapping[str, float],
        is_rank0: bool,
    ) -> None:
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._world_size, self._device = world_size, device
        self._interval = Interval(**interval)
        if not is_rank0:
            self._interval.nats = 0.0
        self._train_seconds = 0.0

    @contextmanager
    def step_time(self) -> Iterator[None]:
        """Count the time of the block as time of steps."""
        began = time.perf_counter()
        yield
        self._interval.seconds += time.perf_counter() - began

    @contextmanager
    def stall(self) -> Iterator[None]:
        """Count the time of the block as standstill for a checkpoint."""
        began = time.perf_counter()
        yield
        self._interval.stalled_seconds += time.perf_counter() - began

    def add(self, result: StepResult, targets: int, waited_seconds: float) -> None:
        """Add a step with so many targets in its global batch, before which this rank waited so long for the batch."""
        self._interval.nats = self._interval.nats + result.nats
        self._interval.targets = self._interval.targets + targets * (1 - result.skipped)
        self._interval.steps += 1
        self._interval.waited_seconds += waited_seconds

    def sums(self) -> dict[str, float]:
        """Return the interval with the nats of all ranks. A collective, which waits for the device."""
        nats = torch.as_tensor(self._interval.nats, device=self._device).clone()
        if self._world_size > 1:
            dist.all_reduce(nats)
        values = {field.name: getattr(self._interval, field.name) for field in fields(Interval)}
        return values | {"nats": float(nats), "targets": float(self._interval.targets)}

    def metrics(
        self, sums: Mapping[str, float], rate: float, result: StepResult, tokens_seen: int, epoch: float, skipped: int
    ) -> dict[str, Any]:
        """Return the metrics of a line of the log by name, without those that are not finite, and begin a new interval.

        Args:
            sums: from `sums`, taken within the time of the last step.
            rate: learning rate of the last step.
            result: the last step.
            tokens_seen: targets since the run's first step.
            epoch: passes over the data since the run's first step.
            skipped: skipped steps of the run.
        """
        stalled, interval = self._interval.stalled_seconds, self._interval
        tokens_per_second = sums["targets"] / interval.seconds
        values: dict[str, Any] = {
            "train/loss": sums["nats"] / sums["targets"] if sums["targets"] else math.nan,
            "train/learning_rate": rate,
            "train/gradient_norm": float(result.gradient_norm),
            "train/tokens_seen": tokens_seen,
            "train/epoch": epoch,
            "train/skipped_steps": skipped,
            "speed/tokens_per_second": tokens_per_second,
            "speed/seconds_per_step": interval.seconds / interval.steps,
            "speed/data_wait": interval.waited_seconds / interval.seconds,
            "speed/stall": stalled / (interval.seconds + stalled),
            "memory/peak_gib": _peak_memory_bytes(self._device) / 2**30,
        }
        used = mfu(tokens_per_second, self._flops_per_token, self._peak_flops, self._world_size)
        values |= {"speed/mfu": used} if used is not None else {}
        values |= {"train/loss_scale": float(result.loss_scale)} if result.loss_scale is not None else {}
        self._train_seconds += interval.seconds
        self._interval = Interval()
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def seconds_left(self, steps_left: int, steps_done: int) -> float:
        """Return the estimated seconds of the steps that are left, from those that this start has done."""
        return steps_left * self._train_seconds / steps_done


def _peak_memory_bytes(device: torch.device) -> int:
    if gpu.is_gpu(device):
        return gpu.peak_bytes(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
