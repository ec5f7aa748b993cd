"""The tutorial's recipe does what the tutorial does: no better, no worse."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import tutorial
from benchmarks.tutorial import StepClock, TutorialSize, build_model, full_windows, random_windows, stand_in_tokenizer
from job.data.tokenizer import train_tokenizer
from job.demo.walk import SAMPLE

pytestmark = pytest.mark.benchmarks

TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
TINY = TutorialSize(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A tokenizer's folder."""
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("vocabulary")).folder


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return AutoTokenizer.from_pretrained(vocabulary)


def test_the_model_has_the_tutorials_number_of_parameters():
    with torch.device("meta"):
        model = build_model(151_646, TutorialSize())
    assert model.num_parameters() == pytest.approx(123.28e6, rel=1e-4)
    assert model.get_input_embeddings().weight.numel() == pytest.approx(77.6e6, rel=1e-3)


def test_only_full_windows_are_kept_and_each_article_begins_one(tokenizer):
    texts = [TEXTS[0], "牛顿", TEXTS[1]]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    found = full_windows({"text": texts}, tokenizer, context_length=16)["input_ids"]
    assert found == [one[i : i + 16] for one in ids for i in range(0, len(one) - 15, 16)]
    assert len(ids[1]) < 16


def test_the_windows_made_up_hold_no_padding_that_would_be_ignored():
    tokens = torch.tensor([row["input_ids"] for row in random_windows(5, 64, 100)])
    assert tokens.shape == (100, 64)
    assert tokens.unique().tolist() == [1, 2, 3, 4]
    assert stand_in_tokenizer().pad_token_id == 0


def test_a_trainer_takes_the_steps_asked_for_with_the_tutorials_arguments(tmp_path):
    clock = StepClock()
    trainer = tutorial.tutorial_trainer(
        build_model(50, TINY, 8),
        random_windows(50, 8, 16),
        stand_in_tokenizer(),
        tmp_path,
        precision="fp32",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=3,
        callbacks=[clock],
    )
    trainer.train()
    assert len(clock.ended) == 3
    assert clock.step_seconds() == [clock.ended[1] - clock.ended[0], clock.ended[2] - clock.ended[1]]
    assert clock.first_began < clock.ended[0]
    wanted = {"learning_rate": 5e-4, "weight_decay": 0.1, "warmup_steps": 200, "lr_scheduler_type": "cosine"}
    assert {name: getattr(trainer.args, name) for name in wanted} == wanted
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.0, 0.1}


def test_the_whole_recipe_runs_from_a_corpus_to_texts(vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    report = tmp_path / "report.json"
    words = f"--corpus {SAMPLE} --tokenizer {vocabulary} --output {tmp_path} --report {report} --context-length 16"
    words += " --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1"
    words += " --intermediate-size 32 --precision fp32 --batch 2 --accumulation 1 --max-steps 2"
    tutorial.main(words.split())
    found = json.loads(report.read_text())
    assert len(found["steps_ended"]) == 2
    assert found["windows"]["test"] == pytest.approx(found["windows"]["train"] / 9, rel=0.2)
    assert found["tokens_per_step"] == 32
    assert len(found["texts"]) == len(tutorial.PROMPTS)
    assert list(found["stages"].values()) == sorted(found["stages"].values())
    assert (tmp_path / "model/model.safetensors").is_file()
