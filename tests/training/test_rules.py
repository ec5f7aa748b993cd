"""What a run says of itself before its first step: rules that settings and data break, and what has changed."""

from pathlib import Path
from typing import Any

import pytest
from small_run import ALONE, DataSet, run, write_settings
from test_workload import data_set as manifest_of

from job import config as settings
from job.config import Config
from job.data.manifest import Manifest
from job.errors import EXIT_DONE, UserError
from job.model.flops import TokenFlops
from job.preflight.findings import UNSURE, WRONG, Findings
from job.preflight.settings import check_run_rules
from job.preflight.workload import plan
from job.runs.attempts import Attempts
from job.runs.compatibility import differences
from job.runs.metrics_file import read_metrics
from job.runs.setting_changes import Change, change_of_schedule, changes
from job.training.rules import Length, about_nodes, check_learning_rates, remarks

FINE = {
    "train": {"context_length": 8, "global_batch_size": 10, "micro_batch_size": 1, "warmup_steps": 5, "epochs": 1},
    "checkpoint": {"every": 50},
    "evaluate": {"every": 1000},
}
MANIFEST = manifest_of([8 * 1000 + 1] * 1, [100])
"""One document of 1,000 sequences."""


def config(**changes: dict[str, Any]) -> Config:
    return settings.build({name: FINE.get(name, {}) | changes.get(name, {}) for name in {**FINE, **changes}})


def length_of(config: Config, manifest: Manifest = MANIFEST) -> Length:
    work = plan(manifest, TokenFlops(1, 1, 1), context_length=config.train.context_length,
                global_batch_size=config.train.global_batch_size, epochs=config.train.epochs,
                max_steps=config.train.max_steps, evaluate_every=1000, evaluate_max_windows=None)  # fmt: skip
    return Length(work.steps, work.steps_of_epochs, work.windows_per_epoch)


def said(config: Config, manifest: Manifest = MANIFEST) -> list[str]:
    return [str(one) for one in remarks(config, manifest, length_of(config, manifest), nodes=1)]


def test_nothing_is_said_of_a_run_that_breaks_no_rule() -> None:
    assert said(config()) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"train": {"warmup_steps": 100}}, "! schedule: all 100 steps are in the warm-up (100): train.learning_rate is "
         "never reached; set train.warmup_steps to 5 or so"),
        ({"checkpoint": {"every": 101}}, "! schedule: a checkpoint every 101 of 100 steps: none before the end; set "
         "checkpoint.every to 10 or so"),
        ({"train": {"max_steps": 101}}, "! schedule: train.max_steps is 101, but train.epochs (1) end after 100 steps; "
         "raise train.epochs, or leave train.max_steps out"),
        ({"train": {"global_batch_size": 1001, "warmup_steps": 0}, "checkpoint": {"every": 1}},
         "! batch: an epoch has 1,000 sequences, fewer than the 1,001 of a step; set train.global_batch_size or "
         "train.context_length to less, or take more text"),
        ({"data": {"node_groups": 2}}, "! node groups: data.node_groups is 2 for 1 nodes: each reads several parts; "
         "set data.node_groups to 1 or less"),
    ],
)  # fmt: skip
def test_a_rule_that_is_broken_is_said_with_what_to_do(changed: dict[str, Any], line: str) -> None:
    assert said(config(**changed)) == [line]


def test_a_context_longer_than_unmasked_documents_is_said() -> None:
    short = manifest_of([2001] * 4, [100])  # one document each
    long = {"train": {"context_length": 2002, "global_batch_size": 1, "warmup_steps": 0}, "checkpoint": {"every": 1}}
    line = "! context: train.context_length is 2,002, and the documents have 2,001 tokens on average: most sequences"
    assert [one[: len(line)] for one in said(config(**long), short)] == [line]
    long["train"]["document_masking"] = True
    assert said(config(**long), short) == []
    long["train"] |= {"document_masking": False, "context_length": 2001}
    assert said(config(**long), short) == []


def test_no_held_out_text_and_too_small_a_cache_are_said() -> None:
    assert [one.partition(":")[0] for one in said(config(), manifest_of([8001], []))] == ["! held-out data"]
    large = manifest_of([2**20], [100])
    remote = {"shards": "s3://bucket/shards", "cache_bytes": "1MiB"}
    found = list(remarks(config(data=remote), large, Length(100, 100, 2**17), 1))
    assert [(one.name, one.is_wrong) for one in found] == [("shard cache", True)]


def test_check_shows_the_same_rules() -> None:
    found, wrong = Findings(), config(train={"warmup_steps": 100}, data={"node_groups": 2})
    work = plan(MANIFEST, TokenFlops(1, 1, 1), context_length=8, global_batch_size=10, epochs=1, max_steps=None,
                evaluate_every=1000, evaluate_max_windows=None)  # fmt: skip
    check_run_rules(found, wrong, MANIFEST, work)
    rows = [f"! {one.name}: {one.found}; {one.remedy}" for one in found.rows if one.mark in (UNSURE, WRONG)]
    assert rows + [str(one) for one in about_nodes(wrong, 1)] == said(wrong)


