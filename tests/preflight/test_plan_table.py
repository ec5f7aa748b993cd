"""The printed plan: rows for all common GPUs, an MFU that depends on the model's size, prices only where known."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from job.config import Checkpoint, Data, Train
from job.model.flops import flops_per_token, parameter_counts
from job.model.gpu_table import Gpu, find_gpu
from job.model.spec import ModelSpec
from job.preflight.assumed_mfu import assumed_mfu
from job.preflight.capacity import ModelSize, check_time_limit
from job.preflight.existing_run import ExistingRun
from job.preflight.findings import UNSURE, Findings
from job.preflight.machine import check_disks
from job.preflight.plan_table import GpuPlan, gpu_plans, hundredths, show_plan
from job.preflight.target import Target
from job.preflight.workload import Workload

GIB = 2**30
VOCAB_SIZE = 151_646
TUTORIAL = ModelSpec(512, 12, 8, 2, 2048)
NAMES = {
    "T4", "V100", "RTX 2080 Ti", "RTX 3060", "RTX 3090", "RTX 4060 Ti", "RTX 4090", "RTX 4090 D", "RTX 5090", "L4",
    "A10", "L40S", "A100", "H20", "H100", "H200", "B200",
}  # fmt: skip
FLOPS = flops_per_token(TUTORIAL, VOCAB_SIZE, 512).total
WORK = Workload(3516, 2, 900_000, 3516 * 131_072, 0, FLOPS, 3516)


def target(gpu_name: str = "", gib: float | None = None) -> Target:
    memory_bytes = None if gib is None else int(gib * GIB)
    return Target("here", 1, 1, 1, gpu_name=gpu_name, gpu_memory_bytes=memory_bytes)


def found(device_name: str) -> Gpu:
    gpu = find_gpu(device_name)
    assert gpu is not None
    return gpu


def mfu_of(parameters: float, device_name: str) -> float:
    gpu = found(device_name)
    return assumed_mfu(round(6 * parameters), gpu, gpu.used_precision("bf16")[1])


MODEL = ModelSize(TUTORIAL, VOCAB_SIZE, parameter_counts(TUTORIAL, VOCAB_SIZE), 12 * 123_277_824)


def plans_of(place: Target, needed_bytes: int, existing: ExistingRun | None = None) -> list[GpuPlan]:
    return gpu_plans("bf16", WORK, place, existing or ExistingRun(), None, None, lambda gpu_bytes: needed_bytes)


def shown(place: Target, mfu: float | None = None, assumptions: tuple[str, ...] = (), **train: object) -> str:
    screen = io.StringIO()
    defaults = {"strategy": "zero2", "precision": "bf16", "micro_batch_size": 32}
    settings = Train.model_validate(defaults | train)
    show_plan(
        Console(file=screen, width=240), settings, settings, Checkpoint(), MODEL, WORK, place, ExistingRun(), mfu, None,
        assumptions,
    )  # fmt: skip
    return screen.getvalue()


# ---- The run ----


def test_plan_shows_the_schedule_and_counts_the_kept_checkpoints() -> None:
    cosine, wsd = shown(target()), shown(target(), schedule="wsd")
    assert "cosine: 200 warm-up, 3,316 decay steps" in cosine
    assert "wsd: 200 warm-up, 2,612 stable, 704 decay steps" in wsd
    assert "10 are kept (checkpoint.keep)" in cosine
    assert "11 are kept (checkpoint.keep, and the one before the decay)" in wsd


@pytest.mark.parametrize(("schedule", "gib"), [("cosine", "11.33"), ("wsd", "12.33")])
def test_disk_has_room_for_the_checkpoint_before_the_decay(schedule: str, gib: str, tmp_path: Path) -> None:
    findings = Findings()
    data = Data(shards=str(tmp_path), cache_dir=str(tmp_path))
    check_disks(findings, data, Checkpoint(scratch_dir=str(tmp_path)), schedule, str(tmp_path), None, GIB)
    (row,) = (row for row in findings.rows if row.name == "disk for checkpoints")
    assert row.found.startswith(f"{gib} GiB needed"), "kept ones, one being written, and the exported weights"


# ---- Rows ----


def test_plan_has_all_common_gpus_those_that_fit_first_by_hours() -> None:
    plans = plans_of(target(), 60 * GIB)
    assert {plan.gpu.name for plan in plans} == NAMES
    assert [plan.gpu.name for plan in plans[:5]] == ["B200", "H200", "H100", "A100", "H20"]
    too_small = plans[5:]
    assert {plan.fit for plan in too_small} == {"too small"}
    assert too_small[0].hours < plans[4].hours, "an L40S is faster than an H20, but too small"
    assert [plan.hours for plan in too_small] == sorted(plan.hours for plan in too_small)


def test_gpu_sold_in_two_sizes_names_the_size_that_fits() -> None:
    for needed, v100, a100, rtx_4060_ti in (
        (7, "fits", "fits", "fits"),
        (12, "fits", "fits", "fits in 16 GiB"),
        (20, "fits in 32 GiB", "fits", "too small"),
        (60, "too small", "fits in 80 GiB", "too small"),
    ):
        fit = {plan.gpu.name: plan.fit for plan in plans_of(target(), needed * GIB)}
        assert (fit["V100"], fit["A100"], fit["RTX 4060 Ti"]) == (v100, a100, rtx_4060_ti)


def test_gpu_of_this_machine_is_first_with_its_own_memory() -> None:
    plans = plans_of(target("NVIDIA A100-SXM4-40GB", 40), 60 * GIB)
    assert (plans[0].gpu.name, plans[0].is_here, plans[0].fit) == ("A100", True, "too small")
    assert [plan.is_here for plan in plans[1:]] == [False] * (len(NAMES) - 1)
    plans = plans_of(target("NVIDIA H100 PCIe", 80), 60 * GIB)
    assert (plans[0].gpu.name, len(plans)) == ("H100 PCIe", len(NAMES) + 1)


def test_hours_are_those_of_the_precision_that_the_gpu_has() -> None:
    """0.2 of a T4's 65 TFLOP/s in fp16: 3.5e17 FLOPs take 7.4 hours; in fp32 it has 8.1 TFLOP/s."""
    for setting, precision, peak in (("bf16", "fp16", 65e12), ("tf32", "fp32", 8.1e12), ("fp32", "fp32", 8.1e12)):
        (t4,) = [
            p for p in gpu_plans(setting, WORK, target(), ExistingRun(), 0.2, None, lambda _: GIB) if p.gpu.name == "T4"
        ]
        assert (t4.precision, t4.hours) == (precision, pytest.approx(WORK.flops / (0.2 * peak) / 3600))
        assert t4.tokens_per_second == pytest.approx(0.2 * peak / FLOPS)


