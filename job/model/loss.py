"""Cross-entropy straight from hidden states and head weight, chunk by chunk: the full logits never exist."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE_INDEX = -100
"""The label of a position that predicts nothing (padding)."""


_ROWS_AT_ONCE = {"cpu": 8, "cuda": 256}
"""Of logits that go through fp32: on a CPU they stay in its cache, and nowhere is there a second set of logits."""
_ENTRIES_AT_ONCE = {"cpu": 4096}
"""Of the head's gradient in the narrow dtype, before it is added to the wide sum; on a GPU all."""
GradLogits = Callable[[Tensor, Tensor, int], Tensor]
"""As `grad_logits_`."""


def grad_logits_(logits: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Puts the gradient of the loss in the place of the logits; what follows is fp32 (fp64 for fp64).

    With ``p = softmax(logits)`` that is ``p - one_hot(target)`` (Goodfellow, Bengio, Courville, Deep Learning, 2016,
    section 6.2.2.3); at the target ``p - 1 = expm1(-nats)``, exact where p is near 1. Written to be compiled: then
    it takes few passes over the logits, and nothing of their size beside them.

    Args:
        logits: ``[tokens, entries]``; entries from `vocab_size` on are padding, and have no part in it.
        targets: ``[tokens, 1]``.

    Returns:
        The nats of each token, ``[tokens, 1]``.
    """
    columns = torch.arange(logits.shape[-1], device=logits.device)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = torch.where(columns < vocab_size, wide, -torch.inf)
    highest = wide.amax(-1, keepdim=True)
    exponentials = (wide - highest).exp()
    normalizer = exponentials.sum(-1, keepdim=True)
    nats = normalizer.log() + (highest - wide.gather(-1, targets))
    logits.copy_(torch.where(columns == targets, torch.expm1(-nats), exponentials / normalizer))
    return nats


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int | None = None,
    ignore_index: int = IGNORE_INDEX,
    vocab_multiple: int | None = None,
    compiled: GradLogits | None = None,
) -> Tensor:
    """Sum of ``-log softmax(hidden @ weight.T)[label]`` over the labels that are not ignored, in nats.

    The gradients of a chunk are computed while its logits are there, so forward and backward together are the three
    matrix products of the plain loss, and one chunk of logits is held (in bf16 few rows of it in fp32 as well).
    Where no gradient is asked for, none is computed. The logits leave their product in the dtype of the inputs, or of
    autocast, as they leave an ``nn.Linear``; softmax, loss and the sum of the weight's gradient over the chunks are
    fp32 (fp64 for fp64).

    The backward pass scales the saved gradients in place: a graph can be walked once, and a second walk
    (``retain_graph=True``) raises RuntimeError. fp16 is not for this loss: an unscaled ``softmax`` underflows in it.

    Args:
        hidden: ``[..., hidden_size]``.
        weight: the head, ``[vocab_size, hidden_size]``.
        labels: ``[...]``, the token after each position.
        chunk_tokens: positions whose logits exist at a time; None chooses (`default_chunk_tokens`).
        vocab_multiple: the products are made with so many more entries, of zeros, that their number is a multiple of
            this: of odd shapes a GPU's are slow; None: 128 on a GPU, 1 elsewhere.
        compiled: `grad_logits_`, compiled; None: the same by PyTorch's operators, one after the other.

    Returns:
        A scalar: fp32, or fp64 for fp64 inputs. 0 if every label is ignored.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        flat = hidden.flatten(0, -2), weight, labels.flatten()
        return _LinearCrossEntropy.apply(*flat, chunk_tokens, ignore_index, vocab_multiple, compiled)
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
    """The loss of every position in nats, ``[...]`` like `labels`; 0 where ignored; carries no gradient."""
    flat = hidden.flatten(0, -2), weight, labels.flatten()
    found = _nats_and_gradients(*flat, chunk_tokens, ignore_index, vocab_multiple, None, (False, False))
    return found[0].view_as(labels)


def default_chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """The largest power of two (it divides the usual micro-batches) whose fp32 logits fit the budget of the device.

    CPU, 256 MiB: the products dominate, and memory decides; with 151,936 entries and hidden size 512, one Zen 5 core
    did 196, 209, 202 and 200 tokens per second of its time in chunks of 128, 256, 512 and 1,024. Elsewhere, 2 GiB, by
    arithmetic: each chunk reads the head twice and adds to its fp32 gradient, about 16 bytes an entry of the head
    against 32 bytes a logit in bf16, so the head's traffic is hidden_size / (2 · chunk) of the logits': an eighth at
    2,048, half at 512.
    """
    budget_bytes = 2**28 if device.type == "cpu" else 2**31
    return 2 ** (max(1, budget_bytes // (4 * vocab_size)).bit_length() - 1)


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
    ) -> Tensor:
        nats, grad_hidden, grad_weight = _nats_and_gradients(
            hidden, weight, labels, chunk_tokens, ignore_index, vocab_multiple, compiled, ctx.needs_input_grad[:2]
        )
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
        return grad_hidden, grad_weight, None, None, None, None, None


def _nats_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_tokens: int | None,
    ignore_index: int,
    vocab_multiple: int | None,
    compiled: GradLogits | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The nats of each token ``[tokens]`` and, where wanted, the gradients of their sum.

    Of the logits it is what `grad_logits_` says, hence that times the weight for the hidden states, and its transpose
    times the hidden states for the weight.
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
        vocab_multiple = 128 if hidden.is_cuda else 1
    padding = -vocab_size % vocab_multiple
    head = F.pad(weight.to(dtype), (0, 0, 0, padding)) if padding else weight.to(dtype)

    nats = hidden.new_empty(tokens, 1, dtype=wide)
    grad_hidden = torch.empty_like(hidden, dtype=dtype) if wanted[0] else None
    grad_weight = torch.zeros_like(head, dtype=wide) if wanted[1] else None
    # What all chunks share. Of a chunk few rows are wide at a time: on a CPU, as many as stay in its cache.
    logits_buffer = hidden.new_empty(chunk, len(head), dtype=dtype)
    rows_at_once = _ROWS_AT_ONCE.get(hidden.device.type, chunk)
    wide_buffer = hidden.new_empty(0 if dtype == wide or compiled else min(chunk, rows_at_once), len(head), dtype=wide)
    entries_at_once = min(_ENTRIES_AT_ONCE.get(hidden.device.type, len(head)), len(head))
    summand = head.new_empty(entries_at_once if wanted[1] and dtype != wide else 0, head.shape[1])

    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        # Ignored tokens are masked on the narrow side, where it costs nothing: zero inputs have finite logits and add
        # nothing to the weight's gradient.
        ignored = (labels[rows] == ignore_index).unsqueeze(-1)
        targets = labels[rows].unsqueeze(-1).masked_fill(ignored, 0)
        inputs = hidden[rows].to(dtype).masked_fill(ignored, 0)
        logits = torch.mm(inputs, head.t(), out=logits_buffer[: len(inputs)])
        if compiled is not None:
            nats[rows] = compiled(logits, targets, vocab_size)
        else:
            logits[:, vocab_size:] = -torch.inf
            pieces = logits.split(rows_at_once), targets.split(rows_at_once), nats[rows].split(rows_at_once)
            for piece, of_piece, nats_of_piece in zip(*pieces, strict=True):
                _grad_logits_eagerly_(piece, of_piece, nats_of_piece, wide_buffer)
        # What lies there now is the gradient of the logits.
        if grad_hidden is not None:
            torch.mm(logits, head, out=grad_hidden[rows]).masked_fill_(ignored, 0)
        if grad_weight is not None and dtype == wide:
            torch.addmm(grad_weight, logits.t(), inputs, out=grad_weight)
        elif grad_weight is not None:
            parts = logits.split(entries_at_once, 1), grad_weight.split(entries_at_once)
            for part, total in zip(*parts, strict=True):
                total.add_(torch.mm(part.t(), inputs, out=summand[: len(total)]))
        nats[rows].masked_fill_(ignored, 0)
    return nats.squeeze(-1), grad_hidden, None if grad_weight is None else grad_weight[:vocab_size]


def _grad_logits_eagerly_(logits: Tensor, targets: Tensor, nats: Tensor, buffer: Tensor) -> None:
    """`grad_logits_` by operators that write where they are told to: none makes a temporary of the logits' size.

    Args:
        nats: where they go, ``[tokens, 1]``.
        buffer: room for the wide logits of at least so many tokens; not used where these are wide themselves.
    """
    highest = logits.amax(-1, keepdim=True).to(nats.dtype)
    lacking = highest - logits.gather(-1, targets)
    wide = logits if logits.dtype == nats.dtype else buffer[: len(logits)].copy_(logits)
    torch.softmax(wide, -1, out=wide)
    torch.sub(lacking, wide.amax(-1, keepdim=True).log(), out=nats)  # the largest probability is 1 / sum(exp(z - max))
    wide.scatter_(-1, targets, torch.expm1(-nats))
    if wide is not logits:
        logits.copy_(wide)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which autocast would multiply `hidden`; its own where autocast is off. fp64 is never cast."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype
