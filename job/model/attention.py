"""FlashAttention's kernels beside SDPA's: for documents in a row, which then need no mask, and those for Hopper GPUs.

Neither is taken on trust: they have to give what a plain computation gives on this GPU, or SDPA goes on as before.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, Qwen2Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from job.errors import one_line

PACKED = "packed_documents"
"""In transformers, the name of what attends within documents whose bounds it is told, and is SDPA where it is not."""
_TOLERANCE = 2e-2
"""Largest ``‖x - exact‖ / ‖exact‖`` of what is computed in bf16; another document's tokens change far more."""
_TRIAL_TOKENS = 1024
"""Most of a row of the trial, whose plain computation takes the square of it."""
_REASON_CHARACTERS = 200

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of queries ``[batch, heads, context_length, head_size]``, keys and values, which may have fewer heads."""


def same_document(input_ids: Tensor, eod_id: int) -> Tensor:
    """Whether a token sees another: one before it, or itself, and of the same document, which its end-of-document token
    closes. Positions need no restart, since rotary embeddings tell distances alone.

    Args:
        input_ids: ``[batch, context_length]``.

    Returns:
        The mask of attention, ``[batch, 1, context_length, context_length]``.
    """
    ends = input_ids == eod_id
    document = ends.cumsum(-1) - ends.long()
    return (document.unsqueeze(-1) == document.unsqueeze(-2)).tril().unsqueeze(1)


def document_bounds(input_ids: Tensor, eod_id: int) -> Tensor:
    """The same, as FlashAttention wants it: where each document begins when the batch's rows lie in one row, then where
    the last one ends. A row begins with a document, or what is left of one.

    Args:
        input_ids: ``[batch, context_length]``, on the CPU: how many documents there are decides the size.

    Returns:
        int32, ``[a power of two]``, so that there are few sizes to compile for: the end is repeated, which makes
        documents without a token.
    """
    begins = torch.ones_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == eod_id
    (found,) = begins.flatten().nonzero(as_tuple=True)
    bounds = torch.full((2 ** len(found).bit_length(),), input_ids.numel(), dtype=torch.int32)
    bounds[: len(found)] = found
    return bounds


def attend_within(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention within documents.

    Args:
        query: ``[batch, heads, context_length, head_size]``; `key` and `value` may have fewer heads.
        bounds: of the documents, from `document_bounds`.
        scale: of the products; None: one over the root of the head's size.

    Returns:
        ``[batch, context_length, heads, head_size]``, as transformers wants it.
    """
    batch, _, length, _ = query.shape
    # Under autocast rotary embeddings leave fp32 behind, which SDPA would round itself.
    q, k, v = (one.transpose(1, 2).flatten(0, 1).to(value.dtype) for one in (query, key, value))
    causal = (-1, 0)
    out = varlen_attn(q, k, v, bounds, bounds, length, length, scale=scale, window_size=causal, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, length))


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    bounds: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, None]:
    if bounds is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)  # type: ignore[arg-type]
        return out, None
    return attend_within(query, key, value, bounds, scaling), None


AttentionInterface.register(PACKED, _packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


# ---- Whether they are to be had here ----


def why_not_packed(config: Qwen2Config, context_length: int, device: torch.device) -> str | None:
    """None if `attend_within` gives what a mask gives, for a model of this shape in bf16; else why not, in a line."""
    length = min(context_length, _TRIAL_TOKENS)
    ids = torch.ones(2, length, dtype=torch.int64)
    ids[0, :: length // 3 or 1] = 0
    bounds, mask = document_bounds(ids, 0).to(device), same_document(ids, 0).to(device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_within(query, key, value, bounds).transpose(1, 2)

    return _why_not(attend, mask, config, device)


def why_not_flash_attention_3(config: Qwen2Config, context_length: int, device: torch.device) -> str | None:
    """None if SDPA takes FlashAttention-3 from here on, in all of this process; else why not, in a line.

    It comes with the package that is imported as `flash_attn_interface`.
    """
    if device.type != "cuda":
        return "it is for GPUs"
    length = min(context_length, _TRIAL_TOKENS)
    causal = torch.ones(2, 1, length, length, dtype=torch.bool, device=device).tril()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch_attention.activate_flash_attention_impl("FA3")
        with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    if (why_not := _why_not(attend, causal, config, device)) and torch_attention.current_flash_attention_impl():
        torch_attention.restore_flash_attention_impl()
    return why_not


def _why_not(attend: Attend, mask: Tensor, config: Qwen2Config, device: torch.device) -> str | None:
    """What is wrong with the outputs or the gradients of `attend`, if anything is."""
    generator = torch.Generator().manual_seed(2333)
    heads = (config.num_attention_heads, *2 * (config.num_key_value_heads or config.num_attention_heads,))
    size = config.hidden_size // config.num_attention_heads
    inputs = [torch.randn(2, count, mask.shape[-1], size, generator=generator) for count in heads]
    weight = torch.randn(inputs[0].shape, generator=generator).to(device, torch.bfloat16)
    exact = [one.to(device, torch.bfloat16).float().requires_grad_() for one in inputs]
    rounded = [one.detach().bfloat16().requires_grad_() for one in exact]
    try:
        found = attend(*rounded)
        q, k, v = exact
        truth = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        gradients = torch.autograd.grad(found, rounded, weight), torch.autograd.grad(truth, exact, weight.float())
        for value, wanted in zip([found, *gradients[0]], [truth, *gradients[1]], strict=True):
            error = float((value.detach().float() - wanted.detach()).norm() / wanted.detach().norm())
            if not error <= _TOLERANCE:
                return f"it is wrong by {error:.2g} here"
    except Exception as error:
        return one_line(f"{type(error).__name__}: {error}")[:_REASON_CHARACTERS]
    return None
