"""Tests of how often a training step makes the host start kernels, copy, or wait for the GPU."""

import json
from collections.abc import Callable
from functools import cache

import pytest
from gpu_child import GPU_TESTS, run_python

pytestmark = pytest.mark.gpu
Case = tuple[str, str, int, str]
"""Strategy, precision, number of micro-batches and optimizer."""
MOST_COPIES_AND_WAITS: dict[Case, tuple[int, int]] = {
    ("ddp", "bf16", 8, "adamw"): (90, 0),
    ("ddp", "fp16", 8, "adamw"): (90, 0),
    ("zero2", "bf16", 8, "adamw"): (2450, 13),
    ("zero2", "bf16", 1, "adamw"): (360, 6),
    ("ddp", "bf16", 8, "muon"): (130, 0),
    ("zero2", "bf16", 1, "muon"): (490, 8),
}
"""Limits for the copies and the synchronisations of a step, in 12 layers.

On the fake GPU, with torch 2.11, the copies are 72, 72, 2,404, 346, 114 and 475, and the synchronisations are the
limits. Those of ZeRO-2 are DeepSpeed's own.
"""
Count = Callable[[str, str, int, str], dict[str, float]]


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Count:
    """Function that returns the counts of a step of a case."""

    @cache
    def count(strategy: str, precision: str, micro_batches: int, optimizer: str) -> dict[str, float]:
        file = tmp_path_factory.mktemp("counts") / "counts.json"
        run_python(GPU_TESTS / "gpu_counts.py", strategy, precision, micro_batches, optimizer, file)
        counts: dict[str, float] = json.loads(file.read_text())
        print(strategy, precision, micro_batches, optimizer, counts)
        return counts

    def counts_under(strategy: str, precision: str, micro_batches: int, optimizer: str) -> dict[str, float]:
        for package in ("pydantic", "s3fs", "orjson", *(["deepspeed"] if strategy == "zero2" else [])):
            pytest.importorskip(package, reason=f"the engine under {strategy} needs {package}")
        return count(strategy, precision, micro_batches, optimizer)

    return counts_under


@pytest.mark.parametrize("case", list(MOST_COPIES_AND_WAITS))
def test_step_copies_and_waits_no_more_than_its_limit(counted: Count, case: Case) -> None:
    counts, (most_copies, most_waits) = counted(*case), MOST_COPIES_AND_WAITS[case]
    assert counts["copies"] <= most_copies
    assert counts["synchronisations"] <= most_waits
    assert counts["copies"] > 0, "copies are not counted"


def test_one_large_micro_batch_takes_a_quarter_of_the_hosts_work(counted: Count) -> None:
    """The work of the host is counted as kernels and copies that it starts; the batch is the same."""
    eight, one = (
        {name: counted("zero2", "bf16", number, "adamw")[name] for name in ("launches", "copies")} for number in (8, 1)
    )
    assert sum(one.values()) <= sum(eight.values()) / 4


@pytest.mark.parametrize("case", list(MOST_COPIES_AND_WAITS))
def test_memory_of_a_step_is_at_most_its_estimate(counted: Count, case: Case) -> None:
    counts = counted(*case)
    assert 0 < counts["peak"] <= counts["estimate"]
