"""Whether the run fits the nodes that it is to have: batch, memory, and the time that it is given."""

from dataclasses import dataclass

from job.config import Config
from job.data.batching import BatchCut, cut_batch
from job.errors import UserError
from job.model.flops import ParameterCounts, peak_flops
from job.model.memory import process_memory
from job.model.spec import ModelSpec
from job.preflight.findings import Findings
from job.preflight.settings import show_remarks
from job.preflight.target import Target
from job.preflight.workload import GPUS, TYPICAL_MFU, Workload
from job.runs.time_limit import TimeBudget
from job.training.rules import about_nodes

_SLOWEST = min(GPUS, key=lambda gpu: peak_flops(gpu.cuda_name) or 0)
_LEAVING_SECONDS = 20
"""For the step that is under way when the request comes, and for the processes to end after the checkpoint."""
_BYTES_OF_CHECKPOINT = 12
"""A parameter's weight and both moments, in fp32."""


@dataclass(frozen=True)
class Shape:
    """What the model comes to with the vocabulary of the data set."""

    spec: ModelSpec
    vocab_size: int
    parameters: ParameterCounts

    @property
    def checkpoint_bytes(self) -> int:
        """Of weights and moments."""
        return _BYTES_OF_CHECKPOINT * self.parameters.total


def check_target(
    findings: Findings, config: Config, target: Target, shape: Shape | None, work: Workload | None, mfu: float | None
) -> None:
    """All rows of one target; those that need the model or the data are left out where there is none."""
    cut = check_batch(findings, config, target)
    if shape is not None and cut is not None:
        check_gpu_memory(findings, config, target, shape, cut)
    if shape is not None:
        check_node_memory(findings, target, shape)
    if shape is not None and work is not None:
        check_time(findings, config, target, shape, work, mfu)
    if target.grace_seconds is not None:
        check_grace(findings, config, target)


def check_batch(findings: Findings, config: Config, target: Target) -> BatchCut | None:
    """The global batch has to be cut evenly, and every node group needs a rank of its own; None if it cannot be."""
    train, world = config.train, target.world_size
    on = f"{target.nodes} x {target.processes} processes"
    try:
        cut = cut_batch(train.global_batch_size, train.micro_batch_size, world)
    except UserError as error:
        findings.wrong("global batch", f"{train.global_batch_size} {error.expected}", error.remedy)
        return None
    tokens = train.global_batch_size * train.context_length
    found = f"{on} x {cut.gradient_accumulation_steps} accumulation x {cut.micro_batch_size}"
    found += f" = {train.global_batch_size} windows, {tokens:,} tokens a step"
    findings.right("global batch", f"{found}; {cut.reason}" if cut.reason else found)
    show_remarks(findings, about_nodes(config, target.nodes))
    return cut


def check_gpu_memory(findings: Findings, config: Config, target: Target, shape: Shape, cut: BatchCut) -> None:
    """Estimate against the card."""
    if not target.gpus:
        return
    train = config.train

    def needed(micro_batch_size: int) -> int:
        return needed_bytes(config, shape, target.world_size, micro_batch_size)

    total, card = needed(cut.micro_batch_size), target.gpu_memory_bytes
    found = f"about {total / 2**30:.1f} GiB with {cut.micro_batch_size} sequences at a time"
    if card is None:
        findings.right("GPU memory", found)
        return
    found += f", of {card / 2**30:.0f} GiB"
    if total <= card:
        findings.right("GPU memory", found)
        return
    share = train.global_batch_size // target.world_size
    fitting = [size for size in range(1, cut.micro_batch_size) if share % size == 0 and needed(size) <= card]
    remedy = f"set train.micro_batch_size to {fitting[-1]}" if fitting else "take a smaller model or a larger GPU"
    findings.wrong("GPU memory", found, remedy)


def needed_bytes(config: Config, shape: Shape, world_size: int, micro_batch_size: int) -> int:
    """What a process takes of its GPU's memory, estimated."""
    return process_memory(
        shape.spec,
        shape.vocab_size,
        strategy=config.train.strategy,
        precision=config.train.precision,
        micro_batch_size=micro_batch_size,
        context_length=config.train.context_length,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        world_size=world_size,
    ).total


def check_node_memory(findings: Findings, target: Target, shape: Shape) -> None:
    """The first process keeps a copy of the whole state, from which a checkpoint is uploaded."""
    if target.memory_bytes is None:
        return
    needed = shape.checkpoint_bytes + target.processes * 3 * 2**30
    if not target.gpus:
        needed += target.processes * 16 * shape.parameters.total
    found = f"about {needed / 2**30:.1f} GiB of {target.memory_bytes / 2**30:.1f} GiB"
    if needed > target.memory_bytes:
        findings.unsure("memory of a node", found, "give it more, or run fewer processes on it")
    else:
        findings.right("memory of a node", found)


def check_time(
    findings: Findings, config: Config, target: Target, shape: Shape, work: Workload, mfu: float | None
) -> None:
    """Whether a start comes to a checkpoint before its time is over."""
    limits = [(target.seconds, target.name)] if target.seconds is not None else []
    if config.train.max_time is not None:
        limits.append((config.train.max_time.seconds, "train.max_time"))
    if not limits:
        findings.right("time limit", "none")
        return
    seconds, source = min(limits)
    gpus = target.world_size
    step_seconds = work.seconds_per_step(peak_flops(_SLOWEST.cuda_name) or 0, mfu or TYPICAL_MFU, gpus)
    budget = TimeBudget(0, shape.checkpoint_bytes)
    budget.step_took(step_seconds)
    needed = budget.needed_seconds(None)
    interval = config.checkpoint.every * step_seconds
    if config.checkpoint.every_minutes is not None:
        interval = min(interval, 60 * config.checkpoint.every_minutes)
    found = f"{_duration(seconds)} ({source})"
    if needed >= seconds:
        remedy = "give it more time: train.max_time, or the limit of the place"
        findings.wrong("time limit", f"{found}, but {_duration(needed)} are for the last checkpoint alone", remedy)
    elif interval >= seconds:
        remedy = f"set checkpoint.every_minutes to {max(1, round(seconds / 60 / 4))} or so"
        found += f"; a checkpoint every {_duration(interval)} on {_SLOWEST.name}s: a crash loses all of a start"
        findings.unsure("time limit", found, remedy)
    else:
        findings.right("time limit", f"{found}, of which {_duration(needed)} are for the last checkpoint")


def check_grace(findings: Findings, config: Config, target: Target) -> None:
    """The place's patience after its request to stop, against that for the last checkpoint."""
    assert target.grace_seconds is not None
    deadline = config.checkpoint.stop_deadline.seconds
    found = (
        f"{_duration(target.grace_seconds)} between warning and end, checkpoint.stop_deadline is {_duration(deadline)}"
    )
    remedy = (
        f"give {round(deadline + _LEAVING_SECONDS)} s or more, "
        f"or set checkpoint.stop_deadline below {_duration(max(1, target.grace_seconds - _LEAVING_SECONDS))}"
    )
    findings.judge("time to stop", target.grace_seconds >= deadline + _LEAVING_SECONDS, found, remedy)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
