"""The size of the loss's chunks: how much memory their logits may take, by arithmetic alone, without torch."""

CPU_LOGITS_BYTES = 2**28
"""Budget for the fp32 logits of one chunk on a CPU. The products dominate there, so memory decides: with 151,936
entries and hidden size 512, one Zen 5 core did 196, 209, 202 and 200 tokens per second of CPU time in chunks of 128,
256, 512 and 1,024 tokens."""

UNKNOWN_GPU_BYTES = 24 * 10**9
"""Memory that a GPU is taken to have if it is not known."""


def largest_chunk_tokens(vocab_size: int, logits_bytes: int) -> int:
    """Return the largest power of two of tokens whose fp32 logits take at most `logits_bytes`; at least 1.

    A power of two divides the usual micro-batches.
    """
    return 2 ** (max(1, logits_bytes // (4 * vocab_size)).bit_length() - 1)


def device_chunk_tokens(vocab_size: int, on_gpu: bool, memory_bytes: int | None = None) -> int:
    """Return the tokens in a chunk: the most whose logits fit the budget of the device.

    Args:
        vocab_size: entries of the vocabulary.
        on_gpu: True for a GPU, False for a CPU.
        memory_bytes: all memory of the GPU; None if that is not known.
    """
    return largest_chunk_tokens(
        vocab_size, gpu_logits_bytes(memory_bytes or UNKNOWN_GPU_BYTES) if on_gpu else CPU_LOGITS_BYTES
    )


def gpu_logits_bytes(memory_bytes: int) -> int:
    """Return the budget for the fp32 logits of one chunk on a GPU: 1/16 of its memory, at most 8 GiB.

    The memory counts as the next power of two, so drivers that report a little more or less for the same card give the
    same budget: 1 GiB for cards of 12 and 16 GB, 2 GiB for 24 GB, 4 GiB for 40 and 48 GB, 8 GiB from 80 GB on. In bf16
    and fp16 the logits take half of it, so less than 1/16 of the memory. At 8 GiB they are 2^31 numbers, as many as
    Inductor's kernels index with 32 bits.

    Larger chunks move less data: in bf16 each chunk reads the head twice and adds to its fp32 gradient, 12 bytes for
    each number of the head. Each logit is written by its product, read twice and written once by the softmax, and read
    by two products: 12 bytes too. So the head's traffic is hidden_size / chunk_tokens of the logits' traffic. With
    151,646 entries and hidden size 512 that is a half on 16 GB (1,024 tokens), a quarter on 24 GB (2,048) and 1/16 on
    80 GB (8,192).

    Args:
        memory_bytes: all memory of the device.
    """
    return min(2 ** (memory_bytes - 1).bit_length() // 16, 2**33)
