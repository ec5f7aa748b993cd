"""What a training process keeps in the memory of its GPU, from the model's shape, the strategy and the micro-batch."""

from dataclasses import dataclass
from typing import Literal

from job.model.flops import parameter_counts
from job.model.spec import ModelSpec

_LOGITS_BYTES = {"cuda": 2**31, "cpu": 2**28}
"""Budget of the logits that exist at once, as `job.model.loss.default_chunk_tokens` has it."""
REDUCE_BUCKET = 2**24
"""Numbers of the gradient that ZeRO-2 reduces at a time, with room for two such: about a third of the layers of the
123 M model, so that two thirds travel while the next are computed."""
_FRAGMENTATION = 0.1
"""Of torch's allocator, which keeps blocks of sizes that nobody asks for again: an assumption."""
_CONTEXT_BYTES = {"cuda": 3 * 2**29, "cpu": 2**29}
"""CUDA's context, cuBLAS's workspace and NCCL's channels, or Python and its libraries: an assumption."""


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes by what they are for, at the moment when most are taken: the end of a forward pass."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    """In which gradients travel."""
    activations: int
    """What the backward pass of one micro-batch needs."""
    loss: int
    """A chunk of logits, and the head's gradient."""
    context: int

    @property
    def total(self) -> int:
        """All of it, with what the allocator loses."""
        held = self.weights + self.gradients + self.optimizer + self.buckets + self.activations + self.loss
        return round(held * (1 + _FRAGMENTATION)) + self.context


def process_memory(
    spec: ModelSpec,
    vocab_size: int,
    *,
    strategy: Literal["zero2", "ddp"],
    precision: Literal["bf16", "tf32", "fp32"],
    micro_batch_size: int,
    context_length: int,
    loss_chunk_tokens: int | None,
    world_size: int,
    device: Literal["cuda", "cpu"] = "cuda",
) -> ProcessMemory:
    """An upper estimate for one process of `world_size`.

    Of P parameters with N processes, ZeRO-2 keeps on each (Rajbhandari et al. 2020, arXiv:1910.02054, section 5; K = 12
    for Adam) the weights in the format of the products, 1/N of the gradients and 1/N of fp32 weights and both moments;
    to which come an fp32 copy of its part of the gradients, when the optimizer steps, and the largest gradient before
    it is reduced, the embedding's. DDP keeps weights, gradients and moments in fp32, and the gradients once more in its
    buckets; autocast keeps copies of the layers' weights in bf16 until the backward pass is over.
    """
    counts, tokens = parameter_counts(spec, vocab_size), micro_batch_size * context_length
    width, head = (2 if precision == "bf16" else 4), vocab_size * spec.hidden_size
    if strategy == "zero2":
        part = -(-counts.total // world_size)
        weights, optimizer = width * counts.total, 12 * part
        gradients = (width + (4 if width == 2 else 0)) * part + width * head
        buckets = 2 * width * min(REDUCE_BUCKET, counts.total)
    else:
        weights, optimizer = 4 * counts.total + (2 * counts.body if width == 2 else 0), 8 * counts.total
        gradients = buckets = 4 * counts.total
    chunk = min(tokens, loss_chunk_tokens or _default_chunk_tokens(vocab_size, device))
    # The chunk's logits; the head's gradient, and in bf16 its next summand and the head's own copy.
    loss = chunk * vocab_size * width + head * (4 + (4 if width == 2 else 0))
    return ProcessMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buckets=buckets,
        activations=tokens * saved_bytes_per_token(spec, strategy, precision),
        loss=loss,
        context=_CONTEXT_BYTES[device],
    )


def saved_bytes_per_token(
    spec: ModelSpec, strategy: Literal["zero2", "ddp"], precision: Literal["bf16", "tf32", "fp32"]
) -> int:
    """What the forward pass keeps of one token for the backward pass, in bytes.

    Counted from what autograd saves in transformers' Qwen2 with flash attention, which keeps no attention matrix (Dao
    et al. 2022, arXiv:2205.14135), without recomputation (compare Korthikanti et al. 2022, arXiv:2205.05198, section
    4): of each norm its input in fp32, the inverse of its size and what it gives; the inputs of the products; query,
    key, value and the sum of the attention; and in the feed-forward layers gate, its SiLU, up, and their product.
    """
    hidden, layers, heads = spec.hidden_size, spec.num_hidden_layers, spec.num_attention_heads
    key_value = hidden // heads * spec.num_key_value_heads
    width = 2 if precision == "bf16" else 4
    # Autocast lets the residual stream and the norms stay fp32, and casts what it gives to each product anew.
    autocast = strategy == "ddp" and precision == "bf16"
    norm = 4 * hidden + 4 + (4 if autocast else width) * hidden
    inputs = width * hidden * (6 if autocast else 3)
    attention = width * (hidden + 2 * key_value) + 4 * heads
    feed_forward = width * 4 * spec.intermediate_size
    gradient_of_loss = width * hidden
    return (2 * layers + 1) * norm + layers * (inputs + attention + feed_forward) + gradient_of_loss


def _default_chunk_tokens(vocab_size: int, device: Literal["cuda", "cpu"]) -> int:
    return 2 ** (max(1, _LOGITS_BYTES[device] // (4 * vocab_size)).bit_length() - 1)
