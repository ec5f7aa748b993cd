"""Compare this job with the tutorial's recipe on this machine's CPU, row by row: `make bench`.

    python -m benchmarks.against_tutorial [--only training ...] [--corpus FILE] [--precision fp32] [--json FILE]

Both sides run as commands, `python -m job ...` and `python -m benchmarks.tutorial ...`, with the same model, dtype,
batch, number of threads and number of processes. They take turns, each time in new processes, and their medians are
compared. The bar of a row is the ratio that this project requires. Evaluation is measured by calling
`job.training.validation` directly, because `job evaluate` does not report its duration.

Without `--corpus`, the articles are generated from the bundled sample: clauses are cut and joined, so that few of them
repeat. The mean length of an article, and the share of tokens in full sequences of 512 tokens, match Chinese Wikipedia.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from benchmarks.articles import count_tokens, text_bytes
from benchmarks.comparison import Bench
from job.config import Config
from job.data.manifest import load_manifest
from job.model.flops import flops_per_token

BYTES_PER_TOKEN = {"small": 3.986, "qwen": 3.752}
"""UTF-8 bytes per token of each vocabulary, used if there is no `--corpus`.

Measured on 106 validation paragraphs of Chinese Wikipedia (CMRC 2018). The small vocabulary was trained on the other
998 paragraphs (1.4 MB). More text would give a better vocabulary, so its value is a lower bound.
"""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    measure: str
    ours: float
    theirs: float | None
    unit: str
    bar: float
    is_at_most: bool = False
    """True if the bar is a maximum, False if it is a minimum."""
    is_of_ours: bool = False
    """True if the bar applies to `ours`, False if it applies to the ratio."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Our number divided by the tutorial's, or None if the tutorial has none."""
        return self.ours / self.theirs if self.theirs else None

    @property
    def is_met(self) -> bool:
        """Return True if the bar is met."""
        value = self.ours if self.is_of_ours else self.ratio
        assert value is not None
        return value <= self.bar if self.is_at_most else value >= self.bar

    def __str__(self) -> str:
        theirs = "" if self.theirs is None else _number(self.theirs)
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        bar = f"{'≤' if self.is_at_most else '≥'} {self.bar:g}{f' {self.unit}' if self.is_of_ours else ''}"
        met = "yes" if self.is_met else "**no**"
        cells = self.measure, _number(self.ours), theirs, self.unit, ratio, bar, met, self.note
        return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        metavar="ROW",
        help=f"rows to measure, from: {', '.join(ROWS)} (default: all)",
    )
    parser.add_argument("--corpus", type=Path, help="JSON lines file to use instead of the generated articles")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="precision of both sides (default: bf16 if the CPU has instructions for it, else fp32)",
    )
    parser.add_argument("--strategy", default=Config().train.strategy, help="train.strategy of the job")
    parser.add_argument("--steps", type=int, default=3, help="steps to measure, after one warm-up step")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--evaluated-sequences", type=int, default=24, help="sequences to evaluate")
    parser.add_argument("--train-bytes", type=int, default=1_500_000, help="bytes of text to train and evaluate on")
    parser.add_argument("--prepare-bytes", type=int, default=96_000_000, help="bytes of text to prepare")
    parser.add_argument("--vocabulary", type=Path, help="folder of a tokenizer to use instead of Qwen2's")
    with tempfile.TemporaryDirectory(prefix="against-tutorial-") as folder:
        bench = Bench(parser.parse_args(arguments), Path(folder))
        print(bench.machine, flush=True)
        rows = [row for name in bench.settings.only for row in _print_rows(ROWS[name](bench))]
        print("\n| measure | ours | tutorial's | | ratio | bar | met | |\n|---|---|---|---|---|---|---|---|")
        print(*rows, sep="\n")
        if bench.settings.json:
            report = {"machine": bench.machine, "rows": [asdict(row) | {"is_met": row.is_met} for row in rows]}
            bench.settings.json.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


# ---- The rows ----


def training(bench: Bench) -> list[Row]:
    """Return the rows of training: tokens per second and peak memory."""
    peak = gemm_peak(bench.precision, bench.threads)
    ours, theirs = bench.trained
    flops = flops_per_token(
        bench.spec, load_manifest(str(bench.shards(bench.qwen, 0.01))).vocab_size, bench.settings.context_length
    ).total
    rates = [_median(run.tokens_per_second for run in side) for side in (ours, theirs)]
    shares = [f"{rate * flops / peak:.0%}" for rate in rates]
    note = f"of a measured {peak / 1e9:,.0f} GFLOP/s of matrix products: {shares[0]}, {shares[1]}"
    peaks = [_median(run.peak_bytes / 2**30 for run in side) for side in (ours, theirs)]
    return [
        Row("training", rates[0], rates[1], "tokens/s", 1.0, note=note),
        Row(
            "training, peak memory", peaks[0], peaks[1], "GiB", 0.35, is_at_most=True, note="ours: all three processes"
        ),
    ]


