"""The model and its optimizer under ZeRO-2 or DDP: one optimizer step at a time, and a state that fits both.

Accelerate sets the processes up; which strategy runs shows nowhere but here. A micro-batch's loss is the sum of its
nats, scaled so that the gradient is that of the mean over all targets of the global batch, however the batch is cut
into ranks and micro-batches.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn

from job.model.architecture import LanguageModel
from job.training.checkpoint import MOMENTS


@dataclass(frozen=True)
class Strategy:
    """How the work is spread: what the settings say, checked against the world that formed."""

    name: str
    """``zero2`` or ``ddp``."""
    precision: str
    """``bf16`` or ``fp32``."""
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_clipping: float


@dataclass(frozen=True)
class AdamW:
    """The optimizer's settings; decay is for matrices only."""

    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float


def start_accelerator(strategy: Strategy, log_with: str | None = None) -> Accelerator:
    """Joins the processes of the run.

    Raises:
        RuntimeError: the world that formed is not the one asked for; training would go on silently wrong.
    """
    on_gpu = torch.cuda.is_available()
    zero2 = strategy.name == "zero2"
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints that it has loaded its library, from every process
        accelerator = Accelerator(
            mixed_precision="bf16" if strategy.precision == "bf16" else "no",
            gradient_accumulation_steps=strategy.gradient_accumulation_steps,
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_deepspeed_config(strategy)) if zero2 else None,
            # Without a backend named here, accelerate on CPU starts no process group at all under DeepSpeed.
            kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo")],
            cpu=not on_gpu and not zero2,
            log_with=log_with,
        )
    formed = (accelerator.num_processes, dist.get_world_size() if dist.is_initialized() else 1)
    if formed != (strategy.world_size, strategy.world_size):
        raise RuntimeError(f"{strategy.world_size} processes were asked for, but {formed} came together")
    kind = str(accelerator.distributed_type.value)
    if (kind == "DEEPSPEED") != zero2:
        raise RuntimeError(f"strategy {strategy.name} was asked for, but accelerate set up {kind}")
    return accelerator


class Engine:
    """A model in training.

    Args:
        accelerator: from `start_accelerator`.
        model: the model, its weights in fp32 and the same on every rank.
        strategy: as given to `start_accelerator`.
        adamw: the optimizer's settings.
    """

    def __init__(self, accelerator: Accelerator, model: LanguageModel, strategy: Strategy, adamw: AdamW) -> None:
        self.accelerator, self.strategy = accelerator, strategy
        self._zero2 = strategy.name == "zero2"
        # ZeRO-2 makes its fp32 weights from bf16 ones: the exact ones are put back below.
        rounds = self._zero2 and strategy.precision == "bf16"
        exact = [parameter.detach().clone() for parameter in model.parameters()] if rounds else []
        on_gpu = accelerator.device.type == "cuda"
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, adamw.weight_decay),
            lr=0.0,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.epsilon,
            fused=on_gpu,
            foreach=False if not on_gpu else None,
        )
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.module: LanguageModel = accelerator.unwrap_model(self.model)
        self._start_moments()
        with torch.no_grad():
            for parameter, weight in zip(self.module.parameters(), exact, strict=False):
                self._set_weight(parameter, weight)

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        return self.accelerator.device

    def step(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], global_targets: int, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step.

        Args:
            micro_batches: this rank's ``(input_ids, labels)``, each `[micro_batch_size, context_length]`.
            global_targets: labels in the global batch, over all ranks, that are not ignored.
            learning_rate: of this step.

        Returns:
            The sum of nats over this rank's targets, and the norm of the global gradient before clipping; scalars,
            still on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # accelerate divides by the accumulation steps, and both strategies average over the ranks.
        scale = len(micro_batches) * self.strategy.world_size / global_targets
        nats = torch.zeros((), device=self.device)
        for input_ids, labels in micro_batches:
            with self.accelerator.accumulate(self.model):
                micro_nats = self.model(
                    input_ids.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
                )
                self.accelerator.backward(micro_nats * scale)
                nats += micro_nats.detach()
        return nats, self._update_weights()

    def _update_weights(self) -> Tensor:
        if self._zero2:  # DeepSpeed clipped and stepped inside the last backward
            return torch.as_tensor(self.model.get_global_grad_norm(), dtype=torch.float32)
        limit = self.strategy.gradient_clipping or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def autocast(self) -> AbstractContextManager[Any]:
        """The number format of training, for evaluation outside of `step`."""
        return self.accelerator.autocast()

    # ---- The whole state, the same for both strategies ----

    def full_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name, and fp32 weight (``param``) and both moments on the CPU, of each parameter, one at a time.

        A collective: every rank has to go through it to the end, and gets the same.
        """
        for name, parameter in self.module.causal_lm.named_parameters():
            if self._zero2:
                found = {"param": safe_get_full_fp32_param(parameter)}
                found |= {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            else:
                found = {"param": parameter} | {key: self.optimizer.state[parameter][key] for key in MOMENTS}
            yield name, {key: tensor.detach().to("cpu", torch.float32) for key, tensor in found.items()}

    def load_state(self, step: int, parameters: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes weights and moments back in, as `full_state` gave them, after `step` optimizer steps."""
        for state in self._optimizer_states():
            state["step"].fill_(step)
        with torch.no_grad():
            for name, parameter in self.module.causal_lm.named_parameters():
                self._set_weight(parameter, parameters[name]["param"])
                for key in MOMENTS:
                    if self._zero2:
                        safe_set_full_optimizer_state(parameter, parameters[name][key], key)
                    else:
                        self.optimizer.state[parameter][key].copy_(parameters[name][key])

    def _set_weight(self, parameter: nn.Parameter, exact: Tensor) -> None:
        if self._zero2:
            safe_set_full_fp32_param(parameter, exact)
        parameter.copy_(exact)

    def _optimizer_states(self) -> Iterator[dict[str, Tensor]]:
        """AdamW's state of each tensor it steps: whole parameters, or under ZeRO-2 this rank's flat partitions."""
        optimizer = self.model.optimizer.optimizer if self._zero2 else self.optimizer
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                yield optimizer.state[tensor]

    def _start_moments(self) -> None:
        """Gives AdamW the state that its first step would make.

        DeepSpeed links moments to parameters after the step of the first parameter group, when the second has no
        state yet; with all states there beforehand it links them all, now.
        """
        optimizer = self.model.optimizer.optimizer if self._zero2 else self.optimizer
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                counter = torch.zeros((), device=tensor.device if group["fused"] else "cpu")
                optimizer.state[tensor] = {"step": counter, **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        if self._zero2:
            self.model.optimizer._lazy_init_hp_params_optimizer_state()  # has no public name


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices, the embedding among them; none for norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _deepspeed_config(strategy: Strategy) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": strategy.micro_batch_size,
        "gradient_accumulation_steps": strategy.gradient_accumulation_steps,
        "gradient_clipping": strategy.gradient_clipping,
        "bf16": {"enabled": strategy.precision == "bf16"},
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_scatter": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 200_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
