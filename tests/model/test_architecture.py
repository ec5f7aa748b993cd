"""The network: valid shapes only, the same weights everywhere, causal, and the loss of transformers' own forward."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from job.errors import UserError
from job.model.architecture import LanguageModel, build_model
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
    """The loss as transformers' own forward gives it, with its full logits and its own mask."""
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
def test_a_shape_that_no_network_can_have_is_refused_by_the_name_of_its_setting(field, value):
    with pytest.raises(UserError) as refusal:
        replace(SPEC, **{field: value})
    assert refusal.value.setting == f"model.{field}"


@pytest.mark.parametrize("hidden_size", [1, 30, 36, 1001])
def test_the_hidden_size_that_a_refusal_offers_is_accepted(hidden_size):
    with pytest.raises(UserError) as refusal:
        replace(SPEC, hidden_size=hidden_size)
    replace(SPEC, hidden_size=int(refusal.value.remedy.split()[1].rstrip(",")))


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_loss_and_every_gradient_are_those_of_transformers_own_forward(tie_word_embeddings, num_key_value_heads):
    spec = replace(SPEC, tie_word_embeddings=tie_word_embeddings, num_key_value_heads=num_key_value_heads)
    model = language_model(spec).double()
    loss, expected = model(*batch()), plain_loss(model, *batch())
    torch.testing.assert_close(loss, expected)
    # Not 1e-9: transformers' RMSNorm computes in fp32 whatever it is given.
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_tied_embedding_is_the_sum_of_its_uses_as_input_and_as_head():
    tied, untied = language_model(), language_model(replace(SPEC, tie_word_embeddings=False))
    weights = tied.causal_lm.state_dict()
    untied.causal_lm.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})

    of_tied = gradients(tied, tied(*batch()))
    of_untied = gradients(untied, untied(*batch()))

    as_head = of_untied.pop("causal_lm.lm_head.weight")
    of_untied["causal_lm.model.embed_tokens.weight"] += as_head
    torch.testing.assert_close(of_tied, of_untied)
    assert as_head.abs().max() > 0.1


def test_evaluation_gives_the_nats_of_each_label_and_their_sum_is_the_training_loss():
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


def test_with_document_masking_a_document_is_read_as_if_it_stood_alone():
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
def test_a_compiled_step_gives_the_loss_and_the_gradients_of_one_that_is_not(document_masking):
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
    torch._dynamo.reset()  # what other tests have compiled
    torch._dynamo.utils.counters.clear()
    model.compile(backend="aot_eager")
    input_ids, labels = batch()
    for _ in range(2):
        model(input_ids, labels).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # a layer, and a chunk of the loss


def test_what_has_other_shapes_than_a_training_step_is_not_compiled_again():
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
    """The operators that a step calls, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), args))
        return func(*args, **(kwargs or {}))


def test_attention_is_causal_by_flag_without_a_mask_and_the_host_never_waits_for_the_device():
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


def test_the_same_seed_gives_the_same_weights_whatever_the_global_generator_holds():
    torch.manual_seed(1)
    first = build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=2333).state_dict()
    torch.manual_seed(2)
    second = build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=2333).state_dict()
    other = build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=2334).state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_building_a_model_leaves_the_global_generator_where_it_was():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_parameters_keep_the_names_of_the_hugging_face_model_and_a_tied_head_has_none():
    model = language_model()
    names = [name for name, _ in model.named_parameters()]
    assert names == [f"causal_lm.{name}" for name, _ in model.causal_lm.named_parameters()]
    assert "causal_lm.model.embed_tokens.weight" in names and "causal_lm.lm_head.weight" not in names
    untied = language_model(replace(SPEC, tie_word_embeddings=False))
    assert {name for name, _ in untied.named_parameters()} == {*names, "causal_lm.lm_head.weight"}


def test_bf16_parameters_and_autocast_give_the_fp32_loss_within_the_tolerance_of_bf16():
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
        if "k_proj.bias" not in name:  # a key's bias adds the same to all scores of a query: its gradient is rounding
            assert (gradient - exact_gradients[name]).norm() < 0.05 * exact_gradients[name].norm(), name


def test_rotary_frequencies_are_not_rounded_with_the_parameters():
    model = language_model()
    exact = model.causal_lm.model.rotary_emb.inv_freq.clone()
    for cast in (model.bfloat16, model.half, model.double, lambda: model.to(torch.bfloat16)):
        cast()
        assert torch.equal(model.causal_lm.model.rotary_emb.inv_freq, exact)


def test_a_saved_model_is_an_ordinary_hugging_face_directory_with_a_cache_for_generation(tmp_path):
    model = language_model()
    model.causal_lm.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids, _ = batch()
    torch.testing.assert_close(loaded(input_ids).logits, model.causal_lm(input_ids).logits)
    assert loaded.config.eos_token_id == loaded.generation_config.eos_token_id == EOD_ID
    assert loaded.config.pad_token_id is None and loaded.config.use_cache
    assert loaded.config.max_position_embeddings == CONTEXT_LENGTH
    assert loaded.config.rope_parameters == {"rope_type": "default", "rope_theta": SPEC.rope_theta}


def test_a_new_model_knows_nothing_its_loss_is_that_of_guessing():
    input_ids, labels = batch()
    mean = language_model()(input_ids, labels) / (labels != -100).sum()
    assert mean.item() == pytest.approx(torch.tensor(float(VOCAB_SIZE)).log().item(), rel=0.02)