def test_a_learning_rate_that_would_rise_is_refused() -> None:
    with pytest.raises(UserError, match=r"^train.min_learning_rate: 0.01: is above train.learning_rate \(0.001\)"):
        check_learning_rates(config(train={"learning_rate": 1e-3, "min_learning_rate": 1e-2}).train)
    check_learning_rates(config(train={"learning_rate": 1e-3, "min_learning_rate": 1e-3}).train)


# ---- What has changed ----


def test_every_setting_that_differs_is_a_change() -> None:
    before, now = (settings.to_dict(config(train={"learning_rate": rate})) for rate in (0.003, 0.001))
    now["run"]["name"], before["train"]["seed"] = "two", 1
    del before["train"]["epochs"]  # an earlier version did not have it: 2 is its default
    assert [str(one) for one in changes(before, now)] == [
        "run.name: null → two",
        "train.epochs: 2 → 1",
        "train.learning_rate: 0.003 → 0.001",
        "train.seed: 1 → 2333",
    ]
    assert changes(now, now) == changes({}, now) == []


def test_settings_before_that_are_damaged_are_no_change() -> None:
    now = settings.to_dict(config())
    assert Change("train.epochs", 2, 1) not in changes({"train": 3}, now)
    for damaged in (3, None, {"max_steps": "many", "epochs": [], "learning_rate": None}):
        assert change_of_schedule({"train": damaged}, config(), 1000, 50) is None


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ({"max_steps": 50}, {}, "ends at step 100 instead of 50: the learning rate of step 51 is 2.71e-04, 0.00e+00"),
        ({}, {"learning_rate": 1e-3}, "ends at step 100: the learning rate of step 51 is 5.41e-04, 2.71e-04"),
        ({"epochs": 2}, {}, "ends at step 100 instead of 200: the learning rate of step 51 is 2.71e-04, 4.37e-04"),
        ({"weight_decay": 1.0}, {}, None),
        ({"max_steps": 100}, {}, None),
    ],
)  # fmt: skip
def test_other_settings_of_the_schedule_say_what_it_does_now(
    before: dict[str, Any], now: dict[str, Any], line: str | None
) -> None:
    earlier = settings.to_dict(config(train=before))
    found = change_of_schedule(earlier, config(train=now), 1000, 50)
    assert (found and found.replace("it was to be ", "")) == (line and f"the schedule {line}")


def test_a_difference_names_the_setting_and_both_values() -> None:
    before = {"model": {"hidden_size": 96, "num_hidden_layers": 2}, "order": {"seed": 1}, "context_length": 8,
              "global_batch_size": 8, "data": "a" * 64, "tokenizer": "c"}  # fmt: skip
    now = {"model": {"hidden_size": 128, "num_hidden_layers": 2}, "order": {"seed": 2}, "context_length": 8,
           "global_batch_size": 16, "data": "b" * 64, "tokenizer": "c"}  # fmt: skip
    assert list(differences(before, now)) == [
        "model.hidden_size was 96, is 128",
        "data.seed was 1, is 2",
        "train.global_batch_size was 8, is 16",
        f"the data set was {'a' * 12}, is {'b' * 12} (fingerprints)",
    ]
    assert list(differences({}, {"model": {"hidden_size": 1}})) == ["model.hidden_size was None, is 1"]


# ---- A real run ----


@pytest.mark.recovery
def test_a_run_says_what_it_breaks_and_what_has_changed(data_set: DataSet, bucket: str, tmp_path: Path) -> None:
    output = f"{bucket}/run"
    train = ALONE | {"max_steps": 30, "warmup_steps": 30, "log_every": 100, "learning_rate": 0.003}
    first = write_settings(tmp_path, data_set, output, train=train)
    code, out, err = run("train", first)
    assert (code, err) == (EXIT_DONE, "")
    assert "! schedule: all 30 steps are in the warm-up (30)" in out
    assert "step 1/30 | loss" in out and "step 2/30" not in out
    assert [row["step"] for row in read_metrics(output) if "train/loss" in row] == [1, 30]
    record = Attempts(output).read(1)
    assert record is not None and record.config is not None and record.changed is None

    longer = train | {"max_steps": 40, "warmup_steps": 5, "learning_rate": 0.001}
    code, out, err = run("train", write_settings(tmp_path, data_set, output, train=longer))
    assert (code, err) == (EXIT_DONE, "")
    lines = [line for line in out.splitlines() if line.startswith(("changed", "! schedule: the"))]
    assert lines[:3] == [
        "changed since attempt 1: train.max_steps: 30 → 40",
        "changed since attempt 1: train.learning_rate: 0.003 → 0.001",
        "changed since attempt 1: train.warmup_steps: 30 → 5",
    ]
    assert lines[3].startswith(
        "! schedule: the schedule ends at step 40 instead of 30: the learning rate of step 31 is "
    )
    record = Attempts(output).read(2)
    assert record is not None and record.changed == {
        "train.max_steps": [30, 40],
        "train.learning_rate": [0.003, 0.001],
        "train.warmup_steps": [30, 5],
    }
