"""The measurements for a GPU run to their tables without one, and call nothing right that is wrong."""

import gzip
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flash_stand_in import flash_kernels

from benchmarks import gpu, gpu_case
from benchmarks.gpu import Case, Measurer
from job.model import architecture
from job.model.loss import linear_cross_entropy

pytestmark = pytest.mark.benchmarks

REPOSITORY = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


# ---- The whole of it ----


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """All rows in tiny: the process, what it wrote, and the folder of the trace."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--json", folder / "rows.json", "--trace", folder]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout, json.loads((folder / "rows.json").read_text())["rows"], folder


def test_every_row_is_measured_or_says_why_not(whole_run):
    _, rows, _ = whole_run
    first = gpu.first_cases()
    assert [row["name"] for row in rows][: len(first)] == [case.name for case in first]
    assert len(rows) == len(first) + len(gpu.batch_cases(first[-1])) + len(gpu.later_cases(first[-1], None))
    why_not = {"FlashAttention-3": "it is for GPUs", "packed": "NotImplementedError: "}
    for row in rows:
        needs_a_gpu = row["loss"] in ("liger", "cce") or (row["compiles"] and row["kind"] in ("train", "loss", "trace"))
        if row["attention"] in why_not:
            assert row["why"].startswith(why_not[row["attention"]])
        else:
            assert row.get("why") == ("CUDA only" if needs_a_gpu else None), row
    trainers = {row["trainer"] for row in rows if "tokens_per_second" in row}
    assert trainers == {"tutorial", "levers", "ddp", "zero2"}


def test_documents_apart_without_a_mask_are_measured_where_there_are_kernels_for_them(monkeypatch):
    monkeypatch.setattr(architecture, "linear_cross_entropy", architecture.linear_cross_entropy)  # the case changes it
    case = gpu.shrunk(Case("packed", "train", attention="packed", compiles=False))
    with flash_kernels() as kernels:
        measured = gpu_case.train(case)
    layers, micro_batches = case.shape[0].num_hidden_layers, case.accumulation_steps
    steps = gpu_case.WARM_UP_STEPS + len(measured["step_seconds"])
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
        assert len(row["step_seconds"]) >= gpu_case.LEAST_STEPS


def test_the_table_of_training_comes_last_and_has_a_line_for_each_row(whole_run):
    printed, rows, _ = whole_run
    table = printed.split("\n\n")[-2].splitlines()
    trained = [row for row in rows if row["kind"] == "train"]
    assert table[0].startswith("| configuration") and len(table) == 2 + len(trained)
    for line, row in zip(table[2:], trained, strict=True):
        assert line.startswith(f"| {row['name']} | {row['model']} |")
        assert f"{row['tokens_per_second']:,.0f}" in line if "tokens_per_second" in row else row["why"] in line
    assert "all that was checked is right" in printed.splitlines()[-1]


def test_the_trace_is_kept_and_its_kernels_are_in_a_table(whole_run):
    printed, rows, folder = whole_run
    (row,) = [row for row in rows if row["kind"] == "trace"]
    assert sum(row["shares"].values()) == pytest.approx(1) and 0 < row["busy"] <= 1
    assert f"| {row['kernels'][0]['name']} |" in printed
    assert json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]


# ---- What goes wrong ----


@dataclass(frozen=True)
class OfAnotherVersion(Case):
    """A process that gets it ends at once."""

    unheard_of: int = 1


def test_what_fails_or_dies_or_takes_too_long_is_reported_and_the_rest_is_measured():
    good = gpu.shrunk(Case("good", "machine"))
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
    assert dying["why"].startswith("its process ended with 1: TypeError: ") and "unheard_of" in dying["why"]
    assert slow["why"] == "stopped after 0 s"
    assert "why" not in after and len(after["reached"]) == 4


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_each_case_has_a_process_of_its_own_which_may_be_started_ahead(monkeypatch, looks_ahead):
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


def test_what_only_a_gpu_can_do_is_not_tried_in_full_size_without_one():
    assert gpu_case.answer(Case("large", "machine")) == {"why": "no GPU here (--tiny does without)"}


def test_no_case_outlasts_the_budget_and_none_is_begun_without_time(monkeypatch):
    endless = replace(gpu.shrunk(Case("endless", "train", compiles=False)), context_length=2**22)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.4)
    measurer = Measurer(0.5, shares=False, looks_ahead=False)
    assert measurer.measure(endless)["why"].startswith("stopped after ")
    monkeypatch.setattr(measurer, "_start", lambda: pytest.fail("a process was started"))
    assert measurer.measure(endless)["why"] == "skipped: 0 s of the time were left"
    measurer.close()


def test_with_no_time_at_all_the_tables_are_printed_and_ours_counts_as_unchecked(capsys):
    assert gpu.main(["--tiny", "--budget", "0"]) == 1
    printed = capsys.readouterr().out
    assert "| the tutorial's recipe | 123M | 16 | 2 x 2 | skipped: 0 s of the time were left |" in printed
    assert "WRONG, or not checked: our loss and model" in printed


@pytest.mark.parametrize("others", [{}, {"loss": "cce"}])
def test_a_wrong_loss_makes_the_exit_code_1_and_the_tables_are_still_printed(monkeypatch, capsys, others):
    error = {"what": "ours: loss", "error": 0.5, "tolerance": 1e-3, "is_right": False}

    def measure(self, case):
        is_it = case.kind == "check" and case.loss == others.get("loss", "ours")
        return vars(case) | (
            {"errors": [error]} if is_it else {"why": "CUDA only"} if case.loss != "ours" else {"errors": []}
        )

    rest = [replace(case, **others) for case in gpu.first_cases() if case.kind == "check"]
    monkeypatch.setattr(gpu, "first_cases", lambda: rest)
    monkeypatch.setattr(gpu, "batch_cases", lambda best: [])
    monkeypatch.setattr(gpu, "later_cases", lambda best, trace: [])
    monkeypatch.setattr(Measurer, "measure", measure)
    assert gpu.main(["--tiny"]) == 1
    assert "| ours: loss | 5.0e-01 | 1e-03 | WRONG |" in capsys.readouterr().out


def test_a_library_that_is_not_there_makes_nothing_wrong():
    missing = {"kind": "check", "loss": "liger", "why": "liger_kernel is not installed"}
    assert not gpu.is_wrong(missing) and gpu.is_wrong(missing | {"loss": "ours"})


# ---- Correctness ----


def head_gradient_too_large(hidden, weight, labels, chunk_tokens=None, **named):
    """The value is right, and so is the gradient of the hidden states."""
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
def test_a_broken_loss_is_called_wrong_in_either_precision_and_where_it_is_broken(broken, wrong):
    errors = list(gpu_case.loss_errors(broken, CPU, "broken"))
    found = {one["what"] for one in errors if not one["is_right"]}
    assert found == {f"broken, {dtype}: {what}" for dtype in ("fp32", "bf16") for what in wrong}
    assert len(errors) == 6 and all(math.isfinite(one["error"]) for one in errors)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_with_a_broken_loss_is_called_wrong(monkeypatch, dtype):
    assert all(one["is_right"] for one in gpu_case.model_errors(CPU, dtype, False))
    monkeypatch.setattr(architecture, "linear_cross_entropy", head_gradient_too_large)
    loss, whole, worst = gpu_case.model_errors(CPU, dtype, False)
    assert loss["is_right"] and not worst["is_right"]
    assert whole["error"] < worst["error"]


def test_a_loss_of_full_logits_is_right():
    assert all(one["is_right"] for one in gpu_case.loss_errors(gpu_case.full_logits, CPU, "full logits"))


# ---- Arithmetic ----


def test_phases_are_counted_from_the_end_of_one_step_to_the_end_of_the_next(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(gpu_case.time, "perf_counter", lambda: float(next(now)))
    clock = gpu_case.Clock(CPU, 0)
    clock.mark("before the start")
    clock.start()
    steps, is_done = 0, False
    while not is_done:
        for phase in ("other", "forward", "loss", "backward", "forward", "loss", "backward"):
            clock.mark(phase)
        is_done, steps = clock.end_step(), steps + 1
    assert steps == gpu_case.WARM_UP_STEPS + gpu_case.LEAST_STEPS
    found = clock.steps()
    assert len(found) == gpu_case.LEAST_STEPS
    # Reading the time at the end of a step takes a tick as well, and belongs to the next.
    assert found[-1] == {"other": 2, "forward": 2, "loss": 2, "backward": 2, "optimizer": 1}


def test_on_a_gpu_the_same_times_come_from_its_events_in_milliseconds(monkeypatch):
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
    clock = gpu_case.Clock(torch.device("cuda"), 0)
    clock.start()
    is_done = False
    while not is_done:
        for phase in ("forward", "loss", "backward"):
            clock.mark(phase)
        is_done = clock.end_step()
    assert len(waits) == gpu_case.WARM_UP_STEPS  # no step that counts has waited
    one = pytest.approx(1e-3)
    assert clock.steps() == [{"forward": one, "loss": one, "backward": one, "optimizer": one}] * gpu_case.LEAST_STEPS


@pytest.mark.parametrize(("chunk", "tokens"), [(512, 16_384), (2048, 16_384), (8192, 16_384), (16_384, 16_384)])
def test_liger_is_told_what_makes_its_chunks_as_large_as_asked(chunk, tokens):
    entries, hidden_size = 151_646, 512
    budget = gpu_case.liger_budget(tokens, hidden_size, entries, chunk)
    chunks = -(-entries // (budget * hidden_size))
    assert 2 ** (-(-tokens // chunks) - 1).bit_length() == chunk  # as its own code finds it


def test_kernels_are_summed_by_name_and_kind_and_gaps_are_not_busy():
    def kernel(name, start, duration, category="kernel"):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    events = [
        kernel("nvjet_hsh_128x256", 0, 40),
        kernel("elementwise_kernel", 30, 20),
        kernel("nvjet_hsh_128x256", 90, 10),
        kernel("Memcpy DtoD", 60, 10, "gpu_memcpy"),
        kernel("aten::mm", 0, 1000, "cpu_op"),
        {"ph": "M", "name": "process_name"},
    ]
    found = gpu_case.kernels({"traceEvents": events}, ("kernel", "gpu_memcpy"))
    assert found["busy"] == pytest.approx(0.7)
    assert found["shares"]["matrix products"] == pytest.approx(50 / 80)
    assert found["shares"]["bound by memory"] == pytest.approx(30 / 80)
    first = found["kernels"][0]
    assert (first["name"], first["times"], first["seconds"]) == ("nvjet_hsh_128x256", 2, pytest.approx(50e-6))
    assert "why" in gpu_case.kernels({"traceEvents": events[-1:]}, ("kernel",))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("triton_red_fused__scaled_dot_product_flash_attention_mul_3", "bound by memory"),
        ("triton_tem_fused_mm_0", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "bound by memory"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdamMathFunctor<float, 4, ...>>", "bound by memory"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ],
)
def test_kinds_of_kernels_are_told_by_their_names(name, kind):
    assert gpu_case.kind_of(name) == kind


def test_the_tutorials_model_is_the_one_of_the_preset_and_the_others_have_the_sizes_they_are_called():
    import yaml

    from job.model.flops import parameter_counts

    preset = yaml.safe_load((REPOSITORY / "configs/wiki-123m.yaml").read_text())["model"]
    spec, _ = gpu.MODELS["123M"]
    assert {field: value for field, value in vars(spec).items() if isinstance(value, int)} == {
        field: preset[field] for field, value in vars(spec).items() if isinstance(value, int)
    }
    for name, (shape, entries) in gpu.MODELS.items():
        assert parameter_counts(shape, entries).total / 1e6 == pytest.approx(int(name[:-1]), rel=0.01)


def test_the_best_is_the_jobs_own_where_there_is_one():
    cases = [Case(trainer, "train", trainer=trainer) for trainer in ("tutorial", "levers", "ddp", "zero2")]
    results = [vars(case) | {"tokens_per_second": speed} for case, speed in zip(cases, (9, 8, 1, 2), strict=True)]
    assert gpu.best_case(cases, results).trainer == "zero2"
    assert gpu.best_case(cases[:2], results[:2]).trainer == "levers"
    assert gpu.best_case(cases[:1], results[:1]).trainer == "tutorial"
