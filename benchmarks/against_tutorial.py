"""Ours against the tutorial's recipe on this machine's CPU, row by row: `make bench`.

    python -m benchmarks.against_tutorial [--only training ...] [--corpus FILE] [--precision fp32] [--json FILE]

Both sides are commands, `python -m job ...` and `python -m benchmarks.tutorial ...`, with the same model, dtype, batch,
number of threads and number of processes; they take turns, each time in fresh processes, and the medians are compared.
A bar is what this project asks of the ratio. Evaluation alone is measured through `job.training.validation`,
since `job evaluate` does not say how long it took.

Without a corpus of yours, articles are made from the bundled sample: clauses cut and joined, so that few are the same,
at lengths whose mean, and whose share in full windows of 512 tokens, are Chinese Wikipedia's.
"""

import argparse
import datetime
import itertools
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_name, peak_bytes
from benchmarks.watched import Finished, Stages, run
from job.config import Config, load
from job.data.manifest import load_manifest
from job.model.flops import flops_per_token
from job.model.spec import ModelSpec
from job.runs.metrics_file import read_metrics

REPOSITORY = Path(__file__).parent.parent
SAMPLE = REPOSITORY / "job/demo/sample.jsonl"
MEAN_TOKENS, SIGMA, TOKENS_PER_CHARACTER = 278, 1.6, 0.8
"""Of an article: 400 M tokens in 1.44 M articles, of which 230 M are in full windows (a log-normal fits both)."""
SMALL_VOCABULARY = 16_384
_TUTORIAL = "import sys; sys.modules['deepspeed'] = None; from benchmarks.tutorial import main; main()"
"""Its author has no DeepSpeed, which its libraries import, for seconds, where they find it."""
BYTES_PER_TOKEN = {"small": 3.986, "qwen": 3.752}
"""Of 106 held-out paragraphs of Chinese Wikipedia (CMRC 2018), where no `--corpus` is given: the small vocabulary was
trained on the 998 others, 1.4 MB, which is too little for one and so its lower bound."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    measure: str
    ours: float
    theirs: float | None
    unit: str
    bar: float
    is_at_most: bool = False
    """Whether the bar is the most that there may be; else it is the least."""
    is_of_ours: bool = False
    """Whether the bar is on our own number; else it is on the ratio."""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours ÷ theirs."""
        return self.ours / self.theirs if self.theirs else None

    @property
    def is_met(self) -> bool:
        """Whether the bar is reached."""
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


@dataclass(frozen=True)
class Training:
    """What a training run came to."""

    tokens_per_second: float
    peak_bytes: int
    start_seconds: float
    """From the command to the beginning of its first step."""
    stages: dict[str, float]
    """What happened until then, in seconds since the command."""


