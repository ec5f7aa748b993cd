"""Tests of what a run prints before its first step: broken rules of settings and data, and changed settings."""

import re
from pathlib import Path
from typing import Any

import pytest
from manifests import manifest_of
from small_run import ALONE, DataSet, run, write_settings

from job import config as settings
from job.config import Config
from job.data.manifest import Manifest
from job.errors import EXIT_DONE, UserError
from job.model.flops import TokenFlops
from job.preflight.findings import UNSURE, WRONG, Findings
from job.preflight.settings import check_run_rules, check_settings
from job.preflight.workload import compute_workload
from job.runs.attempts import Attempts
from job.runs.compatibility import differences
from job.runs.metrics_file import read_metrics
from job.runs.setting_changes import Change, changes
from job.training.rules import Length, Remark, about_nodes, check_decay_steps, check_schedule, remarks
from job.training.schedule import change_of_schedule

FINE = {
    "train": {"context_length": 8, "global_batch_size": 10, "micro_batch_size": 1, "warmup_steps": 5, "epochs": 1},
    "checkpoint": {"every": 50},
    "evaluate": {"every": 1000},
}
MANIFEST = manifest_of([8 * 1000 + 1] * 1, [100])
"""One document of 1,000 sequences."""


WSD = {"schedule": "wsd"}


def config(**changes: dict[str, Any]) -> Config:
    return settings.build({name: FINE.get(name, {}) | changes.get(name, {}) for name in {**FINE, **changes}})


def length_of(config: Config, manifest: Manifest = MANIFEST) -> Length:
    work = compute_workload(manifest, TokenFlops(1, 1, 1), context_length=config.train.context_length,
                            global_batch_size=config.train.global_batch_size, epochs=config.train.epochs,
                            max_steps=config.train.max_steps, evaluate_every=1000,
                            max_evaluated_sequences=None)  # fmt: skip
    return Length(work.steps, work.steps_of_epochs, work.sequences_per_epoch)


def remarks_of(config: Config, manifest: Manifest = MANIFEST) -> list[str]:
    return [str(one) for one in remarks_for(config, manifest, length_of(config, manifest))]


def remarks_for(config: Config, manifest: Manifest, length: Length) -> list[Remark]:
    return list(remarks(config.model, config.train, config.data, config.checkpoint, manifest, length, nodes=1))


def test_run_within_all_rules_has_no_remarks() -> None:
    assert remarks_of(config()) == []


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"train": {"warmup_steps": 100}}, "! schedule: all 100 steps are in the warm-up (100): train.learning_rate is "
         "never reached; set train.warmup_steps to 5 or so"),
        ({"checkpoint": {"every": 101}}, "! schedule: checkpoint.every is 101, but the run has only 100 steps: it is "
         "saved only at its end or when it is stopped; set checkpoint.every to 10 or so"),
        ({"train": {"max_steps": 101}}, "! schedule: train.max_steps is 101, but train.epochs (1) end after 100 steps; "
         "raise train.epochs, or leave train.max_steps out"),
        ({"train": {"schedule": "wsd", "warmup_steps": 90}}, "! schedule: the warm-up (90) leaves 10 of 100 steps for "
         "the decay, which has 20 by default; set train.warmup_steps to 5 or so"),
        ({"train": {"schedule": "wsd", "warmup_steps": 60, "decay_steps": 41}}, "! schedule: train.decay_steps is 41, "
         "expected at most 40: the run has 100 steps, the warm-up takes 60; lower it, or train longer"),
        ({"train": {"global_batch_size": 1001, "warmup_steps": 0}, "checkpoint": {"every": 1}},
         "! batch: an epoch has 1,000 sequences, fewer than the 1,001 of a step; set train.global_batch_size or "
         "train.context_length to less, or take more text"),
        ({"data": {"node_groups": 2}}, "! node groups: data.node_groups is 2 for 1 nodes: each reads several parts; "
         "set data.node_groups to 1 or less"),
    ],
)  # fmt: skip
def test_broken_rule_is_reported_with_a_remedy(changed: dict[str, Any], line: str) -> None:
    assert remarks_of(config(**changed)) == [line]


def test_context_longer_than_unmasked_documents_is_reported() -> None:
    short = manifest_of([2001] * 4, [100])  # Each shard is one document.
    long = {"train": {"context_length": 2002, "global_batch_size": 1, "warmup_steps": 0}, "checkpoint": {"every": 1}}
    line = "! context: train.context_length is 2,002, and the documents have 2,001 tokens on average: most sequences"
    assert [one[: len(line)] for one in remarks_of(config(**long), short)] == [line]
    long["train"]["document_masking"] = True
    assert remarks_of(config(**long), short) == []
    long["train"] |= {"document_masking": False, "context_length": 2001}
    assert remarks_of(config(**long), short) == []


