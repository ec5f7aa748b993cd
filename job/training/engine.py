"""The model and its optimizer under ZeRO-2 or DDP: one optimizer step at a time.

Which strategy runs shows nowhere above this file. The loss of a micro-batch is the sum of its nats, scaled so that the
gradient is that of the mean over all targets of the global batch, however the batch is cut into ranks and
micro-batches.

Clipping and the decision to skip a step are made here, the same for every optimizer and both strategies. DeepSpeed's
own clipping is off, and so is its search for infinities where that is possible; in fp32 it leaves out only steps that
are skipped here anyway.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from job.data.batching import divisors
from job.errors import UserError, one_line
from job.model import gpu
from job.model.attention import document_bounds, why_not_packed
from job.model.language_model import LanguageModel
from job.model.optimizer_state import optimizer_state
from job.training.accelerator import Strategy, autocast
from job.training.bad_steps import BadSteps, StepResult
from job.training.loss_scale import LossScale
from job.training.model_state import ModelState, states_of_groups
from job.training.optimizer import BUILDERS, start_state
from job.training.optimizer_settings import OptimizerSettings

_REASON_CHARACTERS = 200
"""Characters of a compiler's error that are shown; the rest is about its internals."""


class DoesNotFit(UserError):
    """A micro-batch does not fit into memory."""


