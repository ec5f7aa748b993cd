"""Tests of `benchmarks.ranks`: it assigns all time of a profile to a place and prints its tables."""

import pytest

from benchmarks import ranks

pytestmark = pytest.mark.benchmarks

STEP = ("/x/benchmarks/ranks.py", 1, "step")
LAYER = ("/x/transformers/models/qwen2/modeling_qwen2.py", 1, "forward")
ENGINE = ("/x/deepspeed/runtime/engine.py", 1, "step")


def test_native_time_counts_at_its_caller() -> None:
    backward = ("~", 0, "<method 'run_backward' of 'torch._C._EngineBase' objects>")
    linear = ("~", 0, "<built-in method torch._C._nn.linear>")
    wait = ("~", 0, "<method 'wait' of 'torch._C._distributed_c10d.Work' objects>")
    copy = ("~", 0, "<method 'copy_' of 'torch._C.TensorBase' objects>")
    profile = {
        STEP: (1, 1, 0.5, 9.0, {}),
        LAYER: (1, 1, 0.25, 1.0, {STEP: (1, 1, 0.25, 1.0)}),
        backward: (1, 1, 4.0, 4.0, {STEP: (1, 1, 4.0, 4.0)}),
        linear: (1, 1, 2.0, 2.0, {LAYER: (1, 1, 2.0, 2.0)}),
        wait: (1, 1, 1.0, 1.0, {ENGINE: (1, 1, 1.0, 1.0)}),
        copy: (2, 2, 3.0, 3.0, {ENGINE: (1, 1, 1.75, 1.75), LAYER: (1, 1, 1.25, 1.25)}),
    }
    seconds = ranks.places(profile)
    assert seconds == {"other": 0.5, "model": 3.5, "backward": 4.0, "exchange": 1.0, "DeepSpeed": 1.75}
    assert set(seconds) <= set(ranks.PLACES)
    assert sum(seconds.values()) == sum(own for _, _, own, _, _ in profile.values())


def test_benchmark_prints_all_its_tables(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    cases = ("plain PyTorch", "zero2, 2 processes")
    monkeypatch.setattr(ranks, "CASES", {case: ranks.CASES[case] for case in cases})
    sizes = {"hidden": 64, "layers": 1, "context": 16, "batch": 4, "micro_batches": 2, "steps": 1}
    ranks.report(sizes, rounds=1)
    printed = capfd.readouterr().out
    for case in cases:
        times, by_place = [line for line in printed.splitlines() if line.startswith(f"| {case} |")]
        assert times.count("|") == 6 and by_place.count("|") == len(ranks.PLACES) + 2
        assert times.endswith("| +0.000 s, +0.0% |"), (
            "it is the first case with its number of processes, so it is compared with itself"
        )
