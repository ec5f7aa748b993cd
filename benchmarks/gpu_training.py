"""Training steps of the GPU benchmark: the tutorial's recipe, a short loop, and the job's engine."""

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.gpu_device import (
    LEAST_STEPS,
    MEASURED_SECONDS,
    MOST_STEPS,
    WARM_UP_STEPS,
    Clock,
    NotHere,
    needs_cuda,
    peak_bytes,
    the_device,
)
from benchmarks.gpu_losses import Loss, chosen_loss, full_logits
from benchmarks.gpu_plan import Case
from job.model import flops, gpu_table, language_model
from job.model.attention import document_bounds, why_not_flash_attention_3, why_not_packed
from job.model.language_model import LanguageModel, build_model

LEARNING_RATE, WEIGHT_DECAY, CLIPPING = 1e-4, 0.1, 1.0
EOD_ID, DOCUMENT_TOKENS = 0, 600
"""The end-of-document token, and the mean length of a document."""


class Loop(NamedTuple):
    """A training loop that is set up."""

    step: Callable[[], None]
    measured: dict[str, Any]
    """Measurements that are known before the first step, by name."""


class FullLogits(nn.Module):
    """The model with full logits, as transformers runs it, with the same call as `LanguageModel`."""

    def __init__(self, causal_lm: Any, clock: Clock) -> None:
        super().__init__()
        self.causal_lm, self._clock = causal_lm, clock

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of the nats of all labels; both arguments are `[batch, context_length]`."""
        hidden = self.causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state
        self._clock.mark("forward")
        nats = full_logits(hidden, self.causal_lm.lm_head.weight, labels)
        self._clock.mark("loss")
        return nats


def our_model(case: Case, clock: Clock) -> LanguageModel:
    """Return the job's model with the loss of the case, which marks its beginning and its end on `clock`."""
    spec, vocab_size = case.shape
    causal_lm = build_model(spec, vocab_size, EOD_ID, case.context_length, seed=1)
    model = LanguageModel(causal_lm, case.chunk_tokens[0], case.attention in ("masked", "packed"))
    kernels = {"packed": why_not_packed, "FlashAttention-3": why_not_flash_attention_3}.get(case.attention)
    if kernels and (why_not := kernels(causal_lm.config, case.context_length, the_device())):
        raise NotHere(why_not)
    # A compiled model passes its compiled function to the loss, so the loss itself is not compiled here.
    inner = chosen_loss(replace(case, compiles=False))

    def marked(*given: Any, **named: Any) -> Tensor:
        clock.mark("forward")
        nats = inner(*given, **named)
        clock.mark("loss")
        return nats

    language_model.linear_cross_entropy = marked
    return model


def micro_batches(case: Case) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Generate the micro-batches of each step from random tokens, as pairs of input ids and labels on the host."""
    _, vocab_size = case.shape
    generator = torch.Generator().manual_seed(2333)
    pin = torch.cuda.is_available() and not case.waits
    shape = (case.accumulation_steps, case.micro_batch_size, case.context_length + 1)
    while True:
        tokens = torch.randint(vocab_size, shape, generator=generator)
        tokens[torch.rand(shape, generator=generator) < 1 / DOCUMENT_TOKENS] = EOD_ID
        pairs = [(sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()) for sequences in tokens]
        yield [(ids.pin_memory(), labels.pin_memory()) for ids, labels in pairs] if pin else pairs


def loop(case: Case, device: torch.device, clock: Clock) -> Loop:
    """Return the training loop of a case: the short one or that of the job's engine."""
    return (levers if case.trainer == "levers" else engine)(case, device, clock)


def levers(case: Case, device: torch.device, clock: Clock) -> Loop:
    """Return a short training loop in which each optimization can be switched off."""
    if case.loss == "full logits":
        spec, vocab_size = case.shape
        model: nn.Module = FullLogits(build_model(spec, vocab_size, 0, case.context_length, 1), clock)
    else:
        ours = model = our_model(case, clock)
        if case.compiles:
            ours.compile()
    model.to(device).train()
    # Without fusion, torch chooses its default, which updates many parameters at a time.
    options: dict[str, Any] = {"fused": True} if case.fuses_adamw else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **options)
    batches = micro_batches(case)

    def step() -> None:
        total = torch.zeros((), device=device)
        for ids, labels in next(batches):
            inputs = {"input_ids": ids, "labels": labels}
            if case.attention == "packed":
                inputs["bounds"] = document_bounds(ids, EOD_ID)
            on_device = {name: tensor.to(device, non_blocking=not case.waits) for name, tensor in inputs.items()}
            clock.mark("other")
            with torch.autocast(device.type, torch.bfloat16):
                nats = model(**on_device)
            (nats / case.tokens_per_step).backward()
            total += nats.detach()
            clock.mark("backward")
        nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        if case.waits:
            total.item()

    return Loop(step, {})


