"""The model and its optimizer under ZeRO-2 or DDP: one optimizer step at a time, and a state that fits both.

Accelerate sets the processes up; which strategy runs shows nowhere but here. A micro-batch's loss is the sum of its
nats, scaled so that the gradient is that of the mean over all targets of the global batch, however the batch is cut
into ranks and micro-batches.

Clipping and skipping are AdamW's fused kernel's, the same for both strategies. DeepSpeed's own clipping is off, and so
is its search for infinities where it can be; in fp32 it leaves out the steps that are skipped here anyway.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from job.errors import UserError, one_line
from job.model.architecture import LanguageModel
from job.model.attention import document_bounds, why_not_packed
from job.model.memory import REDUCE_BUCKET
from job.model.optimizer_state import MOMENTS
from job.training.bad_steps import Guard

_PIECE = 2**24
"""Numbers of a partition that travel at a time: a GPU needs so much room for those of others, 64 MiB."""
_REASON_CHARACTERS = 200
"""Of what a compiler says; the rest is about its inside."""


@dataclass(frozen=True)
class Strategy:
    """How the work is spread: what the settings say, checked against the world that formed."""

    name: str
    """``zero2`` or ``ddp``."""
    precision: str
    """``bf16``, ``tf32`` or ``fp32``."""
    world_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_clipping: float
    spike_factor: float | None = None
    """Of `Guard`."""


@dataclass(frozen=True)
class AdamW:
    """The optimizer's settings; decay is for matrices only."""

    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float


@dataclass(frozen=True)
class StepResult:
    """What a step came to; scalars, still on the device."""

    nats: Tensor
    """The sum over this rank's targets; 0 if the step was skipped, so that it counts in no mean."""
    computed_nats: Tensor
    """The same as it was computed, whatever that is."""
    gradient_norm: Tensor
    """Of the global gradient, before clipping; infinite if anything was not finite, on any rank."""
    skipped: Tensor
    """1.0 if all ranks left weights and moments as they were, else 0.0."""


@dataclass(frozen=True)
class Snapshot:
    """Room on the CPU for all that a checkpoint holds of a model: `Engine.copy_state` fills it, again and again."""

    flat: dict[str, Tensor]
    """``param`` and both moments: `[parameters]` each, fp32, one parameter behind the other without a gap."""
    tensors: dict[str, dict[str, Tensor]]
    """The same by a parameter's name, in that order, and shaped like it."""


def start_accelerator(strategy: Strategy, log_with: str | None = None) -> Accelerator:
    """Joins the processes of the run.

    Raises:
        RuntimeError: the world that formed is not the one asked for; training would go on silently wrong.
    """
    on_gpu = torch.cuda.is_available()
    zero2 = strategy.name == "zero2"
    if zero2:
        from deepspeed import ops

        # On a CPU it would compile a library, for inference, under a lock that outlives whoever is killed then.
        ops.__compatible_ops__ = {}
    torch.set_float32_matmul_precision("high" if strategy.precision == "tf32" else "highest")
    accelerator = Accelerator(
        mixed_precision="bf16" if strategy.precision == "bf16" else "no",
        gradient_accumulation_steps=strategy.gradient_accumulation_steps,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=_deepspeed_config(strategy)) if zero2 else None,
        # Without a backend named here, accelerate on CPU starts no process group at all under DeepSpeed.
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo"),
            # Gradients are reduced where they lie, instead of in copies: 4 bytes a parameter less.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
        cpu=not on_gpu and not zero2,
        log_with=log_with,
    )
    _check_set_up(accelerator, strategy)
    return accelerator


