"""A stand-in for FlashAttention's variable-length kernels on a CPU, forward and backward, as torch calls them.

It refuses the same arguments as the real kernels, except that it accepts fp32, which makes tests more precise.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import _scoped_library


def probabilities(query: Tensor, key: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """Return the attention weights within each document, `[heads, tokens, tokens]`."""
    document = torch.bucketize(torch.arange(len(query)), bounds, right=True)
    seen = (document.unsqueeze(-1) == document).tril()
    scores = scale * torch.einsum("qhd,khd->hqk", query, repeated(key, query))
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def repeated(of_few: Tensor, query: Tensor) -> Tensor:
    """Return keys or values repeated for each query head."""
    return of_few.repeat_interleave(query.shape[1] // of_few.shape[1], dim=1)


def summed(of_many: Tensor, key: Tensor) -> Tensor:
    """Return the gradient of keys or values from the gradient of what `repeated` returned."""
    return of_many.unflatten(1, (key.shape[1], -1)).sum(2)


def like(given: Tensor, content: Tensor) -> Tensor:
    """Return `content` with the dtype and memory layout of `given`, on which compiled code relies."""
    return torch.empty_like(given).copy_(content)


@contextmanager
def flash_kernels(minds_bounds: bool = True) -> Iterator[list[torch.dtype]]:
    """Register the kernels inside the block. Yields a list of the dtypes with which they were called.

    Args:
        minds_bounds: False: treat all documents as one, like a broken kernel.
    """
    dtypes: list[torch.dtype] = []

    def accept(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, *options: Any) -> Tensor:
        assert query.dtype == key.dtype == value.dtype and bounds.dtype == torch.int32
        assert query.dim() == key.dim() == value.dim() == 3 and key.shape == value.shape
        assert all(one.stride(-1) == 1 for one in (query, key, value))
        assert options == (0.0, True), "dropout, or not causal"
        assert (
            bounds[0] == 0 and bounds[-1] == len(query) and 0 <= bounds.diff().min() <= bounds.diff().max() <= longest
        )
        dtypes.append(query.dtype)
        return bounds if minds_bounds else bounds[[0, -1]]

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Tensor,
        bounds_of_keys: Tensor,
        longest: int,
        longest_of_keys: int,
        dropout: float,
        is_causal: bool,
        return_debug_mask: bool,
        *,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, ...]:
        assert (window_size_left, window_size_right) == (-1, 0)
        bounds = accept(query, key, value, bounds, longest, dropout, is_causal)
        q, k, v = (one.float() for one in (query, key, value))
        taken = probabilities(q, k, bounds, scale or q.shape[-1] ** -0.5)
        out = like(query, torch.einsum("hqk,khd->qhd", taken, repeated(v, q)))
        nothing = torch.empty(0)
        return out, torch.zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64), nothing, nothing

    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        bounds: Tensor,
        bounds_of_keys: Tensor,
        longest: int,
        longest_of_keys: int,
        dropout: float,
        is_causal: bool,
        rng_state: Tensor,
        unused: Tensor,
        *,
        scale: float | None = None,
        **others: Any,
    ) -> tuple[Tensor, ...]:
        bounds = accept(query, key, value, bounds, longest, dropout, is_causal)
        q, k, v, grad = (one.float() for one in (query, key, value, grad_out))
        scale = scale or q.shape[-1] ** -0.5
        taken = probabilities(q, k, bounds, scale)
        grad_taken = torch.einsum("qhd,khd->hqk", grad, repeated(v, q))
        grad_scores = scale * taken * (grad_taken - (grad_taken * taken).sum(-1, keepdim=True))
        return (
            like(query, torch.einsum("hqk,khd->qhd", grad_scores, repeated(k, q))),
            like(key, summed(torch.einsum("hqk,qhd->khd", grad_scores, q), k)),
            like(value, summed(torch.einsum("hqk,qhd->khd", taken, grad), v)),
        )

    with _scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield dtypes
