"""The share of a GPU's peak (MFU) that the plan assumes until a run was measured."""

from job.model.gpu_table import Gpu

ANCHORS = "the tutorial reached 11% on one A100, llm-foundry's MPT-125M 43% on eight"
"""Measured values between which the assumption for the 123 M model lies, as the plan prints them."""
_LARGE_MODEL_MFU = 0.465
_HALF_SIZE = 60e6
_A100_FLOPS_PER_BYTE = 312e12 / 2039e9
_WITHOUT_BF16 = 0.7


def assumed_mfu(flops_per_token: int, gpu: Gpu, peak: float) -> float:
    """Return the assumed model FLOPs utilization of one process, from 0 to 1.

    It is ``0.465 · n / (n + 60 M) · min(1, √(A100's peak/bandwidth ÷ this GPU's)) · (0.7 without bf16)``, where n is
    FLOPs per token / 6: the parameters in matrix products, for short sequences.

    A small model is bound by kernel launches, by memory and by the softmax over the vocabulary, so the share grows with
    n. llm-foundry reports for MPT at 512 tokens on eight A100s 42.6 % (125 M), 50.6 % (350 M), 60.7 % (1.3 B) and
    63.7 % (2.6 B), which ``0.62 · n / (n + 60 M)`` follows within 3.1 points (760 M, with 45.1 %, is an outlier: 56.9 %
    at 2,048 tokens). On eight H100s it reports 43.2 % (1.3 B) and 46.3 % (2.6 B), 0.71 and 0.73 times as much: the root
    of the ratio of the two GPUs' FLOPs per byte of memory bandwidth is 0.72. Source: mosaicml/llm-foundry,
    scripts/train/benchmarking/README.md.

    The plan assumes three quarters of that, hence 0.465, because that framework was tuned for these GPUs, while the
    tutorial that this project follows reached 11 % with the 123 M model on one A100. That factor is an assumption, and
    so is 0.7 for Turing and Volta, which have no FlashAttention kernels; a T4 also lowers its clock at 70 W.

    Args:
        flops_per_token: FLOPs of one training token, forward and backward.
        gpu: the GPU.
        peak: its peak FLOP/s in the precision that is used.
    """
    size = flops_per_token / 6
    flops_per_byte = peak / gpu.memory_bandwidth
    memory_factor = min(1.0, (_A100_FLOPS_PER_BYTE / flops_per_byte) ** 0.5)
    generation_factor = 1.0 if gpu.bf16_flops is not None else _WITHOUT_BF16
    return _LARGE_MODEL_MFU * size / (size + _HALF_SIZE) * memory_factor * generation_factor
