"""Tests of text generation: the streamed pieces join to the text, characters stay whole, and the seed decides it."""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from engine_worker import SPEC
from small_run import STEPS, DataSet, FinishedRun, run
from transformers import AutoTokenizer, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from job import commands
from job import config as settings
from job.model.generation import Sampling, continue_text
from job.model.language_model import build_model
from job.model.spec import ModelSpec

CONTEXT_LENGTH = 64
SAMPLED = Sampling(max_new_tokens=40, temperature=1.0, top_p=1.0, seed=7)
GREEDY = Sampling(max_new_tokens=40, temperature=0.0, top_p=0.9, seed=7)
PROMPT = "人工智能"


@pytest.fixture(scope="module")
def model(data_set: DataSet) -> Qwen2ForCausalLM:
    """A model with new weights that are large enough to make some tokens much likelier than others."""
    spec = ModelSpec(**(vars(SPEC) | {"initializer_range": 0.3}))
    return build_model(spec, data_set.manifest.vocab_size, data_set.manifest.eod_id, CONTEXT_LENGTH, seed=1)


def table_model(data: DataSet, following: Mapping[int, Mapping[int, float]]) -> Qwen2ForCausalLM:
    """Return a model whose next token depends only on the last one.

    `following` gives the probabilities of the next token for each token; after any other token the document ends. The
    layers of the model add nothing, the embedding gives each token its own direction, and the head reads the logits of
    the next token from the direction of the last.
    """
    vocab_size = data.manifest.vocab_size
    width = -(-vocab_size // 4) * 4
    spec = ModelSpec(width, 1, 2, 1, 4, tie_word_embeddings=False)
    model = build_model(spec, vocab_size, data.manifest.eod_id, CONTEXT_LENGTH, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size, width))
        model.lm_head.weight.zero_()
        model.lm_head.weight[data.manifest.eod_id] = 10.0
        for token, probabilities in following.items():
            for other, probability in probabilities.items():
                # RMSNorm scales the 1 in the token's direction to √width.
                model.lm_head.weight[other, token] = (300 + math.log(probability)) / math.sqrt(width)
    return model


def byte_tokens(data: DataSet, text: str) -> list[int]:
    """Return one token for each UTF-8 byte of `text`."""
    fast = AutoTokenizer.from_pretrained(data.tokenizer.folder)
    found: list[int] = fast.convert_tokens_to_ids([bytes_to_unicode()[byte] for byte in text.encode()])
    return found


def test_least_temperature_takes_the_likeliest_token(model: Qwen2ForCausalLM, data_set: DataSet) -> None:
    least = settings.load(None, [("generate.temperature", "0.001")]).generate.temperature
    texts = [
        continue_text(model, data_set.tokenizer, PROMPT, replace(GREEDY, temperature=temperature), CONTEXT_LENGTH)
        for temperature in (0.0, least)
    ]
    assert texts[0] == texts[1] != ""


@torch.no_grad()
def test_temperature_0_takes_the_likeliest_token_each_time(model: Qwen2ForCausalLM, data_set: DataSet) -> None:
    ids = [data_set.manifest.eod_id, *data_set.tokenizer.encode([PROMPT])[0]]
    begun = len(ids)
    for _ in range(GREEDY.max_new_tokens):
        following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if following == data_set.manifest.eod_id:
            break
        ids.append(following)
    expected = data_set.tokenizer.decode(ids[begun:])
    for seed in (1, 2):
        sampling = Sampling(GREEDY.max_new_tokens, 0.0, 0.9, seed)
        assert continue_text(model, data_set.tokenizer, PROMPT, sampling, CONTEXT_LENGTH) == expected


def test_pieces_are_whole_characters_and_join_to_the_text(data_set: DataSet) -> None:
    text = "龘🤖é!"
    ids = byte_tokens(data_set, text)
    assert len(ids) == len(set(ids)) == 10, "a token for each byte, none twice"
    model = table_model(data_set, {token: {other: 1.0} for token, other in pairwise([data_set.manifest.eod_id, *ids])})
    for sampling in (GREEDY, SAMPLED):
        pieces: list[str] = []
        assert continue_text(model, data_set.tokenizer, "", sampling, CONTEXT_LENGTH, pieces.append) == text
        assert pieces == list(text)


def test_invalid_bytes_are_passed_on_once_known_to_be_invalid(data_set: DataSet) -> None:
    ids = byte_tokens(data_set, "龘a")
    model = table_model(
        data_set, {token: {other: 1.0} for token, other in pairwise([data_set.manifest.eod_id, *ids[1:]])}
    )
    pieces: list[str] = []
    text = continue_text(model, data_set.tokenizer, "", GREEDY, CONTEXT_LENGTH, pieces.append)
    assert text == data_set.tokenizer.decode(ids[1:])
    assert pieces == [text]


def test_character_cut_off_at_the_end_is_shown_as_such(data_set: DataSet) -> None:
    ids = byte_tokens(data_set, "a龘")
    model = table_model(data_set, {token: {other: 1.0} for token, other in pairwise([data_set.manifest.eod_id, *ids])})
    pieces: list[str] = []
    text = continue_text(
        model, data_set.tokenizer, "", replace(GREEDY, max_new_tokens=3), CONTEXT_LENGTH, pieces.append
    )
    assert text == data_set.tokenizer.decode(ids[:3])
    assert pieces == ["a", text[1:]]


def test_pieces_of_a_new_model_join_to_its_text(model: Qwen2ForCausalLM, data_set: DataSet) -> None:
    pieces: list[str] = []
    text = continue_text(model, data_set.tokenizer, PROMPT, SAMPLED, CONTEXT_LENGTH, pieces.append)
    assert len(pieces) > 5
    assert "".join(pieces) == text


def test_seed_decides_the_text(model: Qwen2ForCausalLM, data_set: DataSet) -> None:
    texts = [
        continue_text(model, data_set.tokenizer, PROMPT, SAMPLED.for_prompt(index), CONTEXT_LENGTH)
        for index in (0, 0, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_small_top_p_or_temperature_takes_the_likeliest_token(data_set: DataSet) -> None:
    letters = dict(zip(byte_tokens(data_set, "abcd"), (0.5, 0.3, 0.15, 0.05), strict=True))
    model = table_model(data_set, {data_set.manifest.eod_id: letters})

    def said(temperature: float, top_p: float) -> set[str]:
        samplings = [Sampling(1, temperature, top_p, seed) for seed in range(60)]
        return {continue_text(model, data_set.tokenizer, "", one, CONTEXT_LENGTH) for one in samplings}

    assert said(1.0, 1.0) == set("abcd")
    assert said(1.0, 0.9) == set("abc")
    assert said(1.0, 0.7) == set("ab")
    assert said(1.0, 0.01) == set("a")
    assert said(0.05, 1.0) == set("a")


def test_generation_changes_no_global_state(model: Qwen2ForCausalLM, data_set: DataSet) -> None:
    for is_training in (True, False):
        model.train(is_training)
        before = torch.get_rng_state()
        continue_text(model, data_set.tokenizer, PROMPT, SAMPLED, CONTEXT_LENGTH)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.training == is_training


def test_long_prompt_is_continued_from_its_end(model: Qwen2ForCausalLM, data_set: DataSet) -> None:
    fed: list[int] = []
    watch = model.register_forward_pre_hook(
        lambda _, __, words: fed.append(words["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        continue_text(model, data_set.tokenizer, PROMPT * 100, SAMPLED, CONTEXT_LENGTH)
    finally:
        watch.remove()
    assert 0 < sum(fed) <= CONTEXT_LENGTH


def test_generate_reads_checkpoint_and_final_model(
    finished_run: FinishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    final = f"{finished_run.output}/final"
    code, out, err = run("generate", finished_run.settings, PROMPT, "--generate.model", final, "--generate.seed", "7")
    assert code == 0, out + err
    assert out.startswith(f"[{PROMPT}]") and len(out) > len(PROMPT) + 3
    for source in (None, f"{finished_run.output}/checkpoints/step-{STEPS:08d}-a1"):
        overrides = [("generate.seed", "7"), *([("generate.model", source)] if source else [])]
        config = settings.load(str(finished_run.settings), overrides)
        assert commands.generate(config, [PROMPT]) == 0
        assert capsys.readouterr().out == out