class Engine:
    """A model in training.

    Args:
        accelerator: from `start_accelerator`.
        model: the model, its weights in fp32 and the same on every rank.
        strategy: as given to `start_accelerator`.
        settings: the optimizer and its settings.
    """

    def __init__(
        self, accelerator: Accelerator, model: LanguageModel, strategy: Strategy, settings: OptimizerSettings
    ) -> None:
        self.accelerator, self.strategy = accelerator, strategy
        self._is_zero2 = strategy.name == "zero2"
        kept, builder = optimizer_state(settings.name), BUILDERS[settings.name]
        named = list(model.causal_lm.named_parameters())
        # ZeRO-2 makes its fp32 weights from bf16 ones: the exact ones are put back below.
        is_rounded = self._is_zero2 and strategy.precision == "bf16"
        exact = {name: parameter.detach().clone() for name, parameter in named} if is_rounded else {}
        self._optimizer = builder.build(settings, named)
        groups = [list(group["params"]) for group in self._optimizer.param_groups]
        self.model, wrapped = accelerator.prepare(model, self._optimizer)
        self._wrapped_optimizer: Any = wrapped
        self.module: LanguageModel = accelerator.unwrap_model(self.model)
        start_state(self._optimizer, states_of_groups(named, groups, kept))
        if self._is_zero2:
            self.model.optimizer._lazy_init_hp_params_optimizer_state()  # has no public name
        self.state = ModelState(named, self._optimizer, groups, kept, self._is_zero2)
        """Weights and optimizer state, for checkpoints and the final model."""
        for name, parameter in named:
            if name in exact:
                self.state.set_weight(parameter, exact[name])
        self._loss_scale = LossScale(self.device) if strategy.precision == "fp16" else None
        self.bad_steps = BadSteps(strategy.spike_factor, self.device, self._loss_scale)
        """Judges each step, and counts those that were skipped."""
        self._scale = torch.ones((), device=self.device)  # loss scale of the current step
        self._nats = torch.zeros((), device=self.device)  # of this rank in the current step
        self._judged: tuple[Tensor, Tensor] | None = None
        self._packs_documents = False
        eod_id: Any = self.module.causal_lm.config.eos_token_id
        self._eod_id: int = eod_id
        builder.skip_bad_steps(self._optimizer, self._verdict)

    def pack_documents(self, context_length: int) -> str | None:
        """Keep documents apart without a mask from here on, where this device can (see `job.model.attention`).

        Returns:
            None on success; else one line that says why not, and steps take the mask as before.
        """
        if self.strategy.precision != "bf16":
            return "it is for bf16"
        why_not = why_not_packed(self.module.causal_lm.config, context_length, self.device)
        self._packs_documents = why_not is None
        return why_not

    def compile(self, context_length: int, **options: Any) -> str | None:
        """Run steps as compiled code from here on (`LanguageModel.compile`), after a trial.

        Args:
            context_length: tokens of a sequence in the batches to come.
            options: options of ``torch.compile``.

        Returns:
            None on success; else one line that says why not, and steps run as before.

        Raises:
            DoesNotFit: a micro-batch does not fit into memory.
        """
        try:
            self.module.compile(**options)
            self.try_micro_batch(context_length)
        except DoesNotFit:
            raise
        except Exception as error:
            self.module.interpret()
            return one_line(str(error))[:_REASON_CHARACTERS]
        return None

    def try_micro_batch(self, context_length: int) -> None:
        """Run one forward and backward pass on this rank alone; it leaves no gradient behind.

        Raises:
            DoesNotFit: a micro-batch does not fit into memory.
        """
        shape = self.strategy.micro_batch_size, context_length
        tokens = torch.full(shape, int(self._eod_id == 0))  # not the end-of-document token: each would be a document
        given = self._to_device(tokens, tokens)
        try:
            held = self._gradients_of_earlier_micro_batches()  # noqa: F841  # It takes memory during the trial.
            with self.autocast():
                nats = self.module(**given, **self._gradient_scale(1.0))
                torch.autograd.grad(nats, list(self.module.parameters()))
        except Exception as error:
            if _is_out_of_memory(error):
                raise self.does_not_fit() from error
            raise

    def _gradients_of_earlier_micro_batches(self) -> Tensor:
        """Return unused memory of the size of the gradients that a step holds from its second micro-batch on.

        DDP with several processes has the memory already, in its buckets.
        """
        strategy = self.strategy
        numbers = sum(parameter.numel() for parameter in self.module.parameters())
        if strategy.gradient_accumulation_steps == 1 or (strategy.world_size > 1 and not self._is_zero2):
            numbers = 0
        return torch.empty(numbers // (strategy.world_size if self._is_zero2 else 1), device=self.device)

    def change_micro_batch(self, micro_batch_size: int) -> None:
        """Cut this rank's share of the batch into micro-batches of another size, from the next step on.

        Args:
            micro_batch_size: sequences; it divides the rank's share.
        """
        strategy = self.strategy
        steps = strategy.micro_batch_size * strategy.gradient_accumulation_steps // micro_batch_size
        self.strategy = replace(strategy, micro_batch_size=micro_batch_size, gradient_accumulation_steps=steps)
        self.accelerator.gradient_accumulation_steps = steps
        if self._is_zero2:
            self.model.set_train_micro_batch_size(micro_batch_size)
            self.model.set_train_batch_size(micro_batch_size * steps * strategy.world_size)

    @property
    def smaller_micro_batches(self) -> list[int]:
        """Sizes at most half as large as that of the micro-batches now, of those that divide a rank's share."""
        now = self.strategy.micro_batch_size
        return [size for size in divisors(now * self.strategy.gradient_accumulation_steps) if size <= now // 2]

    @property
    def device(self) -> torch.device:
        """The device that computes the steps."""
        return self.accelerator.device

    def step(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], global_targets: int, learning_rate: float
    ) -> StepResult:
        """Do one optimizer step, unless a number is not finite or the gradient is a spike (see `BadSteps`).

        Args:
            micro_batches: this rank's ``(input_ids, labels)``, each `[micro_batch_size, context_length]`.
            global_targets: labels in the global batch, over all ranks, that are not ignored.
            learning_rate: learning rate of this step, for the groups of the optimizer without a ``rate_ratio``.

        Raises:
            DoesNotFit: a micro-batch does not fit into memory.
        """
        try:
            return self._step(micro_batches, global_targets, learning_rate)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise self.does_not_fit() from error

    def _step(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], global_targets: int, learning_rate: float
    ) -> StepResult:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate_ratio", 1.0)
        self._judged = None
        # accelerate divides by the accumulation steps, and both strategies average over the ranks.
        scale = len(micro_batches) * self.strategy.world_size / global_targets
        if self._loss_scale is not None:
            self._scale = self._loss_scale.value
        scaled = self._gradient_scale(scale / len(micro_batches))
        nats = torch.zeros((), device=self.device)
        # All copies first: from page-locked memory they take place while the device still computes the last step.
        on_device = [self._to_device(*pair) for pair in micro_batches]
        for given in on_device:
            with self.accelerator.accumulate(self.model):
                with self.autocast() if scaled else nullcontext():  # accelerate's own autocast is in the model
                    micro_nats = self.model(**given, **scaled)
                # A loss that is not finite makes every gradient NaN, hence the norm on all ranks.
                factor = len(micro_batches) if scaled else scale
                self.accelerator.backward(micro_nats * (factor + 0 * micro_nats.detach()))
                nats += micro_nats.detach()
        self._nats = nats
        if not self._is_zero2:  # DeepSpeed has stepped inside the last backward
            self._wrapped_optimizer.step()
            self._wrapped_optimizer.zero_grad()
        norm, skipped = self._judgement()
        counted = nats.where(skipped == 0, 0)
        bad = self.bad_steps
        scale_of_step = None if self._loss_scale is None else self._scale
        return StepResult(
            counted, nats, norm, skipped, bad.skipped_steps, bad.skipped_in_a_row, bad.overflowed, scale_of_step
        )

    def _gradient_scale(self, scale: float) -> dict[str, Tensor]:
        """Return the argument of the model's forward that scales its gradient in fp16; empty in other formats."""
        return {} if self._loss_scale is None else {"gradient_scale": self._scale * scale}

    def _to_device(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the arguments of the model's forward for a micro-batch that is on the CPU."""
        given = {"input_ids": input_ids, "labels": labels}
        if self._packs_documents:
            bounds = document_bounds(input_ids, self._eod_id)
            given["bounds"] = bounds.pin_memory() if gpu.is_gpu(self.device) else bounds
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in given.items()}

    def _verdict(self) -> tuple[Tensor, Tensor]:
        """Return what the gradients of this step are divided by, and whether it is skipped (see `Verdict`)."""
        norm, skipped = self._judgement()
        if not self.strategy.gradient_clipping:
            return self._scale.clone(), skipped
        return (norm / self.strategy.gradient_clipping).clamp(min=1) * self._scale, skipped

    def _judgement(self) -> tuple[Tensor, Tensor]:
        """Return the gradient norm of this step and whether it is skipped; computed once a step."""
        if self._judged is None:
            if self._is_zero2:
                found = self.model.optimizer._global_grad_norm  # the public one is still that of the step before
                norm = torch.as_tensor(found, dtype=torch.float32, device=self.device)
            else:
                gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
                norm = nn.utils.get_total_norm(gradients) / self._scale
            norm = norm.where(norm.isfinite(), torch.inf)
            loss_is_finite = None if self._loss_scale is None else self._loss_is_finite()
            self._judged = norm, self.bad_steps.judge(norm, loss_is_finite)
        return self._judged

    def _loss_is_finite(self) -> Tensor:
        """Return True if the loss of this step is finite on all ranks. A collective; the host does not wait for it."""
        is_finite = self._nats.isfinite().float()
        if self.strategy.world_size > 1:
            dist.all_reduce(is_finite, dist.ReduceOp.MIN)
        return is_finite.bool()

    def does_not_fit(self) -> "DoesNotFit":
        """Return the error for a micro-batch that does not fit into memory."""
        micro, smaller = self.strategy.micro_batch_size, self.smaller_micro_batches
        place = "GPU" if gpu.is_gpu(self.device) else "machine"
        expected = f"the {place}'s memory is full: this many sequences at a time do not fit"
        remedy = f"try {smaller[-1]}" if smaller else "take a smaller model or a smaller train.context_length"
        return DoesNotFit("train.micro_batch_size", micro, expected, remedy)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that sets the number format of training, for evaluation outside of `step`."""
        return autocast(self.accelerator, self.strategy.precision)

    def load(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], bad_steps: dict[str, Any] | None) -> None:
        """Continue after `step` steps, taken or skipped, with the weights and the optimizer state of then.

        Args:
            step: steps that were done.
            tensors: as `ModelState.read` or a checkpoint gives them, by parameter.
            bad_steps: `BadSteps.state` of then, so that the same steps are skipped from here on; None: nothing was
                skipped.
        """
        if bad_steps:
            self.bad_steps.load_state(bad_steps)
        self.state.load(step - int(self.bad_steps.skipped_steps), tensors)


_OUT_OF_MEMORY = ("can't allocate memory", "std::bad_alloc", "out of memory", "_STATUS_ALLOC_FAILED")
"""Words in the errors of the CPU's allocators, and of CUDA and its libraries."""


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if the error, or one that it follows from, is about memory."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(one in str(error) for one in _OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