def test_price_is_shown_only_where_one_is_known() -> None:
    plans = plans_of(target(), GIB)
    assert {plan.gpu.name for plan in plans if plan.dollars_per_hour is not None} == {"A100", "H100", "RTX 4090"}
    plans = gpu_plans("bf16", WORK, target(), ExistingRun(), None, 7.25, lambda _: GIB)
    assert {plan.dollars_per_hour for plan in plans} == {7.25}


def test_finished_part_of_the_run_takes_no_more_hours() -> None:
    whole = plans_of(target(), GIB)
    rest = plans_of(target(), GIB, ExistingRun(step=3516 // 4))
    assert [plan.hours for plan in rest] == pytest.approx([0.75 * plan.hours for plan in whole])


@pytest.mark.parametrize(
    ("gpu_name", "shown_name"), [("Tesla T4", "T4"), ("", "RTX 3090"), ("NVIDIA A10G", "RTX 3090")]
)
def test_time_limit_counts_with_the_gpu_of_the_target(gpu_name: str, shown_name: str) -> None:
    findings = Findings()
    train, checkpoint = Train.model_validate({"max_time": "20m"}), Checkpoint(every=1000)
    check_time_limit(findings, train, checkpoint, target(gpu_name), MODEL, WORK, None)
    (row,) = findings.rows
    assert row.mark == UNSURE and f"on a {shown_name} checkpoints are " in row.found


# ---- The printed text ----


def test_table_fits_into_100_columns() -> None:
    text = shown(target("NVIDIA GeForce RTX 4090 D", 24), global_batch_size=256)
    table = text[text.index("remaining work") : text.index("MFU:")]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 100
    assert re.search(r"^RTX 4090 D \(this machine\) +24 +bf16 +\d+% ", table, re.MULTILINE)
    assert re.search(r"^T4 +15 +fp16 ", table, re.MULTILINE)


def test_gpu_without_a_known_peak_is_named() -> None:
    assert "The peak of this machine's GPU, NVIDIA A10G, is not known" in shown(target("NVIDIA A10G", 22))
    assert "is not known" not in shown(target())


def test_given_mfu_replaces_the_assumed_one() -> None:
    text = shown(target())
    assert "MFU: assumed from the model's size and the GPU (the tutorial reached 11%" in text
    assert len({*re.findall(r" (\d+)%  ", text)}) > 4
    text = shown(target(), mfu=0.4)
    assert "MFU: --mfu." in text and text.count(" 40% ") == len(NAMES)


def test_every_assumption_about_the_data_is_printed() -> None:
    text = shown(target(), assumptions=("4.5 bytes of text per token", "a vocabulary of 151,646 entries"))
    assert re.search(r"^the run, assumed *$", text, re.MULTILINE)
    assert re.search(r"^assumed: 4\.5 bytes of text per token; `prepare` gives the real number$", text, re.MULTILINE)
    assert re.search(r"^assumed: a vocabulary of 151,646 entries; ", text, re.MULTILINE)
    assert "assumed: " not in shown(target())


# ---- The assumed MFU ----


def test_assumed_mfu_grows_with_the_model() -> None:
    sizes = {8e6: 0.055, 123e6: 0.31, 1e9: 0.44}
    for parameters, expected in sizes.items():
        assert mfu_of(parameters, "NVIDIA A100-SXM4-80GB") == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("parameters", "percent"), [(124_131_840, 42.56), (354_412_544, 50.61), (1_312_804_864, 60.68), (2.648e9, 63.71)]
)
def test_assumed_mfu_is_three_quarters_of_llm_foundrys(parameters: float, percent: float) -> None:
    assert mfu_of(parameters, "NVIDIA A100-SXM4-80GB") == pytest.approx(0.75 * percent / 100, abs=0.025)


def test_memory_bound_gpus_are_assumed_to_use_less_of_their_peak() -> None:
    """llm-foundry's MPT-1B at 512 tokens reached 60.68 % on A100s and 43.21 % on H100s."""
    a100, h100 = (mfu_of(1.3e9, name) for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"))
    assert h100 / a100 == pytest.approx(43.21 / 60.68, abs=0.02)
    assert mfu_of(123e6, "NVIDIA L4") < 0.7 * mfu_of(123e6, "NVIDIA GeForce RTX 3090")
    assert mfu_of(123e6, "NVIDIA GeForce RTX 3090") == mfu_of(123e6, "NVIDIA A100-SXM4-80GB")
    assert mfu_of(123e6, "NVIDIA GeForce RTX 2080 Ti") == pytest.approx(0.7 * mfu_of(123e6, "NVIDIA A100-SXM4-80GB"))


def test_less_than_a_hundredth_is_not_shown_as_nothing() -> None:
    assert [hundredths(value, "$") for value in (0.0, 0.004, 0.01, 1234.567)] == [
        "$0.00",
        "<$0.01",
        "$0.01",
        "$1,234.57",
    ]
