"""Tests of FLOP and parameter counts: they are computed from the shape and equal those of the built model."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from job.model.architecture import ARCHITECTURES
from job.model.flops import flops_per_token, mfu, parameter_counts
from job.model.gpu_table import peak_flops
from job.model.language_model import LanguageModel, build_model
from job.model.spec import ModelSpec

TUTORIAL = ModelSpec(
    hidden_size=512, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2, intermediate_size=2048
)
VOCAB_SIZE = 151_646


@pytest.mark.parametrize(
    ("spec", "vocab_size"),
    [
        (TUTORIAL, VOCAB_SIZE),
        (replace(TUTORIAL, tie_word_embeddings=False), VOCAB_SIZE),
        (replace(TUTORIAL, architecture="qwen3"), VOCAB_SIZE),
        (replace(TUTORIAL, num_key_value_heads=8, num_hidden_layers=3), 16_384),
        (replace(TUTORIAL, hidden_size=96, num_attention_heads=6, num_key_value_heads=1, intermediate_size=100), 257),
    ],
)
def test_counts_from_the_shape_equal_those_of_the_built_model(spec, vocab_size):
    with torch.device("meta"):
        model = build_model(spec, vocab_size, eod_id=0, context_length=512, seed=0)
    counts = parameter_counts(spec, vocab_size)
    named = dict(model.named_parameters())
    vocabulary = {name: p for name, p in named.items() if "embed_tokens" in name or "lm_head" in name}
    assert counts.total == sum(p.numel() for p in named.values())
    assert counts.embedding == sum(p.numel() for p in vocabulary.values())
    assert counts.body == sum(p.numel() for name, p in named.items() if p.ndim == 2 and name not in vocabulary)


def test_parameter_counts_of_the_tutorials_model():
    counts = parameter_counts(TUTORIAL, VOCAB_SIZE)
    assert (counts.total, counts.embedding, counts.body) == (123_277_824, 77_642_752, 45_613_056)


def test_token_of_the_tutorials_model_costs_758_mflop():
    flops = flops_per_token(TUTORIAL, VOCAB_SIZE, context_length=512)
    assert [round(part / 1e6, 1) for part in (flops.body, flops.head, flops.attention)] == [273.7, 465.9, 18.9]
    assert flops.total == flops.body + flops.head + flops.attention == 758_409_216


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_body_and_head_flops_equal_those_of_a_real_step(tie_word_embeddings, architecture):
    spec = ModelSpec(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tie_word_embeddings,
        architecture=architecture,
    )
    model = LanguageModel(build_model(spec, vocab_size=67, eod_id=0, context_length=16, seed=0))
    tokens = torch.zeros(3, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    products = sum(
        flops
        for operator, flops in counter.get_flop_counts()["Global"].items()
        if "attention" not in str(operator) and "bmm" not in str(operator)
    )
    counted = flops_per_token(spec, vocab_size=67, context_length=16)
    assert products == tokens.numel() * (counted.body + counted.head)


def test_qwen3_costs_as_much_as_qwen2_and_has_other_vectors():
    qwen3 = replace(TUTORIAL, architecture="qwen3")
    assert flops_per_token(qwen3, VOCAB_SIZE, 512) == flops_per_token(TUTORIAL, VOCAB_SIZE, 512)
    # A layer has no biases of query (512), key and value (128 each), but the norms of query and key (64 each).
    counts = [parameter_counts(spec, VOCAB_SIZE) for spec in (TUTORIAL, qwen3)]
    assert counts[0].total - counts[1].total == 12 * (512 + 2 * 128 - 2 * 64)


def test_mfu_is_one_when_every_gpu_runs_at_its_peak():
    cost = flops_per_token(TUTORIAL, VOCAB_SIZE, context_length=512).total
    h100 = peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    assert mfu(1.305e6, cost, h100, world_size=1) == pytest.approx(1, abs=1e-3)
    assert mfu(8 * 1.305e6, cost, h100, world_size=8) == pytest.approx(1, abs=1e-3)
    assert mfu(45_400, cost, peak_flops("NVIDIA A100-SXM4-80GB", "bf16"), world_size=1) == pytest.approx(0.11, abs=1e-3)
    assert mfu(100, cost, peak_flops("a CPU", "bf16"), world_size=1) is None
