"""Cross-entropy from hidden states and head weight, chunk by chunk, so that the full logits never exist."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from job.model import gpu
from job.model.chunk_size import device_chunk_tokens
from job.model.spec import IGNORE_INDEX

_ROWS_AT_ONCE = {"cpu": 8, gpu.KIND: 256}
"""Rows of logits that are in fp32 at a time: on a CPU they stay in its cache, and no second set of logits exists."""
_ENTRIES_AT_ONCE = 4096
"""Entries of the head's gradient that a CPU has in the narrow dtype at a time, before it adds them to the fp32 sum."""
GradLogits = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
"""A function like `grad_logits_`."""


def grad_logits_(logits: Tensor, targets: Tensor, vocab_size: int, gradient_scale: Tensor | None = None) -> Tensor:
    """Replace logits by the gradient of the loss, in place, and return the nats of each token, ``[tokens, 1]``.

    With ``p = softmax(logits)`` the gradient is ``p - one_hot(target)`` (Goodfellow, Bengio, Courville, Deep Learning,
    2016, section 6.2.2.3); at the target ``p - 1 = expm1(-nats)``, which is exact where p is near 1. It computes in
    fp32 (fp64 for fp64). It makes no second array of the logits' size when it is compiled.

    For CUDA, Inductor (torch 2.11, 151,680 entries, sm_90) makes one kernel with two loops over a row: the maximum and
    the sum together (Milakov and Gimelshein 2018, arXiv:1805.02867), then the gradient. So the logits are read twice
    and written once. One read would need a kernel that holds a row of 303 kB in bf16 on the chip, and a multiprocessor
    of an H100 has 256 KB of cache and shared memory (NVIDIA H100 whitepaper, 2022). For a CPU it makes one C++
    function that passes over the logits three times.

    Args:
        logits: ``[tokens, entries]``; entries from `vocab_size` on are padding and do not count.
        targets: ``[tokens, 1]``.
        vocab_size: entries of the vocabulary.
        gradient_scale: scalar fp32 factor of the gradient, applied before it is rounded; None: 1.
    """
    columns = torch.arange(logits.shape[-1], device=logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = torch.where(columns < vocab_size, wide, -torch.inf)
    is_target = columns == targets
    highest = wide.amax(-1, keepdim=True)
    log_normalizer = (wide - highest).exp().sum(-1, keepdim=True).log()
    # This is gather() as a reduction: Inductor does not put a kernel that writes to an array into the loops of one that
    # reads that array by an index. A target that is no column has infinite nats.
    logit_of_target = torch.where(is_target, wide, -torch.inf).amax(-1, keepdim=True)
    nats = log_normalizer + (highest - logit_of_target)
    gradient = torch.where(is_target, torch.expm1(-nats), (wide - highest - log_normalizer).exp())
    logits.copy_(gradient if gradient_scale is None else gradient * gradient_scale)
    return nats


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    vocab_multiple: int | None = None,
    compiled: GradLogits | None = None,
    gradient_scale: Tensor | None = None,
) -> Tensor:
    """Return the sum of ``-log softmax(hidden @ weight.T)[label]`` over the labels that are not ignored, in nats.

    The gradients of a chunk are computed while its logits exist. So forward and backward together take the three matrix
    products of the plain loss, with one chunk of logits in memory (in bf16 also a few rows of it in fp32). If no
    gradient is needed, none is computed. The logits have the dtype of the inputs, or of autocast, like the output of an
    ``nn.Linear``; softmax, loss and the weight's gradient over all chunks are fp32 (fp64 for fp64).

    The backward pass scales the saved gradients in place, so it can run once; a second backward pass
    (``retain_graph=True``) raises RuntimeError.

    fp16 needs `gradient_scale`. Its smallest number is 6e-8 and it is exact to 11 bits only from 6e-5 on (IEEE
    754-2019, binary16), but a probability among 151,646 entries is 7e-6 on average. The gradient is made in the forward
    pass, so a factor on the returned loss, as ``torch.amp.GradScaler`` applies it, is too late: the gradient is already
    rounded. If the scale is too large, the gradients have infinite or NaN entries, and the value stays as it is.

    Args:
        hidden: ``[..., hidden_size]``.
        weight: the head, ``[vocab_size, hidden_size]``.
        labels: ``[...]``, the token after each position.
        chunk_tokens: positions whose logits exist at a time; None: `default_chunk_tokens`.
        ignore_index: label of positions that do not count.
        vocab_multiple: the products are padded with zeros to a multiple of this many entries, because GPUs are slow
            with odd shapes; None: 128 on a GPU, 1 elsewhere.
        compiled: a compiled `grad_logits_`; None: PyTorch's operators one after the other.
        gradient_scale: a scalar fp32 tensor on the device, by which the gradient of the logits is multiplied before it
            is rounded to the dtype of the products. So the gradients are those of `gradient_scale` times the loss, and
            the returned value is still the loss. Its value is never read by the host. None: 1.

    Returns:
        A scalar: fp32, or fp64 for fp64 inputs. 0 if every label is ignored.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        flat = hidden.flatten(0, -2), weight, labels.flatten()
        return _LinearCrossEntropy.apply(*flat, chunk_tokens, ignore_index, vocab_multiple, compiled, gradient_scale)
    return token_nats(hidden, weight, labels, chunk_tokens, ignore_index).sum()


@torch.no_grad()
def token_nats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    vocab_multiple: int | None = None,
) -> Tensor:
    """Return the loss of every position in nats, ``[...]`` like `labels`; 0 where ignored; without a gradient."""
    flat = hidden.flatten(0, -2), weight, labels.flatten()
    found = _nats_and_gradients(*flat, chunk_tokens, ignore_index, vocab_multiple, None, None, (False, False))
    return found[0].view_as(labels)


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Return the tokens in a chunk: the most whose logits fit the budget of the device (`job.model.chunk_size`).

    A GPU's budget comes from its whole memory, not from what is free at the moment. The sums of the chunks
    depend on their size in the last bits, so the size must be the same in each step and after each resume on the same
    card. On a machine without a GPU the answer for one is that of a card of 24 GB.
    """
    on_gpu = device.type != "cpu"
    known = gpu.is_gpu(device) and gpu.is_available()
    return device_chunk_tokens(vocab_size, on_gpu, gpu.memory_bytes(device) if known else None)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int | None,
        ignore_index: int,
        vocab_multiple: int | None,
        compiled: GradLogits | None,
        gradient_scale: Tensor | None,
    ) -> Tensor:
        options = chunk_tokens, ignore_index, vocab_multiple, compiled, gradient_scale
        nats, grad_hidden, grad_weight = _nats_and_gradients(hidden, weight, labels, *options, ctx.needs_input_grad[:2])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return nats.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_dtype).mul_(grad_output)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_output).to(weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _nats_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int | None,
    ignore_index: int,
    vocab_multiple: int | None,
    compiled: GradLogits | None,
    gradient_scale: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the nats of each token ``[tokens]`` and, where wanted, the gradients of `gradient_scale` times their sum.

    The gradient of the hidden states is that of the logits (`grad_logits_`) times the weight; the gradient of the
    weight is its transpose times the hidden states.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels {tuple(labels.shape)} and hidden {tuple(hidden.shape)} are not of the same positions")
    (tokens, _), vocab_size = hidden.shape, len(weight)
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(vocab_size, hidden.device)
    chunk = min(chunk_tokens, max(tokens, 1))
    dtype = _product_dtype(hidden)
    wide = torch.promote_types(dtype, torch.float32)
    if vocab_multiple is None:
        vocab_multiple = 128 if gpu.is_gpu(hidden.device) else 1
    head = _padded(weight, dtype, -vocab_size % vocab_multiple)

    nats = hidden.new_empty(tokens, 1, dtype=wide)
    grad_hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
    grad_weight = (torch.empty_like if tokens else torch.zeros_like)(head, dtype=wide) if wanted[1] else None
    # Buffers for all chunks. Only a few rows are wide at a time: on a CPU, as many as fit its cache.
    logits_buffer = hidden.new_empty(chunk, len(head), dtype=dtype)
    rows_at_once = _ROWS_AT_ONCE.get(hidden.device.type, chunk)
    wide_buffer = hidden.new_empty(0 if dtype == wide or compiled else min(chunk, rows_at_once), len(head), dtype=wide)

    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        # Ignored tokens are masked in the inputs, which costs least: zero inputs have finite logits and add nothing to
        # the weight's gradient.
        ignored = (labels[rows] == ignore_index).unsqueeze(-1)
        targets = labels[rows].unsqueeze(-1).masked_fill(ignored, 0)
        inputs = hidden[rows].to(dtype).masked_fill(ignored, 0)
        logits = torch.mm(inputs, head.t(), out=logits_buffer[: len(inputs)])
        if compiled is not None:
            nats[rows] = compiled(logits, targets, vocab_size, gradient_scale)
        else:
            logits[:, vocab_size:].fill_(-torch.inf)
            pieces = logits.split(rows_at_once), targets.split(rows_at_once), nats[rows].split(rows_at_once)
            for piece, of_piece, nats_of_piece in zip(*pieces, strict=True):
                _grad_logits_eagerly_(piece, of_piece, nats_of_piece, wide_buffer, gradient_scale)
        # The buffer now holds the gradient of the logits.
        if grad_hidden is not None:
            torch.mm(logits, head, out=grad_hidden[rows]).masked_fill_(ignored, 0)
        if grad_weight is not None:
            _add_product_(grad_weight, logits.t(), inputs, is_first=start == 0)
        nats[rows].masked_fill_(ignored, 0)
    return nats.squeeze(-1), grad_hidden, None if grad_weight is None else grad_weight[:vocab_size]


def _padded(weight: Tensor, dtype: torch.dtype, padding: int) -> Tensor:
    """Return the weight in `dtype` with `padding` rows of zeros below it, with one pass over the weight."""
    if not padding:
        return weight.to(dtype)
    padded = weight.new_empty(len(weight) + padding, weight.shape[1], dtype=dtype)
    padded[: len(weight)].copy_(weight)
    padded[len(weight) :].zero_()
    return padded


def _add_product_(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Add ``left @ right`` to `total`, which may be of a wider dtype than the factors, without a temporary of its size.

    On a GPU the product itself adds to the fp32 numbers (cuBLAS: ``C = A B + beta C`` with C in fp32), so that it is
    never rounded to the narrow dtype, and no other kernel reads or writes `total`. PyTorch has no such product for the
    CPU.

    Args:
        total: ``[m, n]``, changed in place.
        left: ``[m, k]``.
        right: ``[k, n]``.
        is_first: write the product over whatever `total` holds, so that nobody has to fill it with zeros.
    """
    beta = 0 if is_first else 1
    if total.dtype == right.dtype:
        torch.addmm(total, left, right, beta=beta, out=total)
    elif gpu.is_gpu(total.device):
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, out=total)
    else:
        buffer = right.new_empty(min(_ENTRIES_AT_ONCE, len(total)), right.shape[1])
        for part, rows in zip(total.split(_ENTRIES_AT_ONCE), left.split(_ENTRIES_AT_ONCE), strict=True):
            product = torch.mm(rows, right, out=buffer[: len(part)])
            if is_first:
                part.copy_(product)
            else:
                part.add_(product)


def _grad_logits_eagerly_(
    logits: Tensor, targets: Tensor, nats: Tensor, buffer: Tensor, gradient_scale: Tensor | None
) -> None:
    """Do what `grad_logits_` does by operators that write to given tensors, without a temporary of the logits' size.

    Args:
        logits: as in `grad_logits_`.
        targets: as in `grad_logits_`.
        nats: output, ``[tokens, 1]``.
        buffer: memory for the fp32 logits of at least as many tokens; not used if `logits` are fp32 themselves.
        gradient_scale: as in `grad_logits_`.
    """
    highest = logits.amax(-1, keepdim=True).to(nats.dtype)
    lacking = highest - logits.gather(-1, targets)
    wide = logits if logits.dtype == nats.dtype else buffer[: len(logits)].copy_(logits)
    torch.softmax(wide, -1, out=wide)
    torch.sub(lacking, wide.amax(-1, keepdim=True).log(), out=nats)  # the largest probability is 1 / sum(exp(z - max))
    wide.scatter_(-1, targets, torch.expm1(-nats))
    if gradient_scale is not None:
        torch.mul(wide, gradient_scale, out=logits)
    elif wide is not logits:
        logits.copy_(wide)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which autocast would multiply `hidden`, or its own without autocast. fp64 is never cast."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
