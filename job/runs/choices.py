"""Values of the settings that may be ``auto``, chosen by the number of processes, the hardware and the run's record.

A value that the user sets always holds. A resumed run keeps the values of its record, so that all its steps are
computed in the same way. If this hardware cannot do that, an error of one line asks the user for a value.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from job.config import Train
from job.data.batching import BatchCut, cut_batch, divisors
from job.errors import UserError
from job.model.chunk_size import device_chunk_tokens
from job.model.memory import process_memory
from job.model.spec import ModelSpec
from job.runs.attempts import Attempt
from job.setting_kinds import AUTO

BF16_CAPABILITY = (8, 0)
"""Least CUDA compute capability with bf16 in the tensor cores: Ampere (NVIDIA, CUDA C++ Programming Guide, table of
the arithmetic instructions). Older GPUs emulate it, many times slower."""
CPU_MICRO_BATCH_SIZE = 32
"""Sequences in a micro-batch on a CPU, where larger ones take more memory and are not faster."""
_EARLIER_STRATEGY, _EARLIER_PRECISION = "zero2", "bf16"
"""Values of runs that have no record of their choices: the defaults of that time."""


@dataclass(frozen=True)
class Hardware:
    """The hardware of a run's processes; if their GPUs differ, each field has the lowest value of all."""

    device: str
    """``cuda`` or ``cpu``."""
    gpu_name: str = ""
    """Name of the GPU with the lowest compute capability; empty on a CPU or if it is not known."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability, such as (7, 5); None on a CPU or if it is not known."""
    free_bytes: int | None = None
    """Memory that one process may use; None on a CPU or if it is not known."""
    memory_bytes: int | None = None
    """All memory of the smallest GPU; None on a CPU or if it is not known."""

    @property
    def has_bf16(self) -> bool:
        """True if it computes in bf16 without emulation; also if that is not known."""
        return self.device == "cpu" or self.capability is None or self.capability >= BF16_CAPABILITY

    def has(self, precision: str) -> bool:
        """Return True if it computes in this precision without emulation; also if that is not known."""
        if precision == "tf32":
            return self.device != "cpu" and self.has_bf16
        return precision != "bf16" or self.has_bf16

    @property
    def description(self) -> str:
        """Name and compute capability of the GPU, or ``the CPU``."""
        if self.device == "cpu":
            return "the CPU"
        name = self.gpu_name or "the GPU"
        return name if self.capability is None else f"{name} (compute capability {'.'.join(map(str, self.capability))})"


class Choice(NamedTuple):
    """The value that a setting has in this start."""

    value: str
    reason: str = ""
    """Why ``auto`` means this value; empty if the user has set it."""

    def __str__(self) -> str:
        return f"{self.value} ({self.reason})" if self.reason else self.value


@dataclass(frozen=True)
class Choices:
    """Strategy, precision, device, micro-batch and chunk of the loss of one start."""

    strategy: Choice
    """``zero2`` or ``ddp``."""
    precision: Choice
    """``bf16``, ``fp16``, ``tf32`` or ``fp32``."""
    device: Choice
    """``cuda`` or ``cpu``."""
    cut: BatchCut
    """How the global batch is divided among the processes."""
    chunk_tokens: Choice
    """Tokens whose logits are in memory at the same time."""
    gradient_sum: str = "fp32"
    """Number format in which ``zero2`` adds up the gradients of micro-batches: ``fp32``, or ``bf16`` in runs in bf16
    that began before sums were in fp32."""
    may_shrink: bool = False
    """True if a micro-batch that does not fit into memory may be replaced by a smaller one."""

    def record(self) -> dict[str, str]:
        """Return the values for the record of the attempt, which has the micro-batch in a field of its own."""
        return {
            "strategy": self.strategy.value,
            "precision": self.precision.value,
            "device": self.device.value,
            "gradient_sum": self.gradient_sum,
            "loss_chunk_tokens": self.chunk_tokens.value,
        }


Fitting = Callable[[str, str], int]
"""Function that returns the most sequences of a micro-batch that fit into memory, for a strategy and a precision."""


