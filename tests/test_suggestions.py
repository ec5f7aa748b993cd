"""Suggestions for settings that the user knows by the names of other programs."""

import re

import pytest

from job import config as settings
from job.suggestions import FAMILIAR, NOT_A_SETTING, hint

KNOWN = [setting.name for setting in settings.settings()]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("seq_len", "train.context_length"),
        ("block_size", "train.context_length"),
        ("seq-length", "train.context_length"),
        ("train.batch_size", "train.micro_batch_size"),
        ("save_steps", "checkpoint.every"),
        ("num_train_epochs", "train.epochs"),
        ("lr", "train.learning_rate"),
        ("train.LR", "train.learning_rate"),
        ("fp16", "train.precision"),
        ("data.path", "data.source"),
        ("model.n_embd", "model.hidden_size"),
        ("warmup_ratio", "train.warmup_steps, which counts steps"),
        ("gradient_accumulation_steps", "train.global_batch_size, which is train.micro_batch_size x"),
        ("device", "train.device"),
        ("qk_layernorm", "model.architecture, which is qwen2 (with biases) or qwen3 (with QK-norm"),
        ("use_cpu", "train.device, which is auto, cuda or cpu"),
        ("optim", "train.optimizer, which is adamw or muon"),
        ("learning_rate", "train.learning_rate"),
        ("train.learnin_rate", "train.learning_rate"),
    ],
)
def test_name_of_another_program_suggests_our_setting(typed: str, meant: str) -> None:
    said = hint(typed, KNOWN)
    assert said.removeprefix("did you mean ").startswith(meant)


def test_unfamiliar_name_has_no_hint() -> None:
    assert hint("zzzzzz", KNOWN) == ""


@pytest.mark.parametrize("name", FAMILIAR)
def test_every_familiar_name_suggests_existing_settings(name: str) -> None:
    named = set(re.findall(r"\b(?:[a-z]+)\.[a-z_0-9]+", FAMILIAR[name]))
    assert named and named <= set(KNOWN)
    assert name not in KNOWN and name not in NOT_A_SETTING
