"""Worker process of `benchmarks/gpu.py`: reads cases as lines of JSON, measures them and prints the results as JSON."""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu_device import NotHere, median_seconds, needs_cuda, peak_bytes, the_device
from benchmarks.gpu_losses import check, chosen_loss
from benchmarks.gpu_plan import Case
from benchmarks.gpu_trace import trace
from benchmarks.gpu_training import train
from job.log_setup import silence_libraries

LARGEST_PRODUCT = 8192


# ---- This machine: its highest rates ----


def machine(case: Case) -> dict[str, Any]:
    """Measure this machine: a large square matrix product, the product of the head, and a copy in memory."""
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
        seconds = median_seconds(device, partial(torch.mm, left, right.t(), out=out))
        reached.append({"what": what, "value": 2 * m * k * n / seconds / 1e12, "unit": "TFLOP/s"})
    source = torch.randn(side * side * 4, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(device, partial(target.copy_, source))
    reached.append({"what": "copy, read and written", "value": 8 * len(source) / seconds / 1e9, "unit": "GB/s"})
    about = f"{name}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}"
    return {"machine": about, "reached": reached}


def _versions() -> Iterator[tuple[str, str]]:
    for package in ("torch", "triton", "transformers", "accelerate", "deepspeed", "liger-kernel", "cut-cross-entropy"):
        with suppress(metadata.PackageNotFoundError):
            yield package, metadata.version(package)


# ---- The loss alone ----


def loss_alone(case: Case) -> dict[str, Any]:
    """Measure forward and backward of the loss for one micro-batch, for each size of chunk.

    As under autocast, the hidden states are bf16 and the weight of the head is fp32.
    """
    device, (spec, vocab_size) = the_device(), case.shape
    if case.compiles:
        needs_cuda(torch.empty(0, device=device))
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
            seconds = median_seconds(device, partial(once, chunk_tokens))
        except torch.OutOfMemoryError:
            chunks.append({"chunk_tokens": chunk_tokens, "why": "out of memory"})
        else:
            peak = peak_bytes(device) - before
            chunks.append({"chunk_tokens": chunk_tokens, "seconds": seconds, "peak_bytes": peak})
    return {"chunks": chunks}


# ---- The process ----


def answer(case: Case) -> dict[str, Any]:
    """Return the measurements of a case, or `why` there are none."""
    if not case.tiny and not torch.cuda.is_available():
        return {"why": "this machine has no GPU (use --tiny)"}
    measure = {"machine": machine, "check": check, "loss": loss_alone, "train": train, "trace": trace}[case.kind]
    try:
        return measure(case)
    except NotHere as missing:
        return {"why": str(missing)}
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"why": f"{type(error).__name__}: {lines[0][:200]}"}


def main() -> None:
    """Answer the cases of standard input on standard output; the output of libraries goes to standard error."""
    silence_libraries()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        fields_of_case = json.loads(line)
        case = Case(**fields_of_case | {"chunk_tokens": tuple(fields_of_case["chunk_tokens"])})
        answers.write(json.dumps(answer(case)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # Exit at once: threads of libraries that were not closed could keep this process alive.
