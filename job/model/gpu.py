"""Functions of torch.cuda that models and training use; no other module of these wings names CUDA.

Only for NVIDIA's GPUs. On AMD's, torch answers to the same names, which nobody has tried; other accelerators would need
their own here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

KIND = "cuda"
"""Type of torch's device, and value of `train.device`."""


def is_available() -> bool:
    """Return True if this process can use a GPU."""
    return torch.cuda.is_available()


def is_gpu(device: torch.device) -> bool:
    """Return True if the device is a GPU."""
    return device.type == KIND


def select(index: int) -> None:
    """Make this GPU of the node the one that this process uses."""
    torch.cuda.set_device(index)


def backend(on_gpu: bool) -> str:
    """Return the backend of torch.distributed for tensors on a GPU, or on a CPU."""
    return "nccl" if on_gpu else "gloo"


def name(device: torch.device | None = None) -> str:
    """Return the name of a GPU, such as ``NVIDIA H100 80GB HBM3``; None: of the current one."""
    return torch.cuda.get_device_name(device)


def capability(device: torch.device | None = None) -> tuple[int, int]:
    """Return the compute capability of a GPU, such as (9, 0); None: of the current one."""
    return torch.cuda.get_device_capability(device)


def memory_bytes(device: torch.device | None = None) -> int:
    """Return all memory of a GPU; None: of the current one."""
    return torch.cuda.get_device_properties(device).total_memory


def free_bytes(device: torch.device | None = None) -> int:
    """Return the memory of a GPU that this process may use: what is free, and what it holds already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process's tensors have taken on a GPU."""
    return torch.cuda.max_memory_allocated(device)


def free_cached_memory() -> None:
    """Give the memory that torch keeps for later back to the GPU, and begin a new peak; without a GPU do nothing."""
    if is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize() -> None:
    """Wait until the GPU has done all that was queued; return at once without a GPU."""
    if is_available():
        torch.cuda.synchronize()


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Let SDPA use its kernels other than cuDNN's inside the block."""
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def recorded_event() -> torch.cuda.Event:
    """Return an event that happens when the GPU has done all that is queued now."""
    event = torch.cuda.Event()
    event.record()
    return event
