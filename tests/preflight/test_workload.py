"""The amount of work, compared with known arithmetic and with the order that training follows."""

import math

import pytest
from manifests import manifest_of

from job.data.manifest import Manifest
from job.data.order import SequenceOrder
from job.model.flops import TokenFlops, flops_per_token
from job.model.gpu_table import peak_flops
from job.model.spec import ModelSpec
from job.preflight.workload import Workload, compute_workload

FLOPS = TokenFlops(body=400, head=500, attention=100)


def workload_of(manifest: Manifest, **changes: int | None) -> Workload:
    settings: dict[str, int | None] = {
        "context_length": 32, "global_batch_size": 8, "epochs": 2, "max_steps": None,
        "evaluate_every": 10, "max_evaluated_sequences": None,
    }  # fmt: skip
    return compute_workload(manifest, FLOPS, **(settings | changes))  # type: ignore[arg-type]


def test_all_tokens_but_the_first_are_trained_in_each_epoch() -> None:
    work = workload_of(manifest_of([1000, 7, 501], []))
    assert (work.tokens, work.epochs, work.evaluated_tokens) == (2 * (999 + 6 + 500), 2, 0)


def test_steps_are_those_of_the_order_that_training_follows() -> None:
    manifest = manifest_of([1000, 7, 501, 1], [])
    order = SequenceOrder(
        [shard.tokens for shard in manifest.train], [shard.size for shard in manifest.train], 32, 5, 10**6
    )
    assert workload_of(manifest).steps == math.ceil(order.position_limit(2) / 8)


def test_run_ended_by_max_steps_has_its_share_of_the_tokens() -> None:
    whole = workload_of(manifest_of([100_001], [1001]))
    half = workload_of(manifest_of([100_001], [1001]), max_steps=whole.steps // 2)
    assert half.steps == whole.steps // 2
    assert half.tokens == pytest.approx(whole.tokens / 2, rel=0.01)
    assert workload_of(manifest_of([100_001], [1001]), max_steps=10**9) == whole


def test_validation_tokens_count_in_each_evaluation() -> None:
    manifest = manifest_of([32 * 8 * 25 + 1], [1001])
    assert workload_of(manifest, epochs=1).steps == 25
    assert workload_of(manifest, epochs=1).evaluated_tokens == (2 + 1) * 1000
    assert workload_of(manifest, epochs=1, max_evaluated_sequences=3).evaluated_tokens == 2 * 96 + 1000
    assert workload_of(manifest, epochs=1).evaluation_share == pytest.approx(1000 / (32 * 8 * 25 + 1000))


def test_tutorial_hours_follow_from_its_tokens_and_mfu() -> None:
    """The tutorial took 2 h 49 min for 3,516 steps of 131,072 tokens on one A100 at 11 % MFU, without evaluations."""
    spec = ModelSpec(512, 12, 8, 2, 2048)
    flops = flops_per_token(spec, 151_646, 512).total
    work = Workload(3516, 2, 0, 3516 * 131_072, 0, flops, 3516)
    a100 = peak_flops("NVIDIA A100-SXM4-80GB", "bf16")
    assert a100 is not None
    assert work.hours(a100, 0.11, gpus=1) == pytest.approx(2 + 49 / 60, rel=0.02)
    assert work.hours(a100, 0.11, gpus=8) == pytest.approx(work.hours(a100, 0.11, gpus=1) / 8)
    assert work.seconds_per_step(a100, 0.11, gpus=1) == pytest.approx(2.89, rel=0.02)
