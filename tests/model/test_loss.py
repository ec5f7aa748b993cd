"""Tests of the chunked loss: it equals the plain loss, costs no more products, and never stores the full logits."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from job.model.chunk_size import gpu_logits_bytes
from job.model.loss import (
    _add_product_,
    default_chunk_tokens,
    grad_logits_,
    linear_cross_entropy,
    token_nats,
)


def plain_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels, reduction="sum")


def problem(tokens: int, hidden_size: int, vocab_size: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(vocab_size, (tokens,), generator=generator)
    return hidden, weight, labels


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


class Results(TorchDispatchMode):
    """Mode that records the size and storage of each tensor that an operator returns.

    It keeps the storages alive, so that no address is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[int, torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.tensors.append((result.numel(), result.untyped_storage()))
        return result


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 40),
    hidden_size=st.integers(1, 9),
    vocab_size=st.integers(2, 50),
    chunk_tokens=st.one_of(st.none(), st.integers(1, 50)),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([1.0, -0.37]),
    vocab_multiple=st.sampled_from([None, 8]),
    compiled=st.sampled_from([None, grad_logits_]),
    seed=st.integers(0, 2**16),
)
def test_value_and_gradients_equal_the_plain_loss(
    tokens, hidden_size, vocab_size, chunk_tokens, ignored, scale, vocab_multiple, compiled, seed
):
    hidden, weight, labels = problem(tokens, hidden_size, vocab_size, seed)
    labels[torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < ignored] = -100
    expected = plain_loss(hidden, weight, labels)
    expected_gradients = torch.autograd.grad(scale * expected, (hidden, weight))

    loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens, vocab_multiple=vocab_multiple, compiled=compiled)
    gradients = torch.autograd.grad(scale * loss, (hidden, weight))

    assert loss.dtype == torch.float64 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("vocab_multiple", [None, 16])
def test_token_nats_equal_plain_loss_and_are_zero_where_ignored(vocab_multiple):
    hidden, weight, labels = problem(24, 8, 50)
    labels[::5] = -100
    nats = token_nats(hidden.view(4, 6, 8), weight, labels.view(4, 6), chunk_tokens=7, vocab_multiple=vocab_multiple)
    torch.testing.assert_close(
        nats.flatten(), F.cross_entropy(F.linear(hidden, weight), labels, reduction="none").detach()
    )
    assert nats.shape == (4, 6) and not nats.requires_grad


@pytest.mark.parametrize("compiled", [None, grad_logits_])
def test_ignored_tokens_may_have_nan_hidden_states(compiled):
    hidden, weight, labels = problem(12, 8, 50)
    labels[4:7] = -100
    broken = hidden.detach().clone()
    broken[4:7] = float("nan")
    broken.requires_grad_()
    loss = linear_cross_entropy(broken, weight, labels, chunk_tokens=5, compiled=compiled)
    gradients = torch.autograd.grad(loss, (broken, weight))
    torch.testing.assert_close(loss, plain_loss(hidden, weight, labels))
    assert all(gradient.isfinite().all() for gradient in gradients) and not gradients[0][4:7].any()


@pytest.mark.parametrize("compiled", [None, grad_logits_])
def test_logits_beyond_the_range_of_exp_stay_exact(compiled):
    hidden = torch.tensor([[400.0], [400.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 2]), vocab_multiple=4, compiled=compiled)
    assert loss.item() == 800.0
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], torch.tensor([[0.0], [2.0]]))


@pytest.mark.parametrize("mistake", [torch.zeros(5, dtype=torch.long), torch.zeros(7, dtype=torch.long)])
def test_labels_of_another_shape_are_refused(mistake):
    hidden, weight, _ = problem(6, 8, 50)
    with pytest.raises(ValueError, match="not of the same positions"):
        linear_cross_entropy(hidden, weight, mistake)


