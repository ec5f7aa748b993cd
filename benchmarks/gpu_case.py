"""One process of `benchmarks/gpu.py`: takes cases as lines of JSON, measures them, answers with their numbers."""

import copy
import gzip
import inspect
import json
import math
import os
import platform
import re
import socket
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.gpu import Case
from benchmarks.machine import peak_bytes as resident_peak_bytes
from job.log_setup import silence_libraries
from job.model import architecture, loss
from job.model import flops as counts
from job.model.architecture import LanguageModel, build_model
from job.model.attention import document_bounds, why_not_flash_attention_3, why_not_packed
from job.model.spec import ModelSpec

WARM_UP_STEPS, LEAST_STEPS, MOST_STEPS = 3, 4, 30
MEASURED_SECONDS = 4.0
"""Of steps, within their least and most number."""
LEARNING_RATE, WEIGHT_DECAY, CLIPPING = 1e-4, 0.1, 1.0
LARGEST_PRODUCT = 8192
EOD_ID, DOCUMENT_TOKENS = 0, 600
"""What ends a document, and how long one is on average."""

Loss = Callable[..., Tensor]
"""The sum of the nats, of hidden states ``[..., hidden_size]``, the head's weight ``[vocab_size, hidden_size]``, labels
``[...]``, tokens in a chunk, and what only ours takes."""


class NotHere(Exception):
    """What a case needs is not on this machine."""


# ---- The losses ----


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | None = None, **_: Any) -> Tensor:
    """What everybody writes first, and transformers does: all logits, in fp32."""
    logits = F.linear(hidden, weight).flatten(0, -2)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten(), reduction="sum"
    )


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | None = None, **_: Any) -> Tensor:
    """Liger-Kernel's; its own chunks are as large as the hidden states, and very many for a large vocabulary."""
    _needs_cuda(hidden)
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise NotHere(f"{error.name} is not installed") from error
    hidden, weight = _as_autocast(hidden).flatten(0, -2), _as_autocast(weight)
    options: dict[str, Any] = {"accum_dtype": torch.float32}
    if chunk_tokens is not None:
        if "chunk_mem_const" not in inspect.signature(liger_fused_linear_cross_entropy).parameters:
            raise NotHere("this version of Liger chooses its chunks alone")
        options["chunk_mem_const"] = liger_budget(len(hidden), hidden.shape[-1], len(weight), chunk_tokens)
    return liger_fused_linear_cross_entropy(hidden, weight, labels.flatten(), reduction="sum", **options)


