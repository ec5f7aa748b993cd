"""Tests of `benchmarks.tutorial`: it does exactly what the tutorial does."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import tutorial
from benchmarks.tutorial import (
    StepClock,
    TutorialSize,
    build_model,
    full_sequences,
    random_sequences,
    stand_in_tokenizer,
)
from job.data.tokenizer import train_tokenizer
from job.demo.walk import SAMPLE

pytestmark = pytest.mark.benchmarks

TEXTS = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
TINY = TutorialSize(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """Folder of a tokenizer with 400 entries."""
    return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("vocabulary")).folder


@pytest.fixture(scope="module")
def tokenizer(vocabulary):
    return AutoTokenizer.from_pretrained(vocabulary)


def test_model_has_the_tutorials_number_of_parameters():
    with torch.device("meta"):
        model = build_model(151_646, TutorialSize())
    assert model.num_parameters() == pytest.approx(123.28e6, rel=1e-4)
    assert model.get_input_embeddings().weight.numel() == pytest.approx(77.6e6, rel=1e-3)


def test_tutorial_keeps_only_full_sequences(tokenizer):
    texts = [TEXTS[0], "牛顿", TEXTS[1]]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    sequences = full_sequences({"text": texts}, tokenizer, context_length=16)["input_ids"]
    assert sequences == [article[i : i + 16] for article in ids for i in range(0, len(article) - 15, 16)]
    assert len(ids[1]) < 16


def test_made_up_sequences_hold_no_padding():
    tokens = torch.tensor([row["input_ids"] for row in random_sequences(5, 64, 100)])
    assert tokens.shape == (100, 64)
    assert tokens.unique().tolist() == [1, 2, 3, 4]
    assert stand_in_tokenizer().pad_token_id == 0


def test_trainer_takes_the_requested_steps(tmp_path):
    clock = StepClock()
    trainer = tutorial.tutorial_trainer(
        build_model(50, TINY, 8),
        random_sequences(50, 8, 16),
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


def test_tutorial_recipe_runs_from_corpus_to_text(vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    report_file = tmp_path / "report.json"
    options = (
        f"--corpus {SAMPLE} --tokenizer {vocabulary} --output {tmp_path} --report {report_file} --context-length 16"
    )
    options += " --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1"
    options += " --intermediate-size 32 --precision fp32 --batch 2 --accumulation 1 --max-steps 2"
    tutorial.main(options.split())
    report = json.loads(report_file.read_text())
    assert len(report["steps_ended"]) == 2
    assert report["sequences"]["test"] == pytest.approx(report["sequences"]["train"] / 9, rel=0.2)
    assert report["tokens_per_step"] == 32
    assert len(report["texts"]) == len(tutorial.PROMPTS)
    assert list(report["stages"].values()) == sorted(report["stages"].values())
    assert (tmp_path / "model/model.safetensors").is_file()
