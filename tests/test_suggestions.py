"""Names that other trainers have for our settings."""

import re

import pytest

from job import config as settings
from job.suggestions import FAMILIAR, NOT_A_SETTING, hint

KNOWN = [one.name for one in settings.settings()]


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
        ("use_cpu", "train.device, which is auto, cuda or cpu"),
        ("optim", "there is no such setting: it is AdamW"),
        ("learning_rate", "train.learning_rate"),
        ("train.learnin_rate", "train.learning_rate"),
    ],
)
def test_a_name_that_people_know_leads_to_our_setting(typed: str, meant: str) -> None:
    said = hint(typed, KNOWN)
    assert said.removeprefix("did you mean ").startswith(meant)


def test_what_is_like_nothing_has_no_hint() -> None:
    assert hint("zzzzzz", KNOWN) == ""


@pytest.mark.parametrize("name", FAMILIAR)
def test_every_familiar_name_leads_to_settings_that_there_are(name: str) -> None:
    named = set(re.findall(r"\b(?:[a-z]+)\.[a-z_0-9]+", FAMILIAR[name]))
    assert named and named <= set(KNOWN)
    assert name not in KNOWN and name not in NOT_A_SETTING
