"""Checks that a run fits its target: the global batch, the memory of GPUs and nodes, and the time limit."""

from dataclasses import dataclass

from job.config import Checkpoint, Train
from job.data.batching import BatchCut, cut_batch
from job.errors import UserError
from job.model.flops import ParameterCounts
from job.model.gpu_table import GPUS, find_gpu
from job.model.optimizer_state import BYTES_PER_NUMBER
from job.model.spec import ModelSpec
from job.preflight.assumed_mfu import assumed_mfu
from job.preflight.findings import Findings
from job.preflight.target import Target
from job.preflight.workload import Workload
from job.runs.choices import largest_micro_batch, needed_bytes
from job.runs.time_limit import TimeLimit

_UNKNOWN_GPU = next(gpu for gpu in GPUS if gpu.name == "RTX 3090")
"""The GPU with which the time of a step is estimated if the target's GPU is not known: one of the slower ones."""
_EXIT_SECONDS = 20
"""Time for the step in progress when the request to stop arrives, and for the exit after the last checkpoint."""
_PROCESS_BYTES = 3 * 2**30
"""Main memory of one training process without the model: an assumption."""


@dataclass(frozen=True)
class ModelSize:
    """Size of the model with the vocabulary of the data set."""

    spec: ModelSpec
    vocab_size: int
    parameters: ParameterCounts
    checkpoint_bytes: int
    """Size of a checkpoint: fp32 weights and the optimizer's state."""


def check_target(
    findings: Findings,
    train: Train,
    checkpoint: Checkpoint,
    target: Target,
    model: ModelSize | None,
    work: Workload | None,
    mfu: float | None,
) -> None:
    """Add all rows about a target; rows that need the model or the amount of work are left out if that is None."""
    cut = check_batch(findings, train, target)
    if model is not None and cut is not None:
        check_gpu_memory(findings, train, target, model, cut)
    if model is not None:
        check_node_memory(findings, target, model)
    if model is not None and work is not None:
        check_time_limit(findings, train, checkpoint, target, model, work, mfu)
    if target.grace_seconds is not None:
        check_stop_deadline(findings, target.grace_seconds, checkpoint.stop_deadline.seconds)


def check_batch(findings: Findings, train: Train, target: Target) -> BatchCut | None:
    """Check that the global batch divides evenly over the processes; return how, or None if it does not."""
    try:
        cut = cut_batch(train.global_batch_size, int(train.micro_batch_size), target.world_size)
    except UserError as error:
        found = f"train.global_batch_size: {train.global_batch_size} {error.expected}"
        findings.wrong("global batch", found, error.remedy)
        return None
    tokens = train.global_batch_size * train.context_length
    factors = (
        _counted(target.nodes, "node"),
        _counted(target.processes_per_node, "process", "es"),
        _counted(cut.gradient_accumulation_steps, "accumulation step"),
        _counted(cut.micro_batch_size, "sequence"),
    )
    found = f"{' x '.join(factors)} = {train.global_batch_size} sequences, {tokens:,} tokens per step"
    findings.right("global batch", f"{found}; {cut.reason}" if cut.reason else found)
    return cut


def check_gpu_memory(findings: Findings, train: Train, target: Target, model: ModelSize, cut: BatchCut) -> None:
    """Compare the estimated memory of a training process with the memory of the GPU."""
    if not target.gpus_per_node:
        return
    needed = gpu_memory_bytes(train, model, target.world_size, cut.micro_batch_size, target.gpu_memory_bytes)
    found = f"about {needed / 2**30:.1f} GiB needed with {cut.micro_batch_size} sequences per micro-batch"
    if target.gpu_memory_bytes is None:
        findings.right("GPU memory", found)
        return
    found += f", the GPU has {target.gpu_memory_bytes / 2**30:.0f} GiB"
    if needed <= target.gpu_memory_bytes:
        findings.right("GPU memory", found)
        return
    largest = largest_micro_batch(
        train, model.spec, model.vocab_size, target.world_size, target.hardware, train.strategy, train.precision
    )
    remedy = f"set train.micro_batch_size to {largest}" if largest else "use a smaller model or a GPU with more memory"
    findings.wrong("GPU memory", found, remedy)