def main(words: Sequence[str] | None = None) -> None:
    """Measures the rows and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--corpus", type=Path, help="JSON lines of yours in place of the made-up articles")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="of both; bf16 where the CPU multiplies in it")
    parser.add_argument("--strategy", default=Config().train.strategy, help="train.strategy of ours")
    parser.add_argument("--steps", type=int, default=3, help="measured, after one that is not")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--evaluated-windows", type=int, default=24)
    parser.add_argument("--train-bytes", type=int, default=1_500_000, help="text to train and evaluate on")
    parser.add_argument("--prepare-bytes", type=int, default=96_000_000, help="text to prepare")
    parser.add_argument("--vocabulary", type=Path, help="a tokenizer's folder in the place of Qwen2's")
    with tempfile.TemporaryDirectory(prefix="against-tutorial-") as folder:
        bench = Bench(parser.parse_args(words), Path(folder))
        print(bench.machine, flush=True)
        rows = [row for name in bench.settings.only for row in _said(ROWS[name](bench))]
        print("\n| measure | ours | tutorial's | | ratio | bar | met | |\n|---|---|---|---|---|---|---|---|")
        print(*rows, sep="\n")
        if bench.settings.json:
            found = {"machine": bench.machine, "rows": [asdict(row) | {"is_met": row.is_met} for row in rows]}
            bench.settings.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


# ---- Both sides ----


class Bench:
    """What the rows share: texts, vocabularies, shards, and how either side is run."""

    def __init__(self, settings: argparse.Namespace, folder: Path) -> None:
        self.settings, self.folder, self._runs = settings, folder, 0
        self.threads = len(os.sched_getaffinity(0))
        self.precision: str = settings.precision or ("bf16" if _multiplies_bf16() else "fp32")
        self.spec = ModelSpec(settings.hidden_size, settings.layers, 8, 2, 4 * settings.hidden_size)
        self._environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONUNBUFFERED": "1",
        }

    @cached_property
    def machine(self) -> str:
        """What all of it was measured on."""
        import torch
        import transformers

        return (
            f"{cpu_name()}, {self.threads} threads, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, {datetime.date.today()}: "
            f"{self.settings.layers} x {self.settings.hidden_size}, {self.precision}, "
            f"{self.settings.batch} x {self.settings.context_length} tokens a step, medians of {self.settings.repeats}"
        )

    def corpus(self, size_bytes: int) -> Path:
        """Articles as JSON lines, of about so many bytes of text; a corpus of the user's own is cut there."""
        path = self.folder / f"corpus-{size_bytes}.jsonl"
        if path.exists():
            return path
        texts = articles(size_bytes) if self.settings.corpus is None else _first_texts(self.settings.corpus, size_bytes)
        with path.open("w", encoding="utf-8") as file:
            for i, text in enumerate(texts):
                json.dump({"id": str(i), "title": "", "tags": "", "text": text}, file, ensure_ascii=False)
                file.write("\n")
        return path

    @cached_property
    def qwen(self) -> Path:
        """Qwen2's vocabulary."""
        if self.settings.vocabulary:
            return Path(self.settings.vocabulary)
        folder: Path = import_module("tests.qwen").qwen2_tokenizer_folder(self.folder / "qwen")
        return folder

    @cached_property
    def small(self) -> Path:
        """A vocabulary trained on the text."""
        folder = self.folder / "small"
        self._job(
            "tokenizer",
            data=f"source={self.corpus(self.settings.train_bytes)}",
            tokenizer=f"source={folder} vocab_size={SMALL_VOCABULARY}",
        )
        return folder

    def shards(self, tokenizer: Path, held_out: float) -> Path:
        """The text to train on, prepared."""
        shards = self.folder / f"shards-{tokenizer.name}-{held_out}"
        if shards.exists():
            return shards
        self._job(
            "prepare",
            data=f"source={self.corpus(self.settings.train_bytes)} shards={shards} validation_fraction={held_out}",
            tokenizer=f"source={tokenizer}",
        )
        return shards

    def prepare_ours(self, processes: int) -> Finished:
        """`job prepare` of the larger text."""
        shards = self._new_folder("prepared")
        corpus = self.corpus(self.settings.prepare_bytes)
        return self._job(
            "prepare",
            {"it prepares": lambda log, words: any(shards.glob("*"))},
            data=f"source={corpus} shards={shards} processes={processes} slice_bytes=4MiB",
            tokenizer=f"source={self.qwen}",
        )

    def prepare_theirs(self, processes: int) -> tuple[Finished, dict[str, Any]]:
        """The recipe up to its windows, with nothing in the cache."""
        cache_folder = self._new_folder("datasets")
        more = ["--num-proc", str(processes)] if processes > 1 else []
        return self._tutorial("data", self.settings.prepare_bytes, more, {"HF_DATASETS_CACHE": str(cache_folder)})

    def train_ours(self, tokenizer: Path, steps: int, batch: int) -> Training:
        """`job train`, from the command to its last step."""
        output = self._new_folder("run")
        stages = {
            "the launcher runs": lambda log, words: any("job.launcher.agent" in one for one in words),
            "the worker runs": lambda log, words: any("job.launcher.worker" in one for one in words),
            "the run is taken over": lambda log, words: "\nrun " in f"\n{log}",
            "first step": lambda log, words: "\nstep 1/" in log,
        }
        finished = self._job(
            "train",
            stages,
            # Some text is held out, so that the two batches before the first step are there.
            data=f"shards={self.shards(tokenizer, 0.01)} cache_dir={self.folder / 'cache'}",
            run=f"output={output}",
            model=(
                f"hidden_size={self.spec.hidden_size} num_hidden_layers={self.spec.num_hidden_layers} "
                f"num_attention_heads=8 num_key_value_heads=2 intermediate_size={self.spec.intermediate_size}"
            ),
            train=(
                f"strategy={self.settings.strategy} processes=1 precision={self.precision} log_every=1 "
                f"context_length={self.settings.context_length} micro_batch_size={batch} global_batch_size={batch} "
                f"max_steps={steps} epochs=1000"
            ),
            evaluate=f"batch_size={batch}",
            generate="max_new_tokens=1",
            tracking="mode=disabled",
        )
        rows = [row for row in read_metrics(str(output)) if "speed/seconds_per_step" in row]
        first, *others = [row["speed/seconds_per_step"] for row in rows]
        tokens = batch * self.settings.context_length
        *before, (_, ended) = finished.seen.items()
        return Training(
            tokens_per_second=tokens / statistics.median(others or [first]),
            peak_bytes=finished.peak_bytes,
            start_seconds=ended - first,
            stages=dict(before) | {"the first step begins": ended - first},
        )

    def train_theirs(self, steps: int, batch: int) -> Training:
        """The recipe with its windows in the cache, from the command to its last step."""
        more = ["--batch", str(batch), "--accumulation", "1", "--max-steps", str(steps)]
        finished, report = self._tutorial("trained", self.settings.train_bytes, more)
        ended = report["steps_ended"]
        seconds = [after - before for before, after in itertools.pairwise(ended)]
        tokens = batch * self.settings.context_length
        stages = report["stages"] | {"the first step begins": report["first_step_began"]}
        return Training(
            tokens_per_second=tokens / statistics.median(seconds or [ended[0] - report["first_step_began"]]),
            peak_bytes=finished.peak_bytes,
            start_seconds=report["first_step_began"] - finished.began,
            stages={name: at - finished.began for name, at in stages.items()},
        )

    def evaluate_ours(self) -> tuple[float, int]:
        """Tokens per second and peak memory of an evaluation of random weights by `HeldOut`."""
        report = self._new_folder("evaluation") / "report.json"
        words = {
            "shards": str(self.shards(self.qwen, 0.1)),
            "cache": str(self.folder / "cache"),
            "spec": asdict(self.spec),
            "context_length": self.settings.context_length,
            "precision": self.precision,
            "batch": self.settings.batch,
            "windows": self.settings.evaluated_windows,
            "report": str(report),
        }
        self._run([sys.executable, "-m", "benchmarks.against_tutorial", "--evaluate", json.dumps(words)])
        found = json.loads(report.read_text())
        return found["targets"] / found["seconds"], found["peak_bytes"]

    def evaluate_theirs(self) -> tuple[float, int]:
        """The same by the Trainer."""
        more = ["--batch", str(self.settings.batch), "--evaluated-windows", str(self.settings.evaluated_windows)]
        finished, report = self._tutorial("evaluated", self.settings.train_bytes, more)
        tokens = report["evaluated_windows"] * (self.settings.context_length - 1)
        return tokens / report["evaluate_seconds"], finished.peak_bytes

    def _tutorial(
        self, until: str, corpus_bytes: int, more: Sequence[str], environment: dict[str, str] | None = None
    ) -> tuple[Finished, dict[str, Any]]:
        report = self._new_folder("tutorial") / "report.json"
        command = [sys.executable, "-c", _TUTORIAL, f"--corpus={self.corpus(corpus_bytes)}"]
        command += [f"--tokenizer={self.qwen}", f"--output={report.parent}", f"--report={report}", f"--until={until}"]
        command += [f"--precision={self.precision}", f"--context-length={self.settings.context_length}"]
        command += [f"--hidden-size={self.spec.hidden_size}", f"--num-hidden-layers={self.spec.num_hidden_layers}"]
        command += [f"--intermediate-size={self.spec.intermediate_size}", *more]
        finished = self._run(command, environment=environment)
        return finished, json.loads(report.read_text())

    def _job(self, command: str, stages: Stages | None = None, **sections: str) -> Finished:
        words = [f"--{section}.{one}" for section, settings in sections.items() for one in settings.split()]
        return self._run([sys.executable, "-m", "job", command, *words], stages)

    def _run(
        self, command: Sequence[str], stages: Stages | None = None, environment: dict[str, str] | None = None
    ) -> Finished:
        log = self._new_folder("log") / "log"
        return run(command, REPOSITORY, self._environment | (environment or {}), log, stages)

    def _new_folder(self, name: str) -> Path:
        self._runs += 1
        folder = self.folder / f"{self._runs}-{name}"
        folder.mkdir()
        return folder

    def help(self) -> Finished:
        """The help."""
        return self._run([sys.executable, "-m", "job", "--help"])

    @cached_property
    def cut_theirs(self) -> tuple[Finished, dict[str, Any]]:
        """The recipe's windows of the text to train on, from now on in its cache."""
        return self._tutorial("data", self.settings.train_bytes, [])

    def warm(self) -> None:
        """Puts what both sides train on where they look for it."""
        _ = self.shards(self.qwen, 0.01), self.cut_theirs

    @cached_property
    def trained(self) -> list[list[Training]]:
        """Training runs of both, in turns."""
        self.warm()
        steps, batch = self.settings.steps + 1, self.settings.batch
        return self.in_turns(lambda: self.train_ours(self.qwen, steps, batch), lambda: self.train_theirs(steps, batch))

    def in_turns(self, *measures: Callable[[], Any], repeats: int | None = None) -> list[list[Any]]:
        """The results of each, all of them measured once in every round."""
        rounds = [[measure() for measure in measures] for _ in range(repeats or self.settings.repeats)]
        return [list(results) for results in zip(*rounds, strict=True)]


