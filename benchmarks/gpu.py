"""What a GPU does with the model of the tutorial, lever by lever: correct first, then how fast and where the time goes.

    python -m benchmarks.gpu [--json FILE] [--trace FOLDER] [--budget SECONDS] [--tiny]

Needs torch, transformers and accelerate, no network and no data: the tokens are random. Each row is measured by a
process of its own (`benchmarks/gpu_case.py`), so that neither memory nor what was compiled is left over from another;
one that fails, or that needs what is not installed, is a row that says so. The most important rows come first; those
for which no time is left are skipped. The exit code is 1 if a loss or a gradient is wrong.

``--tiny`` is for a machine without a GPU: every row that a CPU can do, in seconds, with numbers that mean nothing.
"""

import argparse
import datetime
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from job.model.spec import ModelSpec

REPOSITORY = Path(__file__).parent.parent
BUDGET_SECONDS = 460.0
"""Of eight minutes; what is left is for the last process to be stopped and the tables to be printed."""
ENGINE, TUTORIAL = ("ddp", "zero2"), "the tutorial's recipe"
CHILD = ("-m", "benchmarks.gpu_case")
LEAST_SECONDS = 15.0
"""With less of the budget left, a row is not begun."""
MANY_CPUS = 8
"""With so many, the next process imports its libraries while one measures."""

Result = dict[str, Any]
"""A case's name, the numbers that were found, and `why` if there are none."""


@dataclass(frozen=True)
class Case:
    """One row, or, of the losses and the checks, one table's rows of one kind."""

    name: str
    kind: str
    """What is measured: ``machine``, ``check``, ``loss``, ``train`` or ``trace``."""
    trainer: str = "levers"
    """Who takes the steps: ``tutorial`` (transformers.Trainer), ``levers`` (the short loop in `gpu_case.py`, in which
    everything can be switched off), ``ddp`` or ``zero2`` (the project's own engine)."""
    model: str = "123M"
    context_length: int = 512
    micro_batch_size: int = 32
    accumulation_steps: int = 8
    loss: str = "ours"
    """``full logits``, ``ours``, ``liger`` or ``cce`` (cut-cross-entropy)."""
    chunk_tokens: tuple[int | None, ...] = (None,)
    """Of our loss and Liger's; None: as they choose themselves. Training takes the first."""
    pads_vocabulary: bool = True
    fuses_adamw: bool = True
    waits: bool = False
    """The host waits for the device: batches that are not pinned, and the loss read after every step."""
    compiles: bool = True
    attention: str = "SDPA"
    """``SDPA``, ``FlashAttention-3``, or by document: ``masked``, or ``packed`` without a mask."""
    trace: str | None = None
    """The file for the profiler's trace."""
    tiny: bool = False
    limit_seconds: float = 90.0

    @property
    def tokens_per_step(self) -> int:
        """Of an optimizer step."""
        return self.context_length * self.micro_batch_size * self.accumulation_steps

    @property
    def shape(self) -> tuple[ModelSpec, int]:
        """The model's spec and its number of entries."""
        spec, vocab_size = MODELS[self.model]
        if self.tiny:
            narrow = spec.hidden_size // 16
            spec = replace(spec, hidden_size=narrow, num_hidden_layers=2, intermediate_size=2 * narrow)
            vocab_size //= 150
        return spec, vocab_size


MODELS = {
    # The tutorial's, as in configs/wiki-123m.yaml; its tokenizer's number of entries is an odd one for a GPU.
    "123M": (ModelSpec(512, 12, 8, 2, 2048), 151_646),
    "54M": (ModelSpec(512, 12, 8, 2, 2048), 16_384),
    "350M": (ModelSpec(1024, 16, 16, 4, 3072), 151_646),
}
"""Spec, and entries of the vocabulary."""
CHUNKS = (512, 1024, 2048, 4096, 8192)


