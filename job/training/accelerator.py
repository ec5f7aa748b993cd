"""How the work is spread over processes: accelerate with DDP or DeepSpeed ZeRO-2, checked after it was set up."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

from job.model import gpu
from job.model.memory import REDUCE_BUCKET


@dataclass(frozen=True)
class Strategy:
    """How the work is spread over processes, micro-batches and number formats."""

    name: str
    """``zero2`` or ``ddp``."""
    precision: str
    """``bf16``, ``fp16`` (under ``ddp``), ``tf32`` or ``fp32``."""
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_clipping: float
    """Largest norm of the global gradient; 0: gradients are not clipped."""
    spike_factor: float | None = None
    """As of `BadSteps`."""
    gradient_sum: str = "fp32"
    """See `job.runs.choices.Choices`."""


def start_accelerator(strategy: Strategy) -> Accelerator:
    """Set accelerate up for this process.

    Raises:
        RuntimeError: what was set up is not what the strategy asks for; training would silently be wrong.
    """
    on_gpu = gpu.is_available()
    zero2 = strategy.name == "zero2"
    if zero2:
        from deepspeed import ops

        # On a CPU it would compile a library for inference, under a lock that stays if the process is killed meanwhile.
        ops.__compatible_ops__ = {}
    torch.set_float32_matmul_precision("high" if strategy.precision == "tf32" else "highest")
    accelerator = Accelerator(
        mixed_precision="bf16" if strategy.precision == "bf16" else "no",
        gradient_accumulation_steps=strategy.gradient_accumulation_steps,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_deepspeed_config(strategy)) if zero2 else None,
        # Without a backend named here, accelerate on CPU starts no process group at all under DeepSpeed.
        kwargs_handlers=[
            InitProcessGroupKwargs(backend=gpu.backend(on_gpu)),
            # Gradients are reduced where they lie, instead of in copies: 4 bytes a parameter less.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        cpu=not on_gpu and not zero2,
    )
    _check_set_up(accelerator, strategy)
    return accelerator


def autocast(accelerator: Accelerator, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which the model's matrix products are computed in `precision`.

    accelerate is not told of fp16, because it would scale the loss, whose gradient is already made by then (see
    `job.training.loss_scale`).
    """
    if precision == "fp16":
        return torch.autocast(accelerator.device.type, torch.float16)
    return accelerator.autocast()


def _check_set_up(accelerator: Accelerator, strategy: Strategy) -> None:
    """Raise a RuntimeError if anything is not as asked for, such as because of an environment variable."""
    formed = (accelerator.num_processes, dist.get_world_size() if dist.is_initialized() else 1)
    if formed != (strategy.world_size, strategy.world_size):
        raise RuntimeError(f"{strategy.world_size} processes were asked for, but {formed} came together")
    zero2, kind = strategy.name == "zero2", str(accelerator.distributed_type.value)
    kinds = {"DEEPSPEED"} if zero2 else {"MULTI_CPU", "MULTI_GPU"} | ({"NO"} if strategy.world_size == 1 else set())
    if kind not in kinds:
        raise RuntimeError(f"strategy {strategy.name} was asked for, but accelerate set up {kind}")
    wanted: dict[str, Any] = {
        "gradient_accumulation_steps": strategy.gradient_accumulation_steps,
        "mixed_precision": "bf16" if strategy.precision == "bf16" else "no",
    }
    found = {name: getattr(accelerator, name) for name in wanted}
    if zero2:
        decided, formed_of = _deepspeed_config(strategy), accelerator.state.deepspeed_plugin.deepspeed_config
        for name in ("gradient_accumulation_steps", "gradient_clipping"):
            wanted[f"DeepSpeed's {name}"], found[f"DeepSpeed's {name}"] = decided[name], formed_of.get(name)
        for section in ("bf16", "data_types", "zero_optimization"):
            wanted |= {f"{section}.{name}": value for name, value in decided[section].items()}
            found |= {f"{section}.{name}": formed_of[section].get(name) for name in decided[section]}
    for name, value in wanted.items():
        if found[name] != value:
            raise RuntimeError(f"{name} {value} was asked for, but accelerate set up {found[name]}")


def _deepspeed_config(strategy: Strategy) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": strategy.micro_batch_size,
        "gradient_accumulation_steps": strategy.gradient_accumulation_steps,
        "gradient_clipping": 0.0,  # left out, it is set to 1
        "bf16": {"enabled": strategy.precision == "bf16", "check_grad_overflow": False},
        # Gradients of micro-batches are summed in fp32. A sum in bf16, which has 8 bits, would lose the small ones.
        "data_types": {"grad_accum_dtype": "bf16" if strategy.gradient_sum == "bf16" else "fp32"},
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            # One process has nothing to send; the streams and copies for it would cost the host time.
            "overlap_comm": gpu.is_available() and strategy.world_size > 1,
            "reduce_scatter": True,
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": 200_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