def liger_budget(tokens: int, hidden_size: int, vocab_size: int, chunk_tokens: int) -> int:
    """What makes Liger's chunk this power of two: it takes the one from tokens / ceil(entries / (this · hidden)) on."""
    if tokens <= chunk_tokens:
        return -(-vocab_size // hidden_size)
    return max(1, vocab_size // (hidden_size * (tokens // chunk_tokens)))


def cce(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | None = None, **_: Any) -> Tensor:
    """cut-cross-entropy's, which has no logits in the GPU's memory at all."""
    _needs_cuda(hidden)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise NotHere(f"{error.name} is not installed") from error
    hidden, weight = _as_autocast(hidden).flatten(0, -2), _as_autocast(weight)
    return linear_cross_entropy(hidden, weight, labels.flatten(), reduction="sum")


def chosen_loss(case: Case) -> Loss:
    """The loss of a case, its levers as they are set."""
    if case.loss != "ours":
        others: dict[str, Loss] = {"full logits": full_logits, "liger": liger, "cce": cce}
        return others[case.loss]
    options: dict[str, Any] = {} if case.pads_vocabulary else {"vocab_multiple": 1}
    if case.compiles:
        options["compiled"] = torch.compile(loss.grad_logits_, dynamic=False, fullgraph=True)
    return partial(loss.linear_cross_entropy, **options)


def _as_autocast(tensor: Tensor) -> Tensor:
    """In the dtype in which autocast would multiply it."""
    is_on = torch.is_autocast_enabled(tensor.device.type)
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if is_on else tensor


def _needs_cuda(tensor: Tensor) -> None:
    if not tensor.is_cuda:
        raise NotHere("CUDA only")


# ---- Time and memory ----


class Clock:
    """The device's time, phase by phase: a mark ends what went on since the one before it.

    CUDA's events: nobody waits for the device until the times are read.

    Args:
        measured_seconds: of steps, within their least and most number.
    """

    def __init__(self, device: torch.device, measured_seconds: float = MEASURED_SECONDS) -> None:
        self._on_gpu, self._measured_seconds = device.type == "cuda", measured_seconds
        self._is_running = False
        self._marks: list[tuple[str, Any]] = []
        self._step_ends: list[int] = []
        self._began = time.perf_counter()
        self._measuring_since = 0.0
        self.first_step_seconds = 0.0
        """From the beginning until it was done: the model built, and compiled."""

    @property
    def last(self) -> str:
        """The phase that ended last."""
        return self._marks[-1][0] if self._marks else ""

    def mark(self, phase: str) -> None:
        """The end of a phase; before `start` nothing is noted."""
        if not self._is_running:
            return
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def start(self) -> None:
        """The beginning of the first step."""
        self._is_running = True
        self.mark("start")

    def end_step(self) -> bool:
        """The end of a step; whether there were enough."""
        self.mark("optimizer")
        self._step_ends.append(len(self._marks))
        if len(self._step_ends) <= WARM_UP_STEPS:
            self._synchronize()
            now = time.perf_counter()
            self.first_step_seconds = self.first_step_seconds or now - self._began
            self._measuring_since = now
        measured = len(self._step_ends) - WARM_UP_STEPS
        seconds = time.perf_counter() - self._measuring_since
        return measured >= MOST_STEPS or (measured >= LEAST_STEPS and seconds >= self._measured_seconds)

    def steps(self) -> list[dict[str, float]]:
        """Seconds of each step after the warm-up, by phase."""
        self._synchronize()
        found = []
        for start, end in zip(self._step_ends[WARM_UP_STEPS - 1 :], self._step_ends[WARM_UP_STEPS:], strict=False):
            phases: dict[str, float] = defaultdict(float)
            for (_, before), (phase, after) in zip(self._marks[start - 1 : end], self._marks[start:end], strict=False):
                phases[phase] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
            found.append(dict(phases))
        return found

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def peak_bytes(device: torch.device) -> int:
    """The most memory that tensors ever had at once on a GPU; of a CPU's process, all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident_peak_bytes()


def the_device() -> torch.device:
    """The GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- This machine: what can be reached at all ----


def machine(case: Case) -> dict[str, Any]:
    """The products of the head beside a large square one, and a copy, on this machine."""
    device = the_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    versions = ", ".join(f"{package} {version}" for package, version in _versions())
    spec, vocab_size = case.shape
    tokens, side = case.micro_batch_size * case.context_length, 64 if case.tiny else LARGEST_PRODUCT
    reached = []
    for what, m, k, n in [
        (f"bf16 product {side} x {side} x {side}", side, side, side),
        (f"head, {vocab_size:,} entries", tokens, spec.hidden_size, vocab_size),
        (f"head, {-(-vocab_size // 128) * 128:,} entries", tokens, spec.hidden_size, -(-vocab_size // 128) * 128),
    ]:
        left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        right = torch.randn(n, k, device=device, dtype=torch.bfloat16)
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        seconds = _median_seconds(device, partial(torch.mm, left, right.t(), out=out))
        reached.append({"what": what, "value": 2 * m * k * n / seconds / 1e12, "unit": "TFLOP/s"})
    source = torch.randn(side * side * 4, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(device, partial(target.copy_, source))
    reached.append({"what": "copy, read and written", "value": 8 * len(source) / seconds / 1e9, "unit": "GB/s"})
    about = f"{name}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}"
    return {"machine": about, "reached": reached}


def _versions() -> Iterator[tuple[str, str]]:
    for package in ("torch", "triton", "transformers", "accelerate", "deepspeed", "liger-kernel", "cut-cross-entropy"):
        with suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)


def _median_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Of ten, after three."""
    found = []
    for _ in range(13):
        if device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work()
            after.record()
            torch.cuda.synchronize()
            found.append(before.elapsed_time(after) / 1e3)
        else:
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return statistics.median(found[3:])


# ---- Correctness ----

TOLERANCES = {
    # A loss' inputs are rounded before it: what remains is its own arithmetic.
    ("loss", "fp32"): 1e-5,
    ("gradient", "fp32"): 1e-4,
    ("loss", "bf16"): 2e-3,
    ("gradient", "bf16"): 2e-2,
    # The whole model rounds in every layer.
    ("model's loss", "fp32"): 1e-5,
    ("model's gradient", "fp32"): 1e-3,
    ("model's loss", "bf16"): 2e-3,
    ("model's gradient", "bf16"): 5e-2,
}
"""Largest ``‖x - x64‖ / ‖x64‖`` that is called right."""
TF32_TOLERANCE = 2e-3
"""For fp32 in others' kernels, which may multiply in TF32."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SMALL = ModelSpec(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128
)
_SMALL_ENTRIES, _SMALL_BATCH, _SMALL_CONTEXT, _SMALL_CHUNK = 1_003, 4, 96, 100


def check(case: Case) -> dict[str, Any]:
    """A loss, and for ours a small model with it, against the plain computation in fp64 on the CPU."""
    torch.set_float32_matmul_precision("highest")
    device = the_device()
    errors = list(loss_errors(chosen_loss(replace(case, compiles=False)), device, case.loss))
    if case.loss == "ours":
        for is_compiled in [False] + [True] * (device.type == "cuda"):
            if is_compiled:
                errors += loss_errors(chosen_loss(case), device, "ours, compiled")
            for dtype in _DTYPES:
                errors += model_errors(device, dtype, is_compiled)
    return {"errors": errors}


def loss_errors(candidate: Loss, device: torch.device, name: str) -> Iterator[dict[str, Any]]:
    """The errors of the loss itself and of both its gradients, in either precision."""
    generator = torch.Generator().manual_seed(2333)
    hidden = torch.randn(_SMALL_BATCH, _SMALL_CONTEXT, _SMALL.hidden_size, generator=generator)
    weight = torch.randn(_SMALL_ENTRIES, _SMALL.hidden_size, generator=generator)
    labels = torch.randint(_SMALL_ENTRIES, (_SMALL_BATCH, _SMALL_CONTEXT), generator=generator)
    labels[:, ::7] = -100
    for dtype_name, dtype in _DTYPES.items():
        if name == "cce" and dtype != torch.bfloat16:
            continue  # its kernels are for 16 bits
        rounded = [tensor.to(dtype) for tensor in (hidden, weight)]
        exact = [tensor.double().requires_grad_() for tensor in rounded]
        truth = full_logits(exact[0], exact[1], labels)
        truth.mul(0.5).backward()
        inputs = [tensor.to(device, copy=True).requires_grad_() for tensor in rounded]
        found = candidate(inputs[0], inputs[1], labels.to(device), _SMALL_CHUNK)
        found.mul(0.5).backward()
        is_others = name in ("liger", "cce") and dtype == torch.float32
        for what, of, value, exact_value in [
            ("loss", "", found, truth),
            ("gradient", " of the hidden states", inputs[0].grad, exact[0].grad),
            ("gradient", " of the head", inputs[1].grad, exact[1].grad),
        ]:
            tolerance = TF32_TOLERANCE if is_others else TOLERANCES[what, dtype_name]
            yield _compared(f"{name}, {dtype_name}: {what}{of}", value, exact_value, tolerance)


def model_errors(device: torch.device, dtype: str, is_compiled: bool) -> Iterator[dict[str, Any]]:
    """The errors of a small model's loss, of its whole gradient, and of the gradient of the worst of its matrices."""
    causal_lm = build_model(_SMALL, _SMALL_ENTRIES, 0, _SMALL_CONTEXT, seed=1)
    generator = torch.Generator().manual_seed(2333)
    ids, labels = torch.randint(_SMALL_ENTRIES, (2, _SMALL_BATCH, _SMALL_CONTEXT), generator=generator)
    exact = copy.deepcopy(causal_lm).double()
    truth = full_logits(exact.model(ids, use_cache=False).last_hidden_state, exact.lm_head.weight, labels)
    truth.backward()

    model = LanguageModel(causal_lm, _SMALL_CHUNK).to(device)
    if is_compiled:
        model.compile()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
        found = model(ids.to(device), labels.to(device))
    found.backward()
    name = f"model{', compiled' * is_compiled}, {dtype}"
    yield _compared(f"{name}: loss", found, truth, TOLERANCES["model's loss", dtype])
    gradients = [parameter.grad for parameter in causal_lm.parameters()]
    truths = [parameter.grad for parameter in exact.parameters()]
    tolerance = TOLERANCES["model's gradient", dtype]
    yield _compared(f"{name}: gradient", _flat(gradients), _flat(truths), tolerance)
    matrices = [
        _compared(f"{name}: gradient of its worst matrix", gradient, exact_gradient, tolerance)
        for gradient, exact_gradient in zip(gradients, truths, strict=True)
        if exact_gradient is not None and exact_gradient.ndim > 1
    ]
    yield min(matrices, key=lambda one: (one["is_right"], -one["error"]))


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])


def _compared(what: str, value: Tensor | None, truth: Any, tolerance: float) -> dict[str, Any]:
    if value is None:  # no gradient has come
        error = 1.0
    else:
        exact = truth.detach()
        error = float((value.detach().double().cpu() - exact).norm() / exact.norm())
    # What is not a number is not right; JSON has no word for it.
    is_right = error <= tolerance
    return {
        "what": what,
        "error": 1e9 if math.isnan(error) else min(error, 1e9),
        "tolerance": tolerance,
        "is_right": is_right,
    }


# ---- The loss alone ----


def loss_alone(case: Case) -> dict[str, Any]:
    """Forward and backward on the hidden states of one micro-batch, in bf16 and the head in fp32, as under autocast."""
    device, (spec, vocab_size) = the_device(), case.shape
    if case.compiles:
        _needs_cuda(torch.empty(0, device=device))
    candidate, tokens = chosen_loss(case), case.micro_batch_size * case.context_length
    hidden = torch.randn(tokens, spec.hidden_size, device=device).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(vocab_size, spec.hidden_size, device=device)).requires_grad_()
    labels = torch.randint(vocab_size, (tokens,), device=device)

    def once(chunk_tokens: int | None) -> None:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            nats = candidate(hidden, weight, labels, chunk_tokens)
        (nats / tokens).backward()

    chunks: list[dict[str, Any]] = []
    for chunk_tokens in case.chunk_tokens:
        hidden.grad = weight.grad = None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device.type == "cuda" else peak_bytes(device)
        try:
            seconds = _median_seconds(device, partial(once, chunk_tokens))
        except torch.OutOfMemoryError:
            chunks.append({"chunk_tokens": chunk_tokens, "why": "out of memory"})
        else:
            peak = peak_bytes(device) - before
            chunks.append({"chunk_tokens": chunk_tokens, "seconds": seconds, "peak_bytes": peak})
    return {"chunks": chunks}


