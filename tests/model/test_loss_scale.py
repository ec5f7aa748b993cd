"""Tests of the loss's gradient scale: fp16 needs it, and it changes nothing but the gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from job.model.language_model import LanguageModel, build_model
from job.model.loss import grad_logits_, linear_cross_entropy
from job.model.spec import ModelSpec

VOCAB_SIZE, CHUNK_TOKENS = 20_000, 10


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 16, generator=generator)
    hidden[:, 0] = 3  # This is common to all tokens, so most entries are improbable everywhere, as rare words are.
    hidden = hidden.to(dtype).requires_grad_()
    weight = torch.randn(VOCAB_SIZE, 16, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB_SIZE, (32,), generator=generator)


def loss_and_gradients(dtype, compiled, scale):
    hidden, weight, labels = problem(dtype)
    loss = linear_cross_entropy(
        hidden, weight, labels, CHUNK_TOKENS, compiled=compiled, gradient_scale=scale, vocab_multiple=16
    )
    return loss, *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("compiled", [None, grad_logits_])
def test_fp16_gradients_are_right_only_with_a_scale(compiled):
    hidden, weight, labels = problem()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truths = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels, reduction="sum"), exact)

    def errors(loss: Tensor, scale: float) -> list[float]:
        """Return the median relative error of a row, in the hidden states' gradient and in the head's."""
        found = [gradient.double() / scale for gradient in torch.autograd.grad(loss, (hidden, weight))]
        rows = [(one - right).norm(dim=1) / right.norm(dim=1) for one, right in zip(found, truths, strict=True)]
        return [float(errors_of_rows.median()) for errors_of_rows in rows]

    scale = 2.0**13
    options = {"chunk_tokens": CHUNK_TOKENS, "compiled": compiled}
    with torch.autocast("cpu", torch.float16):
        plain = F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")
        scaled = linear_cross_entropy(hidden, weight, labels, **options, gradient_scale=torch.tensor(scale))
        unscaled = linear_cross_entropy(hidden, weight, labels, **options)
    torch.testing.assert_close(scaled, plain)
    assert torch.equal(scaled, unscaled)
    right = errors(scale * plain, scale)
    found, wrong = errors(scaled, scale), errors(unscaled, 1.0)
    assert all(error < 1.2 * of_plain < 5e-3 for error, of_plain in zip(found, right, strict=True))
    assert wrong[1] > 5 * right[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [None, grad_logits_])
def test_scale_multiplies_gradients_and_not_the_loss(dtype, compiled):
    """A power of two changes the exponents only, so the results are equal to the last bit."""
    loss, *gradients = loss_and_gradients(dtype, compiled, None)
    scaled_loss, *scaled = loss_and_gradients(dtype, compiled, torch.tensor(2.0**7))
    assert torch.equal(scaled_loss, loss)
    for gradient, of_scaled in zip(gradients, scaled, strict=True):
        assert of_scaled.dtype == gradient.dtype and torch.equal(of_scaled / 2**7, gradient)


def test_too_large_scale_overflows_in_gradients_only():
    loss, *gradients = loss_and_gradients(torch.float16, None, torch.tensor(2.0**17))
    assert loss.isfinite() and not any(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("compiled", [None, grad_logits_])
def test_host_never_reads_the_scale(compiled):
    """Tensors on the meta device have no values, so any attempt to read one raises an error."""
    hidden, weight, labels = (tensor.detach().to("meta") for tensor in problem(torch.float16))
    inputs = hidden.requires_grad_(), weight.requires_grad_(), labels
    scale = torch.empty((), device="meta")
    linear_cross_entropy(*inputs, CHUNK_TOKENS, compiled=compiled, gradient_scale=scale).backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


def test_scale_reaches_every_gradient_of_the_model():
    spec = ModelSpec(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
    )
    model = LanguageModel(build_model(spec, 67, 3, 16, seed=0), loss_chunk_tokens=5)
    tokens = torch.randint(67, (2, 16), generator=torch.Generator().manual_seed(0))
    losses = [model(tokens, tokens, gradient_scale=scale) for scale in (None, torch.tensor(2.0**7))]
    assert torch.equal(*losses)
    plain, scaled = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
    torch.testing.assert_close([gradient / 2**7 for gradient in scaled], list(plain), rtol=1e-6, atol=1e-7)