def text(bench: Bench) -> list[Row]:
    """Return the row of kB of text trained on per second, ours with the small vocabulary."""
    _, theirs = bench.trained
    steps = bench.settings.steps + 1
    (ours,) = bench.in_turns(lambda: bench.train_ours(bench.small, steps, bench.settings.batch))
    entries = load_manifest(str(bench.shards(bench.small, 0.01))).vocab_size
    if bench.settings.corpus is None:
        small, qwen = BYTES_PER_TOKEN["small"], BYTES_PER_TOKEN["qwen"]
    else:
        vocabularies = bench.small, bench.qwen
        small, qwen = (_validation_bytes_per_token(bench.shards(vocabulary, 0.1)) for vocabulary in vocabularies)
    rates = [
        _median(run.tokens_per_second for run in side) * bytes_per_token / 1e3
        for side, bytes_per_token in ((ours, small), (theirs, qwen))
    ]
    note = f"ours: {entries:,} entries, {small:.2f} bytes per validation token; theirs: {qwen:.2f}"
    return [Row("text trained on", rates[0], rates[1], "kB/s", 2.5, note=note)]


def prepare(bench: Bench) -> list[Row]:
    """Return the rows of preparation: MB of text tokenized per second, with one process and with two."""
    megabytes = text_bytes(bench.corpus(bench.settings.prepare_bytes)) / 1e6
    rows = []
    for processes in (1, 2):
        sides = partial(bench.prepare_ours, processes), partial(bench.prepare_theirs, processes)
        # Preparation takes longer than any other row, so it is repeated at most twice.
        ours, theirs = bench.in_turns(*sides, repeats=min(2, bench.settings.repeats))
        rates = [megabytes / _median(run.seconds for run in side) for side in (ours, [run for run, _ in theirs])]
        # The rates are those of the whole commands, start-up included. The note gives them without the start-up.
        their_seconds = _median(
            report["stages"]["sequences cut"] - report["stages"]["libraries imported"] for _, report in theirs
        )
        our_seconds = _median(run.seconds - run.seen["preparation running"] for run in ours)
        note = f"{megabytes:.0f} MB; without start-up {megabytes / our_seconds:.1f} and {megabytes / their_seconds:.1f}"
        plural = "" if processes == 1 else "es"
        rows.append(Row(f"prepare, {processes} process{plural}", rates[0], rates[1], "MB/s", 5, note=note))
    return rows


def kept(bench: Bench) -> list[Row]:
    """Return the row of the share of the corpus' tokens that are targets in an epoch."""
    path = bench.corpus(bench.settings.train_bytes)
    tokens, documents = count_tokens(bench.qwen, path)
    manifest = load_manifest(str(bench.shards(bench.qwen, 0.1)))
    shards = [*manifest.train, *manifest.validation]
    ours = sum(shard.tokens - 1 for shard in shards) / (tokens + documents)
    _, report = bench.cut_theirs
    targets = sum(report["sequences"].values()) * (bench.settings.context_length - 1)
    note = f"of {tokens:,} tokens in {documents:,} articles; ours also trains on the end of each article"
    return [Row("corpus trained on", 100 * ours, 100 * targets / tokens, "%", 99.9, is_of_ours=True, note=note)]


def evaluation(bench: Bench) -> list[Row]:
    """Return the rows of evaluation: tokens per second and peak memory."""
    bench.warm()
    ours, theirs = bench.in_turns(bench.evaluate_ours, bench.evaluate_theirs)
    rates = [_median(rate for rate, _ in side) for side in (ours, theirs)]
    peaks = [_median(peak / 2**30 for _, peak in side) for side in (ours, theirs)]
    return [
        Row("evaluation", rates[0], rates[1], "tokens/s", 1.0),
        Row("evaluation, peak memory", peaks[0], peaks[1], "GiB", 0.3, is_at_most=True),
    ]


def start(bench: Bench) -> list[Row]:
    """Return the rows of the start: seconds from the command to its first step, with all data prepared."""
    bench.warm()
    ours, theirs = bench.in_turns(lambda: bench.train_ours(bench.qwen, 1, 1), lambda: bench.train_theirs(1, 1))
    seconds = [_median(run.start_seconds for run in side) for side in (ours, theirs)]
    notes = [
        "; ".join(f"{name} {_median(run.stages[name] for run in side):.1f}" for name in side[0].stages)
        for side in (ours, theirs)
    ]
    return [
        Row("start to first step", seconds[0], seconds[1], "s", 1.0, is_at_most=True, note=f"theirs: {notes[1]}"),
        Row(
            "start to first step, ours",
            seconds[0],
            None,
            "s",
            15,
            is_at_most=True,
            is_of_ours=True,
            note=f"ours: {notes[0]}",
        ),
    ]


def help_text(bench: Bench) -> list[Row]:
    """Return the row of the seconds that `python -m job --help` takes."""
    (runs,) = bench.in_turns(bench.help)
    return [
        Row(
            "`python -m job --help`",
            _median(run.seconds for run in runs),
            None,
            "s",
            1.0,
            is_at_most=True,
            is_of_ours=True,
        )
    ]


ROWS = {
    "training": training,
    "text": text,
    "prepare": prepare,
    "kept": kept,
    "evaluation": evaluation,
    "start": start,
    "help": help_text,
}


def _print_rows(rows: list[Row]) -> list[Row]:
    """Print the rows immediately, so that a long benchmark shows its progress, and return them."""
    print(*rows, sep="\n", flush=True)
    return rows


def gemm_peak(precision: str, threads: int) -> float:
    """Return the FLOP/s of the fastest of several products of square matrices on this machine."""
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for size in (1024, 2048, 4096):
        left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        product = left @ right
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(left, right, out=product)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def _validation_bytes_per_token(shards: Path) -> float:
    validation = load_manifest(str(shards)).validation
    return sum(shard.utf8_bytes for shard in validation) / sum(shard.tokens for shard in validation)


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