# ---- Training ----


class FullLogits(nn.Module):
    """The model as transformers runs it, with all logits, for the same micro-batches as `LanguageModel`."""

    def __init__(self, causal_lm: Any, clock: Clock) -> None:
        super().__init__()
        self.causal_lm, self._clock = causal_lm, clock

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """The sum of the nats."""
        hidden = self.causal_lm.model(input_ids=input_ids, use_cache=False).last_hidden_state
        self._clock.mark("forward")
        nats = full_logits(hidden, self.causal_lm.lm_head.weight, labels)
        self._clock.mark("loss")
        return nats


def our_model(case: Case, clock: Clock) -> LanguageModel:
    """The job's model with the loss of the case in it, which marks its beginning and its end."""
    spec, vocab_size = case.shape
    causal_lm = build_model(spec, vocab_size, EOD_ID, case.context_length, seed=1)
    model = LanguageModel(causal_lm, case.chunk_tokens[0], case.attention in ("masked", "packed"))
    kernels = {"packed": why_not_packed, "FlashAttention-3": why_not_flash_attention_3}.get(case.attention)
    if kernels and (why_not := kernels(causal_lm.config, case.context_length, the_device())):
        raise NotHere(why_not)
    inner = chosen_loss(replace(case, compiles=False))  # if it compiles, the model gives it what was compiled

    def marked(*given: Any, **named: Any) -> Tensor:
        clock.mark("forward")
        nats = inner(*given, **named)
        clock.mark("loss")
        return nats

    architecture.linear_cross_entropy = marked
    return model


