"""Tests of training steps on a GPU: both strategies in every precision, compiled code, checkpoints and resuming."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from gpu_steps import BAD_STEP, COMPILED, PRECISIONS, SAVED_STEP, STEPS, TOLERANCES, train_plainly
from torch import Tensor

pytestmark = pytest.mark.gpu
Trained = Callable[[str], dict[str, Any]]
NeedRealGpu = Callable[[], None]
in_each_strategy = pytest.mark.parametrize("strategy", list(PRECISIONS))
in_each_precision = pytest.mark.parametrize(
    ("strategy", "precision"), [(strategy, one) for strategy in PRECISIONS for one in PRECISIONS[strategy]]
)
expected = cache(train_plainly)


@in_each_strategy
def test_engine_steps_run_in_every_case(trained: Trained, strategy: str) -> None:
    seen = trained(strategy)
    compiled = [f"{precision} compiled" for precision in COMPILED if precision in PRECISIONS[strategy]]
    assert {seen[name]["why not"] for name in compiled} == {None}
    names = [f"{precision}{how}" for precision in PRECISIONS[strategy] for how in ("", " again", " accumulated")]
    names += compiled
    assert {name: len(seen[name]["losses"]) for name in names} == dict.fromkeys(names, STEPS)


@in_each_precision
def test_gpu_steps_agree_with_plain_fp32_on_the_cpu(
    trained: Trained, real_gpu: NeedRealGpu, strategy: str, precision: str
) -> None:
    seen = trained(strategy)
    real_gpu()
    of_losses, of_norms = TOLERANCES[precision]
    for how in ("", " accumulated", *([" compiled"] if precision in COMPILED else [])):
        case = seen[precision + how]
        assert case["losses"] == pytest.approx(expected().losses, rel=of_losses), how
        assert case["norms"] == pytest.approx(expected().norms, rel=of_norms), how
        assert case["skipped"] == [0.0] * STEPS, how


@in_each_precision
def test_gpu_weights_agree_with_plain_fp32_on_the_cpu(
    trained: Trained, real_gpu: NeedRealGpu, strategy: str, precision: str
) -> None:
    weights = trained(strategy)[precision]["weights"]
    assert weights.keys() == expected().weights.keys()
    real_gpu()
    # AdamW's step has the size of the learning rate whatever the gradient's, so compare how far the weights have moved.
    start = torch.cat([one.flatten() for one in start_weights().values()])
    ours, plain = (torch.cat([of[name].flatten() for name in start_weights()]) for of in (weights, expected().weights))
    assert (ours - plain).norm() <= {"fp32": 1e-3}.get(precision, 0.1) * (plain - start).norm()


@cache
def start_weights() -> dict[str, Tensor]:
    from gpu_steps import new_model

    return {name: one.detach() for name, one in new_model().named_parameters()}


@in_each_strategy
def test_precisions_are_really_different_on_the_gpu(trained: Trained, real_gpu: NeedRealGpu, strategy: str) -> None:
    seen = trained(strategy)
    real_gpu()
    rounded = [one for one in PRECISIONS[strategy] if one != "fp32"]
    if torch.cuda.get_device_capability() < (8, 0):
        rounded.remove("tf32")  # Such a GPU computes tf32 in fp32.
    assert [one for one in rounded if seen[one]["losses"] == seen["fp32"]["losses"]] == []


@in_each_precision
def test_gpu_checkpoint_holds_the_weights_of_the_step(trained: Trained, strategy: str, precision: str) -> None:
    seen = trained(strategy)[precision]
    assert seen["stored"].keys() == seen["saved"].keys()
    for name, tensor in seen["saved"].items():
        assert torch.equal(seen["stored"][name].view(torch.int32), tensor.view(torch.int32)), name


@in_each_precision
def test_gpu_run_resumed_from_a_checkpoint_has_the_same_bits(
    trained: Trained, real_gpu: NeedRealGpu, strategy: str, precision: str
) -> None:
    straight, resumed = (trained(strategy)[f"{precision}{how}"] for how in ("", " resumed"))
    assert len(resumed["losses"]) == STEPS - SAVED_STEP
    real_gpu()
    assert resumed["losses"] == straight["losses"][SAVED_STEP:]
    assert resumed["norms"] == straight["norms"][SAVED_STEP:]
    assert differing(resumed["weights"], straight["weights"]) == []


@in_each_precision
def test_gpu_steps_have_the_same_bits_each_time(
    trained: Trained, real_gpu: NeedRealGpu, strategy: str, precision: str
) -> None:
    first, again = (trained(strategy)[f"{precision}{how}"] for how in ("", " again"))
    real_gpu()
    assert first["losses"] == again["losses"]
    assert differing(first["weights"], again["weights"]) == []


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@in_each_strategy
def test_bad_step_on_the_gpu_is_skipped_and_changes_nothing(
    trained: Trained, real_gpu: NeedRealGpu, strategy: str
) -> None:
    seen = trained(strategy)["bad step"]
    real_gpu()
    assert seen["skipped"] == [float(step == BAD_STEP) for step in range(STEPS)]
    assert differing(seen["weights before"], seen["weights after"]) == []
    assert seen["losses"][0] == trained(strategy)["bf16"]["losses"][0]


@in_each_strategy
def test_packed_documents_on_the_gpu_have_the_losses_of_a_mask(
    trained: Trained, real_gpu: NeedRealGpu, strategy: str
) -> None:
    packed, masked = trained(strategy)["packed"], trained(strategy)["masked"]
    real_gpu()
    assert packed["why not"] is None
    assert packed["losses"] == pytest.approx(masked["losses"], rel=TOLERANCES["bf16"][0])
    assert packed["losses"] != pytest.approx(trained(strategy)["bf16"]["losses"], rel=1e-4), "documents see each other"


@in_each_strategy
def test_micro_batch_that_does_not_fit_is_one_line(trained: Trained, strategy: str) -> None:
    error = trained(strategy)["out of memory"]
    assert error.startswith("train.micro_batch_size: 8: ") and "the GPU's memory is full" in error
    assert "\n" not in error
