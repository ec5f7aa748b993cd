"""Tests of the model on a GPU: attention's kernels, the chunked loss, evaluation, and continuing a text.

They need torch, transformers, accelerate and pytest alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from gpu_steps import CONTEXT_LENGTH, EOD_ID, VOCAB_SIZE, global_batch, new_model
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from transformers import Qwen2Config

from job.model.attention import document_bounds, varying_lengths, why_not_flash_attention_3, why_not_packed
from job.model.generation import Sampling, continue_text
from job.model.language_model import LanguageModel

pytestmark = pytest.mark.gpu
NeedRealGpu = Callable[[], None]


def language_model(device: torch.device, document_masking: bool = False) -> LanguageModel:
    return LanguageModel(new_model(), loss_chunk_tokens=48, document_masking=document_masking).to(device)


def relative_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Return ``‖found - wanted‖ / ‖wanted‖`` over all tensors together."""
    ours, exact = (torch.cat([one.detach().double().cpu().flatten() for one in of]) for of in (found, wanted))
    return float((ours - exact).norm() / exact.norm())


def exact_loss(input_ids: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the nats of all targets and their gradients, with full logits in fp64 on the CPU."""
    model = new_model().double()
    logits = model(input_ids=input_ids).logits
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return nats, list(torch.autograd.grad(nats, list(model.parameters())))


# ---- The loss ----


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
def test_gpu_loss_and_gradients_agree_with_full_logits_in_fp64(
    gpu: torch.device, real_gpu: NeedRealGpu, dtype: torch.dtype, tolerance: float, is_compiled: bool
) -> None:
    model, (input_ids, labels) = language_model(gpu), global_batch(0)
    if is_compiled:
        model.compile()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        nats = model(input_ids.to(gpu), labels.to(gpu))
    gradients = torch.autograd.grad(nats, list(model.parameters()))
    real_gpu()
    exact, exact_gradients = exact_loss(input_ids, labels)
    assert float(nats.detach()) == pytest.approx(float(exact.detach()), rel=tolerance / 10)
    assert relative_error(gradients, exact_gradients) <= tolerance


def test_evaluation_on_the_gpu_gives_the_nats_of_each_target(gpu: torch.device, real_gpu: NeedRealGpu) -> None:
    model, (input_ids, labels) = language_model(gpu).eval(), global_batch(0)
    with torch.no_grad():
        nats = model(input_ids.to(gpu), labels.to(gpu), reduction="none")
        on_cpu = language_model(torch.device("cpu")).eval()(input_ids, labels, reduction="none")
    assert nats.shape == labels.shape
    real_gpu()
    torch.testing.assert_close(nats.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
    assert (nats.cpu()[labels < 0] == 0).all()


# ---- Attention ----


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_gpu_kernels_give_loss_and_gradients_of_a_mask(
    gpu: torch.device, real_gpu: NeedRealGpu, is_compiled: bool
) -> None:
    model, (input_ids, labels) = language_model(gpu, document_masking=True), global_batch(0)
    why_not = why_not_packed(model.causal_lm.config, CONTEXT_LENGTH, gpu)
    bounds, given = document_bounds(input_ids, EOD_ID).to(gpu), (input_ids.to(gpu), labels.to(gpu))
    with torch.autocast("cuda", torch.bfloat16):
        expected = torch.autograd.grad(model(*given), list(model.parameters()))
        if is_compiled:
            model.compile()
        found = torch.autograd.grad(model(*given, bounds=bounds), list(model.parameters()))
    real_gpu()
    assert why_not is None
    assert relative_error(found, expected) <= 0.05


def test_gpu_uses_flash_attention_3_or_keeps_sdpa(gpu: torch.device, real_gpu: NeedRealGpu) -> None:
    config = Qwen2Config(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
    why_not = why_not_flash_attention_3(config, 512, gpu)
    assert (torch.nn.attention.current_flash_attention_impl() == "FA3") == (why_not is None)
    query, key, value = torch.randn(3, 1, 2, 64, 64, device=gpu, dtype=torch.bfloat16)
    found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    real_gpu()
    assert found.isfinite().all()


def test_attention_of_varying_lengths_never_uses_cudnn(gpu: torch.device) -> None:
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    query, key, value = torch.randn(3, 1, 4, 33, 64, device=gpu, dtype=dtype)

    def chosen() -> SDPBackend:
        return SDPBackend(torch._fused_sdp_choice(query, key, value, is_causal=True))

    with varying_lengths():
        inside = chosen()
        chosen_without_a_mask = {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION}
        assert inside in chosen_without_a_mask
    assert torch.backends.cuda.cudnn_sdp_enabled()


# ---- Continuing a text ----


class Characters:
    """A tokenizer in which each id is a character."""

    eod_id = EOD_ID

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[ord(one) % (VOCAB_SIZE - 1) + 1 for one in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(0x4E00 + i % VOCAB_SIZE) for i in ids)


GREEDY = Sampling(max_new_tokens=12, temperature=0.0, top_p=1.0, seed=7)


def continued(model: LanguageModel, sampling: Sampling) -> str:
    return continue_text(model.causal_lm, Characters(), "abc", sampling, CONTEXT_LENGTH)


def test_text_continued_on_the_gpu_is_that_of_the_cpu(gpu: torch.device, real_gpu: NeedRealGpu) -> None:
    on_gpu, on_cpu = (language_model(device) for device in (gpu, torch.device("cpu")))
    for model in (on_gpu, on_cpu):
        for parameter in model.causal_lm.model.layers.parameters():
            parameter.data.mul_(8)  # Larger weights make one token much likelier than the others.
    found = continued(on_gpu, GREEDY)
    real_gpu()
    assert len(found) > 1
    assert found == continued(on_cpu, GREEDY)


def test_seed_decides_text_and_random_state_of_gpu_is_kept(gpu: torch.device, real_gpu: NeedRealGpu) -> None:
    model, sampled = language_model(gpu), replace(GREEDY, temperature=1.0)
    before = torch.cuda.get_rng_state()
    with torch.autocast("cuda", torch.bfloat16):
        texts = [continued(model, replace(sampled, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    real_gpu()
    assert texts[0] == texts[1] != texts[2]


def test_compiled_model_continues_a_text_in_the_same_way(gpu: torch.device, real_gpu: NeedRealGpu) -> None:
    plain, compiled = language_model(gpu), language_model(gpu)
    compiled.compile()
    input_ids, labels = global_batch(0)
    compiled(input_ids.to(gpu), labels.to(gpu)).backward()
    texts = [continued(model, GREEDY) for model in (plain, compiled)]
    real_gpu()
    assert texts[0] == texts[1]
