"""Tests of bad steps (NaN, infinity, spikes): all ranks skip the step, and training continues as without its batch."""

import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from engine_launch import launch_engines
from engine_worker import Case

from job.training.bad_steps import NEEDED_NORMS, REMEMBERED_NORMS, BadSteps

SeenIn = Callable[[str], dict[str, Any]]

PROCESSES = 2
in_each_strategy = pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=pytest.mark.recovery) for name in ("zero2", "ddp")]
)
in_each_format = pytest.mark.parametrize("precision", ["fp32", "bf16"])
in_each_way = pytest.mark.parametrize("accumulation_steps", [1, 4])

BROKEN = {2: "loss not a number", 3: "infinite gradient"}
"""Fault of each bad step."""
EARLY, LATE, STEPS = 7, NEEDED_NORMS + 3, NEEDED_NORMS + 6
"""Steps with a spike, before and after enough gradient norms are known to detect it; and the number of steps."""
SPIKES = Case(
    "spikes",
    last_step=STEPS,
    faults={3: "loss not a number", EARLY: "spike", LATE: "spike"},
    spike_factor=10.0,
    keeps=LATE,
)


def cases_of_broken_numbers(precision: str, accumulation_steps: int) -> tuple[Case, Case]:
    """Return a case with bad steps and a case that leaves out the batches of these steps."""
    name = f"{precision}, {accumulation_steps} accumulated"
    broken = Case(name, precision, accumulation_steps, faults=BROKEN)
    return broken, replace(broken, name=f"{name}, left out", faults={}, left_out=[*BROKEN])