def first_cases() -> list[Case]:
    """Correctness, and each lever on the tutorial's model."""
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
    compiled = replace(unwaiting, name="+ torch.compile", compiles=True, limit_seconds=150)
    ddp = replace(compiled, name="the job, DDP", trainer="ddp")
    zero2 = replace(ddp, name="the job, ZeRO-2", trainer="zero2")
    return [
        Case("this machine", "machine"),
        Case("our loss and model", "check", limit_seconds=150),
        Case("Liger's loss", "check", loss="liger"),
        Case("cut-cross-entropy", "check", loss="cce"),
        replace(plain, name=TUTORIAL, trainer="tutorial"),
        plain,
        chunked,
        padded,
        fused,
        unwaiting,
        compiled,
        ddp,
        zero2,
    ]


def batch_cases(best: Case) -> list[Case]:
    """The same global batch, in fewer and larger pieces."""
    return [
        replace(
            best,
            name=f"{best.name}, {times} times the micro-batch",
            micro_batch_size=times * best.micro_batch_size,
            accumulation_steps=max(1, best.accumulation_steps // times),
        )
        for times in (2, 4)
    ]


def later_cases(best: Case, trace: str | None) -> list[Case]:
    """What is asked once the best configuration is known."""
    alone = Case("full logits", "loss", loss="full logits", pads_vocabulary=False, compiles=False)
    ours = replace(alone, loss="ours", chunk_tokens=(None, *CHUNKS))
    tutorial = Case(TUTORIAL, "train", trainer="tutorial", compiles=False)
    return [
        replace(best, name=f"Trace of two micro-batches, {best.name}", kind="trace", trace=trace, accumulation_steps=2),
        _long(best),
        replace(best, model="54M"),
        replace(best, model="350M"),
        alone,
        replace(ours, name="ours, vocabulary not padded"),
        replace(ours, name="ours", pads_vocabulary=True),
        replace(ours, name="ours, compiled", pads_vocabulary=True, compiles=True),
        replace(ours, name="Liger", loss="liger"),
        replace(alone, name="cut-cross-entropy", loss="cce"),
        replace(best, name=f"{best.name}, Liger's loss", loss="liger", chunk_tokens=(2048,)),
        replace(best, name=f"{best.name}, cut-cross-entropy", loss="cce"),
        replace(best, name=f"{best.name}, FlashAttention-3", attention="FlashAttention-3"),
        replace(best, name=f"{best.name}, documents apart without a mask", attention="packed"),
        replace(best, name=f"{best.name}, documents apart by a mask", attention="masked"),
        _long(tutorial),
        replace(tutorial, model="54M"),
        replace(tutorial, model="350M"),
        replace(tutorial, name=f"{tutorial.name}, again"),
        replace(best, name=f"{best.name}, again"),
    ]


def _long(case: Case) -> Case:
    """As many tokens in longer sequences."""
    return replace(case, context_length=4 * case.context_length, micro_batch_size=max(1, case.micro_batch_size // 4))


def shrunk(case: Case) -> Case:
    """The same on a CPU in a moment; what is compiled stays a GPU's, but for the job's own engine."""
    if case.tiny:
        return case
    chunks = tuple(chunk and chunk // 256 for chunk in case.chunk_tokens)
    return replace(
        case,
        tiny=True,
        context_length=case.context_length // 32,
        micro_batch_size=max(1, case.micro_batch_size // 16),
        accumulation_steps=2,
        chunk_tokens=chunks,
        compiles=case.compiles and case.trainer not in ENGINE,
    )


class Measurer:
    """Gives cases to processes, one at a time.

    Args:
        budget_seconds: from now on, for all.
        shares: a process does all the cases it can, for tiny sizes, whose time would be that of imports.
        looks_ahead: the next process imports its libraries while one measures; for machines of many cores.
    """

    def __init__(self, budget_seconds: float, *, shares: bool, looks_ahead: bool) -> None:
        self._ends_at = time.monotonic() + budget_seconds
        self._shares, self._looks_ahead = shares, looks_ahead
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._ready: dict[str, subprocess.Popen[bytes]] = {}

    def measure(self, case: Case) -> Result:
        """The numbers of a case, or why there are none; never raises."""
        began = time.monotonic()
        left = self._ends_at - began
        if left < LEAST_SECONDS:
            return {**asdict(case), "why": f"skipped: {max(0, left):.0f} s of the time were left"}
        limit = min(left, case.limit_seconds)
        # Accelerate sets a process up once, for one strategy.
        role = case.trainer if self._shares and case.trainer in ENGINE else ""
        child = self._ready.pop(role, None) or self._start()
        stays = self._shares
        start_of_log = self._log.seek(0, os.SEEK_END)
        try:
            assert child.stdin is not None and child.stdout is not None
            with suppress(BrokenPipeError):  # then there is an end of file to read as well
                child.stdin.write(json.dumps(asdict(case)).encode() + b"\n")
                child.stdin.flush()
            if self._looks_ahead:
                self._ready[role] = self._start()
            if not select.select([child.stdout], [], [], limit)[0]:
                stays = False
                found = {"why": f"stopped after {limit:.0f} s"}
            elif answer := child.stdout.readline():
                found = json.loads(answer)
            else:
                stays = False
                found = {"why": f"its process ended with {child.wait()}: {self._last_words(start_of_log)}"}
        finally:
            if stays:
                self._ready[role] = child
            else:
                _end(child)
        return {**asdict(case), **found, "took_seconds": time.monotonic() - began}

    def close(self) -> None:
        """Ends the processes that wait for a case."""
        while self._ready:
            _end(self._ready.popitem()[1])

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *CHILD],
            cwd=REPOSITORY,
            # Of several GPUs one: transformers' Trainer would take them all.
            env=os.environ
            | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
            | {"TOKENIZERS_PARALLELISM": "false", "DS_IGNORE_CUDA_DETECTION": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # so that what compiles for it ends with it
        )

    def _last_words(self, start: int) -> str:
        self._log.seek(start)
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


def _end(child: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with suppress(BrokenPipeError):
            if pipe is not None:
                pipe.close()


def is_wrong(result: Result) -> bool:
    """Whether a check has failed: a number out of its tolerance, or ours not there at all."""
    if result["kind"] != "check":
        return False
    return not all(one["is_right"] for one in result.get("errors", [])) or (
        "why" in result and result["loss"] == "ours"
    )


def best_case(cases: Sequence[Case], results: Sequence[Result]) -> Case:
    """The job's fastest so far; where none of its was measured, ours."""
    measured = [
        (result["trainer"] in ENGINE, result["tokens_per_second"], i)
        for i, result in enumerate(results)
        if "tokens_per_second" in result and result["trainer"] != "tutorial"
    ]
    return cases[max(measured)[-1] if measured else -1]


# ---- Tables ----


def _table(title: str, columns: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield f"\n{title}\n"
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        yield f"| {' | '.join([*row, *[''] * (len(columns) - len(row))])} |"


def tables(results: Sequence[Result]) -> Iterator[str]:
    """Everything that was found, line by line; what counts most last."""

    def of(kind: str) -> Iterator[Result]:
        return (result for result in results if result["kind"] == kind)

    def unmeasured(result: Result) -> list[list[str]]:
        return [[result["name"], result["why"]]] if "why" in result else []

    def rows(kind: str, list_name: str, cells: Callable[[Result], list[str]]) -> Iterator[list[str]]:
        for result in of(kind):
            yield from unmeasured(result)
            for one in result.get(list_name, []):
                yield [result["name"], *cells(one)]

    yield from _table(
        "This machine",
        ["", "what", "reached"],
        rows("machine", "reached", lambda one: [one["what"], f"{one['value']:,.1f} {one['unit']}"]),
    )
    yield from _table(
        "Against fp64: relative errors, ‖x - x64‖ / ‖x64‖",
        ["", "what", "error", "tolerance", ""],
        rows(
            "check",
            "errors",
            lambda one: [
                one["what"],
                f"{one['error']:.1e}",
                f"{one['tolerance']:.0e}",
                "right" if one["is_right"] else "WRONG",
            ],
        ),
    )
    yield from _table(
        "The loss alone, forward and backward, of one micro-batch",
        ["loss", "chunk", "ms", "peak memory beyond its inputs, GiB"],
        rows(
            "loss",
            "chunks",
            lambda one: [
                "its own" if one["chunk_tokens"] is None else f"{one['chunk_tokens']:,}",
                one.get("why") or f"{1e3 * one['seconds']:.2f}",
                "" if "why" in one else f"{one['peak_bytes'] / 2**30:.2f}",
            ],
        ),
    )
    for result in of("trace"):
        if "kernels" in result:
            shares = ", ".join(f"{share:.0%} {kind}" for kind, share in result["shares"].items())
            title = f"{result['name']}; the device was busy {result['busy']:.0%} of the time: {shares}"
        else:
            title = f"{result['name']}: {result['why']}"
        yield from _table(
            title,
            ["kernel", "kind", "share", "ms", "times"],
            (
                [
                    one["name"][:90].replace("|", "/"),
                    one["kind"],
                    f"{one['share']:.1%}",
                    f"{1e3 * one['seconds']:.2f}",
                    str(one["times"]),
                ]
                for one in result.get("kernels", [])
            ),
        )
    yield from _table(
        "Training; times in ms, of an optimizer step; in ours, the loss holds its gradients and the head's products",
        [
            "configuration",
            "model",
            "context",
            "batch",
            "tokens/s",
            "x tutorial",
            "MFU",
            "peak GiB",
            "step",
            "forward",
            "loss",
            "backward",
            "optimizer",
            "other",
            "least-most step",
            "first step after s",
        ],
        (_training_row(result, results) for result in of("train")),
    )


def _training_row(result: Result, results: Sequence[Result]) -> list[str]:
    batch = f"{result['micro_batch_size']} x {result['accumulation_steps']}"
    about = [result["name"], result["model"], f"{result['context_length']:,}", batch]
    if "why" in result:
        return [*about, result["why"]]
    theirs = next(
        (
            one["tokens_per_second"]
            for one in results
            if one["trainer"] == "tutorial"
            and "tokens_per_second" in one
            and (one["model"], one["context_length"]) == (result["model"], result["context_length"])
        ),
        None,
    )
    phases = result["phase_seconds"]
    steps = [1e3 * seconds for seconds in result["step_seconds"]]
    return [
        *about,
        f"{result['tokens_per_second']:,.0f}",
        f"{result['tokens_per_second'] / theirs:.2f}" if theirs else "",
        f"{result['mfu']:.1%}" if result["mfu"] is not None else "",
        f"{result['peak_bytes'] / 2**30:.2f}",
        f"{1e3 * result['median_step_seconds']:.1f}",
        *(f"{1e3 * phases[phase]:.1f}" for phase in ("forward", "loss", "backward", "optimizer", "other")),
        f"{min(steps):.1f}-{max(steps):.1f}",
        f"{result['first_step_seconds']:.1f}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="for all numbers, written after each row")
    parser.add_argument(
        "--trace", type=Path, metavar="FOLDER", help="for the profiler's trace of the best configuration"
    )
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, metavar="SECONDS", help="default %(default).0f")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to see that the script works")
    options = parser.parse_args(arguments)

    began = time.monotonic()
    cases, results = list[Case](), list[Result]()
    looks_ahead = not options.tiny and (os.cpu_count() or 1) >= MANY_CPUS
    measurer = Measurer(options.budget, shares=options.tiny, looks_ahead=looks_ahead)

    def measure(wanted: list[Case]) -> None:
        for case in [shrunk(case) for case in wanted] if options.tiny else wanted:
            result = measurer.measure(case)
            cases.append(case)
            results.append(result)
            speed = f"{result['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in result else "done"
            told = result.get("why") or speed
            print(
                f"{time.monotonic() - began:4.0f} s  {case.model} {case.context_length:,} {case.name}: {told}",
                flush=True,
            )
            if options.json:
                content = {"date": f"{datetime.date.today()}", "seconds": time.monotonic() - began, "rows": results}
                options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    try:
        measure(first_cases())
        measure(batch_cases(best_case(cases, results)))
        trace = None
        if options.trace:
            options.trace.mkdir(parents=True, exist_ok=True)
            trace = str((options.trace / "trace.json.gz").resolve())
        measure(later_cases(best_case(cases, results), trace))
    finally:
        measurer.close()
    print("\n".join(tables(results)))
    wrong = [result["name"] for result in results if is_wrong(result)]
    machine = next((result["machine"] for result in results if "machine" in result), "nothing could be measured")
    print(f"\n{machine}, {datetime.date.today()}; {time.monotonic() - began:.0f} s")
    print(f"WRONG, or not checked: {', '.join(wrong)}" if wrong else "all that was checked is right")
    return 1 if wrong else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and what measures ends as well
    sys.exit(main())