def choose(
    train: Train,
    vocab_size: int,
    world_size: int,
    hardware: Hardware,
    fitting: Fitting,
    newest: Attempt | None,
    device_reason: str = "",
) -> Choices:
    """Return what each setting that is ``auto`` means.

    Args:
        train: the settings of this start.
        vocab_size: entries of the vocabulary.
        world_size: number of processes of this start.
        hardware: their GPUs or CPUs.
        fitting: estimates the largest micro-batch that fits into the memory of `hardware`.
        newest: the attempt before; None if there is no checkpoint to continue from.
        device_reason: why the launcher has chosen `hardware.device`.

    Raises:
        UserError: this hardware cannot do what the settings or the run's record say; fp16 is set together with
            ``zero2``; or the number of processes does not divide the global batch.
    """
    recorded = _recorded(newest)
    device = _choose_device(train, hardware, recorded, device_reason)
    precision = _choose_precision(train, hardware, recorded)
    strategy = _choose_strategy(train, hardware, precision, world_size, recorded)
    cut, may_shrink = _choose_cut(train, world_size, hardware, lambda: fitting(strategy.value, precision.value), newest)
    summed_in_bf16 = recorded is not None and recorded.values.get("gradient_sum") == "bf16"
    gradient_sum = "bf16" if summed_in_bf16 and precision.value == "bf16" else "fp32"
    chunk_tokens = _choose_chunk(train, vocab_size, hardware, recorded)
    return Choices(strategy, precision, device, cut, chunk_tokens, gradient_sum, may_shrink)


def largest_micro_batch(
    train: Train, spec: ModelSpec, vocab_size: int, world_size: int, hardware: Hardware, strategy: str, precision: str
) -> int:
    """Return the most sequences that fit into memory at a time by the estimate, of those that divide a rank's share.

    It is 0 if not even one fits. If the memory is not known, it is `CPU_MICRO_BATCH_SIZE`.
    """
    share = train.global_batch_size // world_size
    if hardware.free_bytes is None:
        return min(share, CPU_MICRO_BATCH_SIZE)
    model = spec, vocab_size, world_size, hardware.memory_bytes
    for size in reversed(divisors(share)):
        if needed_bytes(train, *model, strategy, precision, size) <= hardware.free_bytes:
            return size
    return 0


def needed_bytes(
    train: Train,
    spec: ModelSpec,
    vocab_size: int,
    world_size: int,
    gpu_bytes: int | None,
    strategy: str,
    precision: str,
    micro_batch_size: int,
) -> int:
    """Return the estimated memory of one process of `world_size`, on a GPU with `gpu_bytes` (see `process_memory`)."""
    return process_memory(
        spec,
        vocab_size,
        optimizer=train.optimizer,
        strategy=strategy,
        precision=precision,
        micro_batch_size=micro_batch_size,
        context_length=train.context_length,
        loss_chunk_tokens=train.loss_chunk_tokens,
        world_size=world_size,
        gpu_bytes=gpu_bytes,
    ).total


def precision_without_run(train: Train, hardware: Hardware) -> str:
    """Return the precision for a command that continues no run, such as an evaluation. Raises UserError as `choose`."""
    return _choose_precision(train, hardware, None).value


class _Recorded(NamedTuple):
    """The recorded values of the attempt before."""

    values: dict[str, str]
    source: str
    """Where the values come from, for messages."""


def _recorded(newest: Attempt | None) -> _Recorded | None:
    if newest is None:
        return None
    source = f"as in attempt {newest.number}"
    if newest.choices is not None:
        return _Recorded(newest.choices, source)
    # Before these settings could be `auto`, the settings of an attempt were what it computed with.
    earlier = (newest.config or {}).get("train", {})
    values = {"strategy": _EARLIER_STRATEGY, "precision": _EARLIER_PRECISION}
    values = {name: str(earlier.get(name, value)) for name, value in values.items()}
    if AUTO in values.values():
        return None  # The record itself is lost.
    return _Recorded(values | {"gradient_sum": "bf16" if values["precision"] == "bf16" else "fp32"}, source)


def _choose_device(train: Train, hardware: Hardware, recorded: _Recorded | None, reason: str) -> Choice:
    found = hardware.device
    if train.device != AUTO:
        return Choice(found)
    before = recorded.values.get("device", found) if recorded else found
    if recorded and before != found:
        expected = f"the run has used {before} so far ({recorded.source}), but this start would use {found}"
        raise UserError(
            "train.device",
            AUTO,
            expected,
            f"set train.device {found} to continue on that, or start the run on a machine with {before}",
        )
    return Choice(found, reason)


