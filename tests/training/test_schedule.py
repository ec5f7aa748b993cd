"""Tests of the learning-rate schedules: a linear warm-up, then a decay, as a function of only the step."""

from itertools import pairwise
from typing import Any

import pytest

from job.config import Train
from job.training.schedule import begins_decay, describe, extension, learning_rate, steps_before_decay

SCHEDULE: dict[str, Any] = {
    "schedule": "cosine",
    "peak": 3e-4,
    "minimum": 3e-5,
    "warmup_steps": 10,
    "decay_steps": None,
    "total_steps": 110,
}
KINDS = ["cosine", "linear", "wsd"]


def rates(**changes: Any) -> list[float]:
    """Return the learning rate of each step and of the step after the last."""
    schedule = SCHEDULE | changes
    return [learning_rate(step, **schedule) for step in range(int(schedule["total_steps"]) + 1)]


@pytest.mark.parametrize("schedule", KINDS)
def test_warm_up_rises_linearly_to_the_peak(schedule: str) -> None:
    rising = rates(schedule=schedule)[:11]
    assert rising[0] > 0
    assert [after - before for before, after in pairwise([0.0, *rising])] == pytest.approx([3e-4 / 11] * 11)
    assert rising[10] == 3e-4 == max(rates(schedule=schedule))


def test_cosine_falls_half_way_in_its_middle_and_to_its_minimum() -> None:
    falling = rates()[10:]
    assert all(before > after for before, after in pairwise(falling))
    assert falling[50] == pytest.approx((3e-4 + 3e-5) / 2)
    assert falling[25] - falling[50] == pytest.approx((3e-4 - 3e-5) / 2 * 0.5**0.5)
    assert falling[100] == pytest.approx(3e-5)


def test_linear_falls_by_the_same_amount_each_step() -> None:
    falls = [before - after for before, after in pairwise(rates(schedule="linear")[10:])]
    assert falls == pytest.approx([(3e-4 - 3e-5) / 100] * 100)
    assert rates(schedule="linear", minimum=0.0)[-1] == 0.0


@pytest.mark.parametrize(("decay_steps", "length"), [(None, 22), (1, 1), (30, 30), (100, 100)])
def test_wsd_stays_at_the_peak_until_its_decay(decay_steps: int | None, length: int) -> None:
    found = rates(schedule="wsd", decay_steps=decay_steps)
    stable, falling = found[10 : 110 - length], found[110 - length - 1 :]
    assert stable == [3e-4] * (100 - length), "the same bits in every step"
    if length < 100:
        assert [before - after for before, after in pairwise(falling)] == pytest.approx(
            [2.7e-4 / (length + 1)] * (length + 1)
        )
    assert [rate < 3e-4 for rate in found[10:110]] == [False] * (100 - length) + [True] * length
    assert found[110] == pytest.approx(3e-5)


def test_rate_on_the_plateau_is_the_peak_to_the_last_bit() -> None:
    for part in range(1, 100):
        changes = {"peak": 0.02, "minimum": 0.02 * part / 997, "schedule": "wsd"}
        assert set(rates(**changes)[10:88]) == {0.02}


def test_default_decay_is_a_fifth_of_the_steps_rounded_up() -> None:
    lengths = {1: 1, 4: 1, 5: 1, 6: 2, 10: 2, 11: 3, 1000: 200}
    for total_steps, length in lengths.items():
        found = rates(schedule="wsd", warmup_steps=0, total_steps=total_steps)[:-1]
        assert [rate < 3e-4 for rate in found] == [False] * (total_steps - length) + [True] * length


@pytest.mark.parametrize("decay_steps", [None, 20])
def test_longer_wsd_run_has_the_same_rates_before_the_decay(decay_steps: int | None) -> None:
    train = Train(schedule="wsd", warmup_steps=10, decay_steps=decay_steps)
    for steps in (40, 110, 111, 500):
        decay_after = steps_before_decay(train, steps)
        assert decay_after is not None and decay_after > 10
        short, long = (
            rates(schedule="wsd", decay_steps=decay_steps, total_steps=total) for total in (steps, 3 * steps)
        )
        assert short[:decay_after] == long[:decay_after]
        assert short[decay_after] < long[decay_after], "the first step of the decay"


def test_only_wsd_has_steps_before_a_decay() -> None:
    for schedule, warmup_steps, decay_steps, expected in (
        ("cosine", 10, None, None), ("linear", 10, None, None), ("wsd", 10, None, 80), ("wsd", 10, 5, 95),
        ("wsd", 95, None, 95), ("wsd", 100, None, None), ("wsd", 200, None, None), ("wsd", 0, 100, None),
    ):  # fmt: skip
        train = Train(schedule=schedule, warmup_steps=warmup_steps, decay_steps=decay_steps)
        assert steps_before_decay(train, 100) == expected, (schedule, warmup_steps, decay_steps)


def test_decay_begins_once_even_if_its_step_is_past() -> None:
    assert [step for step in range(100) if begins_decay(step, 80, [])][:2] == [80, 81], "81 only if 80 was not noted"
    assert [step for step in range(100) if begins_decay(step, 80, [60])] == [80], "a decay of an earlier plan"
    assert not any(begins_decay(step, None, []) for step in range(100))


@pytest.mark.parametrize("schedule", KINDS)
def test_last_step_has_a_positive_rate_if_the_minimum_is_0(schedule: str) -> None:
    assert rates(schedule=schedule, minimum=0.0)[-2] > 0


@pytest.mark.parametrize("schedule", KINDS)
def test_step_after_the_end_has_the_minimum(schedule: str) -> None:
    assert learning_rate(10_000, **SCHEDULE | {"schedule": schedule}) == pytest.approx(3e-5)


@pytest.mark.parametrize("schedule", KINDS)
def test_schedule_without_warm_up_begins_at_the_peak(schedule: str) -> None:
    assert rates(schedule=schedule, warmup_steps=0)[0] == 3e-4


@pytest.mark.parametrize("schedule", KINDS)
@pytest.mark.parametrize("warmup_steps", [110, 500])
def test_warm_up_may_be_longer_than_the_run(warmup_steps: int, schedule: str) -> None:
    rising = rates(schedule=schedule, warmup_steps=warmup_steps)[:110]
    assert rising == pytest.approx([3e-4 * (step + 1) / (warmup_steps + 1) for step in range(110)])


@pytest.mark.parametrize(
    ("settings", "steps", "row"),
    [
        ({"schedule": "wsd", "decay_steps": 2300}, 11_500, "wsd: 200 warm-up, 9,000 stable, 2,300 decay steps"),
        ({"schedule": "wsd"}, 11_500, "wsd: 200 warm-up, 9,000 stable, 2,300 decay steps"),
        ({"schedule": "wsd", "warmup_steps": 0}, 1, "wsd: 1 decay steps"),
        ({}, 11_500, "cosine: 200 warm-up, 11,300 decay steps"),
        ({"schedule": "linear", "warmup_steps": 0}, 100, "linear: 100 decay steps"),
        ({"schedule": "linear"}, 150, "linear: 150 warm-up steps"),
    ],
)
def test_description_has_the_steps_of_each_part(settings: dict[str, Any], steps: int, row: str) -> None:
    assert describe(Train(**settings), steps) == row


def test_extension_names_the_epochs_that_twice_the_steps_need() -> None:
    train = Train(epochs=2, global_batch_size=10)
    assert extension(train, 50, 1000) == "--train.max_steps 100"
    assert extension(train, 100, 1000) == "--train.max_steps 200"
    assert extension(train, 101, 1000) == "--train.max_steps 202 --train.epochs 3"