def micro_batches(case: Case) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Random tokens for one step after another, on the host."""
    _, vocab_size = case.shape
    generator = torch.Generator().manual_seed(2333)
    pin = torch.cuda.is_available() and not case.waits
    shape = (case.accumulation_steps, case.micro_batch_size, case.context_length + 1)
    while True:
        tokens = torch.randint(vocab_size, shape, generator=generator)
        tokens[torch.rand(shape, generator=generator) < 1 / DOCUMENT_TOKENS] = EOD_ID
        pairs = [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in tokens]
        yield [(ids.pin_memory(), labels.pin_memory()) for ids, labels in pairs] if pin else pairs


def levers(case: Case, device: torch.device, clock: Clock) -> Callable[[], None]:
    """A step of a loop with nothing in it but the levers."""
    if case.loss == "full logits":
        spec, vocab_size = case.shape
        model: nn.Module = FullLogits(build_model(spec, vocab_size, 0, case.context_length, 1), clock)
    else:
        ours = model = our_model(case, clock)
        if case.compiles:
            ours.compile()
    model.to(device).train()
    options: dict[str, Any] = (
        {"fused": True} if case.fuses_adamw else {}
    )  # else as torch chooses: many parameters at a time, unfused
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **options)
    batches = micro_batches(case)

    def step() -> None:
        total = torch.zeros((), device=device)
        for ids, labels in next(batches):
            given = {"input_ids": ids, "labels": labels}
            if case.attention == "packed":
                given["bounds"] = document_bounds(ids, EOD_ID)
            on_device = {name: tensor.to(device, non_blocking=not case.waits) for name, tensor in given.items()}
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

    return step


def engine(case: Case, device: torch.device, clock: Clock) -> Callable[[], None]:
    """A step of the job's own engine, in a world of one process, as torchrun would make it."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)  # a process with many tiny cases has set it up before
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if case.trainer == "zero2":
            import deepspeed  # noqa: F401
        from job.training.engine import AdamW, Engine, Strategy, start_accelerator
    except ImportError as error:
        raise NotHere(f"{error.name} is not installed") from error
    strategy = Strategy(
        name=case.trainer,
        precision="bf16",
        world_size=1,
        micro_batch_size=case.micro_batch_size,
        gradient_accumulation_steps=case.accumulation_steps,
        gradient_clipping=CLIPPING,
    )
    accelerator = start_accelerator(strategy)
    trained = Engine(accelerator, our_model(case, clock), strategy, AdamW(WEIGHT_DECAY, 0.9, 0.999, 1e-8))
    trained.model.train()
    if case.attention == "packed":
        trained.pack_documents(case.context_length)
    if case.compiles and (why_not := trained.compile(case.context_length)):
        raise RuntimeError(f"not compiled: {why_not}")
    mark_trainer(trained.model, accelerator, clock)
    batches = micro_batches(case)

    def step() -> None:
        trained.step(next(batches), case.tokens_per_step, LEARNING_RATE)

    return step


