"""What a model costs, from its shape alone: parameters, FLOPs per token, and how much of a GPU they use (MFU)."""

import re
from dataclasses import dataclass

from job.model.spec import ModelSpec


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model: `total` is `embedding` + `body` + the biases and norms, which multiply nothing."""

    total: int
    embedding: int
    """The embedding, and the head where it is not tied to it."""
    body: int
    """The weights of the layers' matrix products: N_body."""


@dataclass(frozen=True)
class TokenFlops:
    """What one token costs, forward and backward, part by part."""

    body: int
    head: int
    attention: int

    @property
    def total(self) -> int:
        """FLOPs of one token."""
        return self.body + self.head + self.attention


def parameter_counts(spec: ModelSpec, vocab_size: int) -> ParameterCounts:
    """The parameters of the Qwen2 decoder that `build_model` makes of `spec`."""
    hidden = spec.hidden_size
    key_value = hidden // spec.num_attention_heads * spec.num_key_value_heads
    attention = 2 * hidden * hidden + 2 * hidden * key_value
    feed_forward = 3 * hidden * spec.intermediate_size
    biases = hidden + 2 * key_value
    body = spec.num_hidden_layers * (attention + feed_forward)
    embedding = vocab_size * hidden * (1 if spec.tie_word_embeddings else 2)
    vectors = spec.num_hidden_layers * (biases + 2 * hidden) + hidden
    return ParameterCounts(total=embedding + body + vectors, embedding=embedding, body=body)


def flops_per_token(spec: ModelSpec, vocab_size: int, context_length: int) -> TokenFlops:
    """``6·N_body + 6·V·d + 6·L·d·T``: two FLOPs a weight forward, four backward (Kaplan et al. 2020, arXiv:2001.08361,
    section 2.1), the head included even if tied, the embedding's look-up free; for attention ``12·L·d·T`` (Chowdhery et
    al. 2022, arXiv:2204.02311, appendix B), of which causality leaves half."""
    return TokenFlops(
        body=6 * parameter_counts(spec, vocab_size).body,
        head=6 * vocab_size * spec.hidden_size,
        attention=6 * spec.num_hidden_layers * spec.hidden_size * context_length,
    )


# NVIDIA's data sheets and, for GeForce, the GA102 and Ada white papers: dense (half of "with sparsity"), accumulated
# in fp32.
_PEAK_BF16_FLOPS = {
    r"\b(H100|H800) PCIe\b": 756e12,
    r"\b(H100|H200) NVL\b": 835.5e12,
    r"\bH100\b.*\b(SXM|HBM3)|\b(H200|H800)\b": 989.4e12,
    r"\bH20\b": 148e12,
    r"\b(A100|A800)\b": 312e12,
    r"\bL40S\b": 362e12,
    r"\bRTX 4090$": 165.2e12,
    r"\bRTX 3090$": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a GPU by the name that CUDA gives it (``NVIDIA H100 80GB HBM3``).

    None where it is not known, where there is no bf16 (V100, T4), and for a MIG slice, which is part of a GPU.
    """
    if "MIG" in device_name:
        return None
    return next((peak for name, peak in _PEAK_BF16_FLOPS.items() if re.search(name, device_name)), None)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, world_size: int) -> float | None:
    """Model FLOPs utilization, 0 to 1 (arXiv:2204.02311, appendix B): the part of the GPUs' peak that the model's own
    arithmetic uses. None without a known peak.

    Args:
        tokens_per_second: of all ranks together.
        peak: FLOP/s of one GPU.
    """
    return None if peak is None else tokens_per_second * flops_per_token / (peak * world_size)
