"""Tests of packed documents: attention without a mask gives the numbers of a mask; kernels are checked before use."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from flash_stand_in import flash_kernels
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config

from job.model.attention import (
    attend_within,
    document_bounds,
    same_document,
    varying_lengths,
    why_not_flash_attention_3,
    why_not_packed,
)
from job.model.generation import Sampling, continue_text
from job.model.language_model import LanguageModel, build_model
from job.model.spec import ModelSpec

SPEC = ModelSpec(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
)
VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH = 67, 3, 16
CPU = torch.device("cpu")
IDS = st.integers(1, 4).flatmap(
    lambda length: st.lists(st.lists(st.sampled_from([1, 2, EOD_ID]), min_size=length, max_size=length), min_size=1)
)


def language_model(document_masking: bool = True) -> LanguageModel:
    return LanguageModel(build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=0), 5, document_masking)


def config(heads: int = 4, key_value_heads: int = 2) -> Qwen2Config:
    return Qwen2Config(hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=key_value_heads)


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens[0, [4, 5, 11]] = EOD_ID
    tokens[1, [0, CONTEXT_LENGTH - 1]] = EOD_ID
    return tokens[:, :-1], tokens[:, 1:]


def test_bounds_mark_starts_of_documents_and_rows_and_the_end():
    ids = torch.tensor([[7, 7, EOD_ID, 8, EOD_ID, EOD_ID, 9, 9], [9, EOD_ID, 5, 5, 5, 5, 5, EOD_ID]])
    assert document_bounds(ids, EOD_ID).tolist() == [0, 3, 5, 6, 8, 10, 16, 16]


@given(IDS)
def test_bounds_and_mask_describe_the_same_documents(rows):
    ids = torch.tensor(rows)
    bounds = document_bounds(ids, EOD_ID)
    assert bounds.dtype == torch.int32 and len(bounds).bit_count() == 1
    assert bounds[-1] == ids.numel() and (bounds.diff() >= 0).all()
    document = torch.bucketize(torch.arange(ids.numel()), bounds, right=True).view_as(ids)
    same = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril()
    assert torch.equal(same, same_document(ids, EOD_ID).squeeze(1))
    assert len(set(document.flatten().tolist())) == len(set(bounds.tolist())) - 1  # No document crosses rows.


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_attention_within_bounds_equals_attention_with_mask(key_value_heads):
    generator = torch.Generator().manual_seed(1)
    ids, _ = batch()
    shapes = [(3, heads, CONTEXT_LENGTH, 8) for heads in (4, key_value_heads, key_value_heads)]
    inputs = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator)
    masked = F.scaled_dot_product_attention(*inputs, attn_mask=same_document(ids, EOD_ID), scale=0.5, enable_gqa=True)
    with flash_kernels():
        within = attend_within(*inputs, document_bounds(ids, EOD_ID), scale=0.5).transpose(1, 2)
        found = torch.autograd.grad(within, inputs, weight)
    torch.testing.assert_close(within, masked)
    torch.testing.assert_close(found, torch.autograd.grad(masked, inputs, weight))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_model_with_bounds_has_loss_and_gradients_of_one_with_mask(is_compiled):
    model = language_model()
    input_ids, labels = batch()
    expected = model(input_ids, labels)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    assert (language_model(document_masking=False)(input_ids, labels) - expected).abs() > 1e-3
    with flash_kernels() as dtypes:
        if is_compiled:
            model.compile(backend="aot_eager")
        loss = model(input_ids, labels, bounds=document_bounds(input_ids, EOD_ID))
        found = torch.autograd.grad(loss, list(model.parameters()))
    assert len(dtypes) == 2 * SPEC.num_hidden_layers  # Each layer calls the kernel forward and backward.
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-5)


def test_under_autocast_the_kernels_get_bf16():
    input_ids, labels = batch()
    with flash_kernels() as dtypes, torch.autocast("cpu", torch.bfloat16):
        language_model()(input_ids, labels, bounds=document_bounds(input_ids, EOD_ID)).backward()
    assert set(dtypes) == {torch.bfloat16}


def test_document_masking_changes_neither_generation_nor_saving(tmp_path: Path):
    plain, masking = language_model(document_masking=False).causal_lm, language_model().causal_lm
    prompt = torch.tensor([[5, 6, 7], [EOD_ID, 8, 9]])
    options = {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(masking.generate(prompt, **options), plain.generate(prompt, **options))
    for model, folder in ((plain, tmp_path / "plain"), (masking, tmp_path / "masking")):
        model.save_pretrained(folder)
    saved = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("plain", "masking")]
    assert saved[0] == saved[1]


# ── Kernels are checked before use ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key_value_heads", [1, 4])
@pytest.mark.parametrize("context_length", [2, 16, 100])
def test_correct_kernel_is_used(context_length, key_value_heads):
    with flash_kernels() as dtypes:
        assert why_not_packed(config(4, key_value_heads), context_length, CPU) is None
    assert dtypes == 2 * [torch.bfloat16]


def test_kernel_that_mixes_documents_is_not_used():
    with flash_kernels(minds_bounds=False):
        assert str(why_not_packed(config(), 16, CPU)).startswith("its result is wrong by ")


def test_missing_kernel_is_reported_in_one_line():
    why_not = why_not_packed(config(), 16, CPU)
    assert why_not is not None and why_not.startswith("NotImplementedError: ") and "\n" not in why_not


def test_flash_attention_3_needs_a_gpu():
    assert why_not_flash_attention_3(config(), 16, CPU) == "it needs a GPU"


# ── Which of SDPA's kernels are used ─────────────────────────────────────────────────────────────────────────────────


class OneTokenPerCharacter:
    eod_id = EOD_ID

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[4 + ord(one) % (VOCAB_SIZE - 4) for one in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "x" * len(ids)


def test_continuing_a_text_leaves_cudnn_out_and_allows_it_afterwards():
    allowed: list[bool] = []

    def is_asked_to_stop() -> bool:
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return False

    model, sampling = language_model().causal_lm, Sampling(4, 1.0, 1.0, 7)
    continue_text(model, OneTokenPerCharacter(), "abc", sampling, CONTEXT_LENGTH, should_stop=is_asked_to_stop)
    assert allowed and not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_that_was_switched_off_stays_off():
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with varying_lengths():
            pass
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
