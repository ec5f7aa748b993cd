"""The learning rate: linear up, half a cosine down, and nothing but a function of the step."""

from itertools import pairwise

import pytest

from job.training.schedule import learning_rate

SCHEDULE = {"peak": 3e-4, "minimum": 3e-5, "warmup_steps": 10, "total_steps": 110}


def rates(**changes: float) -> list[float]:
    """The learning rate of each step, and of the one after the last."""
    schedule = SCHEDULE | changes
    return [learning_rate(step, **schedule) for step in range(int(schedule["total_steps"]) + 1)]


def test_warm_up_rises_by_the_same_amount_each_step_from_above_0_to_the_peak() -> None:
    rising = rates()[:11]
    assert rising[0] > 0
    assert [after - before for before, after in pairwise([0.0, *rising])] == pytest.approx([3e-4 / 11] * 11)
    assert rising[10] == 3e-4 == max(rates())


def test_the_cosine_is_half_way_down_in_its_middle_and_at_the_minimum_at_the_end() -> None:
    falling = rates()[10:]
    assert all(before > after for before, after in pairwise(falling))
    assert falling[50] == pytest.approx((3e-4 + 3e-5) / 2)
    assert falling[25] - falling[50] == pytest.approx((3e-4 - 3e-5) / 2 * 0.5**0.5)
    assert falling[100] == pytest.approx(3e-5)
    assert learning_rate(10_000, **SCHEDULE) == pytest.approx(3e-5)


def test_the_last_step_still_learns_where_the_minimum_is_0() -> None:
    assert rates(minimum=0.0)[-2] > 0


def test_without_warm_up_it_begins_at_the_peak() -> None:
    assert rates(warmup_steps=0)[0] == 3e-4


@pytest.mark.parametrize("warmup_steps", [110, 500])
def test_a_warm_up_longer_than_the_run_is_all_there_is(warmup_steps: int) -> None:
    rising = rates(warmup_steps=warmup_steps)[:110]
    assert rising == pytest.approx([3e-4 * (step + 1) / (warmup_steps + 1) for step in range(110)])
