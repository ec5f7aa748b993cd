"""Tests of the network: it refuses invalid shapes, is reproducible and causal, and has the loss of transformers."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from job.errors import UserError
from job.model.language_model import LanguageModel, build_model
from job.model.spec import ModelSpec

SPEC = ModelSpec(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48
)
VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH = 67, 3, 16


def language_model(spec: ModelSpec = SPEC, seed: int = 0, loss_chunk_tokens: int | None = 5) -> LanguageModel:
    return LanguageModel(build_model(spec, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed), loss_chunk_tokens)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCAB_SIZE, (3, CONTEXT_LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    labels = tokens[:, 1:].clone()
    labels[2, 11:] = -100
    return tokens[:, :-1], labels


def plain_loss(model: LanguageModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of transformers' own forward, with its full logits and its own mask."""
    logits = model.causal_lm(input_ids=input_ids).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def gradients(model: LanguageModel, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 30),
        ("hidden_size", 36),
        ("hidden_size", 0),
        ("num_hidden_layers", 0),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("intermediate_size", 0),
    ],
)
def test_impossible_shape_is_refused_with_its_setting(field, value):
    with pytest.raises(UserError) as refusal:
        replace(SPEC, **{field: value})
    assert refusal.value.setting == f"model.{field}"


@pytest.mark.parametrize("hidden_size", [1, 30, 36, 1001])
def test_hidden_size_suggested_by_a_refusal_is_accepted(hidden_size):
    with pytest.raises(UserError) as refusal:
        replace(SPEC, hidden_size=hidden_size)
    replace(SPEC, hidden_size=int(refusal.value.remedy.split()[3].rstrip(",")))


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_loss_and_gradients_equal_transformers_own_forward(tie_word_embeddings, num_key_value_heads):
    spec = replace(SPEC, tie_word_embeddings=tie_word_embeddings, num_key_value_heads=num_key_value_heads)
    model = language_model(spec).double()
    loss, expected = model(*batch()), plain_loss(model, *batch())
    torch.testing.assert_close(loss, expected)
    # The tolerance is not 1e-9, because transformers' RMSNorm always computes in fp32.
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-5, atol=1e-6)


def test_tied_embedding_gradient_sums_input_and_head():
    tied, untied = language_model(), language_model(replace(SPEC, tie_word_embeddings=False))
    weights = tied.causal_lm.state_dict()
    untied.causal_lm.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})

    of_tied = gradients(tied, tied(*batch()))
    of_untied = gradients(untied, untied(*batch()))

    as_head = of_untied.pop("causal_lm.lm_head.weight")
    of_untied["causal_lm.model.embed_tokens.weight"] += as_head
    torch.testing.assert_close(of_tied, of_untied)
    assert as_head.abs().max() > 0.1


def test_nats_of_each_label_sum_to_the_training_loss():
    model = language_model()
    input_ids, labels = batch()
    nats = model(input_ids, labels, reduction="none")
    assert nats.shape == labels.shape and not nats.requires_grad
    assert not nats[labels == -100].any() and nats[labels != -100].all()
    torch.testing.assert_close(nats.sum(), model(input_ids, labels).detach())


def test_no_token_sees_a_later_one():
    model = language_model()
    input_ids, labels = batch()
    changed = input_ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % VOCAB_SIZE
    before, after = (model(tokens, labels, reduction="none") for tokens in (input_ids, changed))
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert ((before - after).abs()[:, 9:] > 1e-4)[labels[:, 9:] != -100].all()


def test_document_masking_hides_other_documents():
    plain, masked = language_model(), language_model()
    masked.document_masking = True
    first, second = torch.arange(4, 11), torch.arange(20, 28)
    end = torch.tensor([EOD_ID])
    both = torch.cat([first, end, second]).unsqueeze(0)
    labels = both.roll(-1, 1)
    alone = masked(second.unsqueeze(0), labels[:, len(first) + 1 :], reduction="none")
    torch.testing.assert_close(masked(both, labels, reduction="none")[:, len(first) + 1 :], alone)
    before = plain(both, labels, reduction="none")
    assert ((before[:, len(first) + 1 :] - alone).abs() > 1e-4).any()
    torch.testing.assert_close(masked(both, labels, reduction="none")[:, : len(first) + 1], before[:, : len(first) + 1])


@pytest.mark.parametrize("document_masking", [False, True])
def test_compiled_step_gives_the_same_loss_and_gradients(document_masking):
    model, compiled = language_model(), language_model()
    model.document_masking = compiled.document_masking = document_masking
    input_ids, labels = batch()
    input_ids[:, 5] = EOD_ID
    compiled.compile(backend="aot_eager")
    expected, loss = model(input_ids, labels), compiled(input_ids, labels)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(compiled, loss), gradients(model, expected), rtol=1e-5, atol=1e-5)
    assert list(compiled.state_dict()) == list(model.state_dict())


