"""The global batch, cut over processes: always exactly, with the largest micro-batch that fits."""

import pytest

from job.config import Train
from job.data.batching import cut_batch
from job.errors import UserError
from job.runs.attempts import Attempt
from job.runs.resume import cut_as_before


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "steps", "cut"),
    [
        (256, 32, 1, 8, 32),
        (256, 32, 8, 1, 32),
        (256, 32, 16, 1, 16),
        (256, 32, 256, 1, 1),
        (96, 32, 2, 2, 24),
        (96, 32, 3, 1, 32),
        (62, 32, 2, 1, 31),
        (74, 36, 1, 37, 2),
        (7, 32, 7, 1, 1),
    ],
)
def test_micro_batch_is_the_largest_that_divides_the_share_of_a_process(
    batch: int, micro: int, processes: int, steps: int, cut: int
) -> None:
    found = cut_batch(batch, micro, processes)
    assert (found.gradient_accumulation_steps, found.micro_batch_size) == (steps, cut)
    assert steps * cut * processes == batch
    assert bool(found.reason) == (cut < micro)


def test_reason_names_the_setting_and_the_share() -> None:
    assert str(cut_batch(256, 32, 16)) == (
        "1 x 16 sequences (train.micro_batch_size is 32, which does not divide the 16 of a process)"
    )


@pytest.mark.parametrize(
    ("batch", "processes", "nearest", "batches"),
    [
        (256, 3, "2 and 4", "255 or 258"),
        (256, 24, "16 and 32", "240 or 264"),
        (8, 9, "8", "9"),
        (7, 2, "1 and 7", "6 or 8"),
    ],
)
def test_processes_that_do_not_divide_the_batch_are_refused_with_the_nearest_that_do(
    batch: int, processes: int, nearest: str, batches: str
) -> None:
    with pytest.raises(UserError) as caught:
        cut_batch(batch, 32, processes)
    assert caught.value.setting == "train.global_batch_size"
    assert caught.value.expected == (
        f"cannot be divided by the {processes} processes; the nearest numbers of processes that divide it are {nearest}"
    )
    assert caught.value.remedy == f"start so many, or set train.global_batch_size to {batches}"


def attempt_before(micro_batch_size: int | None, asked: int = 32) -> Attempt:
    return Attempt(
        3, "run", "start", None, "host", 1, "2026-01-01T00:00:00+00:00", "auto",
        config={"train": {"micro_batch_size": asked}}, micro_batch_size=micro_batch_size,
    )  # fmt: skip


def test_resumed_run_takes_the_micro_batch_of_the_attempt_before() -> None:
    train = Train(global_batch_size=256, micro_batch_size=32)
    assert cut_as_before(train, 8, None).micro_batch_size == 32
    found = cut_as_before(train, 8, attempt_before(16))
    assert (found.gradient_accumulation_steps, found.micro_batch_size) == (2, 16)
    assert found.reason == "as in attempt 3; train.micro_batch_size is 32"


def test_it_does_not_where_it_no_longer_fits_or_the_setting_has_changed_or_nothing_is_recorded() -> None:
    train = Train(global_batch_size=256, micro_batch_size=32)
    assert cut_as_before(train, 32, attempt_before(16)).micro_batch_size == 8
    assert cut_as_before(train, 8, attempt_before(16, asked=16)).micro_batch_size == 32
    assert cut_as_before(train, 8, attempt_before(None)).micro_batch_size == 32
