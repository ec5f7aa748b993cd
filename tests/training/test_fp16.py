"""Tests of fp16: the loss scale, steps whose gradient overflows, and resuming with the scale of the checkpoint."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from engine_launch import launch_engines
from engine_worker import Case
from small_run import WriteSettings, run

from job.runs.metrics_file import read_metrics
from job.training.bad_steps import BadSteps
from job.training.loss_scale import FLOOR, GROWTH_STEPS, LossScale

PROCESSES = 2
FIRST_SCALE = 2.0**16
OVERFLOWS = Case(
    "fp16 overflows",
    "fp16",
    accumulation_steps=4,
    faults={1: "infinite gradient", 5: "infinite gradient"},
    growth_steps=2,
    keeps=3,
    last_step=8,
)
"""A run whose loss scale is lowered and raised before and after the state that is kept."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Measurements of each case on two processes under DDP."""
    cases = [
        Case("fp32"),
        Case("fp16", "fp16"),
        Case("fp16, 4 accumulated", "fp16", accumulation_steps=4),
        OVERFLOWS,
        replace(OVERFLOWS, name="left out", faults={}, left_out=[1, 5], keeps=None, growth_steps=GROWTH_STEPS),
        Case("blown up", "fp16", faults={1: "loss not a number", 2: "loss not a number"}),
        replace(OVERFLOWS, name="resumed", first_step=3, keeps=None, goes_on_from=OVERFLOWS.name),
    ]
    orders = {"strategy": "ddp", "cases": [asdict(case) for case in cases]}
    return launch_engines(tmp_path_factory.mktemp("fp16"), PROCESSES, orders)


# ---- Steps of the engine ----


@pytest.mark.parametrize("case", ["fp16", "fp16, 4 accumulated"])
def test_fp16_agrees_with_fp32_within_its_error(seen: dict[str, Any], case: str) -> None:
    assert seen[case]["losses"] == pytest.approx(seen["fp32"]["losses"], rel=1e-3)
    assert seen[case]["norms"] == pytest.approx(seen["fp32"]["norms"], rel=2e-3)
    assert seen[case]["losses"] != seen["fp32"]["losses"], "fp16 is in use"
    assert not any(sum(skipped) for skipped in seen[case]["skipped"])


def test_overflow_skips_the_step_and_halves_the_scale(seen: dict[str, Any]) -> None:
    found = seen[OVERFLOWS.name]
    assert [skipped[0] for skipped in found["skipped"]] == [step in OVERFLOWS.faults for step in range(8)]
    for step in OVERFLOWS.faults:
        assert found["engines"][step] == found["engines"][step - 1]
    scales = [state["loss_scale"]["value"] / FIRST_SCALE for state in found["guard"]]
    assert scales == [1, 0.5, 0.5, 1, 1, 0.5, 0.5, 1], "two steps without an overflow double it"


def test_scale_changes_no_weight_beyond_rounding(seen: dict[str, Any]) -> None:
    taken = [step for step in range(8) if step not in OVERFLOWS.faults]
    for key in ("losses", "norms"):
        found = [seen[OVERFLOWS.name][key][step] for step in taken]
        assert found == pytest.approx(seen["left out"][key], rel=2e-3)


def test_overflows_are_counted_but_not_in_a_row(seen: dict[str, Any]) -> None:
    guard = seen[OVERFLOWS.name]["guard"]
    assert [state["skipped_steps"] for state in guard] == [0, 1, 1, 1, 1, 2, 2, 2]
    assert {state["skipped_in_a_row"] for state in guard} == {0}


def test_infinite_loss_is_no_overflow_on_any_rank(seen: dict[str, Any]) -> None:
    guard = seen["blown up"]["guard"]
    assert [state["skipped_in_a_row"] for state in guard] == [0, 1, 2, 0, 0, 0]
    assert {state["loss_scale"]["value"] for state in guard} == {FIRST_SCALE}, "the loss does not depend on the scale"


def test_resumed_run_continues_with_the_scale_bit_for_bit(seen: dict[str, Any]) -> None:
    for key in ("losses", "norms", "guard", "engines"):
        assert seen["resumed"][key] == seen[OVERFLOWS.name][key][3:], key


# ---- The judge ----


def test_infinite_gradient_counts_only_with_the_scale_at_its_floor() -> None:
    scale = LossScale(torch.device("cpu"))
    judge = BadSteps(None, torch.device("cpu"), scale)
    steps_to_floor = int(math.log2(FIRST_SCALE / FLOOR))
    for _ in range(steps_to_floor):
        assert judge.judge(torch.tensor(torch.inf)) == 1 and judge.overflowed
    assert (float(scale.value), int(judge.skipped_in_a_row)) == (FLOOR, 0)
    for count in (1, 2):
        assert judge.judge(torch.tensor(torch.inf)) == 1 and not judge.overflowed
        assert (float(scale.value), int(judge.skipped_in_a_row)) == (FLOOR, count)
    assert judge.judge(torch.tensor(1.0)) == 0
    assert int(judge.skipped_in_a_row) == 0


def test_scale_grows_after_its_interval_without_an_overflow() -> None:
    scale = LossScale(torch.device("cpu"))
    for infinite_step in (True, *[False] * (GROWTH_STEPS - 1)):
        scale.update(torch.tensor(infinite_step))
    assert float(scale.value) == FIRST_SCALE / 2
    copy = LossScale(torch.device("cpu"))
    copy.load_state(scale.state())
    copy.update(torch.tensor(False))
    assert float(copy.value) == FIRST_SCALE


def test_state_of_other_formats_can_be_continued_in_fp16() -> None:
    before = BadSteps(None, torch.device("cpu"))
    before.judge(torch.tensor(2.0))
    assert "loss_scale" not in before.state()
    after = BadSteps(None, torch.device("cpu"), LossScale(torch.device("cpu")))
    after.load_state(before.state())
    assert after.state() == before.state() | {"loss_scale": {"value": FIRST_SCALE, "steps_without_overflow": 0}}


# ---- Whole runs ----


@pytest.mark.recovery
@pytest.mark.timeout(900)  # CPUs compute slowly in fp16.
def test_500_steps_in_fp16_reach_the_loss_of_fp32(settings: WriteSettings, bucket: str) -> None:
    """At 1e-3 the precisions stay within 0.01 %. From 2e-3 on, this small model leaves its plateau of the token
    frequencies at a step that rounding decides, so the losses differ by up to a tenth, on one CPU and not on another.
    """
    losses: dict[str, list[float]] = {}
    for precision in ("fp32", "fp16"):
        train = {"processes": 1, "precision": precision, "max_steps": 500, "learning_rate": 1e-3, "warmup_steps": 20}
        train |= {"global_batch_size": 4, "context_length": 16}
        path = settings(run={"output": f"{bucket}/{precision}"}, train=train)
        code, out, err = run("train", path)
        assert code == 0, err
        assert f"{precision}" in out
        losses[precision] = [row["train/loss"] for row in read_metrics(f"{bucket}/{precision}") if "train/loss" in row]
    assert len(losses["fp16"]) == 500
    assert losses["fp16"] != losses["fp32"]
    last = {name: sum(values[-50:]) / 50 for name, values in losses.items()}
    assert last["fp32"] < 0.9 * losses["fp32"][0], "the model learns"
    assert last["fp16"] == pytest.approx(last["fp32"], rel=0.01)
