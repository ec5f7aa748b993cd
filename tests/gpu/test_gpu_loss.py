"""Tests of the loss on a GPU: how many kernels and operators it takes, and that it equals the plain loss in fp64."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch._inductor import metrics
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from job.model.loss import _nats_and_gradients, grad_logits_, linear_cross_entropy

pytestmark = pytest.mark.gpu
TOKENS, HIDDEN_SIZE, VOCAB_SIZE, CHUNK_TOKENS = 40, 8, 50, 10
CHUNKS = TOKENS // CHUNK_TOKENS


class Operators(TorchDispatchMode):
    """Mode that counts the operators that write a tensor of the given shapes; views and new memory do not count."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes, self.counts = shapes, Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        only_memory = func.is_view or func.__name__.split(".")[0] in ("empty", "empty_like", "new_empty")
        if isinstance(result, Tensor) and result.shape in self.shapes and not only_memory:
            self.counts[func.__name__] += 1
        return result


def test_gpu_writes_the_size_of_the_head_once_a_chunk_and_once():
    hidden = torch.zeros(TOKENS, HIDDEN_SIZE, device="cuda", dtype=torch.bfloat16)
    weight = torch.zeros(VOCAB_SIZE, HIDDEN_SIZE, device="cuda")
    labels = torch.zeros(TOKENS, device="cuda", dtype=torch.long)
    with Operators((VOCAB_SIZE, HIDDEN_SIZE), (128, HIDDEN_SIZE)) as of_head_size:
        _nats_and_gradients(hidden, weight, labels, CHUNK_TOKENS, -100, None, None, None, (True, True))
    # One copy casts and pads the head. Besides that, only the products write anything of its size.
    assert of_head_size.counts == {"copy_.default": 1, "addmm.dtype_out": CHUNKS}


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, None), (torch.float16, 256.0)])
def test_gpu_compiles_the_softmax_to_one_kernel(dtype, scale):
    """With fewer rows than the GPU has multiprocessors, Inductor would divide a row among several."""
    entries = 151_680
    logits = torch.zeros(2048, entries, dtype=dtype, device="cuda")
    targets = torch.zeros(len(logits), 1, dtype=torch.long, device="cuda")
    gradient_scale = None if scale is None else torch.tensor(scale, device="cuda")
    torch._dynamo.reset()
    metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(grad_logits_, dynamic=False, fullgraph=True)
        compiled(logits, targets, entries - 34, gradient_scale)
        before, _ = torch.cuda.memory_allocated(), torch.cuda.reset_peak_memory_stats()
        compiled(logits, targets, entries - 34, gradient_scale)
    assert metrics.generated_kernel_count == 1
    assert torch.cuda.max_memory_allocated() - before < 2**20


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [
        (torch.float64, None, 1e-9),
        (torch.float32, None, 1e-4),
        (torch.bfloat16, None, 2e-2),
        (torch.float16, 256.0, 4e-3),
    ],
)
def test_gpu_results_equal_the_plain_loss_in_fp64(is_compiled, dtype, scale, tolerance, real_gpu):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(96, 64, generator=generator).to(dtype)
    weight = (0.2 * torch.randn(1003, 64, generator=generator)).to(dtype)
    labels = torch.randint(1003, (96,), generator=generator)
    labels[::7] = -100
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    truth = F.cross_entropy(F.linear(*exact), labels, reduction="sum")
    inputs = [tensor.cuda().requires_grad_() for tensor in (hidden, weight)]
    loss = linear_cross_entropy(
        *inputs,
        labels.cuda(),
        chunk_tokens=40,
        compiled=torch.compile(grad_logits_, dynamic=False, fullgraph=True) if is_compiled else None,
        gradient_scale=None if scale is None else torch.tensor(scale, device="cuda"),
    )
    gradients = [gradient / (scale or 1) for gradient in torch.autograd.grad(loss, inputs)]
    real_gpu()
    for found, right in zip(
        (loss.detach(), *gradients), (truth.detach(), *torch.autograd.grad(truth, exact)), strict=True
    ):
        assert (found.double().cpu() - right).norm() <= tolerance * right.norm()
