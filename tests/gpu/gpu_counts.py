"""A process that counts what the host does in a step of the engine: gpu_counts.py STRATEGY PRECISION N OPTIMIZER FILE.

FILE gets, as JSON, the numbers of kernel launches, of copies and of waits for the GPU (synchronisations) of a compiled
step, and in GiB the peak of the memory of its tensors and the estimate of that. The model and the batch are those of
configs/wiki-123m.yaml, in N micro-batches. They have this size because the loss copies for each of its chunks.
"""

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_child import become_only_rank

from job.log_setup import silence_libraries
from job.model import gpu
from job.model.language_model import LanguageModel, build_model
from job.model.memory import process_memory
from job.model.spec import ModelSpec
from job.training.accelerator import Strategy, start_accelerator
from job.training.engine import Engine
from job.training.optimizer_settings import OptimizerSettings

SPEC = ModelSpec(
    hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=2048
)
VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, BATCH_SIZE = 151_646, 0, 512, 256
WARM_UP_STEPS, COUNTED_STEPS = 2, 3
_COUNTS = {"launches": 0, "copies": 2, "synchronisations": 4}
"""Numbers of the counts in `fake/runtime.c`."""
_LAUNCHING = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"}
_WAITING = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}
_COPYING = {"cudaMemcpyAsync", "cudaMemcpy"}
"""Names of CUDA's functions in a trace."""


def count(steps: Callable[[], None]) -> dict[str, int]:
    """Return the kernel launches, the copies and the synchronisations while `steps` runs."""
    libraries = ctypes.CDLL(None)
    if hasattr(libraries, "fake_count"):
        before = {name: libraries.fake_count(kind) for name, kind in _COUNTS.items()}
        steps()
        return {name: libraries.fake_count(kind) - before[name] for name, kind in _COUNTS.items()}
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile, torch.profiler.record_function("counted"):
        steps()
    events = profile.events()
    assert events is not None
    (counted,) = [event for event in events if event.name == "counted" and event.device_type.name == "CPU"]
    # The profiler itself waits for the GPU when it ends, which is after the counted steps.
    within = [event.name for event in events if event.time_range.end <= counted.time_range.end]
    return {
        "launches": sum(name in _LAUNCHING for name in within),
        "copies": sum(name in _COPYING for name in within),
        "synchronisations": sum(name in _WAITING for name in within),
    }


def main(name: str, precision: str, micro_batches: int, optimizer: str, file: Path) -> None:
    silence_libraries()
    become_only_rank()
    strategy = Strategy(name, precision, 1, BATCH_SIZE // micro_batches, micro_batches, 1.0)
    accelerator = start_accelerator(strategy)
    model = LanguageModel(build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=1))
    engine = Engine(accelerator, model, strategy, OptimizerSettings(optimizer, 0.1, 0.9, 0.95, 1e-8))
    why_not = engine.compile(CONTEXT_LENGTH)
    assert why_not is None, why_not
    tokens = torch.randint(1, VOCAB_SIZE, (BATCH_SIZE // micro_batches, CONTEXT_LENGTH + 1)).pin_memory()
    pair = tokens[:, :-1].contiguous().pin_memory(), tokens[:, 1:].contiguous().pin_memory()

    def steps(number: int) -> None:
        for _ in range(number):
            engine.step([pair] * micro_batches, micro_batches * pair[1].numel(), 1e-4)

    steps(WARM_UP_STEPS)
    counted = count(lambda: steps(COUNTED_STEPS))
    estimate = process_memory(
        SPEC, VOCAB_SIZE, optimizer=optimizer, strategy=name, precision=precision,
        micro_batch_size=BATCH_SIZE // micro_batches, context_length=CONTEXT_LENGTH, loss_chunk_tokens=None,
        world_size=1, gpu_bytes=gpu.memory_bytes(),
    )  # fmt: skip
    gibibytes = {"peak": gpu.peak_bytes(engine.device) / 2**30, "estimate": estimate.total / 2**30}
    file.write_text(json.dumps({name: number / COUNTED_STEPS for name, number in counted.items()} | gibibytes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
