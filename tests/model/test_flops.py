"""The counts come from the shape alone, and are those of the model that is built from it."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from job.model.architecture import LanguageModel, build_model
from job.model.flops import flops_per_token, mfu, parameter_counts, peak_flops
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
        (replace(TUTORIAL, num_key_value_heads=8, num_hidden_layers=3), 16_384),
        (replace(TUTORIAL, hidden_size=96, num_attention_heads=6, num_key_value_heads=1, intermediate_size=100), 257),
    ],
)
def test_counts_from_the_shape_are_those_of_the_built_model(spec, vocab_size):
    with torch.device("meta"):
        model = build_model(spec, vocab_size, eod_id=0, context_length=512, seed=0)
    counts = parameter_counts(spec, vocab_size)
    named = dict(model.named_parameters())
    vocabulary = {name: p for name, p in named.items() if "embed_tokens" in name or "lm_head" in name}
    assert counts.total == sum(p.numel() for p in named.values())
    assert counts.embedding == sum(p.numel() for p in vocabulary.values())
    assert counts.body == sum(p.numel() for name, p in named.items() if p.ndim == 2 and name not in vocabulary)


def test_the_tutorials_model_has_123_277_824_parameters_of_which_77_642_752_are_its_embedding():
    counts = parameter_counts(TUTORIAL, VOCAB_SIZE)
    assert (counts.total, counts.embedding, counts.body) == (123_277_824, 77_642_752, 45_613_056)


def test_a_token_of_the_tutorials_model_costs_758_mflop():
    flops = flops_per_token(TUTORIAL, VOCAB_SIZE, context_length=512)
    assert [round(part / 1e6, 1) for part in (flops.body, flops.head, flops.attention)] == [273.7, 465.9, 18.9]
    assert flops.total == flops.body + flops.head + flops.attention == 758_409_216


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_body_and_head_flops_are_those_that_a_step_of_the_built_model_makes(tie_word_embeddings):
    spec = ModelSpec(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tie_word_embeddings,
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


@pytest.mark.parametrize(
    ("device_name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_dense_bf16_rate(device_name, teraflops):
    assert peak_flops(device_name) == teraflops * 1e12


@pytest.mark.parametrize(
    "device_name",
    [
        "Tesla V100-SXM2-32GB",
        "Tesla T4",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GH200 480GB",
        "NVIDIA L40",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD EPYC",
        "",
    ],
)
def test_no_peak_is_guessed_for_a_device_that_only_resembles_a_known_one(device_name):
    assert peak_flops(device_name) is None


def test_mfu_is_one_when_every_gpu_runs_at_its_peak():
    cost = flops_per_token(TUTORIAL, VOCAB_SIZE, context_length=512).total
    h100 = peak_flops("NVIDIA H100 80GB HBM3")
    assert mfu(1.305e6, cost, h100, world_size=1) == pytest.approx(1, abs=1e-3)
    assert mfu(8 * 1.305e6, cost, h100, world_size=8) == pytest.approx(1, abs=1e-3)
    assert mfu(45_400, cost, peak_flops("NVIDIA A100-SXM4-80GB"), world_size=1) == pytest.approx(0.11, abs=1e-3)
    assert mfu(100, cost, peak_flops("a CPU"), world_size=1) is None
