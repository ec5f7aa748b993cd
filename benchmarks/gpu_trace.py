"""Profiler of the GPU benchmark: the kernels that take the time of a step, and what the host does meanwhile."""

import gzip
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_conclusions import SOFTMAX
from benchmarks.gpu_device import WARM_UP_STEPS, Clock, NotHere, needs_cuda, the_device
from benchmarks.gpu_plan import Case
from benchmarks.gpu_training import loop

STEP = "the traced step"
"""Name of the step in the trace, from its first call to the return of its last one."""
_LAUNCH = r"^cu(da)?LaunchKernel"
_COPY = r"^cu(da)?Memcpy"
_WAIT = r"^cu(da)?(Stream|Device|Event|Ctx)Synchronize|^cudaMemcpy$"
"""Regular expressions for the functions of CUDA's runtime and driver that start a kernel, copy, and wait."""
_MEMORY = "bound by memory"
_KINDS = {
    # The compiled kernel of `job.model.loss.grad_logits_`: nothing else in a step has an expm1.
    SOFTMAX: r"^triton_.*_expm1",
    # The names of these kernels of torch.compile list all operators of the graph, but they do no matrix products.
    _MEMORY: r"^triton_(poi|per|red)_",
    "attention": r"flash|fmha|attention|sdpa",
    "communication": r"nccl",
    "matrix products": r"gemm|gemv|nvjet|cutlass|xmma|wgmma|s\d+816|triton_tem|triton_mm|cublas|_mm\b|::mm\b|::bmm\b",
}
"""Regular expression for the names of each kind of kernel.

The first match decides. A kernel without a match is bound by memory.
"""


def trace(case: Case) -> dict[str, Any]:
    """Run one step under the profiler and return the kernels that took the time."""
    device = the_device()
    if case.compiles:
        needs_cuda(torch.empty(0, device=device))
    if case.trainer == "tutorial":
        raise NotHere("no case of the job was measured")
    step = loop(case, device, Clock(device)).step
    for _ in range(WARM_UP_STEPS):
        step()
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    if on_gpu:
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        with torch.profiler.record_function(STEP):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        content = path.read_bytes()
    if case.trace:
        Path(case.trace).write_bytes(gzip.compress(content))
    trace_of_step = json.loads(content)
    categories = ("kernel", "gpu_memcpy", "gpu_memset") if on_gpu else ("cpu_op",)
    return kernels(trace_of_step, categories) | host(trace_of_step)


def host(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the host did in the traced step, in a trace in Chrome's format.

    ``host_seconds`` is the time from the first call of the step to the return of the last, without the time in which a
    thread waited for the device. The profiler itself makes it longer. ``launches``, ``copies`` and ``waits`` are calls
    of CUDA. Empty if the trace does not have the step.
    """
    events = [event for event in content["traceEvents"] if event.get("ph") == "X"]
    steps = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == STEP]
    if not steps:
        return {}
    start, end = steps[0]["ts"], steps[0]["ts"] + steps[0]["dur"]
    calls = [
        event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver") and start <= event["ts"] < end
    ]
    waits = [event for event in calls if re.search(_WAIT, event["name"])]
    waited = _covered((event["ts"], min(end, event["ts"] + event["dur"])) for event in waits)
    return {
        "host_seconds": (end - start - waited) / 1e6,
        "launches": sum(bool(re.search(_LAUNCH, event["name"])) for event in calls),
        "copies": sum(bool(re.search(_COPY, event["name"])) for event in calls),
        "waits": len(waits),
    }


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of spans, each given by its start and its end."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def kernels(content: Mapping[str, Any], categories: tuple[str, ...], most: int = 20) -> dict[str, Any]:
    """Return the kernels of a trace in Chrome's format that took the most time.

    The result also has the share of each kind of kernel in the time of all kernels, ``span_seconds``: the time from the
    first to the last kernel, and ``busy``: the share of it in which a kernel ran.
    """
    events = [event for event in content["traceEvents"] if event.get("cat") in categories and event.get("ph") == "X"]
    if not events:
        return {"why": "the profiler's trace has no kernels"}
    seconds: dict[str, float] = defaultdict(float)
    times: dict[str, int] = defaultdict(int)
    for event in events:
        seconds[event["name"]] += event["dur"] / 1e6
        times[event["name"]] += 1
    total = sum(seconds.values()) or 1.0
    kinds: dict[str, float] = dict.fromkeys(_KINDS, 0.0)
    for name, name_seconds in seconds.items():
        kinds[kind_of(name)] += name_seconds
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events]
    span = max(end for _, end in spans) - min(start for start, _ in spans)
    return {
        "busy": _covered(spans) / max(span, 1e-9),
        "span_seconds": span / 1e6,
        "shares": {kind: kind_seconds / total for kind, kind_seconds in kinds.items()},
        "kernels": [
            {
                "name": name,
                "kind": kind_of(name),
                "seconds": name_seconds,
                "share": name_seconds / total,
                "times": times[name],
            }
            for name, name_seconds in sorted(seconds.items(), key=lambda item: -item[1])[:most]
        ],
    }


def kind_of(kernel: str) -> str:
    """Return the kind of work that a kernel does, judged by its name."""
    return next((kind for kind, names in _KINDS.items() if re.search(names, kernel, re.IGNORECASE)), _MEMORY)
