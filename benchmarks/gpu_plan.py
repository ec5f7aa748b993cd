"""Cases of the GPU benchmark, the most important first: what decides a default stands before what explains it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.gpu_tables import Result
from job.model.spec import ModelSpec

ENGINE, TUTORIAL = ("ddp", "zero2"), "the tutorial's recipe"
ASSUMED_SECONDS = 15.0
"""Seconds that a row takes, before a row of its kind was measured."""
CHUNKS = (16_384, 4096, 2048, 1024)
"""Chunk sizes of the loss, in tokens, that are measured in training beside the default."""
CHUNKS_ALONE = (512, 1024, 2048, 4096, 8192)
"""Chunk sizes, in tokens, with which the loss alone is measured."""
TUTORIAL_PARTS, LARGER_PARTS = 8, 2
"""Micro-batches of a step: the tutorial's number, and that with micro-batches four times as large."""
PARTS = (TUTORIAL_PARTS, LARGER_PARTS, 1, 4)
"""All numbers of micro-batches that are measured: micro-batches of 32 to 256 sequences."""


@dataclass(frozen=True)
class Case:
    """One measurement: a row of the training table, or several rows of another table."""

    name: str
    kind: str
    """The measurement: ``machine``, ``check``, ``loss``, ``train`` or ``trace``."""
    trainer: str = "levers"
    """The training loop: ``tutorial`` (transformers.Trainer), ``levers`` (the short loop in `gpu_training.py`, in which
    each optimization can be switched off), ``ddp`` or ``zero2`` (this project's engine)."""
    model: str = "123M"
    context_length: int = 512
    micro_batch_size: int = 32
    accumulation_steps: int = 8
    auto_micro_batch: bool = False
    """True if the job chooses the micro-batch, as for ``train.micro_batch_size: auto``; the sequences of a step stay.
    The measurements have the sizes that it chose."""
    precision: str = "bf16"
    """``bf16``, or ``fp16`` with the job's engine under ``ddp``."""
    loss: str = "ours"
    """``full logits``, ``ours``, ``liger`` or ``cce`` (cut-cross-entropy)."""
    chunk_tokens: tuple[int | None, ...] = (None,)
    """Chunk sizes of our loss or Liger's; None is the loss' own default. Training uses only the first."""
    pads_vocabulary: bool = True
    fuses_adamw: bool = True
    waits: bool = False
    """True if the host waits for the device: batches are not pinned, and the loss is read after every step."""
    compiles: bool = True
    attention: str = "SDPA"
    """``SDPA`` or ``FlashAttention-3``; within documents only: ``masked`` (with a mask) or ``packed`` (without)."""
    trace: str | None = None
    """File to write the profiler's trace to."""
    tiny: bool = False
    limit_seconds: float = 60.0
    """Seconds after which the row is stopped, with its imports and its compilation."""

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens in an optimizer step."""
        return self.context_length * self.micro_batch_size * self.accumulation_steps

    @property
    def shape(self) -> tuple[ModelSpec, int]:
        """The spec and the vocabulary size of the model."""
        spec, vocab_size = MODELS[self.model]
        if self.tiny:
            narrow = spec.hidden_size // 16
            spec = replace(spec, hidden_size=narrow, num_hidden_layers=2, intermediate_size=2 * narrow)
            vocab_size //= 150
        return spec, vocab_size


MODELS = {
    # The tutorial's model, as in configs/wiki-123m.yaml. Its vocabulary size is not a multiple of 8, as a GPU prefers.
    "123M": (ModelSpec(512, 12, 8, 2, 2048), 151_646),
    "54M": (ModelSpec(512, 12, 8, 2, 2048), 16_384),
    "350M": (ModelSpec(1024, 16, 16, 4, 3072), 151_646),
}
"""Spec and vocabulary size of each model, by name."""


def first_cases() -> list[Case]:
    """Return the cases that run first: correctness, the tutorial's recipe, and the job as it is by default."""
    job = Case("the job, DDP", "train", trainer="ddp", auto_micro_batch=True, limit_seconds=90)
    return [
        Case("this machine", "machine"),
        Case("our loss and model", "check", limit_seconds=100),
        Case(TUTORIAL, "train", trainer="tutorial", compiles=False),
        job,
        replace(job, name="the job, ZeRO-2", trainer="zero2"),
    ]


def deciding_cases(default: Case, zero2: Case, traces: Path | None) -> list[Case]:
    """Return the cases that decide the job's defaults.

    Args:
        default: the job under DDP, with the micro-batch that it chose.
        zero2: the same under ZeRO-2.
        traces: folder for the profiler's traces; None: they are not kept.
    """
    swept = [_divided(default, parts) for parts in PARTS if parts != default.accumulation_steps]
    tutorials = [_divided(zero2, TUTORIAL_PARTS)] if zero2.accumulation_steps != TUTORIAL_PARTS else []
    return [
        *(_traced(case, traces) for case in (default, zero2)),
        *swept[:2],
        *tutorials,
        *swept[2:],
        replace(default, name=f"{default.name}, fp16", precision="fp16"),
        replace(default, model="54M"),
        _long(default),
        *(replace(default, name=f"{default.name}, chunks of {size:,}", chunk_tokens=(size,)) for size in CHUNKS),
    ]