# ---- The rows ----


def training(bench: Bench) -> list[Row]:
    """Tokens per second and memory of training."""
    peak = gemm_peak(bench.precision, bench.threads)
    ours, theirs = bench.trained
    flops = flops_per_token(
        bench.spec, load_manifest(str(bench.shards(bench.qwen, 0.01))).vocab_size, bench.settings.context_length
    ).total
    rates = [_median(one.tokens_per_second for one in side) for side in (ours, theirs)]
    shares = [f"{rate * flops / peak:.0%}" for rate in rates]
    note = f"of a measured {peak / 1e9:,.0f} GFLOP/s of matrix products: {shares[0]}, {shares[1]}"
    peaks = [_median(one.peak_bytes / 2**30 for one in side) for side in (ours, theirs)]
    return [
        Row("training", rates[0], rates[1], "tokens/s", 1.0, note=note),
        Row(
            "training, peak memory", peaks[0], peaks[1], "GiB", 0.35, is_at_most=True, note="ours: all three processes"
        ),
    ]


def text(bench: Bench) -> list[Row]:
    """Bytes of text trained on per second, with the small vocabulary."""
    _, theirs = bench.trained
    steps = bench.settings.steps + 1
    (ours,) = bench.in_turns(lambda: bench.train_ours(bench.small, steps, bench.settings.batch))
    entries = load_manifest(str(bench.shards(bench.small, 0.01))).vocab_size
    if bench.settings.corpus is None:
        small, qwen = BYTES_PER_TOKEN["small"], BYTES_PER_TOKEN["qwen"]
    else:
        small, qwen = (_held_out_bytes_per_token(bench.shards(one, 0.1)) for one in (bench.small, bench.qwen))
    rates = [
        _median(one.tokens_per_second for one in side) * width / 1e3 for side, width in ((ours, small), (theirs, qwen))
    ]
    note = f"{entries:,} entries of {small:.2f} bytes a held-out token, against {qwen:.2f}"
    return [Row("text trained on", rates[0], rates[1], "kB/s", 2.5, note=note)]


