"""FlashAttention kernels beside SDPA's: for several documents in a row without a mask, and for Hopper GPUs.

A kernel is used only if it gives the result of a plain computation on this GPU; else SDPA is used as before. Where the
lengths change from call to call, `varying_lengths` chooses among SDPA's own kernels.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import attention as torch_attention
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from job.errors import one_line
from job.model import gpu

PACKED = "packed_documents"
"""Name in transformers of the attention that stays within documents if it is given their bounds, and else is SDPA."""
_TOLERANCE = 2e-2
"""Largest accepted ``‖x - exact‖ / ‖exact‖`` in bf16; attending to another document changes far more."""
_TRIAL_TOKENS = 1024
"""Most tokens in a row of the trial, whose plain computation needs memory for their square."""
_REASON_CHARACTERS = 200
_FEWER_KEY_HEADS: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)
"""Options of `varlen_attn` that let keys and values have fewer heads. torch 2.11 needs none: it does not compare the
numbers of heads, and the kernel itself takes fewer ones."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries ``[batch, heads, context_length, head_size]``, and keys and values that may have fewer heads."""


def same_document(input_ids: Tensor, eod_id: int) -> Tensor:
    """Return the mask of causal attention within documents, ``[batch, 1, context_length, context_length]``.

    True where a token attends to another: itself or an earlier one of the same document, which ends with its
    end-of-document token. Positions need no restart, since rotary embeddings depend on distances only.

    Args:
        input_ids: ``[batch, context_length]``.
        eod_id: the end-of-document token.
    """
    ends = input_ids == eod_id
    document = ends.cumsum(-1) - ends.long()
    return (document.unsqueeze(-1) == document.unsqueeze(-2)).tril().unsqueeze(1)


def document_bounds(input_ids: Tensor, eod_id: int) -> Tensor:
    """Return where each document begins, with the batch's rows one after the other, and where the last one ends.

    This is the form that FlashAttention needs. Each row begins with a new document or the rest of one.

    Args:
        input_ids: ``[batch, context_length]``, on the CPU, since the number of documents decides the size.
        eod_id: the end-of-document token.

    Returns:
        int32, ``[a power of two]``, so that there are few sizes to compile for. The end is repeated, which makes
        documents without tokens.
    """
    begins = torch.ones_like(input_ids, dtype=torch.bool)
    begins[:, 1:] = input_ids[:, :-1] == eod_id
    (found,) = begins.flatten().nonzero(as_tuple=True)
    bounds = torch.full((2 ** len(found).bit_length(),), input_ids.numel(), dtype=torch.int32)
    bounds[: len(found)] = found
    return bounds


def attend_within(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scale: float | None = None) -> Tensor:
    """Return causal attention within documents, ``[batch, context_length, heads, head_size]``, for transformers.

    Args:
        query: ``[batch, heads, context_length, head_size]``.
        key: the same, maybe with fewer heads.
        value: the same as `key`.
        bounds: from `document_bounds`.
        scale: factor of the products; None: one over the square root of the head's size.
    """
    batch, _, length, _ = query.shape
    # Under autocast, rotary embeddings return fp32, which SDPA would round by itself.
    q, k, v = (one.transpose(1, 2).flatten(0, 1).to(value.dtype) for one in (query, key, value))
    causal = (-1, 0)
    out = varlen_attn(q, k, v, bounds, bounds, length, length, scale=scale, window_size=causal, **_FEWER_KEY_HEADS)
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


@contextmanager
def varying_lengths() -> Iterator[None]:
    """Let SDPA use FlashAttention instead of cuDNN inside the block, which suits calls of ever new lengths.

    On GPUs of compute capability 9 and 10, SDPA takes cuDNN's attention first, which makes a plan on the CPU for each
    new shape (torch from 2.11 on: ``check_prefer_cudnn_attention`` in ``cuda/sdp_utils.cpp``, ``MHAParams`` in
    ``cudnn/MHA.cpp``). A continued text has a new length with each token.

    cuDNN is switched off and not just moved behind the others by ``sdpa_kernel(..., set_priority=True)``: torch puts it
    first again in the first call of SDPA in a process, also in one inside such a block.
    """
    with gpu.without_cudnn_attention():
        yield


# ---- Whether the kernels work here ----


def why_not_packed(config: PreTrainedConfig, context_length: int, device: torch.device) -> str | None:
    """Return None if `attend_within` gives the result of a mask for a model of this shape in bf16; else why not."""
    length = min(context_length, _TRIAL_TOKENS)
    ids = torch.ones(2, length, dtype=torch.int64)
    ids[0, :: length // 3 or 1] = 0
    bounds, mask = document_bounds(ids, 0).to(device), same_document(ids, 0).to(device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_within(query, key, value, bounds).transpose(1, 2)

    return _why_not(attend, mask, config, device)


def why_not_flash_attention_3(config: PreTrainedConfig, context_length: int, device: torch.device) -> str | None:
    """Use FlashAttention-3 in SDPA from here on, in this process; return None on success, else one line why not.

    Its package is imported as `flash_attn_interface`.
    """
    if not gpu.is_gpu(device):
        return "it needs a GPU"
    length = min(context_length, _TRIAL_TOKENS)
    causal = torch.ones(2, 1, length, length, dtype=torch.bool, device=device).tril()

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch_attention.activate_flash_attention_impl("FA3")
        with torch_attention.sdpa_kernel(torch_attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    if (why_not := _why_not(attend, causal, config, device)) and torch_attention.current_flash_attention_impl():
        torch_attention.restore_flash_attention_impl()
    return why_not


def _why_not(attend: Attend, mask: Tensor, config: PreTrainedConfig, device: torch.device) -> str | None:
    """Return what is wrong with the outputs or the gradients of `attend`; None if nothing is."""
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
                return f"its result is wrong by {error:.2g} here"
    except Exception as error:
        return one_line(f"{type(error).__name__}: {error}")[:_REASON_CHARACTERS]
    return None
