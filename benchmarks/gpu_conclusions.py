"""Conclusions from the rows of the GPU benchmark, each a function of the results alone.

Rows are compared with the job as it is by default (DDP, the micro-batch that it chooses) and must differ from it only
in what the conclusion is about. One process measures, so nothing here says what communication costs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu_plan import ENGINE, LARGER_PARTS, TUTORIAL_PARTS
from benchmarks.gpu_tables import Result

LEAST_ZERO2 = 0.9
"""ZeRO-2's share of DDP's tokens per second from which on it stays the default of several processes."""
LEAST_GAIN = 1.05
"""Ratio of tokens per second above which a four times larger micro-batch is worth its memory."""
LEAST_OF_BEST = 0.97
"""Share of the best row's tokens per second that a choice of the job must reach; less than that is a better choice."""
MOST_SOFTMAX = 0.12
"""Share of the kernels' time above which the softmax kernel is worth a kernel of our own. The compiled one reads the
logits twice and writes them once. One read and one write would save a third of it, at this share 4 % of a step."""
LEAST_BUSY = 0.9
"""Share of a step's time on the device in which a kernel should run."""
LEAST_FP16 = 0.95
"""fp16's share of bf16's tokens per second; the tensor cores compute both at the same rate."""
GOAL_RATE, GOAL_MFU, GOAL_AIM, GOAL_RATIO = 450_000, 0.35, 550_000, 8.0
"""Goals on one H100 with 123.28 M parameters, 151,646 entries, 512 tokens of context, in bf16: tokens per second at
least, their share of the peak, tokens per second as the aim, and the ratio to the tutorial's recipe in the same run."""
SOFTMAX = "softmax of the loss"
"""Kind of the compiled kernel of the loss in a trace."""
_FIELDS = (
    "kind",
    "trainer",
    "model",
    "context_length",
    "micro_batch_size",
    "accumulation_steps",
    "precision",
    "loss",
    "chunk_tokens",
    "attention",
)
"""Fields in which compared rows must be the same."""


class Conclusion(NamedTuple):
    """An answer to one question, from the results."""

    question: str
    found: str
    """The numbers."""
    advice: str
    """The recommended change; ``not decided`` with the reason if a row is missing."""


def conclusions(results: Sequence[Result]) -> list[Conclusion]:
    """Return all conclusions, the goals last."""
    deciding = (
        strategy,
        larger_micro_batches,
        chosen_micro_batch,
        chunk_size,
        softmax_kernel,
        device_busy,
        fp16,
        goals,
    )
    return [decide(results) for decide in deciding]


def strategy(results: Sequence[Result]) -> Conclusion:
    """Conclude whether ZeRO-2 stays the default of several processes."""
    question = "ZeRO-2 against DDP, one process"
    ratios, default = dict[str, float](), _default(results)
    if default:
        zero2 = _row(results, trainer="zero2", auto_micro_batch=True, context_length=default["context_length"])
        if zero2:
            ratios["as the job chooses"] = zero2["tokens_per_second"] / default["tokens_per_second"]
        parts = _parts(default, TUTORIAL_PARTS)
        zero2, ddp = (_like(results, default, trainer=name, **parts) for name in ("zero2", "ddp"))
        if zero2 and ddp:
            ratio = zero2["tokens_per_second"] / ddp["tokens_per_second"]
            ratios[f"in micro-batches of {ddp['micro_batch_size']}"] = ratio
    if not ratios:
        return Conclusion(question, "", "not decided: the rows of the job under ddp and zero2 are not both measured")
    of_hosts = [_described(trace) for name in ("ddp", "zero2") for trace in [_trace(results, name)] if trace]
    found = "; ".join([*(f"{ratio:.2f} {where}" for where, ratio in ratios.items()), *of_hosts])
    if next(iter(ratios.values())) >= LEAST_ZERO2:
        return Conclusion(question, found, f"at least {LEAST_ZERO2}: keep zero2 as the default of several processes")
    trace = _trace(results, "zero2")
    waits_for_host = trace is not None and trace["busy"] < LEAST_BUSY
    cause = "its device waits for the host, so find the host's time, or " if waits_for_host else ""
    advice = f"{cause}make ddp the default of several processes too where its memory fits"
    return Conclusion(question, found, f"under {LEAST_ZERO2}: {advice}")