def engine(case: Case, device: torch.device, clock: Clock) -> Loop:
    """Return a loop around the job's engine in a world of one process, set up as the job does it."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # A process that runs several tiny cases has set up accelerate before.
    AcceleratorState._reset_state(reset_partial_state=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if case.trainer == "zero2":
            import deepspeed  # noqa: F401
        from job.config import Train
        from job.runs.choices import choose, largest_micro_batch
        from job.runs.world import World
        from job.training.accelerator import start_accelerator
        from job.training.distributed import weakest_hardware
        from job.training.engine import Engine
        from job.training.engine_setup import strategy_of, try_micro_batches
        from job.training.optimizer_settings import OptimizerSettings
    except ImportError as error:
        raise NotHere(f"{error.name} is not installed") from error
    settings: dict[str, Any] = {
        "strategy": case.trainer,
        "precision": case.precision,
        "micro_batch_size": "auto" if case.auto_micro_batch else case.micro_batch_size,
        "global_batch_size": case.micro_batch_size * case.accumulation_steps,
        "context_length": case.context_length,
        "loss_chunk_tokens": case.chunk_tokens[0],
        "gradient_clipping": CLIPPING,
        "compile": case.compiles,
    }
    train, world, (spec, vocab_size) = Train(**settings), World(0, 0, 1, 1), case.shape
    hardware = weakest_hardware(world, device.type)
    choices = choose(
        train,
        vocab_size,
        world.world_size,
        hardware,
        lambda strategy, precision: largest_micro_batch(train, spec, vocab_size, 1, hardware, strategy, precision),
        newest=None,
    )
    strategy = strategy_of(train, choices)
    accelerator = start_accelerator(strategy)
    trained = Engine(
        accelerator, our_model(case, clock), strategy, OptimizerSettings("adamw", WEIGHT_DECAY, 0.9, 0.999, 1e-8)
    )
    trained.model.train()
    if case.attention == "packed":
        trained.pack_documents(case.context_length)
    began = time.perf_counter()
    compiled, too_large = try_micro_batches(train, choices.may_shrink, trained, world)
    if compiled.startswith("no: "):
        raise RuntimeError(f"not compiled: {compiled.removeprefix('no: ')}")
    compile_seconds = time.perf_counter() - began
    mark_trainer(trained.model, accelerator, clock)
    micro_batch_size = trained.strategy.micro_batch_size
    accumulation_steps = trained.strategy.gradient_accumulation_steps
    measured = {
        "micro_batch_size": micro_batch_size,
        "accumulation_steps": accumulation_steps,
        "too_large": too_large,
        "compile_seconds": compile_seconds,
    }
    batches = micro_batches(replace(case, micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps))

    def step() -> None:
        trained.step(next(batches), case.tokens_per_step, LEARNING_RATE)

    return Loop(step, measured)


def mark_trainer(model: nn.Module, accelerator: Any, clock: Clock) -> None:
    """Mark the phases of a trainer around the loss; the loss marks its own phase.

    DeepSpeed runs the optimizer inside the last backward pass, so the rest of that pass counts as the optimizer.
    """
    backward = accelerator.backward

    def marked(*given: Any, **named: Any) -> None:
        backward(*given, **named)
        clock.mark("optimizer" if clock.last == "optimizer" else "backward")

    accelerator.backward = marked
    model.register_forward_pre_hook(lambda *_: clock.mark("other"))
    register_optimizer_step_pre_hook(lambda *_: clock.mark("backward" if clock.last == "loss" else "optimizer"))
    register_optimizer_step_post_hook(lambda *_: clock.mark("optimizer"))


def train(case: Case) -> dict[str, Any]:
    """Train for some steps after a warm-up and return their speed, times and memory."""
    device = the_device()
    if case.compiles:
        needs_cuda(torch.empty(0, device=device))
    clock = Clock(device, 0 if case.tiny else MEASURED_SECONDS)
    measured: dict[str, Any] = {}
    if case.trainer == "tutorial":
        tutorial(case, clock)
    else:
        step, measured = loop(case, device, clock)
        clock.start()
        while True:
            step()
            if clock.end_step():
                break
    steps = clock.steps()
    seconds = statistics.median(sum(step.values()) for step in steps)
    spec, vocab_size = case.shape
    token_flops = flops.flops_per_token(spec, vocab_size, case.context_length).total
    peak = gpu_table.peak_flops(torch.cuda.get_device_name(), case.precision) if device.type == "cuda" else None
    tokens_per_second = case.tokens_per_step / seconds
    return measured | {
        "tokens_per_second": tokens_per_second,
        "mfu": flops.mfu(tokens_per_second, token_flops, peak, 1),
        "peak_bytes": peak_bytes(device),
        "median_step_seconds": seconds,
        "step_seconds": [sum(step.values()) for step in steps],
        "phase_seconds": {
            phase: statistics.median(step.get(phase, 0.0) for step in steps)
            for phase in ("forward", "loss", "backward", "optimizer", "other")
        },
        "first_step_seconds": clock.first_step_seconds,
    }


def tutorial(case: Case, clock: Clock) -> None:
    """Train with the tutorial's unchanged recipe, `transformers.Trainer`, and time its phases with hooks."""
    from benchmarks.tutorial import TutorialSize, build_model, random_sequences, stand_in_tokenizer, tutorial_trainer

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = clock.end_step()

    spec, vocab_size = case.shape
    most_steps = WARM_UP_STEPS + (LEAST_STEPS if case.tiny else MOST_STEPS)
    sequences = most_steps * case.micro_batch_size * case.accumulation_steps
    model = build_model(
        vocab_size,
        TutorialSize(**{field.name: getattr(spec, field.name) for field in fields(TutorialSize)}),
        case.context_length,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = tutorial_trainer(
            model,
            random_sequences(vocab_size, case.context_length, sequences),
            stand_in_tokenizer(),
            folder,
            per_device_train_batch_size=case.micro_batch_size,
            gradient_accumulation_steps=case.accumulation_steps,
            max_steps=most_steps + 1,  # The Trainer saves a checkpoint at its last step, so it must not reach it.
            callbacks=[Steps()],
        )
        mark_trainer(model, trainer.accelerator, clock)
        original_loss: Loss = model.loss_function

        def marked(*given: Any, **named: Any) -> Tensor:
            nats = original_loss(*given, **named)
            clock.mark("loss")
            return nats

        model.loss_function = marked
        model.lm_head.register_forward_pre_hook(lambda *_: clock.mark("forward"))
        trainer.train()
