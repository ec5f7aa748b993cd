"""Losses of the GPU benchmark (ours, full logits, Liger-Kernel, cut-cross-entropy), and their check against fp64."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_device import (
    NotHere,
    needs_cuda,
    the_device,
)
from benchmarks.gpu_plan import Case
from job.model import loss
from job.model.language_model import LanguageModel, build_model
from job.model.spec import ModelSpec

Loss = Callable[..., Tensor]
"""A function that returns the sum of the nats.

Its arguments are hidden states ``[..., hidden_size]``, the weight of the head ``[vocab_size, hidden_size]``, labels
``[...]`` and the tokens in a chunk. Our loss takes more arguments, which the others ignore.
"""


# ---- The losses ----


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | None = None, **_: Any) -> Tensor:
    """Compute the loss from the full logits in fp32, as transformers does."""
    logits = F.linear(hidden, weight).flatten(0, -2)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.flatten(), reduction="sum"
    )


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | None = None, **_: Any) -> Tensor:
    """Compute the loss with Liger-Kernel.

    By default, the logits of one of its chunks take as much memory as the hidden states, so a large vocabulary needs
    very many chunks.
    """
    needs_cuda(hidden)
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise NotHere(f"{error.name} is not installed") from error
    hidden, weight = _as_autocast(hidden).flatten(0, -2), _as_autocast(weight)
    options: dict[str, Any] = {"accum_dtype": torch.float32}
    if chunk_tokens is not None:
        if "chunk_mem_const" not in inspect.signature(liger_fused_linear_cross_entropy).parameters:
            raise NotHere("this version of Liger-Kernel has no setting for the size of its chunks")
        options["chunk_mem_const"] = liger_budget(len(hidden), hidden.shape[-1], len(weight), chunk_tokens)
    return liger_fused_linear_cross_entropy(hidden, weight, labels.flatten(), reduction="sum", **options)


def liger_budget(tokens: int, hidden_size: int, vocab_size: int, chunk_tokens: int) -> int:
    """Return the `chunk_mem_const` with which Liger-Kernel uses chunks of `chunk_tokens` tokens, a power of two.

    Its chunk is the smallest power of two that is at least
    ``tokens / ceil(vocab_size / (chunk_mem_const * hidden_size))``.
    """
    if tokens <= chunk_tokens:
        return -(-vocab_size // hidden_size)
    return max(1, vocab_size // (hidden_size * (tokens // chunk_tokens)))


def cce(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int | None = None, **_: Any) -> Tensor:
    """Compute the loss with cut-cross-entropy, which never stores logits in the GPU's memory."""
    needs_cuda(hidden)
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise NotHere(f"{error.name} is not installed") from error
    hidden, weight = _as_autocast(hidden).flatten(0, -2), _as_autocast(weight)
    return linear_cross_entropy(hidden, weight, labels.flatten(), reduction="sum")


def chosen_loss(case: Case) -> Loss:
    """Return the loss of a case, with the options of the case."""
    if case.loss != "ours":
        others: dict[str, Loss] = {"full logits": full_logits, "liger": liger, "cce": cce}
        return others[case.loss]
    options: dict[str, Any] = {} if case.pads_vocabulary else {"vocab_multiple": 1}
    if case.compiles:
        options["compiled"] = torch.compile(loss.grad_logits_, dynamic=False, fullgraph=True)
    return partial(loss.linear_cross_entropy, **options)


def _as_autocast(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype in which autocast would multiply it."""
    is_on = torch.is_autocast_enabled(tensor.device.type)
    return tensor.to(torch.get_autocast_dtype(tensor.device.type)) if is_on else tensor


# ---- Correctness ----

TOLERANCES = {
    # The inputs of a loss are rounded before both computations, so the error is that of its own arithmetic.
    ("loss", "fp32"): 1e-5,
    ("gradient", "fp32"): 1e-4,
    ("loss", "bf16"): 2e-3,
    ("gradient", "bf16"): 2e-2,
    # The whole model rounds its numbers in every layer, so its tolerances are larger.
    ("model's loss", "fp32"): 1e-5,
    ("model's gradient", "fp32"): 1e-3,
    ("model's loss", "bf16"): 2e-3,
    ("model's gradient", "bf16"): 5e-2,
}
"""Largest relative error ``‖x - x64‖ / ‖x64‖`` that counts as right, by number and precision."""
TF32_TOLERANCE = 2e-3
"""Tolerance for fp32 in the kernels of Liger and cut-cross-entropy, which may multiply in TF32."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SMALL = ModelSpec(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128
)
_SMALL_ENTRIES, _SMALL_BATCH, _SMALL_CONTEXT, _SMALL_CHUNK = 1_003, 4, 96, 100