def _check_set_up(accelerator: Accelerator, strategy: Strategy) -> None:
    """Raises a RuntimeError if anything is not as it was asked for, such as by an environment variable."""
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
        for section in ("bf16", "zero_optimization"):
            wanted |= {f"{section}.{name}": value for name, value in decided[section].items()}
            found |= {f"{section}.{name}": formed_of[section].get(name) for name in decided[section]}
    for name, value in wanted.items():
        if found[name] != value:
            raise RuntimeError(f"{name} {value} was asked for, but accelerate set up {found[name]}")


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
        if self._zero2:
            import deepspeed.utils

            self._deepspeed = deepspeed.utils
        # ZeRO-2 makes its fp32 weights from bf16 ones: the exact ones are put back below.
        rounds = self._zero2 and strategy.precision == "bf16"
        exact = [parameter.detach().clone() for parameter in model.parameters()] if rounds else []
        self._groups = _parameter_groups(model, adamw.weight_decay)
        self._adamw = torch.optim.AdamW(
            [dict(group) for group in self._groups],
            lr=0.0,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.epsilon,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(model, self._adamw)
        self.module: LanguageModel = accelerator.unwrap_model(self.model)
        self._start_moments()
        with torch.no_grad():
            for parameter, weight in zip(self.module.parameters(), exact, strict=False):
                self._set_weight(parameter, weight)
        self.guard = Guard(strategy.spike_factor, self.device)
        """What was skipped so far, on the device."""
        self._judged: tuple[Tensor, Tensor] | None = None
        self._packs_documents = False
        eod_id: Any = self.module.causal_lm.config.eos_token_id
        self._eod_id: int = eod_id
        self._adamw.register_step_pre_hook(self._before_update)

    def pack_documents(self, context_length: int) -> str | None:
        """Has a model that masks documents do it without a mask from here on, if that is to be had here.

        Returns:
            None; or in a line why not, and steps take the mask as before (see `job.model.attention`).
        """
        if self.strategy.precision != "bf16":
            return "it is for bf16"
        why_not = why_not_packed(self.module.causal_lm.config, context_length, self.device)
        self._packs_documents = why_not is None
        return why_not

    def compile(self, context_length: int, **options: Any) -> str | None:
        """Has steps run as compiled code from here on (`LanguageModel.compile`), after one has been tried.

        The trial goes through the model and back, and leaves no gradient behind.

        Args:
            context_length: of the batches to come, whose other size is the strategy's.
            options: of ``torch.compile``.

        Returns:
            None; or in a line why it is not to be had here, and steps run as before.

        Raises:
            UserError: a micro-batch does not fit into memory.
        """
        shape = self.strategy.micro_batch_size, context_length
        tokens = torch.full(shape, int(self._eod_id == 0))  # no end of a document, lest there be as many as tokens
        given = self._to_device(tokens, tokens)
        try:
            self.module.compile(**options)
            with self.autocast():
                torch.autograd.grad(self.module(**given), list(self.module.parameters()))
        except Exception as error:
            if _is_out_of_memory(error):
                raise self._too_large() from error
            self.module.interpret()
            return one_line(str(error))[:_REASON_CHARACTERS]
        return None

    @property
    def device(self) -> torch.device:
        """Where the batches go."""
        return self.accelerator.device

    def step(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], global_targets: int, learning_rate: float
    ) -> StepResult:
        """One optimizer step, or none if its numbers are not finite or its gradient is a spike (see `Guard`).

        Args:
            micro_batches: this rank's ``(input_ids, labels)``, each `[micro_batch_size, context_length]`.
            global_targets: labels in the global batch, over all ranks, that are not ignored.
            learning_rate: of this step.

        Raises:
            UserError: a micro-batch does not fit into memory.
        """
        try:
            return self._step(micro_batches, global_targets, learning_rate)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise self._too_large() from error

    def _step(
        self, micro_batches: Sequence[tuple[Tensor, Tensor]], global_targets: int, learning_rate: float
    ) -> StepResult:
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._judged = None
        # accelerate divides by the accumulation steps, and both strategies average over the ranks.
        scale = len(micro_batches) * self.strategy.world_size / global_targets
        nats = torch.zeros((), device=self.device)
        # All copies first: from page-locked memory they take place while the device still computes the last step.
        on_device = [self._to_device(*pair) for pair in micro_batches]
        for given in on_device:
            with self.accelerator.accumulate(self.model):
                micro_nats = self.model(**given)
                # A loss that is not finite makes every gradient NaN, hence the norm on all ranks.
                self.accelerator.backward(micro_nats * (scale + 0 * micro_nats.detach()))
                nats += micro_nats.detach()
        if not self._zero2:  # DeepSpeed has stepped inside the last backward
            self.optimizer.step()
            self.optimizer.zero_grad()
        norm, skipped = self._judgement()
        return StepResult(nats.where(skipped == 0, 0), nats, norm, skipped)

    def _to_device(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What the model is given of a micro-batch on the CPU."""
        given = {"input_ids": input_ids, "labels": labels}
        if self._packs_documents:
            bounds = document_bounds(input_ids, self._eod_id)
            given["bounds"] = bounds.pin_memory() if self.device.type == "cuda" else bounds
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in given.items()}

    def _before_update(self, adamw: torch.optim.Optimizer, *_: object) -> None:
        """Tells AdamW's kernel, the way torch's GradScaler does, what to divide gradients by and whether to do nothing.

        Under ZeRO-2 it is called for each parameter group, and not at all where DeepSpeed itself left the step out.
        """
        norm, adamw.found_inf = self._judgement()  # type: ignore[attr-defined]
        if self.strategy.gradient_clipping:
            adamw.grad_scale = (norm / self.strategy.gradient_clipping).clamp(min=1)  # type: ignore[attr-defined]

    def _judgement(self) -> tuple[Tensor, Tensor]:
        """The gradient norm of this step and whether it is skipped, found once."""
        if self._judged is None:
            if self._zero2:
                found = self.model.optimizer._global_grad_norm  # the engine's public one is still the last step's
                norm = torch.as_tensor(found, dtype=torch.float32, device=self.device)
            else:
                gradients = [parameter.grad for parameter in self.module.parameters() if parameter.grad is not None]
                norm = nn.utils.get_total_norm(gradients)
            norm = norm.where(norm.isfinite(), torch.inf)
            self._judged = norm, self.guard.judge(norm)
        return self._judged

    def _too_large(self) -> UserError:
        micro = self.strategy.micro_batch_size
        of_rank = micro * self.strategy.gradient_accumulation_steps
        smaller = [size for size in range(1, micro // 2 + 1) if of_rank % size == 0]
        place = "GPU" if self.device.type == "cuda" else "machine"
        expected = f"the {place}'s memory is full: so many sequences at a time do not fit"
        remedy = f"try {smaller[-1]}" if smaller else "take a smaller model or a smaller train.context_length"
        return UserError("train.micro_batch_size", micro, expected, remedy)

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
                found = {"param": self._deepspeed.safe_get_full_fp32_param(parameter)}
                found |= {key: self._deepspeed.safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            else:
                found = {"param": parameter} | {key: self.optimizer.state[parameter][key] for key in MOMENTS}
            yield name, {key: tensor.detach().to("cpu", torch.float32) for key, tensor in found.items()}

    def empty_snapshot(self) -> Snapshot:
        """Room for `copy_state`: 12 bytes of the CPU's memory a parameter, page-locked for a GPU."""
        parameters = [parameter for group in self._groups for parameter in group["params"]]
        sizes = [parameter.numel() for parameter in parameters]
        # Ones, because pages that were never written are not there yet.
        flat = {
            key: torch.ones(sum(sizes), pin_memory=self.device.type == "cuda", device="cpu")
            for key in ("param", *MOMENTS)
        }
        names = {parameter: name for name, parameter in self.module.causal_lm.named_parameters()}
        pieces = {key: tensor.split(sizes) for key, tensor in flat.items()}
        tensors = {
            names[parameter]: {key: pieces[key][i].view_as(parameter) for key in flat}
            for i, parameter in enumerate(parameters)
        }
        return Snapshot(flat, tensors)

    @torch.no_grad()
    def copy_state(self, snapshot: Snapshot | None) -> None:
        """Fills the snapshot of rank 0 with fp32 weights and moments; training stands still meanwhile.

        A collective: every rank calls it, the others with None.
        """
        if self._zero2:
            self._collect_partitions(snapshot)
        elif snapshot is not None:
            for name, parameter in self.module.causal_lm.named_parameters():
                state = {"param": parameter, **self._adamw.state[parameter]}
                for key, destination in snapshot.tensors[name].items():
                    destination.copy_(state[key], non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _collect_partitions(self, snapshot: Snapshot | None) -> None:
        """DeepSpeed lays the parameters of a group one behind the other, and cuts that into equal parts for the ranks;
        what is left over of the last parts is padding."""
        for key in ("param", *MOMENTS):
            start = 0
            for of_model, of_rank in zip(self._groups, self._adamw.param_groups, strict=True):
                (partition,) = of_rank["params"]
                source = partition if key == "param" else self._adamw.state[partition][key]
                end = start + sum(parameter.numel() for parameter in of_model["params"])
                for owner in range(self.strategy.world_size):
                    first = start + owner * len(source)
                    for begin in range(first, min(first + len(source), end), _PIECE):
                        until = min(begin + _PIECE, first + len(source), end)
                        destination = None if snapshot is None else snapshot.flat[key][begin:until]
                        self._bring(source[begin - first : until - first], owner, destination)
                start = end

    def _bring(self, piece: Tensor, owner: int, destination: Tensor | None) -> None:
        """Copies the `piece` of rank `owner` to the `destination`, which rank 0 alone has."""
        if destination is not None:
            if owner:
                piece = torch.empty_like(piece) if piece.is_cuda else destination
                dist.recv(piece, owner)
            if piece is not destination:
                destination.copy_(piece, non_blocking=True)
        elif owner == self.accelerator.process_index:
            dist.send(piece, 0)

    def guard_state(self) -> dict[str, Any]:
        """What `load_state` takes beside weights and moments."""
        return self.guard.state()

    def load_state(
        self,
        step: int,
        parameters: Mapping[str, Mapping[str, Tensor]],
        guard_state: dict[str, Any] | None = None,
    ) -> None:
        """Takes weights and moments back in, as `full_state` gave them, after `step` steps, taken or skipped.

        With the `guard_state` of then, the same steps are skipped from here on as would have been.
        """
        if guard_state:
            self.guard.load_state(guard_state)
        for state in self._adamw.state.values():
            state["step"].fill_(step - int(self.guard.skipped_steps))
        with torch.no_grad():
            for name, parameter in self.module.causal_lm.named_parameters():
                self._set_weight(parameter, parameters[name]["param"])
                for key in MOMENTS:
                    if self._zero2:
                        self._deepspeed.safe_set_full_optimizer_state(parameter, parameters[name][key], key)
                    else:
                        self.optimizer.state[parameter][key].copy_(parameters[name][key])

    def _set_weight(self, parameter: nn.Parameter, exact: Tensor) -> None:
        if self._zero2:
            self._deepspeed.safe_set_full_fp32_param(parameter, exact)
        parameter.copy_(exact)

    def _start_moments(self) -> None:
        """Gives AdamW the state that its first step would make.

        DeepSpeed links moments to parameters after the step of the first parameter group, when the second has no
        state yet; with all states there beforehand it links them all, now.
        """
        for group in self._adamw.param_groups:
            for tensor in group["params"]:
                counter = torch.zeros((), device=tensor.device)
                self._adamw.state[tensor] = {"step": counter, **{key: torch.zeros_like(tensor) for key in MOMENTS}}
        if self._zero2:
            self.model.optimizer._lazy_init_hp_params_optimizer_state()  # has no public name


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "std::bad_alloc"))  # of the CPU's allocators


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay for matrices, the embedding among them; none for norms and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _deepspeed_config(strategy: Strategy) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": strategy.micro_batch_size,
        "gradient_accumulation_steps": strategy.gradient_accumulation_steps,
        "gradient_clipping": 0.0,  # left out, it is set to 1
        "bf16": {"enabled": strategy.precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": {
            "stage": 2,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "reduce_scatter": True,
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": 200_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
