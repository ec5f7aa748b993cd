"""Tests of the cases of the GPU benchmark: what they are, and which come first."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from benchmarks import gpu, gpu_plan
from benchmarks.gpu_plan import Case
from job.config import Config
from job.launcher.device import Device
from job.launcher.supervisor import worker_environment
from job.model.flops import parameter_counts

pytestmark = pytest.mark.benchmarks

REPOSITORY = Path(__file__).parent.parent.parent
DDP = Case("ddp", "train", trainer="ddp", micro_batch_size=256, accumulation_steps=1)
ZERO2 = replace(DDP, name="zero2", trainer="zero2")


def test_what_decides_a_default_comes_first():
    first = gpu_plan.first_cases()
    assert [(case.kind, case.trainer, case.auto_micro_batch) for case in first] == [
        ("machine", "levers", False),
        ("check", "levers", False),
        ("train", "tutorial", False),
        ("train", "ddp", True),
        ("train", "zero2", True),
    ]
    deciding = gpu_plan.deciding_cases(DDP, ZERO2, None)
    assert [(case.kind, case.trainer) for case in deciding[:2]] == [("trace", "ddp"), ("trace", "zero2")]
    seen = [(case.trainer, case.micro_batch_size, case.accumulation_steps) for case in deciding[2:6]]
    assert seen == [("ddp", 32, 8), ("ddp", 128, 2), ("zero2", 32, 8), ("ddp", 64, 4)]
    rest = deciding[6:]
    changed = [{name for name in vars(DDP) if vars(case)[name] != vars(DDP)[name]} - {"name"} for case in rest]
    assert changed[:3] == [{"precision"}, {"model"}, {"context_length", "micro_batch_size"}]
    assert changed[3:] == [{"chunk_tokens"}] * len(gpu_plan.CHUNKS)
    assert rest[2].context_length == 2048 and rest[2].tokens_per_step == DDP.tokens_per_step


def test_chosen_micro_batch_is_not_measured_twice():
    chosen = replace(DDP, micro_batch_size=32, accumulation_steps=8), replace(ZERO2, micro_batch_size=64)
    sizes = [(case.trainer, case.micro_batch_size) for case in gpu_plan.deciding_cases(*chosen, None)[2:6]]
    assert sizes == [("ddp", 128), ("ddp", 256), ("zero2", 8), ("ddp", 64)]


def test_traces_have_two_micro_batches_and_a_file_each(tmp_path):
    of_ddp, of_zero2 = gpu_plan.deciding_cases(replace(DDP, accumulation_steps=8), ZERO2, tmp_path)[:2]
    assert (of_ddp.accumulation_steps, of_zero2.accumulation_steps) == (2, 1)
    assert of_ddp.trace == str(tmp_path / "trace-ddp.json.gz")
    assert of_zero2.trace == str(tmp_path / "trace-zero2.json.gz")


def test_each_lever_is_added_to_the_one_before():
    cases = gpu_plan.lever_cases()
    for before, after in pairwise(cases):
        changed = {name for name in vars(before) if vars(before)[name] != vars(after)[name]} - {"name"}
        assert len(changed) == 1, changed


def test_expected_time_is_the_median_of_like_rows():
    rows = [vars(DDP) | {"took_seconds": seconds} for seconds in (50, 10, 12)]
    others = [vars(ZERO2) | {"took_seconds": 99}, vars(DDP) | {"took_seconds": 1, "why": "out of memory"}]
    assert gpu_plan.expected_seconds(DDP, rows + others) == 12
    assert gpu_plan.expected_seconds(DDP, others) == gpu_plan.ASSUMED_SECONDS


def test_case_takes_the_micro_batch_of_its_row():
    auto = replace(DDP, micro_batch_size=32, accumulation_steps=8, auto_micro_batch=True, limit_seconds=99)
    other = vars(auto) | {"model": "54M", "micro_batch_size": 1, "tokens_per_second": 1.0}
    row = vars(auto) | {"micro_batch_size": 256, "accumulation_steps": 1, "tokens_per_second": 1.0}
    assert gpu_plan.as_measured(auto, [other, row]) == DDP
    failed = gpu_plan.as_measured(auto, [vars(auto) | {"why": "it failed"}])
    assert failed == replace(auto, auto_micro_batch=False, limit_seconds=DDP.limit_seconds)


def test_processes_get_the_allocator_settings_of_the_job(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    jobs = worker_environment(Device("cuda", ("NVIDIA H100 80GB HBM3",), ""), 1, Config())
    assert jobs["PYTORCH_CUDA_ALLOC_CONF"] == gpu.ENVIRONMENT["PYTORCH_CUDA_ALLOC_CONF"]


def test_models_have_the_sizes_of_their_names():
    preset = yaml.safe_load((REPOSITORY / "configs/wiki-123m.yaml").read_text())["model"]
    spec, _ = gpu_plan.MODELS["123M"]
    assert {field: value for field, value in vars(spec).items() if isinstance(value, int)} == {
        field: preset[field] for field, value in vars(spec).items() if isinstance(value, int)
    }
    for name, (shape, entries) in gpu_plan.MODELS.items():
        assert parameter_counts(shape, entries).total / 1e6 == pytest.approx(int(name[:-1]), rel=0.01)


def test_best_row_is_the_jobs_own_if_it_was_measured():
    cases = [Case(trainer, "train", trainer=trainer) for trainer in ("tutorial", "levers", "ddp", "zero2")]
    results = [vars(case) | {"tokens_per_second": speed} for case, speed in zip(cases, (9, 8, 1, 2), strict=True)]
    assert gpu_plan.best_case(cases, results).trainer == "zero2"
    assert gpu_plan.best_case(cases[:2], results[:2]).trainer == "levers"
    assert gpu_plan.best_case(cases[:1], results[:1]).trainer == "tutorial"
