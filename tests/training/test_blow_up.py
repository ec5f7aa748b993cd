"""Numbers that blow up: all ranks skip the step together, and the run goes on as if its batch had not been there."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worker import PYTHONPATH, Case
from small_run import REPOSITORY

from job.config import Config
from job.launcher.device import ON_CPU
from job.launcher.supervisor import worker_environment
from job.training.bad_steps import NEEDED_NORMS, REMEMBERED_NORMS, Guard

SeenIn = Callable[[str], dict[str, Any]]

PROCESSES = 2
in_each_strategy = pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=pytest.mark.recovery) for name in ("zero2", "ddp")]
)
in_each_format = pytest.mark.parametrize("precision", ["fp32", "bf16"])
in_each_way = pytest.mark.parametrize("accumulation_steps", [1, 4])

BROKEN = {2: "loss not a number", 3: "infinite gradient"}
"""By step."""
EARLY, LATE, STEPS = 7, NEEDED_NORMS + 3, NEEDED_NORMS + 6
"""Steps with a spike, before and after there are enough norms to call it one."""
SPIKES = Case(
    "spikes",
    last_step=STEPS,
    faults={3: "loss not a number", EARLY: "spike", LATE: "spike"},
    spike_factor=10.0,
    keeps=LATE,
)


def cases_of_broken_numbers(precision: str, accumulation_steps: int) -> tuple[Case, Case]:
    """One whose numbers break, and one that never sees those batches."""
    name = f"{precision}, {accumulation_steps} accumulated"
    broken = Case(name, precision, accumulation_steps, faults=BROKEN)
    return broken, replace(broken, name=f"{name}, left out", faults={}, left_out=[*BROKEN])


@pytest.fixture(scope="module")
def seen_in(tmp_path_factory: pytest.TempPathFactory) -> SeenIn:
    """By strategy: what engines on two processes came to in each case, launched once."""
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
        (folder / "orders.json").write_text(
            json.dumps({"strategy": strategy, "cases": [asdict(case) for case in cases]})
        )
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"),
                *(str(Path(__file__).with_name("engine_worker.py")), str(folder)),
            ],
            cwd=REPOSITORY,
            env=os.environ | worker_environment(ON_CPU, PROCESSES, Config()) | {"PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
        return found

    return launch


# ---- Numbers that are not finite ----


@in_each_way
@in_each_format
@in_each_strategy
def test_what_is_not_finite_on_one_rank_leaves_weights_and_moments_on_all_ranks_as_they_were(
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
def test_after_a_skipped_step_all_goes_on_as_if_its_batch_had_not_been_there(
    seen_in: SeenIn, strategy: str, precision: str, accumulation_steps: int
) -> None:
    broken, left_out = (seen_in(strategy)[c.name] for c in cases_of_broken_numbers(precision, accumulation_steps))
    for key in ("losses", "norms", "engines"):
        assert [seen for step, seen in enumerate(broken[key]) if step not in BROKEN] == left_out[key], key


@in_each_strategy
def test_a_skipped_step_adds_nothing_to_the_mean_loss_and_what_was_computed_is_still_told(
    seen_in: SeenIn, strategy: str
) -> None:
    case, _ = cases_of_broken_numbers("fp32", 1)
    seen = seen_in(strategy)[case.name]
    assert [step for step, loss in enumerate(seen["losses"]) if loss == 0] == [*BROKEN]
    # The faults are those of the last rank alone, and only one is in the loss.
    assert seen["finite"] == [[True, step != 2] for step in range(case.last_step)]


@in_each_strategy
def test_skipped_steps_are_counted_in_all_and_in_a_row(seen_in: SeenIn, strategy: str) -> None:
    case, _ = cases_of_broken_numbers("fp32", 1)
    guard = seen_in(strategy)[case.name]["guard"]
    assert [state["skipped_steps"] for state in guard] == [0, 0, 1, 2, 2, 2]
    assert [state["skipped_in_a_row"] for state in guard] == [0, 0, 1, 2, 0, 0]


# ---- Spikes ----


@in_each_strategy
def test_a_spike_is_skipped_once_there_are_norms_enough_to_tell(seen_in: SeenIn, strategy: str) -> None:
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
def test_a_resumed_run_skips_the_same_steps(seen_in: SeenIn, strategy: str) -> None:
    whole, resumed = seen_in(strategy)["spikes"], seen_in(strategy)["spikes resumed"]
    for key in ("skipped", "losses", "norms", "guard", "engines"):
        assert resumed[key] == whole[key][LATE:], key


def judge(guard: Guard, norm: float) -> bool:
    return bool(guard.judge(torch.tensor(norm)))


@pytest.mark.parametrize("seed", range(3))
def test_a_spike_is_a_norm_above_so_many_times_the_median_of_the_last_accepted(seed: int) -> None:
    numbers = random.Random(seed)
    guard = Guard(3.0, torch.device("cpu"))
    accepted: list[float] = []
    spikes = 0
    for step in range(3 * REMEMBERED_NORMS):
        usual = 2.0 ** (step / 50)  # so that it matters which norms are remembered
        norm = float(torch.tensor(usual * numbers.choice([*(numbers.uniform(0.5, 4.5),) * 9, math.nan, math.inf])))
        last = sorted(accepted[-REMEMBERED_NORMS:])
        is_spike = len(last) >= NEEDED_NORMS and norm > 3 * last[len(last) // 2]
        assert judge(guard, norm) == (is_spike or not math.isfinite(norm))
        if not is_spike and math.isfinite(norm):
            accepted.append(norm)
        spikes += is_spike and math.isfinite(norm)
        assert guard.state()["norms"] == accepted[-REMEMBERED_NORMS:]
        if step % 37 == 0:
            state = json.loads(json.dumps(guard.state()))
            guard = Guard(3.0, torch.device("cpu"))
            guard.load_state(state)
    assert spikes > 20


# ---- Memory ----


@in_each_strategy
def test_a_micro_batch_that_does_not_fit_into_memory_ends_with_one_that_may(seen_in: SeenIn, strategy: str) -> None:
    said = seen_in(strategy)["out of memory"]
    assert said.startswith("train.micro_batch_size: 12288: the machine's memory is full")
    assert said.endswith("; try 6144")
