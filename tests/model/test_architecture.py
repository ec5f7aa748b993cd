"""Tests of every entry of the table of architectures: what the job computes with it, in each way that it computes."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from flash_stand_in import flash_kernels
from torch import Tensor
from torch.nn import functional as F

from job.model.architecture import ARCHITECTURES, tensor_shapes
from job.model.attention import document_bounds
from job.model.generation import Sampling, continue_text
from job.model.language_model import LanguageModel, build_model
from job.model.load_folder import NotAModel, read_model
from job.model.save_folder import write_model
from job.model.spec import ModelSpec
from job.training.optimizer import BUILDERS, OptimizerSettings

VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH = 67, 3, 16
SMALL = ModelSpec(32, 2, 4, 2, 48)
of_every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def language_model(architecture: str, document_masking: bool = False, init_range: float = 0.02) -> LanguageModel:
    spec = replace(SMALL, architecture=architecture, initializer_range=init_range)
    model = build_model(spec, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # Vectors begin as 0 or 1, and would hide that one is left out.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return LanguageModel(model, 5, document_masking)


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    tokens[0, [4, 5, 11]] = EOD_ID
    tokens[1, 0] = EOD_ID
    labels = tokens[:, 1:].clone()
    labels[2, 11:] = -100
    return tokens[:, :-1], labels


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# ---- The function ----


def plain_qwen3(weights: dict[str, Tensor], ids: Tensor, spec: ModelSpec) -> Tensor:
    """Return the logits of Qwen3 as its report describes it (Yang et al. 2025, arXiv:2505.09388, section 2).

    Grouped queries, RMSNorm before each block and of each head's queries and keys, rotary embeddings, SwiGLU, no
    biases.
    """
    heads, groups = spec.num_attention_heads, spec.num_key_value_heads
    size, length = spec.hidden_size // heads, ids.shape[1]

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + spec.rms_norm_eps).sqrt()

    angles = torch.outer(torch.arange(length), spec.rope_theta ** (-torch.arange(0, size, 2) / size)).double()
    turns = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)

    def rotated(x: Tensor) -> Tensor:
        """Turn the pairs (i, i + size / 2) of the features of each head, ``[batch, length, heads, size]``."""
        pairs = torch.view_as_complex(x.unflatten(-1, (2, size // 2)).transpose(-1, -2).contiguous()) * turns
        return torch.view_as_real(pairs).transpose(-1, -2).flatten(-2)

    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(spec.num_hidden_layers):
        name = f"model.layers.{layer}"
        x = norm(hidden, f"{name}.input_layernorm")
        q, k, v = (x @ weights[f"{name}.self_attn.{one}_proj.weight"].T for one in "qkv")
        q = rotated(norm(q.unflatten(-1, (heads, size)), f"{name}.self_attn.q_norm"))
        k = rotated(norm(k.unflatten(-1, (groups, size)), f"{name}.self_attn.k_norm"))
        k, v = (one.repeat_interleave(heads // groups, 2) for one in (k, v.unflatten(-1, (groups, size))))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        taken = scores.masked_fill(future, -torch.inf).softmax(-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", taken, v).flatten(-2)
        hidden = hidden + attended @ weights[f"{name}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{name}.post_attention_layernorm")
        gate, up = (x @ weights[f"{name}.mlp.{one}_proj.weight"].T for one in ("gate", "up"))
        hidden = hidden + (F.silu(gate) * up) @ weights[f"{name}.mlp.down_proj.weight"].T
    return norm(hidden, "model.norm") @ weights["model.embed_tokens.weight"].T


def test_qwen3_computes_what_its_report_says():
    model = language_model("qwen3", init_range=0.3).causal_lm.double()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert "model.layers.0.self_attn.q_norm.weight" in weights
    assert not [name for name in weights if name.endswith("bias")]
    ids, _ = batch()
    with torch.no_grad():
        found = model(input_ids=ids).logits
    expected = plain_qwen3(weights, ids, replace(SMALL, architecture="qwen3"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # transformers' RMSNorm computes in fp32


@of_every_architecture
def test_loss_and_gradients_are_those_of_transformers_forward(architecture):
    model = language_model(architecture).double()
    input_ids, labels = batch()
    loss = model(input_ids, labels)
    logits = model.causal_lm(input_ids=input_ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-5, atol=1e-6)


@of_every_architecture
def test_zero_projections_leave_only_the_embedding(architecture):
    spec = replace(SMALL, architecture=architecture, init="zero_projections")
    model = build_model(spec, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=0)
    ids, _ = batch()
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits, model.lm_head(model.model.norm(model.model.embed_tokens(ids)))
        )


# ---- Folders ----


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"head_dim": 16}, "config.json says head_dim 16, this program only computes 8"),
        ({"head_dim": ...}, "config.json says head_dim 128, this program only computes 8"),
        ({"attention_bias": True}, "config.json says attention_bias True, this program only computes False"),
        ({"use_sliding_window": True}, "config.json says use_sliding_window True"),
        ({"model_type": "llama", "attention_bias": True}, "self_attn.k_norm.weight is not part of the model"),
    ],
)
def test_folder_of_another_qwen3_is_refused(changed, named, tmp_path):
    spec, form = replace(SMALL, architecture="qwen3"), ARCHITECTURES["qwen3"].form("qwen3")
    weights = {name: one.detach() for name, one in language_model("qwen3").causal_lm.named_parameters()}
    write_model(tmp_path, form, spec, weights, vocab_size=VOCAB_SIZE, eod_id=EOD_ID, context_length=CONTEXT_LENGTH)
    assert read_model(tmp_path).spec == spec
    config = json.loads((tmp_path / "config.json").read_bytes()) | changed
    (tmp_path / "config.json").write_text(json.dumps({key: one for key, one in config.items() if one is not ...}))
    with pytest.raises(NotAModel, match=re.escape(named)):
        read_model(tmp_path)


# ---- The ways in which it is computed ----


@of_every_architecture
def test_compiled_step_has_the_same_loss_and_gradients(architecture):
    model, compiled = language_model(architecture), language_model(architecture)
    compiled.compile(backend="aot_eager")
    expected, loss = model(*batch()), compiled(*batch())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(compiled, loss), gradients(model, expected), rtol=1e-5, atol=1e-5)


@of_every_architecture
def test_packed_documents_are_masked_and_single_documents(architecture):
    model = language_model(architecture, document_masking=True, init_range=0.1)
    input_ids, labels = batch()
    masked = model(input_ids, labels)
    with flash_kernels() as dtypes:
        packed = model(input_ids, labels, bounds=document_bounds(input_ids, EOD_ID))
        of_packed = gradients(model, packed)
    assert len(dtypes) == 2 * SMALL.num_hidden_layers, "forward and backward"
    torch.testing.assert_close(packed, masked)
    torch.testing.assert_close(of_packed, gradients(model, masked), rtol=1e-4, atol=1e-5)
    nats = model(input_ids, labels, reduction="none")
    alone = model(input_ids[:1, 6:12], labels[:1, 6:12], reduction="none")
    torch.testing.assert_close(nats[:1, 6:12], alone)
    mixed = language_model(architecture, init_range=0.1)(input_ids, labels, reduction="none")
    assert ((mixed - nats)[:1, 6:12].abs() > 1e-3).any(), "without a mask, documents see each other"


@of_every_architecture
def test_packed_documents_are_computed_in_bf16_under_autocast(architecture):
    model = language_model(architecture, document_masking=True, init_range=0.1)
    input_ids, labels = batch()
    with flash_kernels() as dtypes, torch.autocast("cpu", dtype=torch.bfloat16):
        packed = model(input_ids, labels, bounds=document_bounds(input_ids, EOD_ID))
    assert dtypes == SMALL.num_hidden_layers * [torch.bfloat16]
    torch.testing.assert_close(packed, model(input_ids, labels), rtol=2e-3, atol=0)


@of_every_architecture
@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_autocast_has_the_fp32_gradients_within_its_rounding(architecture, dtype, error):
    model, scale = language_model(architecture, init_range=0.1), torch.tensor(1024.0)
    exact = gradients(model, model(*batch()))
    with torch.autocast("cpu", dtype=dtype):
        loss = model(*batch(), gradient_scale=scale)
    for name, gradient in gradients(model, loss).items():
        assert gradient.dtype == torch.float32
        # The bias of a key adds the same number to all scores of a query, so its gradient is only rounding errors.
        if "k_proj.bias" not in name:
            assert (gradient / scale - exact[name]).norm() < error * exact[name].norm(), name


class OneTokenPerCharacter:
    eod_id = EOD_ID

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[ord(one) - ord("0") for one in text] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("0") + one) for one in ids)


@of_every_architecture
def test_generation_with_its_cache_takes_the_likeliest_tokens(architecture):
    model, tokenizer = language_model(architecture, init_range=0.3).causal_lm.eval(), OneTokenPerCharacter()
    ids = [EOD_ID, *tokenizer.encode(["12"])[0]]
    while len(ids) < CONTEXT_LENGTH:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert EOD_ID not in ids[1:] and len(set(ids[3:])) > 3, "the prompt has to show more than one repeated token"
    found = continue_text(model, tokenizer, "12", Sampling(100, 0.0, 1.0, 1), CONTEXT_LENGTH)
    assert found == tokenizer.decode(ids[3:])


# ---- The optimizer ----


@of_every_architecture
def test_only_matrices_have_weight_decay(architecture):
    spec = replace(SMALL, architecture=architecture)
    model = language_model(architecture).causal_lm
    settings = OptimizerSettings("adamw", weight_decay=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8)
    optimizer = BUILDERS["adamw"].build(settings, list(model.named_parameters()))
    decays = {one: group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    names = {name: decays[parameter] for name, parameter in model.named_parameters()}
    assert names == {name: 0.1 if len(shape) == 2 else 0.0 for name, shape in tensor_shapes(spec, VOCAB_SIZE).items()}
