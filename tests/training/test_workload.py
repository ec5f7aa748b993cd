"""The plan against arithmetic that is known from elsewhere, and against the order that training follows."""

import math

import pytest

from job.data.manifest import Manifest, Shard, shard_size
from job.data.order import WindowOrder
from job.model.flops import TokenFlops, flops_per_token, peak_flops
from job.model.spec import ModelSpec
from job.preflight.workload import GPUS, Workload, plan

FLOPS = TokenFlops(body=400, head=500, attention=100)


def data_set(train: list[int], validation: list[int]) -> Manifest:
    def shards(tokens: list[int]) -> tuple[Shard, ...]:
        return tuple(
            Shard(name=f"{i}.bin", tokens=count, documents=1, utf8_bytes=1, characters=1,
                  size=shard_size(count, 1, "uint16"), sha256="0" * 64)
            for i, count in enumerate(tokens)
        )  # fmt: skip

    return Manifest(
        fingerprint="", tokenizer_fingerprint="", vocab_size=400, dtype="uint16", eod_id=0, seed=0,
        validation_fraction=0.1, split_rule="", train=shards(train), validation=shards(validation), statistics={},
    )  # fmt: skip


def planned(manifest: Manifest, **changes: int | None) -> Workload:
    settings: dict[str, int | None] = {
        "context_length": 32, "global_batch_size": 8, "epochs": 2, "max_steps": None,
        "evaluate_every": 10, "evaluate_max_windows": None,
    }  # fmt: skip
    return plan(manifest, FLOPS, **(settings | changes))  # type: ignore[arg-type]


def test_two_epochs_train_on_every_token_but_the_first_of_each_shard_twice() -> None:
    work = planned(data_set([1000, 7, 501], []))
    assert (work.tokens, work.epochs, work.evaluated_tokens) == (2 * (999 + 6 + 500), 2, 0)


def test_the_steps_are_those_of_the_order_that_training_follows() -> None:
    manifest = data_set([1000, 7, 501, 1], [])
    order = WindowOrder([one.tokens for one in manifest.train], [one.size for one in manifest.train], 32, 5, 10**6)
    assert planned(manifest).steps == math.ceil(order.position_limit(2) / 8)


def test_a_run_that_is_cut_short_has_its_share() -> None:
    whole = planned(data_set([100_001], [1001]))
    half = planned(data_set([100_001], [1001]), max_steps=whole.steps // 2)
    assert half.steps == whole.steps // 2
    assert half.tokens == pytest.approx(whole.tokens / 2, rel=0.01)
    assert planned(data_set([100_001], [1001]), max_steps=10**9) == whole


def test_the_held_out_tokens_count_at_every_evaluation_and_after_the_last_step() -> None:
    manifest = data_set([32 * 8 * 25 + 1], [1001])
    assert planned(manifest, epochs=1).steps == 25
    assert planned(manifest, epochs=1).evaluated_tokens == (2 + 1) * 1000
    assert planned(manifest, epochs=1, evaluate_max_windows=3).evaluated_tokens == 2 * 96 + 1000
    assert planned(manifest, epochs=1).evaluation_share == pytest.approx(1000 / (32 * 8 * 25 + 1000))


def test_the_tutorials_hours_follow_from_its_tokens_and_its_utilization() -> None:
    """It took 2 h 49 min for 3,516 steps of 131,072 tokens on one A100, at about 11 % MFU, without its evaluations."""
    spec = ModelSpec(512, 12, 8, 2, 2048)
    flops = flops_per_token(spec, 151_646, 512).total
    work = Workload(3516, 2, 0, 3516 * 131_072, 0, flops, 3516)
    a100 = peak_flops("NVIDIA A100-SXM4-80GB")
    assert a100 is not None
    assert work.hours(a100, 0.11, gpus=1) == pytest.approx(2 + 49 / 60, rel=0.02)
    assert work.hours(a100, 0.11, gpus=8) == pytest.approx(work.hours(a100, 0.11, gpus=1) / 8)
    assert work.seconds_per_step(a100, 0.11, gpus=1) == pytest.approx(2.89, rel=0.02)


def test_every_gpu_of_the_plan_has_a_known_peak() -> None:
    assert [gpu.name for gpu in GPUS if peak_flops(gpu.cuda_name) is None] == []