def test_missing_validation_text_and_small_cache_are_reported() -> None:
    assert [one.partition(":")[0] for one in remarks_of(config(), manifest_of([8001], []))] == ["! validation data"]
    large = manifest_of([2**20], [100])
    remote = {"shards": "s3://bucket/shards", "cache_bytes": "1MiB"}
    found = remarks_for(config(data=remote), large, Length(100, 100, 2**17))
    assert [(one.name, one.is_wrong) for one in found] == [("shard cache", True)]


def test_zero_projections_with_adamw_are_reported() -> None:
    zero = config(model={"init": "zero_projections"})
    line = (
        "! initialisation: model.init is zero_projections with train.optimizer adamw, for which it made the result of "
        "pilot runs worse (from 3.268 to 3.303 bits per byte); set model.init to default, or train.optimizer to muon"
    )
    assert remarks_of(zero) == [line]
    assert remarks_of(config(model={"init": "zero_projections"}, train={"optimizer": "muon"})) == []
    found = Findings()
    check_settings(found, zero.model, zero.train, zero.tracking, is_here=False)
    assert [f"! {one.name}: {one.found}; {one.remedy}" for one in found.rows if one.mark == UNSURE] == [line]


def test_check_shows_the_same_rules() -> None:
    found, wrong = Findings(), config(train={"warmup_steps": 100}, data={"node_groups": 2})
    work = compute_workload(MANIFEST, TokenFlops(1, 1, 1), context_length=8, global_batch_size=10, epochs=1,
                            max_steps=None, evaluate_every=1000, max_evaluated_sequences=None)  # fmt: skip
    check_run_rules(found, wrong.train, wrong.checkpoint, wrong.data, MANIFEST, work)
    rows = [f"! {one.name}: {one.found}; {one.remedy}" for one in found.rows if one.mark in (UNSURE, WRONG)]
    assert rows + [str(one) for one in about_nodes(wrong.data, 1)] == remarks_of(wrong)


def test_minimum_above_peak_learning_rate_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^train.min_learning_rate: 0.01: expected at most train.learning_rate \(0.001\)"
    ):
        check_schedule(config(train={"learning_rate": 1e-3, "min_learning_rate": 1e-2}).train)
    check_schedule(config(train={"learning_rate": 1e-3, "min_learning_rate": 1e-3}).train)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_decay_steps_of_another_schedule_are_refused(schedule: str) -> None:
    with pytest.raises(UserError) as refused:
        check_schedule(config(train={"schedule": schedule, "decay_steps": 20}).train)
    assert str(refused.value) == (
        f"train.decay_steps: 20: expected null with train.schedule {schedule}, which decays from the warm-up to the "
        "end; leave it out, or set train.schedule to wsd"
    )
    check_schedule(config(train={"schedule": "wsd", "decay_steps": 20}).train)


def test_decay_longer_than_the_run_is_refused() -> None:
    wsd = config(train={"schedule": "wsd", "warmup_steps": 60, "decay_steps": 40}).train
    check_decay_steps(wsd, 100)
    with pytest.raises(UserError, match=r"^train.decay_steps: 40: expected at most 39: the run has 99 steps, the warm"):
        check_decay_steps(wsd, 99)
    check_decay_steps(wsd.model_copy(update={"decay_steps": None}), 1)


def test_check_finds_a_decay_longer_than_the_run_wrong() -> None:
    found, wrong = Findings(), config(train={"schedule": "wsd", "decay_steps": 96})
    work = compute_workload(MANIFEST, TokenFlops(1, 1, 1), context_length=8, global_batch_size=10, epochs=1,
                            max_steps=None, evaluate_every=1000, max_evaluated_sequences=None)  # fmt: skip
    check_run_rules(found, wrong.train, wrong.checkpoint, wrong.data, MANIFEST, work)
    assert [one.name for one in found.rows if one.mark == WRONG] == ["schedule"]


# ---- Changed settings ----


def test_every_setting_that_differs_is_a_change() -> None:
    before, now = (settings.to_dict(config(train={"learning_rate": rate})) for rate in (0.003, 0.001))
    now["run"]["name"], before["train"]["seed"] = "two", 1
    del before["train"]["epochs"]  # An earlier version did not have this setting, so its default of 2 counts.
    assert [str(one) for one in changes(before, now)] == [
        "run.name: null → two",
        "train.epochs: 2 → 1",
        "train.learning_rate: 0.003 → 0.001",
        "train.seed: 1 → 2333",
    ]
    assert changes(now, now) == changes({}, now) == []