def lever_cases() -> list[Case]:
    """Return the short loop with the tutorial's micro-batches and the optimizations added one by one."""
    plain = Case(
        "plain: full logits, eager",
        "train",
        loss="full logits",
        pads_vocabulary=False,
        fuses_adamw=False,
        waits=True,
        compiles=False,
    )
    chunked = replace(plain, name="+ chunked loss", loss="ours")
    padded = replace(chunked, name="+ padded vocabulary", pads_vocabulary=True)
    fused = replace(padded, name="+ fused AdamW", fuses_adamw=True)
    unwaiting = replace(fused, name="+ the host never waits", waits=False)
    compiled = replace(unwaiting, name="+ torch.compile", compiles=True)
    return [plain, chunked, padded, fused, unwaiting, compiled]


def other_cases(best: Case) -> list[Case]:
    """Return the cases that decide nothing: other losses, other attention, other models, and two rows again."""
    full_logits = Case("full logits", "loss", loss="full logits", pads_vocabulary=False, compiles=False)
    ours = replace(full_logits, loss="ours", chunk_tokens=(None, *CHUNKS_ALONE))
    tutorial = Case(TUTORIAL, "train", trainer="tutorial", compiles=False)
    return [
        replace(tutorial, name=f"{tutorial.name}, again"),
        replace(best, name=f"{best.name}, again"),
        replace(tutorial, model="54M"),
        _long(tutorial),
        replace(best, model="350M", auto_micro_batch=True),  # that of the smaller model may not fit
        replace(tutorial, model="350M"),
        full_logits,
        replace(ours, name="ours, vocabulary not padded"),
        replace(ours, name="ours", pads_vocabulary=True),
        replace(ours, name="ours, compiled", pads_vocabulary=True, compiles=True),
        Case("Liger's loss", "check", loss="liger"),
        Case("cut-cross-entropy", "check", loss="cce"),
        replace(ours, name="Liger", loss="liger"),
        replace(full_logits, name="cut-cross-entropy", loss="cce"),
        replace(best, name=f"{best.name}, Liger's loss", loss="liger", chunk_tokens=(2048,)),
        replace(best, name=f"{best.name}, cut-cross-entropy", loss="cce"),
        replace(best, name=f"{best.name}, FlashAttention-3", attention="FlashAttention-3"),
        replace(best, name=f"{best.name}, packed documents", attention="packed"),
        replace(best, name=f"{best.name}, masked documents", attention="masked"),
    ]


def _divided(case: Case, parts: int) -> Case:
    """Return the case with the sequences of its step in this many micro-batches, or in one for each sequence."""
    size = max(1, case.micro_batch_size * case.accumulation_steps // parts)
    steps = case.micro_batch_size * case.accumulation_steps // size
    return replace(case, name=f"{case.name}, micro-batches of {size}", micro_batch_size=size, accumulation_steps=steps)


def _traced(case: Case, folder: Path | None) -> Case:
    """Return the case that traces one step, of at most two micro-batches: more would fill CUDA's queue of kernels."""
    file = None if folder is None else str((folder / f"trace-{case.trainer}.json.gz").resolve())
    return replace(case, kind="trace", trace=file, accumulation_steps=min(2, case.accumulation_steps))


def _long(case: Case) -> Case:
    """Return the case with the same number of tokens in sequences four times as long."""
    return replace(case, context_length=4 * case.context_length, micro_batch_size=max(1, case.micro_batch_size // 4))


def shrunk(case: Case) -> Case:
    """Return the case at a size that a CPU does in seconds.

    Cases of the job's engine run without compilation. Other compiled cases stay compiled and report "CUDA only".
    """
    if case.tiny:
        return case
    chunks = tuple(chunk and chunk // 256 for chunk in case.chunk_tokens)
    return replace(
        case,
        tiny=True,
        context_length=case.context_length // 32,
        micro_batch_size=max(1, case.micro_batch_size // 32),
        chunk_tokens=chunks,
        compiles=case.compiles and case.trainer not in ENGINE,
    )


def expected_seconds(case: Case, results: Sequence[Result]) -> float:
    """Return the seconds that a case probably takes: the median of the measured rows of its kind and its trainer."""
    took = [
        result["took_seconds"]
        for result in results
        if "why" not in result and (result["kind"], result["trainer"]) == (case.kind, case.trainer)
    ]
    return median(took) if took else ASSUMED_SECONDS


def as_measured(case: Case, results: Sequence[Result]) -> Case:
    """Return the case with the micro-batch that the job chose in its row; as it is if the row was not measured.

    It has the usual limit: the first row of the job also compiles what later rows take from the compiler's cache.
    """
    case = replace(case, auto_micro_batch=False, limit_seconds=Case.limit_seconds)
    of_case = (case.name, case.model, case.context_length)
    for row in results:
        if "tokens_per_second" in row and (row["name"], row["model"], row["context_length"]) == of_case:
            sizes = {name: row[name] for name in ("micro_batch_size", "accumulation_steps")}
            return replace(case, **sizes)
    return case


def best_case(cases: Sequence[Case], results: Sequence[Result]) -> Case:
    """Return the fastest case of the job's engine, or of the short loop if no engine case was measured.

    Only cases of the first model and context length count, in bf16.
    """
    first = next((case for case in cases if case.kind == "train"), cases[-1])
    measured = [
        (result["trainer"] in ENGINE, result["tokens_per_second"], i)
        for i, result in enumerate(results)
        if "tokens_per_second" in result
        and result["trainer"] != "tutorial"
        and result["precision"] == "bf16"
        and (result["model"], result["context_length"]) == (first.model, first.context_length)
    ]
    return as_measured(cases[max(measured)[-1]], results) if measured else cases[-1]