@pytest.fixture(scope="module")
def seen_in(tmp_path_factory: pytest.TempPathFactory) -> SeenIn:
    """Function that returns the measurements of each case on two processes, by strategy; launches them only once."""
    cases = [case for p in ("fp32", "bf16") for steps in (1, 4) for case in cases_of_broken_numbers(p, steps)]
    cases += [
        SPIKES,
        replace(SPIKES, name="spikes left out", faults={EARLY: "spike"}, left_out=[3, LATE], keeps=None),
        replace(SPIKES, name="spikes taken", spike_factor=None, keeps=None),
        replace(SPIKES, name="spikes resumed", first_step=LATE, keeps=None, goes_on_from="spikes"),
    ]

    @cache
    def launch(strategy: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("blow-up")
        return launch_engines(folder, PROCESSES, {"strategy": strategy, "cases": [asdict(case) for case in cases]})

    return launch


# ---- Numbers that are not finite ----


@in_each_way
@in_each_format
@in_each_strategy
def test_non_finite_numbers_on_one_rank_change_no_rank(
    seen_in: SeenIn, strategy: str, precision: str, accumulation_steps: int
) -> None:
    case, _ = cases_of_broken_numbers(precision, accumulation_steps)
    seen = seen_in(strategy)[case.name]
    for step in range(1, case.last_step):
        is_broken = step in BROKEN
        assert seen["skipped"][step] == [float(is_broken)] * PROCESSES
        assert math.isinf(seen["norms"][step]) == is_broken
        for rank in range(PROCESSES):
            assert (seen["engines"][step][rank] == seen["engines"][step - 1][rank]) == is_broken


@in_each_way
@in_each_format
@in_each_strategy
def test_skipped_step_has_no_effect_on_later_steps(
    seen_in: SeenIn, strategy: str, precision: str, accumulation_steps: int
) -> None:
    broken, left_out = (seen_in(strategy)[c.name] for c in cases_of_broken_numbers(precision, accumulation_steps))
    for key in ("losses", "norms", "engines"):
        assert [seen for step, seen in enumerate(broken[key]) if step not in BROKEN] == left_out[key], key


@in_each_strategy
def test_skipped_step_is_reported_but_not_in_the_mean_loss(seen_in: SeenIn, strategy: str) -> None:
    case, _ = cases_of_broken_numbers("fp32", 1)
    seen = seen_in(strategy)[case.name]
    assert [step for step, loss in enumerate(seen["losses"]) if loss == 0] == [*BROKEN]
    # Only the last rank has the faults, and only one of them is in its loss.
    assert seen["finite"] == [[True, step != 2] for step in range(case.last_step)]


@in_each_strategy
def test_skipped_steps_are_counted_in_total_and_in_a_row(seen_in: SeenIn, strategy: str) -> None:
    case, _ = cases_of_broken_numbers("fp32", 1)
    guard = seen_in(strategy)[case.name]["guard"]
    assert [state["skipped_steps"] for state in guard] == [0, 0, 1, 2, 2, 2]
    assert [state["skipped_in_a_row"] for state in guard] == [0, 0, 1, 2, 0, 0]


# ---- Spikes ----


@in_each_strategy
def test_spike_is_skipped_once_enough_norms_are_known(seen_in: SeenIn, strategy: str) -> None:
    seen = seen_in(strategy)
    usual = statistics.median(seen["spikes"]["guard"][-1]["norms"])
    assert min(seen["spikes"]["norms"][step] for step in (EARLY, LATE)) > 10 * usual
    assert [step for step, skipped in enumerate(seen["spikes"]["skipped"]) if any(skipped)] == [3, LATE]
    assert seen["spikes"]["engines"][-1] == seen["spikes left out"]["engines"][-1]


@in_each_strategy
def test_no_spike_is_skipped_without_a_factor(seen_in: SeenIn, strategy: str) -> None:
    seen = seen_in(strategy)["spikes taken"]
    assert [step for step, skipped in enumerate(seen["skipped"]) if any(skipped)] == [3]


@in_each_strategy
def test_resumed_run_skips_the_same_steps(seen_in: SeenIn, strategy: str) -> None:
    whole, resumed = seen_in(strategy)["spikes"], seen_in(strategy)["spikes resumed"]
    for key in ("skipped", "losses", "norms", "guard", "engines"):
        assert resumed[key] == whole[key][LATE:], key


def judge(bad_steps: BadSteps, norm: float) -> bool:
    return bool(bad_steps.judge(torch.tensor(norm)))


@pytest.mark.parametrize("seed", range(3))
def test_spike_is_a_multiple_of_the_median_accepted_norm(seed: int) -> None:
    numbers = random.Random(seed)
    bad_steps = BadSteps(3.0, torch.device("cpu"))
    accepted: list[float] = []
    spikes = 0
    for step in range(3 * REMEMBERED_NORMS):
        usual = 2.0 ** (step / 50)  # The norms grow, so the median depends on which norms are remembered.
        norm = float(torch.tensor(usual * numbers.choice([*(numbers.uniform(0.5, 4.5),) * 9, math.nan, math.inf])))
        last = sorted(accepted[-REMEMBERED_NORMS:])
        is_spike = len(last) >= NEEDED_NORMS and norm > 3 * last[len(last) // 2]
        assert judge(bad_steps, norm) == (is_spike or not math.isfinite(norm))
        if not is_spike and math.isfinite(norm):
            accepted.append(norm)
        spikes += is_spike and math.isfinite(norm)
        assert bad_steps.state()["norms"] == accepted[-REMEMBERED_NORMS:]
        if step % 37 == 0:
            state = json.loads(json.dumps(bad_steps.state()))
            bad_steps = BadSteps(3.0, torch.device("cpu"))
            bad_steps.load_state(state)
    assert spikes > 20


# ---- Memory ----


@in_each_strategy
def test_out_of_memory_suggests_a_smaller_micro_batch(seen_in: SeenIn, strategy: str) -> None:
    said = seen_in(strategy)["out of memory"]
    assert said.startswith("train.micro_batch_size: 12288: the machine's memory is full")
    assert said.endswith("; try 6144")


@in_each_strategy
def test_micro_batch_shrinks_on_all_ranks_until_it_fits_on_each(seen_in: SeenIn, strategy: str) -> None:
    (too_large, found), of_other_rank = seen_in(strategy)["fitted"]
    assert of_other_rank == [too_large, found], "only the last rank has too little memory"
    sizes = [12288 // 2**power for power in range(14)]
    assert too_large and too_large == sizes[: len(too_large)]
    assert found["micro_batch_size"] == sizes[len(too_large)]
    assert found["micro_batch_size"] * found["gradient_accumulation_steps"] == 2 * 12288, "the batch is the same"