def test_damaged_earlier_settings_are_no_change() -> None:
    now = settings.to_dict(config())
    assert Change("train.epochs", 2, 1) not in changes({"train": 3}, now)
    for damaged in (3, None, {"max_steps": "many", "epochs": [], "learning_rate": None}):
        assert change_of_schedule({"train": damaged}, config().train, 1000, 50) is None


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ({"max_steps": 50}, {}, "ends at step 100 instead of 50: the learning rate of step 51 is 2.71e-04, 0.00e+00"),
        ({}, {"learning_rate": 1e-3}, "ends at step 100: the learning rate of step 51 is 5.41e-04, 2.71e-04"),
        ({"epochs": 2}, {}, "ends at step 100 instead of 200: the learning rate of step 51 is 2.71e-04, 4.37e-04"),
        ({"weight_decay": 1.0}, {}, None),
        ({"max_steps": 100}, {}, None),
        ({}, {"schedule": "linear"}, "is linear instead of cosine and ends at step 100: the learning rate of step 51 "
         "is 2.63e-04, 2.71e-04"),
        ({}, {"schedule": "wsd"}, "is wsd instead of cosine, ends at step 100 and decays after step 80: the learning "
         "rate of step 51 is 5.00e-04, 2.71e-04"),
        (WSD | {"max_steps": 60}, WSD, "ends at step 100 instead of 60 and decays after step 80 instead of 48: the "
         "learning rate of step 51 is 5.00e-04, 3.85e-04"),
        (WSD, WSD | {"decay_steps": 30}, "ends at step 100 and decays after step 70 instead of 80: up to step 70 "
         "nothing changes; the learning rate of step 71 is 4.84e-04, 5.00e-04"),
        ({"warmup_steps": 80, "max_steps": 90}, {"warmup_steps": 80}, "ends at step 100 instead of 90: up to step 81 "
         "nothing changes; the learning rate of step 82 is 4.97e-04, 4.88e-04"),
        (WSD, WSD | {"min_learning_rate": 1e-4}, "ends at step 100: up to step 80 nothing changes; the learning rate "
         "of step 81 is 4.81e-04, 4.76e-04"),
        ({"warmup_steps": 90, "max_steps": 90}, {"warmup_steps": 90, "max_steps": 80}, "ends at step 80 instead of 90: "
         "the learning rates up to there stay as they were"),
        (WSD | {"decay_steps": 20}, WSD, None),
    ],
)  # fmt: skip
def test_changed_schedule_is_described(before: dict[str, Any], now: dict[str, Any], line: str | None) -> None:
    earlier = settings.to_dict(config(train=before))
    found = change_of_schedule(earlier, config(train=now).train, 1000, 50)
    assert (found and found.replace("it would have been ", "")) == (line and f"the schedule {line}")


def test_record_without_a_schedule_is_of_a_cosine() -> None:
    earlier = settings.to_dict(config())
    del earlier["train"]["schedule"], earlier["train"]["decay_steps"]
    assert change_of_schedule(earlier, config().train, 1000, 50) is None
    found = change_of_schedule(earlier, config(train=WSD).train, 1000, 50)
    assert found is not None and found.startswith("the schedule is wsd instead of cosine")


def test_change_after_a_decay_names_the_checkpoint_before_it() -> None:
    earlier, longer = settings.to_dict(config(train=WSD)), config(train=WSD | {"epochs": 2}).train
    found = change_of_schedule(earlier, longer, 1000, 100, [80])
    assert found is not None and found.endswith(
        "the decay since step 80 stays in the weights: to continue without it, set train.resume to the checkpoint of "
        "step 80, which is kept"
    )
    assert "decay since" not in (change_of_schedule(earlier, longer, 1000, 80) or "")
    assert change_of_schedule(earlier, config(train=WSD).train, 1000, 100, [80]) is None


def test_difference_names_the_setting_and_both_values() -> None:
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


def test_key_of_an_earlier_version_is_default_init_and_qwen2() -> None:
    earlier = {"model": {"hidden_size": 96}}
    assert list(differences(earlier, {"model": {"hidden_size": 96, "architecture": "qwen2", "init": "default"}})) == []
    changed = {"model": {"hidden_size": 96, "architecture": "qwen3", "init": "zero_projections"}}
    assert list(differences(earlier, changed)) == [
        "model.architecture was qwen2, is qwen3",
        "model.init was default, is zero_projections",
    ]


# ---- A real run ----


@pytest.mark.recovery
def test_run_prints_broken_rules_and_changed_settings(data_set: DataSet, bucket: str, tmp_path: Path) -> None:
    output = f"{bucket}/run"
    train = ALONE | {"max_steps": 30, "warmup_steps": 30, "log_every": 100, "learning_rate": 0.003}
    first = write_settings(tmp_path, data_set, output, train=train)
    code, out, err = run("train", first)
    assert (code, err) == (EXIT_DONE, "")
    assert "! schedule: all 30 steps are in the warm-up (30)" in out
    lines = [1, *range(3, 31, 3)]  # train.log_every is longer than the run, which has about ten lines all the same
    assert re.findall(r"^step (\d+)/30 \| loss", out, re.MULTILINE) == list(map(str, lines))
    assert [row["step"] for row in read_metrics(output) if "train/loss" in row] == lines
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