def prepare(bench: Bench) -> list[Row]:
    """Megabytes of text made into tokens per second, with one process and with two."""
    megabytes = _text_bytes(bench.corpus(bench.settings.prepare_bytes)) / 1e6
    rows = []
    for processes in (1, 2):
        sides = partial(bench.prepare_ours, processes), partial(bench.prepare_theirs, processes)
        ours, theirs = bench.in_turns(*sides, repeats=min(2, bench.settings.repeats))  # they take longest
        rates = [megabytes / _median(one.seconds for one in side) for side in (ours, [one for one, _ in theirs])]
        # Both commands whole, for either has to start; what is left without the starts, in the note.
        work = _median(
            report["stages"]["its windows are there"] - report["stages"]["its libraries are imported"]
            for _, report in theirs
        )
        bare = _median(one.seconds - one.seen["it prepares"] for one in ours)
        note = f"{megabytes:.0f} MB; without the starts {megabytes / bare:.1f} and {megabytes / work:.1f}"
        plural = "" if processes == 1 else "es"
        rows.append(Row(f"prepare, {processes} process{plural}", rates[0], rates[1], "MB/s", 5, note=note))
    return rows


def kept(bench: Bench) -> list[Row]:
    """The share of the corpus' tokens that are targets once an epoch, counted by the vocabulary itself."""
    path = bench.corpus(bench.settings.train_bytes)
    tokens, documents = _count_tokens(bench.qwen, path)
    manifest = load_manifest(str(bench.shards(bench.qwen, 0.1)))
    shards = [*manifest.train, *manifest.validation]
    ours = sum(shard.tokens - 1 for shard in shards) / (tokens + documents)
    _, report = bench.cut_theirs
    targets = sum(report["windows"].values()) * (bench.settings.context_length - 1)
    note = f"of {tokens:,} in {documents:,} articles; ours learns their ends too"
    return [Row("corpus trained on", 100 * ours, 100 * targets / tokens, "%", 99.9, is_of_ours=True, note=note)]


