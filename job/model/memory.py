"""Estimate of the GPU memory of a training process, from the model's shape, the strategy and the micro-batch."""

from dataclasses import dataclass

from job.model.architecture import architecture_of, tensor_shapes
from job.model.chunk_size import device_chunk_tokens
from job.model.flops import parameter_counts
from job.model.optimizer_state import BYTES_PER_NUMBER, optimizer_state
from job.model.spec import ModelSpec

_NARROW = ("bf16", "fp16")
"""Precisions with two bytes a number."""
REDUCE_BUCKET = 2**24
"""Numbers of the gradient that ZeRO-2 reduces at a time; there are two such buckets. It is about a third of the layers
of the 123 M model, so that two thirds are reduced while the next layers are computed."""
_FRAGMENTATION = 0.1
"""Share of memory that torch's allocator loses to blocks of sizes that are not used again: an assumption."""
_CONTEXT_BYTES = 3 * 2**29
"""Bytes of CUDA's context, cuBLAS's workspace and NCCL's channels: an assumption."""


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes by purpose, at the peak: the end of a forward pass, or the optimizer's step."""

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    """Copies of gradients that are being reduced."""
    activations: int
    """Values of the forward pass of one micro-batch that its backward pass needs."""
    loss: int
    """One chunk of logits, and the gradient of the head."""
    step: int
    """Copies that the optimizer makes during its step, when activations and logits are gone."""
    context: int

    @property
    def total(self) -> int:
        """Bytes of all of it, and what the allocator loses."""
        held = self.weights + self.gradients + self.optimizer + self.buckets
        held += max(self.activations + self.loss, self.step)
        return round(held * (1 + _FRAGMENTATION)) + self.context


def process_memory(
    spec: ModelSpec,
    vocab_size: int,
    *,
    optimizer: str,
    strategy: str,
    precision: str,
    micro_batch_size: int,
    context_length: int,
    loss_chunk_tokens: int | None,
    world_size: int,
    gpu_bytes: int | None = None,
) -> ProcessMemory:
    """Return an upper estimate for one process of `world_size`, by the values of the settings of these names.

    Of P parameters with N processes, ZeRO-2 keeps on each (Rajbhandari et al. 2020, arXiv:1910.02054, section 5; K = 12
    for Adam) the weights in the format of the products, 1/N of the gradients, and 1/N of the fp32 weights and of the
    optimizer's state. Added to this are an fp32 copy of its part of the gradients while the optimizer steps, and the
    largest gradient before it is reduced, that of the embedding. DDP keeps weights, gradients and the optimizer's state
    in fp32, and the gradients once more in its buckets; autocast keeps copies of the layers' weights in bf16 until the
    backward pass is over.
    """
    counts, tokens = parameter_counts(spec, vocab_size), micro_batch_size * context_length
    width, head = (2 if precision in _NARROW else 4), vocab_size * spec.hidden_size
    kept_by, shapes = optimizer_state(optimizer), tensor_shapes(spec, vocab_size)
    state = kept_by.bytes_of(shapes)
    if strategy == "zero2":
        part = -(-counts.total // world_size)
        weights, kept = width * counts.total, BYTES_PER_NUMBER * part + -(-state // world_size)
        gradients = (width + (4 if width == 2 else 0)) * part + width * head
        buckets = 2 * width * min(REDUCE_BUCKET, counts.total)
    else:
        weights, kept = 4 * counts.total + (2 * counts.body if width == 2 else 0), state
        gradients = buckets = 4 * counts.total
    chunk = min(tokens, loss_chunk_tokens or device_chunk_tokens(vocab_size, on_gpu=True, memory_bytes=gpu_bytes))
    # The logits of a chunk; the gradient of the head, and in 16 bits a copy of the head.
    loss = chunk * vocab_size * width + head * (4 + (2 if width == 2 else 0))
    return ProcessMemory(
        weights=weights,
        gradients=gradients,
        optimizer=kept,
        buckets=buckets,
        activations=tokens * saved_bytes_per_token(spec, strategy, precision),
        loss=loss,
        step=kept_by.step_bytes(shapes, strategy, world_size),
        context=_CONTEXT_BYTES,
    )


def saved_bytes_per_token(spec: ModelSpec, strategy: str, precision: str) -> int:
    """Return the bytes that the forward pass keeps of one token for the backward pass.

    Counted from what autograd saves in transformers' Qwen2 and Qwen3 with flash attention, which keeps no attention
    matrix (Dao et al. 2022, arXiv:2205.14135), without recomputation (compare Korthikanti et al. 2022,
    arXiv:2205.05198, section 4). Of each norm: its input in fp32, its inverse size and its output. Of attention: the
    inputs of the products, query, key, value and output, and of a norm of query and key the same as of each norm. Of
    the feed-forward layers: gate, its SiLU, up, and their product.
    """
    hidden, layers, heads = spec.hidden_size, spec.num_hidden_layers, spec.num_attention_heads
    key_value = hidden // heads * spec.num_key_value_heads
    width = 2 if precision in _NARROW else 4
    # Under autocast the residual stream and the norms stay fp32, and each product casts its input again.
    autocast = strategy == "ddp" and precision in _NARROW
    norm = 4 * hidden + 4 + (4 if autocast else width) * hidden
    inputs = width * hidden * (6 if autocast else 3)
    attention = width * (hidden + 2 * key_value) + 4 * heads
    if architecture_of(spec).has_query_key_norm:
        # Its input comes from a product, so that autocast makes its output as narrow as the product's.
        attention += (4 + width) * (hidden + key_value) + 4 * (heads + spec.num_key_value_heads)
    feed_forward = width * 4 * spec.intermediate_size
    gradient_of_loss = width * hidden
    return (2 * layers + 1) * norm + layers * (inputs + attention + feed_forward) + gradient_of_loss