def mark_trainer(model: nn.Module, accelerator: Any, clock: Clock) -> None:
    """Marks what a trainer does around the loss, which marks itself.

    DeepSpeed steps within the last backward pass: what comes after the optimizer there belongs to it.
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
    """Steps, after some to warm up."""
    device = the_device()
    if case.compiles:
        _needs_cuda(torch.empty(0, device=device))
    clock = Clock(device, 0 if case.tiny else MEASURED_SECONDS)
    if case.trainer == "tutorial":
        tutorial(case, clock)
    else:
        step = (levers if case.trainer == "levers" else engine)(case, device, clock)
        clock.start()
        while True:
            step()
            if clock.end_step():
                break
    steps = clock.steps()
    seconds = statistics.median(sum(step.values()) for step in steps)
    spec, vocab_size = case.shape
    flops = counts.flops_per_token(spec, vocab_size, case.context_length).total
    peak = counts.peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    tokens_per_second = case.tokens_per_step / seconds
    return {
        "tokens_per_second": tokens_per_second,
        "mfu": counts.mfu(tokens_per_second, flops, peak, 1),
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
    """The tutorial's recipe by transformers.Trainer, as it is, watched from outside."""
    from benchmarks.tutorial import TutorialSize, build_model, random_windows, stand_in_tokenizer, tutorial_trainer

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = clock.end_step()

    spec, vocab_size = case.shape
    most = WARM_UP_STEPS + (LEAST_STEPS if case.tiny else MOST_STEPS)
    windows = most * case.micro_batch_size * case.accumulation_steps
    model = build_model(
        vocab_size,
        TutorialSize(**{field.name: getattr(spec, field.name) for field in fields(TutorialSize)}),
        case.context_length,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = tutorial_trainer(
            model,
            random_windows(vocab_size, case.context_length, windows),
            stand_in_tokenizer(),
            folder,
            per_device_train_batch_size=case.micro_batch_size,
            gradient_accumulation_steps=case.accumulation_steps,
            max_steps=most + 1,  # at its own last step it would save a checkpoint
            callbacks=[Steps()],
        )
        mark_trainer(model, trainer.accelerator, clock)
        its_loss: Loss = model.loss_function

        def marked(*given: Any, **named: Any) -> Tensor:
            nats = its_loss(*given, **named)
            clock.mark("loss")
            return nats

        model.loss_function = marked
        model.lm_head.register_forward_pre_hook(lambda *_: clock.mark("forward"))
        trainer.train()


# ---- The profiler's trace ----

_MEMORY = "bound by memory"
_KINDS = {
    _MEMORY: r"^triton_(poi|per|red)_",  # torch.compile's kernels are named after all they do, and do no products
    "attention": r"flash|fmha|attention|sdpa",
    "communication": r"nccl",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|wgmma|s\d+816|triton_tem|triton_mm|cublas|_mm\b|::mm\b|::bmm\b",
}
"""Names of kernels, the first that fits; all others are bound by memory."""


def trace(case: Case) -> dict[str, Any]:
    """One step under the profiler: which kernels took the time."""
    device = the_device()
    if case.compiles:
        _needs_cuda(torch.empty(0, device=device))
    if case.trainer == "tutorial":
        raise NotHere("nothing of ours was measured")
    step = (levers if case.trainer == "levers" else engine)(case, device, Clock(device))
    for _ in range(WARM_UP_STEPS):
        step()
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    if on_gpu:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        content = path.read_bytes()
    if case.trace:
        Path(case.trace).write_bytes(gzip.compress(content))
    return kernels(json.loads(content), ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",))


def kernels(content: Mapping[str, Any], categories: tuple[str, ...], most: int = 20) -> dict[str, Any]:
    """Of a trace in Chrome's format the `most` time-consuming kernels, the share of each kind, and of the time from the
    first to the last the share in which any ran."""
    events = [event for event in content["traceEvents"] if event.get("cat") in categories and event.get("ph") == "X"]
    if not events:
        return {"why": "there are no kernels in the profiler's trace"}
    seconds: dict[str, float] = defaultdict(float)
    times: dict[str, int] = defaultdict(int)
    for event in events:
        seconds[event["name"]] += event["dur"] / 1e6
        times[event["name"]] += 1
    total = sum(seconds.values()) or 1.0
    kinds: dict[str, float] = dict.fromkeys(_KINDS, 0.0)
    for name, of_name in seconds.items():
        kinds[kind_of(name)] += of_name
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    busy, until = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return {
        "busy": busy / max(until - spans[0][0], 1e-9),
        "shares": {kind: of_kind / total for kind, of_kind in kinds.items()},
        "kernels": [
            {"name": name, "kind": kind_of(name), "seconds": of_name, "share": of_name / total, "times": times[name]}
            for name, of_name in sorted(seconds.items(), key=lambda item: -item[1])[:most]
        ],
    }


def kind_of(kernel: str) -> str:
    """Which kind of work a kernel does, by its name."""
    return next((kind for kind, names in _KINDS.items() if re.search(names, kernel, re.IGNORECASE)), _MEMORY)


# ---- The process ----


def answer(case: Case) -> dict[str, Any]:
    """The numbers of a case, or why there are none."""
    if not case.tiny and not torch.cuda.is_available():
        return {"why": "no GPU here (--tiny does without)"}
    measure = {"machine": machine, "check": check, "loss": loss_alone, "train": train, "trace": trace}[case.kind]
    try:
        return measure(case)
    except NotHere as missing:
        return {"why": str(missing)}
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        return {"why": f"{type(error).__name__}: {words[0][:200]}"}


def main() -> None:
    """Cases come in on standard input; what libraries print goes where errors go."""
    silence_libraries()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        given = json.loads(line)
        case = Case(**given | {"chunk_tokens": tuple(given["chunk_tokens"])})
        answers.write(json.dumps(answer(case)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # libraries that were not closed may still have threads, which have nothing to say
