"""Tests of `benchmarks.gpu` without a GPU: it prints its tables and detects wrong losses and gradients."""

import gzip
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flash_stand_in import flash_kernels

from benchmarks import gpu, gpu_case, gpu_device, gpu_losses, gpu_plan, gpu_training
from benchmarks.gpu import Measurer
from benchmarks.gpu_plan import Case
from job.model import language_model
from job.model.loss import linear_cross_entropy

pytestmark = pytest.mark.benchmarks

REPOSITORY = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


# ---- The whole benchmark ----


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Output, JSON rows and trace folder of a whole run with ``--tiny``."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--json", folder / "rows.json", "--trace", folder]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # tiny products are slower on more
    process = subprocess.run(command, cwd=REPOSITORY, env=one_thread, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, json.loads((folder / "rows.json").read_text())["rows"], folder


def test_every_row_is_measured_or_says_why_not(whole_run):
    _, rows, _ = whole_run
    first = gpu_plan.first_cases()
    ddp, zero2 = (replace(gpu_plan.shrunk(case), micro_batch_size=8, accumulation_steps=1) for case in first[-2:])
    then = [*gpu_plan.deciding_cases(ddp, zero2, None), *gpu_plan.lever_cases(), *gpu_plan.other_cases(ddp)]
    assert [row["name"] for row in rows][: len(first)] == [case.name for case in first]
    assert len(rows) == len(first) + len(then)
    why_not = {"FlashAttention-3": "it needs a GPU", "packed": "NotImplementedError: "}
    for row in rows:
        needs_a_gpu = row["loss"] in ("liger", "cce") or (row["compiles"] and row["kind"] in ("train", "loss", "trace"))
        if row["attention"] in why_not:
            assert row["why"].startswith(why_not[row["attention"]])
        else:
            assert row.get("why") == ("CUDA only" if needs_a_gpu else None), row
    trainers = {row["trainer"] for row in rows if "tokens_per_second" in row}
    assert trainers == {"tutorial", "levers", "ddp", "zero2"}


def test_packed_documents_are_measured_if_kernels_exist(monkeypatch):
    monkeypatch.setattr(
        language_model, "linear_cross_entropy", language_model.linear_cross_entropy
    )  # The case replaces the loss; this restores it after the test.
    case = gpu_plan.shrunk(Case("packed", "train", attention="packed", compiles=False))
    with flash_kernels() as kernels:
        measured = gpu_training.train(case)
    layers, micro_batches = case.shape[0].num_hidden_layers, case.accumulation_steps
    steps = gpu_device.WARM_UP_STEPS + len(measured["step_seconds"])
    assert set(kernels) == {torch.bfloat16}
    assert len(kernels) >= 2 * layers * micro_batches * steps


def test_numbers_are_finite_and_phases_make_up_the_step(whole_run):
    _, rows, _ = whole_run

    def numbers(value):
        if isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                yield from numbers(one)
        elif isinstance(value, float):
            yield value

    assert all(math.isfinite(number) for number in numbers(rows))
    trained = [row for row in rows if "tokens_per_second" in row]
    for row in trained:
        tokens = row["context_length"] * row["micro_batch_size"] * row["accumulation_steps"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["median_step_seconds"])
        assert all(row["phase_seconds"][phase] > 0 for phase in ("forward", "loss", "backward", "optimizer")), row
        assert len(row["step_seconds"]) >= gpu_device.LEAST_STEPS


def test_training_table_is_last_and_has_all_rows(whole_run):
    printed, rows, _ = whole_run
    table = printed.split("\n\n")[-2].splitlines()
    trained = [row for row in rows if row["kind"] == "train"]
    assert table[0].startswith("| configuration") and len(table) == 2 + len(trained)
    for line, row in zip(table[2:], trained, strict=True):
        assert line.startswith(f"| {row['name']} | {row['model']} |")
        assert f"{row['tokens_per_second']:,.0f}" in line if "tokens_per_second" in row else row["why"] in line
    assert "all checks passed" in printed.splitlines()[-1]


def test_job_chooses_its_micro_batch_and_others_are_measured(whole_run):
    _, rows, _ = whole_run
    of_model = [row for row in rows if row["kind"] == "train" and row["model"] == "123M"]
    sizes = {}
    for row in of_model:
        if row["name"].split(", ")[-1].startswith("micro-batches of "):
            sizes.setdefault(row["trainer"], []).append((row["micro_batch_size"], row["accumulation_steps"]))
    chosen = [row for row in of_model if row["auto_micro_batch"]]
    assert [(row["trainer"], row["micro_batch_size"], row["accumulation_steps"]) for row in chosen] == [
        ("ddp", 8, 1),
        ("zero2", 8, 1),
    ]
    assert sizes == {"ddp": [(1, 8), (4, 2), (2, 4)], "zero2": [(1, 8)]}


def test_traces_of_both_strategies_are_kept_and_listed(whole_run):
    printed, rows, folder = whole_run
    traced = [row for row in rows if row["kind"] == "trace"]
    assert [row["trainer"] for row in traced] == ["ddp", "zero2"]
    for row in traced:
        assert sum(row["shares"].values()) == pytest.approx(1) and 0 < row["busy"] <= 1
        assert row["host_seconds"] > 0 and (row["launches"], row["waits"]) == (0, 0)
        assert f"| {row['kernels'][0]['name']} |" in printed
        content = gzip.decompress((folder / f"trace-{row['trainer']}.json.gz").read_bytes())
        assert json.loads(content)["traceEvents"]


def test_conclusions_are_printed_and_in_the_json(whole_run):
    printed, _, folder = whole_run
    concluded = json.loads((folder / "rows.json").read_text())["conclusions"]
    assert "fp16 against bf16" in [one["question"] for one in concluded]
    for one in concluded:
        assert f"| {one['question']} | {one['found']} | {one['advice']} |" in printed
    undecided = [one["question"] for one in concluded if one["advice"].startswith("not decided")]
    assert undecided == ["softmax kernel of the loss"]  # A CPU's trace has no kernel of this name.


# ---- Failures ----


@dataclass(frozen=True)
class OfAnotherVersion(Case):
    """A case with an unknown field, which makes the process that gets it fail."""

    unheard_of: int = 1


def test_failed_cases_are_reported_and_the_rest_is_measured():
    good = gpu_plan.shrunk(Case("good", "machine"))
    endless = replace(good, kind="train", compiles=False, context_length=2**22, limit_seconds=0.1)
    measurer = Measurer(300, shares=True, looks_ahead=False)
    try:
        failing = measurer.measure(replace(good, kind="loss", compiles=False, chunk_tokens=(0,)))
        dying = measurer.measure(OfAnotherVersion("dies", "machine"))
        slow = measurer.measure(endless)
        after = measurer.measure(good)
    finally:
        measurer.close()
    assert failing["why"].startswith("ValueError: ")
    assert dying["why"].startswith("its process exited with 1: TypeError: ") and "unheard_of" in dying["why"]
    assert slow["why"] == "stopped after 0 s"
    assert "why" not in after and len(after["reached"]) == 4


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_each_case_has_its_own_process(monkeypatch, looks_ahead):
    answer = "import json, os, sys\nfor line in sys.stdin: print(json.dumps({'pid': os.getpid()}), flush=True)"
    monkeypatch.setattr(gpu, "CHILD", ("-c", answer))
    measurer = Measurer(300, shares=False, looks_ahead=looks_ahead)
    first = measurer.measure(Case("first", "machine"))["pid"]
    ahead = [child.pid for child in measurer._ready.values()]
    second = measurer.measure(Case("second", "machine"))["pid"]
    waiting = list(measurer._ready.values())
    measurer.close()
    assert first != second and ahead == ([second] if looks_ahead else [])
    assert len(waiting) == looks_ahead and all(child.returncode is not None for child in waiting)


def test_gpu_sizes_are_not_tried_without_a_gpu():
    assert gpu_case.answer(Case("large", "machine")) == {"why": "this machine has no GPU (use --tiny)"}


def test_no_case_exceeds_the_budget(monkeypatch):
    endless = replace(gpu_plan.shrunk(Case("endless", "train", compiles=False)), context_length=2**22)
    monkeypatch.setattr(gpu_plan, "ASSUMED_SECONDS", 0.4)
    measurer = Measurer(0.5, shares=False, looks_ahead=False)
    assert measurer.measure(endless)["why"].startswith("stopped after ")
    monkeypatch.setattr(measurer, "_start", lambda: pytest.fail("a process was started"))
    assert measurer.measure(endless)["why"] == "left out: 0 s of the budget were left, and it takes about 0 s"
    measurer.close()


def test_long_case_is_left_out_and_a_shorter_one_is_measured(monkeypatch):
    answer = "import json, sys, time\nfor line in sys.stdin: print(json.dumps({}), flush=True)"
    monkeypatch.setattr(gpu, "CHILD", ("-c", answer))
    monkeypatch.setattr(gpu_plan, "expected_seconds", lambda case, results: {"loss": 70, "machine": 50}[case.kind])
    measurer = Measurer(60, shares=True, looks_ahead=False)
    long, short = measurer.measure(Case("long", "loss")), measurer.measure(Case("short", "machine"))
    measurer.close()
    assert long["why"].endswith("s of the budget were left, and it takes about 70 s") and "why" not in short


def test_tables_are_printed_even_without_any_time(capsys):
    assert gpu.main(["--tiny", "--budget", "0"]) == 1
    printed = capsys.readouterr().out
    assert (
        "| the tutorial's recipe | 123M | 16 | 1 x 8 | left out: 0 s of the budget were left, and it takes about 15 s |"
        in printed
    )
    assert "WRONG or not checked: our loss and model" in printed


@pytest.mark.parametrize("others", [{}, {"loss": "cce"}])
def test_wrong_loss_exits_1_after_printing_the_tables(monkeypatch, capsys, others):
    error = {"what": "ours: loss", "error": 0.5, "tolerance": 1e-3, "is_right": False}

    def measure(self, case):
        is_it = case.kind == "check" and case.loss == others.get("loss", "ours")
        return vars(case) | ({"errors": [error]} if is_it else {"why": "CUDA only"})

    first = [replace(case, **others) if case.kind == "check" else case for case in gpu_plan.first_cases()]
    monkeypatch.setattr(gpu_plan, "first_cases", lambda: first)
    monkeypatch.setattr(Measurer, "measure", measure)
    assert gpu.main(["--tiny"]) == 1
    assert "| ours: loss | 5.0e-01 | 1e-03 | WRONG |" in capsys.readouterr().out


def test_missing_library_is_not_an_error():
    missing = {"kind": "check", "loss": "liger", "why": "liger_kernel is not installed"}
    assert not gpu.is_wrong(missing) and gpu.is_wrong(missing | {"loss": "ours"})


# ---- Correctness ----


def head_gradient_too_large(hidden, weight, labels, chunk_tokens=None, **named):
    """Return a loss whose value and gradient of the hidden states are right."""
    right = linear_cross_entropy(hidden, weight, labels, chunk_tokens)
    share = linear_cross_entropy(hidden.detach(), weight, labels, chunk_tokens)
    return right + 0.1 * (share - share.detach())


def head_forgotten(hidden, weight, labels, chunk_tokens=None, **named):
    return linear_cross_entropy(hidden, weight.detach(), labels, chunk_tokens)


def hidden_states_forgotten(hidden, weight, labels, chunk_tokens=None, **named):
    return linear_cross_entropy(hidden.detach(), weight, labels, chunk_tokens)


def ignored_labels_counted(hidden, weight, labels, chunk_tokens=None, **named):
    return linear_cross_entropy(hidden, weight, labels.clamp(min=0), chunk_tokens)


def not_a_number(hidden, weight, labels, chunk_tokens=None, **named):
    return linear_cross_entropy(hidden, weight, labels, chunk_tokens) * math.nan


def value_too_large(hidden, weight, labels, chunk_tokens=None, **named):
    return linear_cross_entropy(hidden, weight, labels, chunk_tokens) + 30.0


@pytest.mark.parametrize(
    ("broken", "wrong"),
    [
        (head_gradient_too_large, {"gradient of the head"}),
        (head_forgotten, {"gradient of the head"}),
        (hidden_states_forgotten, {"gradient of the hidden states"}),
        (ignored_labels_counted, {"loss", "gradient of the hidden states", "gradient of the head"}),
        (not_a_number, {"loss", "gradient of the hidden states", "gradient of the head"}),
        (value_too_large, {"loss"}),
    ],
)
def test_broken_loss_is_detected_and_located(broken, wrong):
    errors = list(gpu_losses.loss_errors(broken, CPU, "broken"))
    found = {one["what"] for one in errors if not one["is_right"]}
    assert found == {f"broken, {dtype}: {what}" for dtype in ("fp32", "bf16") for what in wrong}
    assert len(errors) == 6 and all(math.isfinite(one["error"]) for one in errors)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_model_with_a_broken_loss_is_detected(monkeypatch, dtype):
    assert all(one["is_right"] for one in gpu_losses.model_errors(CPU, dtype, False))
    monkeypatch.setattr(language_model, "linear_cross_entropy", head_gradient_too_large)
    loss, whole, worst = gpu_losses.model_errors(CPU, dtype, False)
    assert loss["is_right"] and not worst["is_right"]
    assert whole["error"] < worst["error"]


def test_loss_of_full_logits_is_accepted():
    assert all(one["is_right"] for one in gpu_losses.loss_errors(gpu_losses.full_logits, CPU, "full logits"))


# ---- Arithmetic ----


def test_phases_cover_the_time_from_step_end_to_step_end(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(gpu_device.time, "perf_counter", lambda: float(next(now)))
    clock = gpu_device.Clock(CPU, 0)
    clock.mark("before the start")
    clock.start()
    steps, is_done = 0, False
    while not is_done:
        for phase in ("other", "forward", "loss", "backward", "forward", "loss", "backward"):
            clock.mark(phase)
        is_done, steps = clock.end_step(), steps + 1
    assert steps == gpu_device.WARM_UP_STEPS + gpu_device.LEAST_STEPS
    found = clock.steps()
    assert len(found) == gpu_device.LEAST_STEPS
    # Reading the time at the end of a step also takes a tick, which counts for the next step.
    assert found[-1] == {"other": 2, "forward": 2, "loss": 2, "backward": 2, "optimizer": 1}


def test_gpu_times_come_from_events(monkeypatch):
    now = iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = float(next(now))

        def elapsed_time(self, after):
            return after.milliseconds - self.milliseconds

    waits = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    clock = gpu_device.Clock(torch.device("cuda"), 0)
    clock.start()
    is_done = False
    while not is_done:
        for phase in ("forward", "loss", "backward"):
            clock.mark(phase)
        is_done = clock.end_step()
    assert len(waits) == gpu_device.WARM_UP_STEPS  # No measured step waits for the GPU.
    one = pytest.approx(1e-3)
    assert clock.steps() == [{"forward": one, "loss": one, "backward": one, "optimizer": one}] * gpu_device.LEAST_STEPS


@pytest.mark.parametrize(("chunk", "tokens"), [(512, 16_384), (2048, 16_384), (8192, 16_384), (16_384, 16_384)])
def test_liger_gets_the_requested_chunk_size(chunk, tokens):
    entries, hidden_size = 151_646, 512
    budget = gpu_losses.liger_budget(tokens, hidden_size, entries, chunk)
    chunks = -(-entries // (budget * hidden_size))
    assert 2 ** (-(-tokens // chunks) - 1).bit_length() == chunk  # This is how Liger-Kernel computes its chunk.