@pytest.mark.parametrize("compiled", [None, grad_logits_])
def test_bf16_is_as_close_to_fp64_as_the_plain_loss(compiled):
    exact = problem(256, 64, 500)
    truth = plain_loss(*exact)
    truths = torch.autograd.grad(truth, exact[:2])
    hidden, weight = (tensor.detach().bfloat16().requires_grad_() for tensor in exact[:2])

    loss = linear_cross_entropy(hidden, weight, exact[2], chunk_tokens=60, compiled=compiled)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    plain = torch.autograd.grad(plain_loss(hidden, weight, exact[2]), (hidden, weight))

    assert loss.dtype == torch.float32 and all(gradient.dtype == torch.bfloat16 for gradient in gradients)
    assert relative_error(loss.detach(), truth.detach()) < 2e-3
    for gradient, plain_gradient, exact_gradient in zip(gradients, plain, truths, strict=True):
        assert relative_error(gradient, exact_gradient) < 1.2 * relative_error(plain_gradient, exact_gradient)


def test_weight_gradient_of_bf16_chunks_is_summed_in_fp32():
    """The 512 chunks add the same number each; a sum in bf16 would stop growing after 256 of them."""
    hidden = torch.ones(512, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(512, dtype=torch.long), chunk_tokens=1).backward()
    assert weight.grad[0].tolist() == [-448.0] * 4 and weight.grad[1].tolist() == [64.0] * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_first_product_overwrites_memory_and_the_next_adds(dtype):
    left, right = (torch.randn(size, 8, generator=torch.Generator().manual_seed(0)).to(dtype) for size in (9_000, 5))
    total = torch.full((9_000, 5), torch.nan, dtype=torch.promote_types(dtype, torch.float32))
    expected = (left @ right.t()).to(total.dtype)
    _add_product_(total, left, right.t(), is_first=True)
    torch.testing.assert_close(total, expected)
    _add_product_(total, left, right.t(), is_first=False)
    torch.testing.assert_close(total, 2 * expected)


def test_no_token_at_all_has_gradients_of_zero():
    hidden, weight, labels = problem(0, 8, 50)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        gradients = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    finally:
        torch.use_deterministic_algorithms(False)
    assert gradients[0].shape == (0, 8) and torch.equal(gradients[1], torch.zeros_like(weight))


def test_compiled_loss_of_a_label_that_is_no_entry_is_infinite():
    hidden, weight, labels = problem(6, 8, 50)
    labels[3] = 50
    for vocab_multiple in (1, 16):
        assert linear_cross_entropy(hidden, weight, labels, 4, -100, vocab_multiple, grad_logits_).isinf()


def test_autocast_keeps_the_dtype_of_gradients():
    hidden, weight, labels = problem(64, 32, 200, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, chunk_tokens=20)
        expected = plain_loss(hidden, weight, labels)
        nats = token_nats(hidden, weight, labels)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    in_bf16 = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), labels, chunk_tokens=20)

    assert loss.dtype == nats.dtype == torch.float32 and loss == in_bf16
    torch.testing.assert_close(nats.sum(), loss)
    for gradient, plain_gradient in zip(gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert gradient.dtype == torch.float32 and relative_error(gradient, plain_gradient) < 1e-2


def test_full_logits_never_exist():
    tokens, hidden_size, vocab_size, chunk_tokens = 64, 4, 300, 8
    hidden, weight, labels = problem(tokens, hidden_size, vocab_size, dtype=torch.float32)
    with Results() as evaluation:
        token_nats(hidden, weight, labels, chunk_tokens)
    with Results() as training:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens).backward()
    for results, buffers in (evaluation, {"logits"}), (training, {"logits", "gradient of the weight"}):
        assert max(size for size, _ in results.tensors) == chunk_tokens * vocab_size
        large = {storage.data_ptr() for size, storage in results.tensors if size >= weight.numel()}
        assert len(large - {weight.data_ptr()}) == len(buffers)