def gpu_memory_bytes(
    train: Train, model: ModelSize, world_size: int, micro_batch_size: int, gpu_bytes: int | None
) -> int:
    """Return the estimated GPU memory of one training process, on a GPU with `gpu_bytes` of memory."""
    strategy, precision = train.strategy, train.precision
    return needed_bytes(
        train, model.spec, model.vocab_size, world_size, gpu_bytes, strategy, precision, micro_batch_size
    )


def check_node_memory(findings: Findings, target: Target, model: ModelSize) -> None:
    """Compare the main memory that the processes of a node need with what the node has."""
    if target.memory_bytes is None:
        return
    # Rank 0 keeps a copy of the whole state while it uploads a checkpoint.
    needed = model.checkpoint_bytes + target.processes_per_node * _PROCESS_BYTES
    if not target.gpus_per_node:
        # On the CPU each process also has weights and optimizer state as in a checkpoint, and the gradients.
        needed += target.processes_per_node * (model.checkpoint_bytes + BYTES_PER_NUMBER * model.parameters.total)
    found = f"about {needed / 2**30:.1f} GiB needed, {target.memory_bytes / 2**30:.1f} GiB available"
    if needed > target.memory_bytes:
        findings.unsure("node memory", found, "give the node more memory, or lower train.processes")
    else:
        findings.right("node memory", found)


def check_time_limit(
    findings: Findings,
    train: Train,
    checkpoint: Checkpoint,
    target: Target,
    model: ModelSize,
    work: Workload,
    mfu: float | None,
) -> None:
    """Check that an attempt can write a checkpoint before its time limit ends."""
    limits = [(target.time_limit_seconds, target.name)] if target.time_limit_seconds is not None else []
    if train.max_time is not None:
        limits.append((train.max_time.seconds, "train.max_time"))
    if not limits:
        findings.right("time limit", "none")
        return
    limit_seconds, source = min(limits)
    gpu = find_gpu(target.gpu_name) or _UNKNOWN_GPU
    _, peak = gpu.used_precision(train.precision)
    share = mfu or assumed_mfu(work.flops_per_token, gpu, peak)
    step_seconds = work.seconds_per_step(peak, share, target.world_size)
    budget = TimeLimit(0, model.checkpoint_bytes)
    budget.step_took(step_seconds)
    last_checkpoint_seconds = budget.needed_seconds(None)
    interval_seconds = checkpoint.every * step_seconds
    if checkpoint.every_minutes is not None:
        interval_seconds = min(interval_seconds, 60 * checkpoint.every_minutes)
    found = f"{_duration(limit_seconds)} ({source})"
    if last_checkpoint_seconds >= limit_seconds:
        found += f", but the last checkpoint alone needs {_duration(last_checkpoint_seconds)}"
        findings.wrong("time limit", found, "raise train.max_time, or the time limit of the place")
    elif interval_seconds >= limit_seconds:
        found += (
            f"; on a {gpu.name} checkpoints are {_duration(interval_seconds)} apart, "
            "so a crash loses all work of the attempt"
        )
        remedy = f"set checkpoint.every_minutes to about {max(1, round(limit_seconds / 60 / 4))}"
        findings.unsure("time limit", found, remedy)
    else:
        findings.right("time limit", f"{found}, including {_duration(last_checkpoint_seconds)} for the last checkpoint")


def check_stop_deadline(findings: Findings, grace_seconds: float, deadline_seconds: float) -> None:
    """Check that the last checkpoint may take `checkpoint.stop_deadline` before the place kills the processes."""
    found = (
        f"{_duration(grace_seconds)} between the warning and SIGKILL; "
        f"checkpoint.stop_deadline is {_duration(deadline_seconds)}"
    )
    remedy = (
        f"give {round(deadline_seconds + _EXIT_SECONDS)} s or more, "
        f"or set checkpoint.stop_deadline below {_duration(max(1, grace_seconds - _EXIT_SECONDS))}"
    )
    findings.judge("time to stop", grace_seconds >= deadline_seconds + _EXIT_SECONDS, found, remedy)


def _counted(number: int, noun: str, plural_ending: str = "s") -> str:
    return f"{number} {noun}{plural_ending if number != 1 else ''}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
