"""The division of the global batch among processes: always exact, with the largest micro-batch that fits."""

import pytest

from job.data.batching import cut_batch
from job.errors import UserError


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
def test_micro_batch_is_the_largest_that_divides_a_process_share(
    batch: int, micro: int, processes: int, steps: int, cut: int
) -> None:
    found = cut_batch(batch, micro, processes)
    assert (found.gradient_accumulation_steps, found.micro_batch_size) == (steps, cut)
    assert steps * cut * processes == batch
    assert bool(found.reason) == (cut < micro)


def test_reason_names_the_setting_and_the_share() -> None:
    assert str(cut_batch(256, 32, 16)) == (
        "1 x 16 sequences (train.micro_batch_size is 32, which does not divide the 16 sequences of a process)"
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
def test_world_size_that_does_not_divide_the_batch_is_refused(
    batch: int, processes: int, nearest: str, batches: str
) -> None:
    with pytest.raises(UserError) as caught:
        cut_batch(batch, 32, processes)
    assert caught.value.setting == "train.global_batch_size"
    assert caught.value.expected == (
        f"cannot be divided by the {processes} processes; the nearest numbers of processes that divide it are {nearest}"
    )
    assert caught.value.remedy == f"change the number of processes, or set train.global_batch_size to {batches}"