def matrix_product_flops(step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_makes_no_more_products_than_the_plain_loss(dtype):
    hidden, weight, labels = problem(40, 8, 50, dtype=dtype)
    flops = matrix_product_flops(lambda: linear_cross_entropy(hidden, weight, labels, chunk_tokens=7).backward())
    assert flops == matrix_product_flops(lambda: plain_loss(hidden, weight, labels).backward()) == 3 * 2 * 40 * 8 * 50


def test_no_product_is_made_for_an_unneeded_gradient():
    hidden, weight, labels = problem(40, 8, 50)
    product = 2 * 40 * 8 * 50
    frozen = weight.detach()
    assert matrix_product_flops(lambda: linear_cross_entropy(hidden, frozen, labels).backward()) == 2 * product
    assert matrix_product_flops(lambda: linear_cross_entropy(hidden.detach(), frozen, labels)) == product
    assert matrix_product_flops(lambda: token_nats(hidden, weight, labels)) == product
    with torch.no_grad():
        assert matrix_product_flops(lambda: linear_cross_entropy(hidden, weight, labels)) == product


@pytest.mark.parametrize("compiled", [None, grad_logits_])
def test_loss_never_makes_the_host_wait(compiled):
    """Tensors on the meta device have no values, so any attempt to read one raises an error."""
    hidden, weight, labels = problem(40, 8, 50, dtype=torch.bfloat16)
    hidden, weight, labels = (tensor.detach().to("meta") for tensor in (hidden, weight, labels))
    inputs = hidden.requires_grad_(), weight.requires_grad_(), labels
    linear_cross_entropy(*inputs, chunk_tokens=7, vocab_multiple=16, compiled=compiled).backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("gradient_scale", [None, torch.tensor(4.0)])
def test_loss_between_products_compiles_to_one_graph(gradient_scale):
    logits, targets = torch.randn(5, 12), torch.tensor([[0], [3], [9], [1], [4]])
    expected = logits.clone()
    nats = grad_logits_(expected, targets, 10, gradient_scale)
    compiled = torch.compile(grad_logits_, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, targets, 10, gradient_scale), nats)
    torch.testing.assert_close(logits, expected)


def test_second_backward_raises_instead_of_scaling_twice():
    hidden, weight, labels = problem(6, 4, 9)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("vocab_size", [256, 16_384, 151_936, 2**40])
@pytest.mark.parametrize(("device", "budget_bytes"), [("cpu", 2**28), ("cuda", 2**31)])
def test_default_chunk_fills_more_than_half_of_its_budget(vocab_size, device, budget_bytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chunk_tokens = default_chunk_tokens(vocab_size, torch.device(device))
    assert chunk_tokens == 1 or budget_bytes / 2 < 4 * vocab_size * chunk_tokens <= budget_bytes
    assert chunk_tokens >= 1


@pytest.mark.parametrize(
    ("gibibytes", "chunk_tokens"), [(7.6, 512), (14.7, 1024), (23.5, 2048), (39.4, 4096), (79.1, 8192), (178.0, 8192)]
)
def test_gpus_chunk_depends_on_its_memory_but_not_on_its_driver(gibibytes, chunk_tokens, monkeypatch):
    """The numbers are what cards of 8, 16, 24, 40, 80 and 192 GB report at least, or up to 4 percent more."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for factor in (1.0, 1.02, 1.04):
        properties = SimpleNamespace(total_memory=int(factor * gibibytes * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, properties=properties: properties)
        assert default_chunk_tokens(151_646, torch.device("cuda", 0)) == chunk_tokens


@pytest.mark.parametrize("gibibytes", [8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192])
def test_gpu_logits_in_16_bits_take_less_than_a_sixteenth(gibibytes):
    memory_bytes = gibibytes * 2**30 - 2**29
    assert min(memory_bytes / 32, 2**32) <= gpu_logits_bytes(memory_bytes) / 2 < memory_bytes / 16
    assert gpu_logits_bytes(memory_bytes) <= 2**33