def evaluation(bench: Bench) -> list[Row]:
    """Tokens per second and memory of evaluation."""
    bench.warm()
    ours, theirs = bench.in_turns(bench.evaluate_ours, bench.evaluate_theirs)
    rates = [_median(rate for rate, _ in side) for side in (ours, theirs)]
    peaks = [_median(peak / 2**30 for _, peak in side) for side in (ours, theirs)]
    return [
        Row("evaluation", rates[0], rates[1], "tokens/s", 1.0),
        Row("evaluation, peak memory", peaks[0], peaks[1], "GiB", 0.3, is_at_most=True),
    ]


def start(bench: Bench) -> list[Row]:
    """Seconds from the command to the first step, with everything prepared."""
    bench.warm()
    ours, theirs = bench.in_turns(lambda: bench.train_ours(bench.qwen, 1, 1), lambda: bench.train_theirs(1, 1))
    seconds = [_median(one.start_seconds for one in side) for side in (ours, theirs)]
    notes = [
        "; ".join(f"{name} {_median(one.stages[name] for one in side):.1f}" for name in side[0].stages)
        for side in (ours, theirs)
    ]
    return [
        Row("start to first step", seconds[0], seconds[1], "s", 1.0, is_at_most=True, note=f"theirs: {notes[1]}"),
        Row("the same", seconds[0], None, "s", 15, is_at_most=True, is_of_ours=True, note=f"ours: {notes[0]}"),
    ]