def larger_micro_batches(results: Sequence[Result]) -> Conclusion:
    """Conclude whether larger micro-batches are worth their memory."""
    question, default = "four times the tutorial's micro-batch", _default(results)
    rows = [_like(results, default, **_parts(default, parts)) for parts in (LARGER_PARTS, TUTORIAL_PARTS)]
    if not rows[0] or not rows[1]:
        return Conclusion(question, "", "not decided: its rows are not both measured")
    gain = rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"]
    found = f"{gain:.2f} of the tokens/s, {rows[0]['micro_batch_size']} against {rows[1]['micro_batch_size']} sequences"
    if gain > LEAST_GAIN:
        return Conclusion(question, found, f"above {LEAST_GAIN}: raise the micro-batch, which auto does")
    advice = f"at most {LEAST_GAIN}: {rows[1]['micro_batch_size']} sequences are enough; auto takes memory for little"
    return Conclusion(question, found, advice)


def chosen_micro_batch(results: Sequence[Result]) -> Conclusion:
    """Conclude whether ``train.micro_batch_size: auto`` chooses well among the measured sizes."""
    question, default = "train.micro_batch_size auto", _default(results)
    rows = [
        row
        for row in results
        if default and "tokens_per_second" in row and _same(row, default, "micro_batch_size", "accumulation_steps")
    ]
    if len(rows) < 2 or not default:
        return Conclusion(question, "", "not decided: no other micro-batch is measured")
    best = max(rows, key=lambda row: row["tokens_per_second"])
    share = default["tokens_per_second"] / best["tokens_per_second"]
    found = f"it chose {default['micro_batch_size']}, {share:.2f} of the best size, {best['micro_batch_size']}"
    if share >= LEAST_OF_BEST:
        return Conclusion(question, found, f"at least {LEAST_OF_BEST}: keep the choice")
    advice = f"let auto take at most {best['micro_batch_size'] * best['context_length']:,} tokens"
    return Conclusion(question, found, f"under {LEAST_OF_BEST}: {advice}")


def chunk_size(results: Sequence[Result]) -> Conclusion:
    """Conclude whether the default chunk of the loss is large enough, and not too large."""
    question, default = "chunk size of the loss", _default(results)
    rows = [row for row in results if "tokens_per_second" in row and default and _same(row, default, "chunk_tokens")]
    if len(rows) < 2 or not default:
        return Conclusion(question, "", "not decided: no other chunk size is measured")
    best = max(rows, key=lambda row: row["tokens_per_second"])
    share = default["tokens_per_second"] / best["tokens_per_second"]
    size = best["chunk_tokens"][0]
    name = "the default itself" if size is None else f"{size:,} tokens"
    found = f"the default has {share:.2f} of the tokens/s of the best, {name}"
    if share >= LEAST_OF_BEST or size is None:
        return Conclusion(question, found, f"at least {LEAST_OF_BEST}: keep the budget of job/model/chunk_size.py")
    advice = f"change the budget of job/model/chunk_size.py so that it gives {size:,} on this GPU"
    return Conclusion(question, found, f"under {LEAST_OF_BEST}: {advice}")


def softmax_kernel(results: Sequence[Result]) -> Conclusion:
    """Conclude whether the softmax kernel of the loss is worth a kernel of our own."""
    question, trace = "softmax kernel of the loss", _trace(results, "ddp")
    share = trace["shares"].get(SOFTMAX, 0.0) if trace else 0.0
    if not share:
        return Conclusion(question, "", "not decided: no trace of the job under ddp has this kernel")
    found = f"{share:.1%} of the kernels' time"
    if share > MOST_SOFTMAX:
        return Conclusion(
            question, found, f"above {MOST_SOFTMAX:.0%}: write a kernel that reads the logits once, in Triton"
        )
    return Conclusion(question, found, f"at most {MOST_SOFTMAX:.0%}: keep the compiled kernel")


def device_busy(results: Sequence[Result]) -> Conclusion:
    """Conclude whether the device waits for the host in the job as it is by default."""
    question, trace = "device busy, the job under DDP", _trace(results, "ddp")
    if not trace:
        return Conclusion(question, "", "not decided: the profiler's trace of the job under ddp has no kernels")
    if trace["busy"] < LEAST_BUSY:
        advice = "the device waits for the host: start fewer kernels, or record them once in a CUDA graph"
        return Conclusion(question, _described(trace), f"under {LEAST_BUSY:.0%}: {advice}")
    return Conclusion(question, _described(trace), f"at least {LEAST_BUSY:.0%}: look for time in the kernels")