def check(case: Case) -> dict[str, Any]:
    """Compare a loss with the plain computation in fp64 on the CPU; our loss also inside a small model."""
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
    """Generate the relative errors of the loss and of both its gradients, in fp32 and bf16."""
    generator = torch.Generator().manual_seed(2333)
    hidden = torch.randn(_SMALL_BATCH, _SMALL_CONTEXT, _SMALL.hidden_size, generator=generator)
    weight = torch.randn(_SMALL_ENTRIES, _SMALL.hidden_size, generator=generator)
    labels = torch.randint(_SMALL_ENTRIES, (_SMALL_BATCH, _SMALL_CONTEXT), generator=generator)
    labels[:, ::7] = -100
    for dtype_name, dtype in _DTYPES.items():
        if name == "cce" and dtype != torch.bfloat16:
            continue  # The kernels of cut-cross-entropy support only 16-bit numbers.
        rounded = [tensor.to(dtype) for tensor in (hidden, weight)]
        exact = [tensor.double().requires_grad_() for tensor in rounded]
        truth = full_logits(exact[0], exact[1], labels)
        truth.mul(0.5).backward()
        inputs = [tensor.to(device, copy=True).requires_grad_() for tensor in rounded]
        nats = candidate(inputs[0], inputs[1], labels.to(device), _SMALL_CHUNK)
        nats.mul(0.5).backward()
        may_use_tf32 = name in ("liger", "cce") and dtype == torch.float32
        for what, of, value, exact_value in [
            ("loss", "", nats, truth),
            ("gradient", " of the hidden states", inputs[0].grad, exact[0].grad),
            ("gradient", " of the head", inputs[1].grad, exact[1].grad),
        ]:
            tolerance = TF32_TOLERANCE if may_use_tf32 else TOLERANCES[what, dtype_name]
            yield _compared(f"{name}, {dtype_name}: {what}{of}", value, exact_value, tolerance)


def model_errors(device: torch.device, dtype: str, is_compiled: bool) -> Iterator[dict[str, Any]]:
    """Generate the relative errors of a small model: of its loss, its whole gradient, and its worst matrix gradient."""
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
        nats = model(ids.to(device), labels.to(device))
    nats.backward()
    name = f"model{', compiled' * is_compiled}, {dtype}"
    yield _compared(f"{name}: loss", nats, truth, TOLERANCES["model's loss", dtype])
    gradients = [parameter.grad for parameter in causal_lm.parameters()]
    truths = [parameter.grad for parameter in exact.parameters()]
    tolerance = TOLERANCES["model's gradient", dtype]
    yield _compared(f"{name}: gradient", _flat(gradients), _flat(truths), tolerance)
    matrices = [
        _compared(f"{name}: gradient of its worst matrix", gradient, exact_gradient, tolerance)
        for gradient, exact_gradient in zip(gradients, truths, strict=True)
        if exact_gradient is not None and exact_gradient.ndim > 1
    ]
    yield min(matrices, key=lambda compared: (compared["is_right"], -compared["error"]))


def _flat(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])


def _compared(what: str, value: Tensor | None, truth: Any, tolerance: float) -> dict[str, Any]:
    """Return the relative error of `value` and whether it is within `tolerance`."""
    if value is None:  # A tensor without a gradient counts as a gradient of 0.
        error = 1.0
    else:
        exact = truth.detach()
        error = float((value.detach().double().cpu() - exact).norm() / exact.norm())
    # A NaN error is never right, as NaN <= tolerance is False. JSON cannot store NaN, so 1e9 stands for it.
    is_right = error <= tolerance
    return {
        "what": what,
        "error": 1e9 if math.isnan(error) else min(error, 1e9),
        "tolerance": tolerance,
        "is_right": is_right,
    }