def _choose_precision(train: Train, hardware: Hardware, recorded: _Recorded | None) -> Choice:
    needed = ".".join(map(str, BF16_CAPABILITY))
    if train.precision != AUTO:
        if not hardware.has(train.precision):
            on_cpu = hardware.device == "cpu"
            needs = "needs a GPU" if on_cpu else f"needs compute capability {needed}"
            expected = f"{hardware.description} has no {train.precision}, which {needs}"
            remedy = f"set it to auto, which is {'bf16' if on_cpu else 'fp16'} here, or to fp32"
            raise UserError("train.precision", train.precision, expected, remedy)
        return Choice(train.precision)
    if recorded:
        before = recorded.values["precision"]
        if not hardware.has(before):
            expected = f"the run has used {before} so far ({recorded.source}), but {hardware.description} has none"
            remedy = "set train.precision fp16 (with train.strategy ddp) or fp32"
            if before == "tf32":
                remedy = "set train.precision fp32, which is tf32 with more digits"
            raise UserError("train.precision", AUTO, expected, f"{remedy}, or use a GPU of compute capability {needed}")
        return Choice(before, recorded.source)
    if hardware.device == "cpu":
        return Choice("bf16", "on a CPU")
    if hardware.has_bf16:
        return Choice("bf16", f"{hardware.description} has it")
    return Choice("fp16", f"{hardware.description} has no bf16")


def _choose_strategy(
    train: Train, hardware: Hardware, precision: Choice, world_size: int, recorded: _Recorded | None
) -> Choice:
    if train.strategy != AUTO:
        if train.strategy == "zero2" and precision.value == "fp16":
            why = f" ({precision.reason})" if precision.reason else ""
            expected = f"fp16{why} works under ddp only: zero2 has no loss scale here"
            raise UserError("train.strategy", "zero2", expected, "set it to ddp or auto, or set train.precision fp32")
        return Choice(train.strategy)
    if precision.value == "fp16":
        return Choice("ddp", "fp16 needs it")
    if recorded:
        return Choice(recorded.values["strategy"], recorded.source)
    if world_size == 1:
        return Choice("ddp", "one process has nothing to divide")
    return Choice("zero2", f"{world_size} processes divide the optimizer's state")


def _choose_chunk(train: Train, vocab_size: int, hardware: Hardware, recorded: _Recorded | None) -> Choice:
    """Return the chunk, whose size decides the rounding of the loss's sums.

    The record does not decide if it has none, as those of earlier versions, or is of another kind of device.
    """
    if train.loss_chunk_tokens is not None:
        return Choice(str(train.loss_chunk_tokens))
    if recorded and recorded.values.get("device") == hardware.device and "loss_chunk_tokens" in recorded.values:
        return Choice(recorded.values["loss_chunk_tokens"], recorded.source)
    on_gpu = hardware.device != "cpu"
    tokens = device_chunk_tokens(vocab_size, on_gpu, hardware.memory_bytes)
    return Choice(str(tokens), "by the GPU's memory" if on_gpu else "on a CPU")


def _choose_cut(
    train: Train, world_size: int, hardware: Hardware, fitting: Callable[[], int], newest: Attempt | None
) -> tuple[BatchCut, bool]:
    """Return the division of the batch, and whether its micro-batch may become smaller if it does not fit."""
    batch, setting = train.global_batch_size, train.micro_batch_size
    recorded = None if newest is None else newest.micro_batch_size
    if setting != AUTO:
        cut = cut_batch(batch, setting, world_size)
        before = None if newest is None else (newest.config or {}).get("train", {}).get("micro_batch_size")
        if recorded is None or setting != before or recorded == cut.micro_batch_size or batch // world_size % recorded:
            return cut, False
        reason = f"as in attempt {newest.number if newest else ''}; train.micro_batch_size is {setting}"
        return replace(cut_batch(batch, recorded, world_size), reason=reason), False
    if newest is not None:
        # The records of the earliest versions have the setting only, or nothing.
        earlier = recorded or (newest.config or {}).get("train", {}).get("micro_batch_size", CPU_MICRO_BATCH_SIZE)
        cut = cut_batch(batch, earlier, world_size)
        reason = "as" if cut.micro_batch_size == earlier else f"at most the {earlier} sequences"
        return replace(cut, reason=f"{reason} in attempt {newest.number}"), False
    if hardware.device == "cpu":
        return replace(cut_batch(batch, CPU_MICRO_BATCH_SIZE, world_size), reason="on a CPU"), False
    most = fitting()
    room = "" if hardware.free_bytes is None else f" into {hardware.free_bytes / 2**30:.0f} GiB"
    reason = f"the most that fit{room}" if most else f"by the estimate not even one fits{room}"
    return replace(cut_batch(batch, max(1, most), world_size), reason=reason), True