def help_text(bench: Bench) -> list[Row]:
    """Seconds of `python -m job --help`."""
    (found,) = bench.in_turns(bench.help)
    return [
        Row(
            "`python -m job --help`",
            _median(one.seconds for one in found),
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


def _said(rows: list[Row]) -> list[Row]:
    """The rows, printed as soon as they are there."""
    print(*rows, sep="\n", flush=True)
    return rows


# ---- What is measured in this process ----


def gemm_peak(precision: str, threads: int) -> float:
    """FLOP/s of the fastest of some products of square matrices: what this machine's matrix products reach."""
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


def evaluate_here(words: dict[str, Any]) -> None:
    """The other half of `Bench.evaluate_ours`, in a process of its own."""
    # What the launcher would set; of a world of one, nobody has to know the port, which the kernel gives.
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_IGNORE_CUDA_DETECTION": "1", "TORCHDYNAMO_DISABLE": "1"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from job.data.tokenizer import load_tokenizer
    from job.model.architecture import LanguageModel, build_model
    from job.runs.world import World
    from job.training.distributed import Lockstep
    from job.training.engine import Strategy, start_accelerator
    from job.training.validation import HeldOut

    overrides = [("data.shards", words["shards"]), ("data.cache_dir", words["cache"])]
    config = load(None, [*overrides, ("evaluate.batch_size", str(words["batch"]))])
    manifest, world = load_manifest(words["shards"]), World(0, 0, 1, 1)
    tokenizer = load_tokenizer(f"{words['shards']}/{manifest.tokenizer}", Path(words["cache"]))
    spec = ModelSpec(**words["spec"])
    accelerator = start_accelerator(Strategy("ddp", words["precision"], 1, 1, 1, 0.0))
    model = LanguageModel(build_model(spec, manifest.vocab_size, manifest.eod_id, words["context_length"], seed=1))
    held_out = HeldOut(config, manifest, tokenizer, words["context_length"], world)
    lockstep = Lockstep(world, lambda: False, lambda: None)
    began = time.perf_counter()
    found = held_out.evaluate(model, accelerator.device, accelerator.autocast, lockstep, words["windows"])
    assert found is not None
    report = {"seconds": time.perf_counter() - began, "targets": found.targets, "peak_bytes": peak_bytes()}
    Path(words["report"]).write_text(json.dumps(report))


def _multiplies_bf16() -> bool:
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


# ---- Text ----


def articles(size_bytes: int, seed: int = 2333) -> Iterator[str]:
    """Articles made of the bundled sample, until there are so many bytes."""
    draw = random.Random(seed)
    sample = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    clauses = [one for one in re.split(r"(?<=[，。；、！？])|\n", "\n".join(sample)) if one]
    while size_bytes > 0:
        # A log-normal's mean is exp(mu + sigma² / 2).
        characters = MEAN_TOKENS / TOKENS_PER_CHARACTER * draw.lognormvariate(-(SIGMA**2) / 2, SIGMA)
        parts = list[str]()
        while sum(map(len, parts)) < characters:
            head, tail = draw.choice(clauses), draw.choice(clauses)
            parts.append(
                head[: draw.randint(0, len(head))].rstrip("，。；、！？") + tail[draw.randint(0, len(tail) - 1) :]
            )
        yield "".join(parts)
        size_bytes -= len("".join(parts).encode())


def _first_texts(corpus: Path, size_bytes: int) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            if size_bytes <= 0:
                return
            text = json.loads(line)["text"]
            yield text
            size_bytes -= len(text.encode())


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _text_bytes(path: Path) -> int:
    return sum(len(text.encode()) for text in _texts(path))


def _count_tokens(tokenizer: Path, path: Path) -> tuple[int, int]:
    from tokenizers import Tokenizer

    texts = _texts(path)
    encoded = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode_batch_fast(texts, add_special_tokens=False)
    return sum(len(one.ids) for one in encoded), len(texts)


def _held_out_bytes_per_token(shards: Path) -> float:
    held_out = load_manifest(str(shards)).validation
    return sum(shard.utf8_bytes for shard in held_out) / sum(shard.tokens for shard in held_out)


def _median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--evaluate"]:
        evaluate_here(json.loads(sys.argv[2]))
    else:
        main()