def test_all_layers_share_one_compiled_graph():
    model = language_model(replace(SPEC, num_hidden_layers=12), loss_chunk_tokens=8)
    torch._dynamo.reset()  # Forget the graphs that other tests have compiled.
    torch._dynamo.utils.counters.clear()
    model.compile(backend="aot_eager")
    input_ids, labels = batch()
    for _ in range(2):
        model(input_ids, labels).backward()
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    )  # One graph for a layer and one for a chunk of the loss.


def test_other_shapes_than_a_step_are_not_compiled():
    model = language_model()
    model.compile(backend="aot_eager")
    input_ids, labels = batch()
    model(input_ids, labels)
    torch._dynamo.config.error_on_recompile = True
    try:
        model.eval()
        model(input_ids[:1], labels[:1], reduction="none")
        model.causal_lm.generate(input_ids[:1, :3], max_new_tokens=3, do_sample=False)
    finally:
        torch._dynamo.config.error_on_recompile = False


class Operators(TorchDispatchMode):
    """Mode that records the operators that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), args))
        return func(*args, **(kwargs or {}))


def test_attention_uses_causal_flag_and_host_never_waits():
    model = language_model()
    attention = F.scaled_dot_product_attention
    with (
        patch.object(F, "scaled_dot_product_attention", side_effect=attention) as attended,
        Operators() as operators,
    ):
        model(*batch()).backward()
    assert attended.call_count == SPEC.num_hidden_layers
    assert all(call.kwargs["is_causal"] and call.kwargs["attn_mask"] is None for call in attended.call_args_list)
    assert not [name for name, _ in operators.calls if "_local_scalar_dense" in name]


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=2333).state_dict()
    torch.manual_seed(2)
    second = build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=2333).state_dict()
    other = build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=2334).state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_zero_projections_change_only_the_projections():
    default, zero = (
        build_model(replace(SPEC, init=init), VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=2333).state_dict()
        for init in ("default", "zero_projections")
    )
    projections = {name for name in default if name.endswith(("o_proj.weight", "down_proj.weight"))}
    assert len(projections) == 2 * SPEC.num_hidden_layers and default.keys() == zero.keys()
    for name, weight in default.items():
        assert weight.any() or name.endswith("bias")
        assert torch.equal(zero[name], torch.zeros_like(weight) if name in projections else weight), name


def test_zero_projections_learn_from_the_first_step():
    model = language_model(replace(SPEC, init="zero_projections"))
    found = gradients(model, model(*batch()))
    for name, gradient in found.items():
        # The gradients of all other weights of a layer pass through its projections, which are still 0.
        is_reached = name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "model.norm.weight"))
        assert bool(gradient.any()) == is_reached, name


def test_building_a_model_keeps_the_global_random_state():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_have_transformers_names_and_tied_head_has_none():
    model = language_model()
    names = [name for name, _ in model.named_parameters()]
    assert names == [f"causal_lm.{name}" for name, _ in model.causal_lm.named_parameters()]
    assert "causal_lm.model.embed_tokens.weight" in names and "causal_lm.lm_head.weight" not in names
    untied = language_model(replace(SPEC, tie_word_embeddings=False))
    assert {name for name, _ in untied.named_parameters()} == {*names, "causal_lm.lm_head.weight"}


def test_bf16_and_autocast_give_the_fp32_loss_within_bf16():
    model = language_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(*batch())
    exact, exact_gradients = model(*batch()), gradients(model, model(*batch()))
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model, autocast).values())
    model.bfloat16()
    loss = model(*batch())

    assert loss.dtype == autocast.dtype == torch.float32
    torch.testing.assert_close(autocast, exact, rtol=2e-3, atol=0)
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)
    for name, gradient in gradients(model, loss).items():
        assert gradient.dtype == torch.bfloat16
        # The bias of a key adds the same number to all scores of a query, so its gradient is only rounding errors.
        if "k_proj.bias" not in name:
            assert (gradient - exact_gradients[name]).norm() < 0.05 * exact_gradients[name].norm(), name


def test_casting_the_model_keeps_rotary_frequencies_in_fp32():
    model = language_model()
    exact = model.causal_lm.model.rotary_emb.inv_freq.clone()
    for cast in (model.bfloat16, model.half, model.double, lambda: model.to(torch.bfloat16)):
        cast()
        assert torch.equal(model.causal_lm.model.rotary_emb.inv_freq, exact)


def test_saved_model_is_a_plain_hugging_face_folder(tmp_path):
    model = language_model()
    model.causal_lm.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids, _ = batch()
    torch.testing.assert_close(loaded(input_ids).logits, model.causal_lm(input_ids).logits)
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == EOD_ID
    assert loaded.config.pad_token_id is None and loaded.config.use_cache
    assert loaded.config.max_position_embeddings == CONTEXT_LENGTH
    assert loaded.config.rope_parameters == {"rope_type": "default", "rope_theta": SPEC.rope_theta}


def test_new_model_has_the_loss_of_guessing():
    input_ids, labels = batch()
    mean = language_model()(input_ids, labels) / (labels != -100).sum()
    assert mean.item() == pytest.approx(torch.tensor(float(VOCAB_SIZE)).log().item(), rel=0.02)
