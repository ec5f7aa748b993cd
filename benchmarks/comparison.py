"""Both sides of the comparison: run this job and the tutorial's recipe with the same model and text."""

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.articles import articles, first_texts
from benchmarks.machine import cpu_name, peak_bytes
from benchmarks.watched import Finished, Stages, run
from job.data.manifest import load_manifest
from job.model.spec import ModelSpec
from job.runs.metrics_file import read_metrics

REPOSITORY = Path(__file__).parent.parent
SMALL_VOCABULARY = 16_384
TUTORIAL = "import sys; sys.modules['deepspeed'] = None; from benchmarks.tutorial import main; main()"
"""Program that runs the tutorial without DeepSpeed.

The tutorial does not use DeepSpeed, but its libraries import it if it is installed, which takes seconds.
"""


@dataclass(frozen=True)
class Training:
    """Measurements of one training run."""

    tokens_per_second: float
    peak_bytes: int
    start_seconds: float
    """Seconds from the start of the command to the start of its first step."""
    stages: dict[str, float]
    """Stages of the start, each with the seconds from the start of the command."""


class Bench:
    """Corpora, vocabularies and shards that the rows share, and the commands that run each side."""

    def __init__(self, settings: argparse.Namespace, folder: Path) -> None:
        self.settings, self.folder, self._folders = settings, folder, 0
        self.threads = len(os.sched_getaffinity(0))
        self.precision: str = settings.precision or ("bf16" if multiplies_bf16() else "fp32")
        self.spec = ModelSpec(settings.hidden_size, settings.layers, 8, 2, 4 * settings.hidden_size)
        self._environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONUNBUFFERED": "1",
        }

    @cached_property
    def machine(self) -> str:
        """One line that describes the machine, the library versions and the model."""
        import torch
        import transformers

        return (
            f"{cpu_name()}, {self.threads} threads, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, {datetime.date.today()}: "
            f"{self.settings.layers} x {self.settings.hidden_size}, {self.precision}, "
            f"{self.settings.batch} x {self.settings.context_length} tokens a step, medians of {self.settings.repeats}"
        )

    def corpus(self, size_bytes: int) -> Path:
        """Return a JSON lines file of articles with about `size_bytes` of text, from `--corpus` if it is given."""
        path = self.folder / f"corpus-{size_bytes}.jsonl"
        if path.exists():
            return path
        texts = articles(size_bytes) if self.settings.corpus is None else first_texts(self.settings.corpus, size_bytes)
        with path.open("w", encoding="utf-8") as file:
            for i, text in enumerate(texts):
                json.dump({"id": str(i), "title": "", "tags": "", "text": text}, file, ensure_ascii=False)
                file.write("\n")
        return path

    @cached_property
    def qwen(self) -> Path:
        """Folder of the large vocabulary: Qwen2's, or the one of `--vocabulary`."""
        if self.settings.vocabulary:
            return Path(self.settings.vocabulary)
        folder: Path = import_module("tests.qwen").qwen2_tokenizer_folder(self.folder / "qwen")
        return folder

    @cached_property
    def small(self) -> Path:
        """Folder of a small vocabulary that is trained on the training text."""
        folder = self.folder / "small"
        self._job(
            "tokenizer",
            data=f"source={self.corpus(self.settings.train_bytes)}",
            tokenizer=f"source={folder} vocab_size={SMALL_VOCABULARY}",
        )
        return folder

    def shards(self, tokenizer: Path, validation_fraction: float) -> Path:
        """Prepare the training text with `tokenizer`, once, and return the folder of the shards."""
        shards = self.folder / f"shards-{tokenizer.name}-{validation_fraction}"
        if shards.exists():
            return shards
        corpus = self.corpus(self.settings.train_bytes)
        self._job(
            "prepare",
            data=f"source={corpus} shards={shards} validation_fraction={validation_fraction}",
            tokenizer=f"source={tokenizer}",
        )
        return shards

    def prepare_ours(self, processes: int) -> Finished:
        """Run `job prepare` on the larger corpus."""
        shards = self._new_folder("prepared")
        corpus = self.corpus(self.settings.prepare_bytes)
        return self._job(
            "prepare",
            {"preparation running": lambda log, commands: any(shards.glob("*"))},
            data=f"source={corpus} shards={shards} processes={processes} slice_bytes=4MiB",
            tokenizer=f"source={self.qwen}",
        )

    def prepare_theirs(self, processes: int) -> tuple[Finished, dict[str, Any]]:
        """Run the tutorial's recipe until its sequences are cut, with an empty cache; return its report too."""
        cache_folder = self._new_folder("datasets")
        more = ["--num-proc", str(processes)] if processes > 1 else []
        return self._tutorial("data", self.settings.prepare_bytes, more, {"HF_DATASETS_CACHE": str(cache_folder)})

    def train_ours(self, tokenizer: Path, steps: int, batch: int) -> Training:
        """Run `job train` for `steps` steps of `batch` sequences and return its measurements."""
        output = self._new_folder("run")
        stages = {
            "launcher running": lambda log, commands: any("job.launcher.agent" in command for command in commands),
            "worker running": lambda log, commands: any("job.launcher.worker" in command for command in commands),
            "run claimed": lambda log, commands: "\nrun " in f"\n{log}",
            "first step done": lambda log, commands: "\nstep 1/" in log,
        }
        finished = self._job(
            "train",
            stages,
            # With some validation text, the run also does its two evaluation batches before the first step.
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
        *before, (_, first_step_done) = finished.seen.items()
        return Training(
            tokens_per_second=tokens / statistics.median(others or [first]),
            peak_bytes=finished.peak_bytes,
            start_seconds=first_step_done - first,
            stages=dict(before) | {"first step begins": first_step_done - first},
        )

    def train_theirs(self, steps: int, batch: int) -> Training:
        """Train with the tutorial's recipe and return the measurements; its sequences must be in the cache by then."""
        more = ["--batch", str(batch), "--accumulation", "1", "--max-steps", str(steps)]
        finished, report = self._tutorial("trained", self.settings.train_bytes, more)
        ended = report["steps_ended"]
        seconds = [after - before for before, after in itertools.pairwise(ended)]
        tokens = batch * self.settings.context_length
        stages = report["stages"] | {"first step begins": report["first_step_began"]}
        return Training(
            tokens_per_second=tokens / statistics.median(seconds or [ended[0] - report["first_step_began"]]),
            peak_bytes=finished.peak_bytes,
            start_seconds=report["first_step_began"] - finished.began,
            stages={name: at - finished.began for name, at in stages.items()},
        )

    def evaluate_ours(self) -> tuple[float, int]:
        """Return the tokens per second and peak memory of evaluating random weights with `ValidationSet`."""
        report_file = self._new_folder("evaluation") / "report.json"
        orders = {
            "shards": str(self.shards(self.qwen, 0.1)),
            "cache": str(self.folder / "cache"),
            "spec": asdict(self.spec),
            "context_length": self.settings.context_length,
            "precision": self.precision,
            "batch": self.settings.batch,
            "sequences": self.settings.evaluated_sequences,
            "report": str(report_file),
        }
        self._run([sys.executable, "-m", "benchmarks.comparison", json.dumps(orders)])
        report = json.loads(report_file.read_text())
        return report["targets"] / report["seconds"], report["peak_bytes"]

    def evaluate_theirs(self) -> tuple[float, int]:
        """Return the tokens per second and peak memory of the same evaluation with transformers' Trainer."""
        more = ["--batch", str(self.settings.batch), "--evaluated-sequences", str(self.settings.evaluated_sequences)]
        finished, report = self._tutorial("evaluated", self.settings.train_bytes, more)
        tokens = report["evaluated_sequences"] * (self.settings.context_length - 1)
        return tokens / report["evaluate_seconds"], finished.peak_bytes

    def _tutorial(
        self, until: str, corpus_bytes: int, more: Sequence[str], environment: dict[str, str] | None = None
    ) -> tuple[Finished, dict[str, Any]]:
        report = self._new_folder("tutorial") / "report.json"
        command = [sys.executable, "-c", TUTORIAL, f"--corpus={self.corpus(corpus_bytes)}"]
        command += [f"--tokenizer={self.qwen}", f"--output={report.parent}", f"--report={report}", f"--until={until}"]
        command += [f"--precision={self.precision}", f"--context-length={self.settings.context_length}"]
        command += [f"--hidden-size={self.spec.hidden_size}", f"--num-hidden-layers={self.spec.num_hidden_layers}"]
        command += [f"--intermediate-size={self.spec.intermediate_size}", *more]
        finished = self._run(command, environment=environment)
        return finished, json.loads(report.read_text())

    def _job(self, command: str, stages: Stages | None = None, **sections: str) -> Finished:
        options = [f"--{section}.{setting}" for section, settings in sections.items() for setting in settings.split()]
        return self._run([sys.executable, "-m", "job", command, *options], stages)

    def _run(
        self, command: Sequence[str], stages: Stages | None = None, environment: dict[str, str] | None = None
    ) -> Finished:
        log = self._new_folder("log") / "log"
        return run(command, REPOSITORY, self._environment | (environment or {}), log, stages)

    def _new_folder(self, name: str) -> Path:
        self._folders += 1
        folder = self.folder / f"{self._folders}-{name}"
        folder.mkdir()
        return folder

    def help(self) -> Finished:
        """Run `python -m job --help`."""
        return self._run([sys.executable, "-m", "job", "--help"])

    @cached_property
    def cut_theirs(self) -> tuple[Finished, dict[str, Any]]:
        """The tutorial's run that cuts the training text into sequences and leaves them in its cache."""
        return self._tutorial("data", self.settings.train_bytes, [])

    def warm(self) -> None:
        """Prepare the training data of both sides, so that no measurement includes it."""
        _ = self.shards(self.qwen, 0.01), self.cut_theirs

    @cached_property
    def trained(self) -> list[list[Training]]:
        """Training runs of both sides, taken in turns: ours, then the tutorial's."""
        self.warm()
        steps, batch = self.settings.steps + 1, self.settings.batch
        return self.in_turns(lambda: self.train_ours(self.qwen, steps, batch), lambda: self.train_theirs(steps, batch))

    def in_turns(self, *measures: Callable[[], Any], repeats: int | None = None) -> list[list[Any]]:
        """Call each of `measures` once in every round and return the results of each, by measure."""
        rounds = [[measure() for measure in measures] for _ in range(repeats or self.settings.repeats)]
        return [list(results) for results in zip(*rounds, strict=True)]


def evaluate_here(orders: dict[str, Any]) -> None:
    """Evaluate in this process and write the report; `Bench.evaluate_ours` starts a process that calls this."""
    # The launcher sets these variables in a real run. Port 0 lets the kernel choose a free port, which is enough for a
    # single process.
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_IGNORE_CUDA_DETECTION": "1", "TORCHDYNAMO_DISABLE": "1"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from job.data.tokenizer import load_tokenizer
    from job.model.language_model import LanguageModel, build_model
    from job.runs.world import World
    from job.training.accelerator import Strategy, start_accelerator
    from job.training.distributed import StepSync
    from job.training.validation import ValidationSet

    manifest, world = load_manifest(orders["shards"]), World(0, 0, 1, 1)
    tokenizer = load_tokenizer(f"{orders['shards']}/{manifest.tokenizer}", Path(orders["cache"]))
    spec = ModelSpec(**orders["spec"])
    accelerator = start_accelerator(Strategy("ddp", orders["precision"], 1, 1, 1, 0.0))
    model = LanguageModel(build_model(spec, manifest.vocab_size, manifest.eod_id, orders["context_length"], seed=1))
    validation_set = ValidationSet(
        orders["shards"],
        manifest,
        tokenizer,
        orders["context_length"],
        world,
        seed=0,
        batch_size=orders["batch"],
        cache_dir=Path(orders["cache"]),
        cache_bytes=2**40,
    )
    sync = StepSync(world, lambda: False, lambda: None)
    began = time.perf_counter()
    evaluation = validation_set.evaluate(model, accelerator.device, accelerator.autocast, sync, orders["sequences"])
    assert evaluation is not None
    report = {"seconds": time.perf_counter() - began, "targets": evaluation.targets, "peak_bytes": peak_bytes()}
    Path(orders["report"]).write_text(json.dumps(report))


def multiplies_bf16() -> bool:
    """Return True if the CPU has instructions for bf16 products."""
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


if __name__ == "__main__":
    evaluate_here(json.loads(sys.argv[1]))
