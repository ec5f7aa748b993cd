"""Tests of what the GPU benchmark concludes, with results on both sides of each threshold."""

from dataclasses import replace

import pytest

from benchmarks import gpu_conclusions as conclude
from benchmarks import gpu_plan
from benchmarks.gpu_plan import Case
from benchmarks.gpu_tables import tables
from job.model.flops import flops_per_token
from job.model.gpu_table import peak_flops

pytestmark = pytest.mark.benchmarks

DDP = Case("ddp", "train", trainer="ddp", auto_micro_batch=True, micro_batch_size=256, accumulation_steps=1)
ZERO2 = replace(DDP, name="zero2", trainer="zero2")
TUTORIAL = Case("tutorial", "train", trainer="tutorial")


def row(case, rate, **fields):
    return vars(replace(case, **fields)) | {"tokens_per_second": float(rate)}


def divided(case, parts):
    return replace(case, auto_micro_batch=False, micro_batch_size=256 // parts, accumulation_steps=parts)


def trace(trainer, busy=0.95, softmax=0.1):
    measured = {"busy": busy, "span_seconds": 0.3, "host_seconds": 0.1, "shares": {conclude.SOFTMAX: softmax}}
    return vars(replace(DDP, kind="trace", trainer=trainer)) | measured


# ---- Each threshold ----


@pytest.mark.parametrize(
    ("rate", "busy", "advice"),
    [
        (90, 0.5, "at least 0.9: keep zero2"),
        (89, 0.95, "under 0.9: make ddp the default"),
        (89, 0.89, "under 0.9: its device waits for the host, so find the host's time, or make ddp the default"),
    ],
)
def test_slow_zero2_leaves_several_processes_to_ddp(rate, busy, advice):
    found = conclude.strategy([row(DDP, 100), row(ZERO2, rate), trace("ddp"), trace("zero2", busy)])
    assert found.advice.startswith(advice)
    assert found.found.startswith(f"{rate / 100:.2f} as the job chooses; ddp: device busy 95%, host 100 ms of 300 ms")
    assert f"zero2: device busy {busy:.0%}" in found.found


def test_strategies_are_compared_in_equal_micro_batches_too():
    pair = [row(divided(DDP, 8), 50), row(divided(ZERO2, 8), 40)]
    both = conclude.strategy([row(DDP, 100), row(ZERO2, 95), *pair])
    assert both.found == "0.95 as the job chooses; 0.80 in micro-batches of 32" and "keep zero2" in both.advice
    assert conclude.strategy([row(DDP, 100), *pair]).advice.startswith("under 0.9: make ddp")


@pytest.mark.parametrize(("rate", "advice"), [(106, "above 1.05: raise the micro-batch"), (105, "at most 1.05: 32")])
def test_faster_large_micro_batches_are_taken(rate, advice):
    rows = [row(DDP, 120), row(divided(DDP, 8), 100), row(divided(DDP, 2), rate), row(divided(ZERO2, 2), 900)]
    found = conclude.larger_micro_batches(rows)
    assert found.advice.startswith(advice) and found.found.endswith("128 against 32 sequences")


@pytest.mark.parametrize(
    ("rate", "advice"), [(97, "at least 0.97: keep"), (96, "under 0.97: let auto take at most 65,536")]
)
def test_chosen_micro_batch_is_compared_with_the_best(rate, advice):
    rows = [row(DDP, rate), row(divided(DDP, 2), 100), row(divided(DDP, 8), 50), row(divided(ZERO2, 4), 900)]
    found = conclude.chosen_micro_batch(rows)
    assert found.advice.startswith(advice) and found.found.endswith("of the best size, 128")


@pytest.mark.parametrize(("rate", "advice"), [(97, "at least 0.97: keep"), (96, "under 0.97: change the budget")])
def test_default_chunk_is_compared_with_the_best(rate, advice):
    chunks = [
        row(DDP, speed, chunk_tokens=(size,), auto_micro_batch=False) for size, speed in ((2048, 50), (4096, 100))
    ]
    found = conclude.chunk_size([row(DDP, rate), *chunks])
    assert found.advice.startswith(advice) and found.found.endswith("of the best, 4,096 tokens")


def test_default_chunk_that_is_the_best_is_kept():
    found = conclude.chunk_size([row(DDP, 100), row(DDP, 90, chunk_tokens=(2048,), auto_micro_batch=False)])
    assert "the default itself" in found.found and found.advice.startswith("at least 0.97: keep")


@pytest.mark.parametrize(("share", "advice"), [(0.12, "at most 12%: keep"), (0.121, "above 12%: write a kernel")])
def test_softmax_kernel_is_judged_by_its_share(share, advice):
    assert conclude.softmax_kernel([trace("zero2", softmax=0.5), trace("ddp", softmax=share)]).advice.startswith(advice)


@pytest.mark.parametrize(("busy", "advice"), [(0.9, "at least 90%: look for"), (0.89, "under 90%: the device waits")])
def test_idle_device_is_blamed_on_the_host(busy, advice):
    assert conclude.device_busy([trace("zero2", 0.1), trace("ddp", busy)]).advice.startswith(advice)


@pytest.mark.parametrize(("rate", "advice"), [(95, "at least 0.95: nothing"), (94, "under 0.95: compare a trace")])
def test_slow_fp16_is_looked_into(rate, advice):
    rows = [row(DDP, rate, precision="fp16", auto_micro_batch=False), row(DDP, 100)]
    assert conclude.fp16(rows).advice.startswith(advice)


# ---- Goals ----


@pytest.mark.parametrize(
    ("rate", "tutorial", "outcome"),
    [
        (449_999, 50_000, "least missed, aim missed, ratio reached"),
        (450_000, 60_000, "least reached, aim missed, ratio missed"),
        (550_000, 68_750, "least reached, aim reached, ratio reached"),
        (550_000, None, "least reached, aim reached"),
    ],
)
def test_goals_are_compared_with_the_fastest_row_of_the_job(rate, tutorial, outcome):
    machine = vars(Case("", "machine")) | {"machine": "NVIDIA H100 80GB HBM3, 16 CPUs"}
    rows = [machine, row(DDP, 1), row(divided(ZERO2, 2), rate)]
    others = [row(DDP, 900_000, model="54M"), row(DDP, 900_000, precision="fp16"), row(DDP, 900_000, context_length=64)]
    of_tutorial = [row(TUTORIAL, tutorial)] if tutorial else []
    found = conclude.goals(rows + others + of_tutorial)
    assert found.advice == f"{outcome}: 450,000 tokens/s (35% MFU) at least, 550,000 the aim, 8 x the tutorial"
    assert found.found.startswith(f"{rate:,} tokens/s, ")


@pytest.mark.parametrize(("machine", "tiny"), [("NVIDIA A100-SXM4-80GB", False), ("NVIDIA H100 80GB HBM3", True)])
def test_goals_are_for_an_h100_and_the_whole_model(machine, tiny):
    found = conclude.goals([{"kind": "machine", "machine": machine}, row(DDP, 900_000, tiny=tiny)])
    assert found.advice.startswith("not to be compared")


def test_goal_in_tokens_is_the_goal_in_mfu():
    token_flops = flops_per_token(*gpu_plan.MODELS["123M"], 512).total
    mfu = conclude.GOAL_RATE * token_flops / peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    assert mfu == pytest.approx(conclude.GOAL_MFU, abs=0.01)


# ---- Missing rows ----


def test_nothing_is_decided_without_its_rows():
    failed = [vars(case) | {"why": "out of memory"} for case in (DDP, ZERO2, TUTORIAL)]
    without_kernels = vars(replace(DDP, kind="trace")) | {"why": "the profiler's trace has no kernels"}
    for results in ([], failed, [*failed, without_kernels], [row(TUTORIAL, 100)]):
        assert all(one.advice.startswith("not decided: ") for one in conclude.conclusions(results))
    alone = {one.question for one in conclude.conclusions([row(DDP, 100)]) if one.advice.startswith("not decided: ")}
    assert len(alone) == len(conclude.conclusions([])) - 1


def test_trace_without_the_hosts_time_is_used_for_the_rest():
    without_host = {name: value for name, value in trace("ddp", 0.5).items() if name != "host_seconds"}
    assert conclude.device_busy([without_host]).found == "ddp: device busy 50%"


def test_trace_without_kernels_is_printed_with_its_reason():
    result = vars(replace(DDP, kind="trace")) | {"why": "the profiler's trace has no kernels", "host_seconds": 0.1}
    result |= {"launches": 3, "copies": 2, "waits": 1}
    printed = "\n".join(tables([result], []))
    assert "waited 1 times: the profiler's trace has no kernels" in printed