def fp16(results: Sequence[Result]) -> Conclusion:
    """Conclude whether fp16 costs time beside bf16."""
    question, default = "fp16 against bf16", _default(results)
    row = _like(results, default, precision="fp16")
    if not row or not default:
        return Conclusion(question, "", "not decided: the row in fp16 or that in bf16 is not measured")
    share = row["tokens_per_second"] / default["tokens_per_second"]
    if share >= LEAST_FP16:
        return Conclusion(question, f"{share:.2f}", f"at least {LEAST_FP16}: nothing to do")
    return Conclusion(question, f"{share:.2f}", f"under {LEAST_FP16}: compare a trace in fp16 with that in bf16")


def goals(results: Sequence[Result]) -> Conclusion:
    """Compare the fastest row of the job in bf16 with the goals."""
    question, default = "goals on one H100", _default(results)
    varying = ("trainer", "micro_batch_size", "accumulation_steps", "chunk_tokens", "attention", "loss")
    rows = [
        row
        for row in results
        if default and "tokens_per_second" in row and row["trainer"] in ENGINE and _same(row, default, *varying)
    ]
    if not rows or not default:
        return Conclusion(question, "", "not decided: no row of the job is measured")
    machine = next((result["machine"] for result in results if "machine" in result), "an unknown machine")
    rate = max(row["tokens_per_second"] for row in rows)
    tutorial = _row(results, trainer="tutorial", context_length=default["context_length"])
    ratio = rate / tutorial["tokens_per_second"] if tutorial else None
    goal = f"{GOAL_RATE:,} tokens/s ({GOAL_MFU:.0%} MFU) at least, {GOAL_AIM:,} the aim, {GOAL_RATIO:g} x the tutorial"
    found = f"{rate:,.0f} tokens/s, {f'{ratio:.1f} x the tutorial' if ratio else 'the tutorial is not measured'}"
    if default["tiny"] or "H100" not in machine:
        return Conclusion(question, found, f"not to be compared, as this is another GPU or model: {goal}")
    reached = {"least": rate >= GOAL_RATE, "aim": rate >= GOAL_AIM}
    if ratio is not None:
        reached["ratio"] = ratio >= GOAL_RATIO
    outcome = ", ".join(f"{name} {'reached' if is_reached else 'missed'}" for name, is_reached in reached.items())
    return Conclusion(question, found, f"{outcome}: {goal}")


def _row(results: Sequence[Result], **fields: object) -> Result | None:
    """Return the first measured training row of the first model in bf16 with these fields."""
    wanted = {"kind": "train", "model": "123M", "precision": "bf16"} | fields
    return next((row for row in results if "tokens_per_second" in row and _has(row, wanted)), None)


def _default(results: Sequence[Result]) -> Result | None:
    """Return the row of the job as it is by default."""
    return _row(results, trainer="ddp", auto_micro_batch=True)


def _like(results: Sequence[Result], default: Result | None, **fields: object) -> Result | None:
    """Return the measured row that differs from `default` in these fields only."""
    if not default:
        return None
    wanted = {name: default[name] for name in _FIELDS} | fields
    return next((row for row in results if "tokens_per_second" in row and _has(row, wanted)), None)


def _same(row: Result, default: Result, *varying: str) -> bool:
    """Return True if a row is the same as `default` but for the fields named in `varying`."""
    return _has(row, {name: default[name] for name in _FIELDS if name not in varying})


def _has(row: Result, wanted: Mapping[str, object]) -> bool:
    return all(row[name] == value for name, value in wanted.items())


def _parts(default: Result | None, parts: int) -> dict[str, Any]:
    """Return the fields of a row with the sequences of a step in this many micro-batches."""
    if not default:
        return {}
    sequences = default["micro_batch_size"] * default["accumulation_steps"]
    return {"micro_batch_size": sequences // parts, "accumulation_steps": parts}


def _trace(results: Sequence[Result], trainer: str) -> Result | None:
    """Return the trace of the job under this strategy, if it has kernels."""
    traces = (row for row in results if row["kind"] == "trace" and "busy" in row)
    return next((trace for trace in traces if trace["trainer"] == trainer), None)


def _described(trace: Result) -> str:
    described = f"{trace['trainer']}: device busy {trace['busy']:.0%}"
    if "host_seconds" not in trace:
        return described
    return f"{described}, host {1e3 * trace['host_seconds']:.0f} ms of {1e3 * trace['span_seconds']:.0f} ms (profiled)"
