"""Printed plan of a run: what it computes, and how many hours and dollars that takes on common GPUs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table

from job.config import Checkpoint, Train
from job.model.gpu_table import GPUS, Gpu, Precision, find_gpu
from job.preflight.assumed_mfu import ANCHORS, assumed_mfu
from job.preflight.capacity import ModelSize, gpu_memory_bytes
from job.preflight.existing_run import ExistingRun
from job.preflight.gpu_prices import DOLLARS_PER_HOUR, PRICES_AS_OF
from job.preflight.target import Target
from job.preflight.workload import Workload
from job.runs.retention import most_kept
from job.setting_kinds import AUTO
from job.training.schedule import describe


@dataclass(frozen=True)
class GpuPlan:
    """The remaining work of a run on one kind of GPU."""

    gpu: Gpu
    is_here: bool
    """True for the GPU of this machine."""
    precision: Precision
    mfu: float
    tokens_per_second: float
    """Tokens per second of all processes together."""
    hours: float
    dollars_per_hour: float | None
    """Price of one GPU; None if no price is known."""
    fit: str
    """``fits``, ``too small``, or ``fits in 32 GiB`` if only a larger size of the GPU has enough memory."""


def show_plan(
    console: Console,
    train: Train,
    resolved: Train,
    checkpoint: Checkpoint,
    model: ModelSize,
    work: Workload,
    target: Target,
    existing: ExistingRun,
    mfu: float | None,
    price_per_gpu_hour: float | None,
    assumptions: Sequence[str] = (),
) -> None:
    """Print the plan.

    Args:
        console: where it is printed.
        train: settings of the training.
        resolved: the same, with what ``auto`` means at the target.
        checkpoint: settings of the checkpoints.
        model: size of the model.
        work: amount of work of the whole run.
        target: nodes on which the run would train.
        existing: how far the run at `run.output` is already.
        mfu: model FLOPs utilization from 0 to 1; None for `assumed_mfu` of each GPU.
        price_per_gpu_hour: price in dollars; None for the prices in `DOLLARS_PER_HOUR`.
        assumptions: sentences that name the numbers assumed before there is a data set; empty if there is one.
    """
    micro_batch_size = int(resolved.micro_batch_size)
    needed_bytes = gpu_memory_bytes(resolved, model, target.world_size, micro_batch_size, target.gpu_memory_bytes)
    _show_work(console, train, checkpoint, model, work, existing, needed_bytes, assumptions)
    # Where the micro-batch is chosen by the memory, a GPU is large enough if one sequence fits.
    least_micro_batch = 1 if train.micro_batch_size == AUTO else micro_batch_size
    least_bytes = partial(gpu_memory_bytes, resolved, model, target.world_size, least_micro_batch)
    # A run that exists continues in its precision; a new one takes what each GPU has.
    precision = train.precision if existing.attempt_before is None else resolved.precision
    plans = gpu_plans(precision, work, target, existing, mfu, price_per_gpu_hour, least_bytes)
    _show_gpus(console, plans, work, target, existing)
    if target.gpu_name and not any(plan.is_here for plan in plans):
        console.print(f"The peak of this machine's GPU, {target.gpu_name}, is not known, so it has no row.")
    mfu_source = "--mfu"
    if mfu is None:
        mfu_source = f"assumed from the model's size and the GPU ({ANCHORS}); --mfu sets another"
    price_source = "--price" if price_per_gpu_hour is not None else f"{PRICES_AS_OF}, assumed; --price sets another"
    console.print(f"MFU: {mfu_source}.\nPrice: {price_source}.", soft_wrap=True)


def gpu_plans(
    precision_setting: str,
    work: Workload,
    target: Target,
    existing: ExistingRun,
    mfu: float | None,
    price_per_gpu_hour: float | None,
    needed_bytes: Callable[[int], int],
) -> list[GpuPlan]:
    """Return the plan for the GPU of this machine, then those that fit, then those that are too small, by hours.

    Args:
        precision_setting: `train.precision`.
        work, target, existing, mfu, price_per_gpu_hour: see `show_plan`.
        needed_bytes: returns the least memory that one training process needs on a GPU with so many bytes.
    """
    here = find_gpu(target.gpu_name)
    plans = []
    for gpu in GPUS:
        if not (gpu.is_in_plan or gpu is here):
            continue
        precision, peak = gpu.used_precision(precision_setting)
        share = mfu or assumed_mfu(work.flops_per_token, gpu, peak)
        memory_sizes = gpu.memory_bytes
        if gpu is here and target.gpu_memory_bytes is not None:
            memory_sizes = (target.gpu_memory_bytes,)
        plans.append(
            GpuPlan(
                gpu=gpu,
                is_here=gpu is here,
                precision=precision,
                mfu=share,
                tokens_per_second=peak * share * target.world_size / work.flops_per_token,
                hours=_share_left(work, existing) * work.hours(peak, share, target.world_size),
                dollars_per_hour=DOLLARS_PER_HOUR.get(gpu.name) if price_per_gpu_hour is None else price_per_gpu_hour,
                fit=_fit(memory_sizes, needed_bytes),
            )
        )
    return sorted(plans, key=lambda plan: (not plan.is_here, plan.fit == _TOO_SMALL, plan.hours))


_TOO_SMALL = "too small"


def _fit(memory_sizes: tuple[int, ...], needed_bytes: Callable[[int], int]) -> str:
    fitting = [size for size in memory_sizes if needed_bytes(size) <= size]
    if not fitting:
        return _TOO_SMALL
    return "fits" if len(fitting) == len(memory_sizes) else f"fits in {_gib(fitting[0])} GiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.0f}"


def _share_left(work: Workload, existing: ExistingRun) -> float:
    return max(0.0, 1 - existing.step / work.steps)


def _show_work(
    console: Console,
    train: Train,
    checkpoint: Checkpoint,
    model: ModelSize,
    work: Workload,
    existing: ExistingRun,
    needed_bytes: int,
    assumptions: Sequence[str],
) -> None:
    """Print sizes and amounts, and what they assume."""
    parameters = model.parameters
    kept = most_kept(checkpoint.keep, train.schedule)
    reason = "checkpoint.keep" if kept == checkpoint.keep else "checkpoint.keep, and the one before the decay"
    title = "the run, assumed" if assumptions else "the run"
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False, show_header=False)
    for name, value in (
        ("parameters", f"{parameters.total:,}, including {parameters.embedding:,} in embeddings"),
        ("FLOPs per token", f"{work.flops_per_token / 1e6:,.1f} M, forward and backward"),
        ("training", f"{work.steps:,} steps, {work.tokens:,} tokens, {work.epochs:.2f} epochs"),
        ("evaluation", f"{work.evaluated_tokens:,} tokens, {work.evaluation_share:.0%} of the FLOPs"),
        ("schedule", describe(train, work.steps)),
        ("checkpoint", f"{model.checkpoint_bytes / 1e9:,.2f} GB each, {kept} are kept ({reason})"),
        ("GPU memory", f"about {needed_bytes / 2**30:.1f} GiB for each process"),
        *([("already done", f"{existing.step:,} steps")] if existing.step else []),
    ):
        table.add_row(name, value)
    console.print(table)
    for assumption in assumptions:
        console.print(f"assumed: {assumption}; `prepare` gives the real number", soft_wrap=True)


def hundredths(value: float, unit: str = "") -> str:
    """Return a number of hours or dollars; less than a hundredth is said to be less, since it is not nothing."""
    return f"<{unit}0.01" if 0 < value < 0.01 else f"{unit}{value:,.2f}"


def _show_gpus(console: Console, plans: list[GpuPlan], work: Workload, target: Target, existing: ExistingRun) -> None:
    """Print hours and price on each GPU, which depend on assumptions."""
    world_size = target.world_size
    processes = f"{target.nodes} x {target.processes_per_node} processes" if world_size > 1 else "one process"
    table = Table(title=f"\nremaining work on {processes}", title_justify="left", box=None, pad_edge=False)
    for name in ("GPU", "GiB", "precision", "MFU", "tokens/s", "hours", "$/GPU-hour", "price", "memory"):
        table.add_column(name, justify="left" if name in ("GPU", "precision", "memory") else "right")
    if existing.tokens_per_second is not None:
        hours = _share_left(work, existing) * work.flops / work.flops_per_token / existing.tokens_per_second / 3600
        table.add_row("measured in this run", "", "", "", f"{existing.tokens_per_second:,.0f}", hundredths(hours))
    for plan in plans:
        price = plan.dollars_per_hour
        table.add_row(
            f"{plan.gpu.name} (this machine)" if plan.is_here else plan.gpu.name,
            "/".join(map(_gib, plan.gpu.memory_bytes)),
            plan.precision,
            f"{plan.mfu:.0%}",
            f"{plan.tokens_per_second:,.0f}",
            hundredths(plan.hours),
            "" if price is None else f"{price:.2f}",
            "" if price is None else hundredths(plan.hours * world_size * price, "$"),
            plan.fit,
        )
    console.print(table)
