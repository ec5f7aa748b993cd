"""Train and measure the runs of the speedrun: the recipes, the sizes of the comparison, and the commands."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import log
from pathlib import Path
from typing import Any

from benchmarks.comparison import REPOSITORY, TUTORIAL
from job import storage
from job.data.manifest import load_manifest
from job.data.split import is_validation
from job.model.flops import flops_per_token
from job.model.spec import ModelSpec
from job.runs.metrics_file import read_metrics

VALIDATION_FRACTION, SPLIT_SEED = 0.1, 2333
TUTORIAL_WARMUP = 0.057
"""Share of the steps: 200 of the tutorial's 3,516."""
WARMUP = 0.05
"""Share of the steps that the new recipe warms up."""


@dataclass(frozen=True)
class Size:
    """The size at which recipes are compared: model, batch, vocabularies and amount of text."""

    spec: ModelSpec
    context_length: int
    global_batch_size: int
    """Sequences in a step."""
    same_vocabulary: int
    """Entries of the vocabulary that both sides have in row 1."""
    own_vocabulary: int
    """Entries of the new recipe's vocabulary in rows 2 to 4."""
    same_tokens: int
    """Tokens of a run in row 1."""
    tutorial_tokens: int
    """Tokens of the tutorial's vocabulary in a run of rows 2 to 4."""
    searched_lengths: int
    """Most runs of the new recipe in row 4, each of another length."""
    adamw_rates: tuple[float, ...]
    """Rates of the opponent, of which the best is taken."""
    device: str = "cpu"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step."""
        return self.context_length * self.global_batch_size

    def with_width(self, width: int) -> "Size":
        """Return the same size with another width of the model, and the opponent's rates for it."""
        spec = replace(self.spec, hidden_size=width, intermediate_size=4 * width)
        return replace(self, spec=spec, adamw_rates=_rates(width))

    def flops(self, vocab_size: int, tokens: int) -> float:
        """Return the FLOPs of training on so many tokens with a vocabulary."""
        return flops_per_token(self.spec, vocab_size, self.context_length).total * tokens


def rate_at_width(width: int) -> float:
    """Return the tutorial's rate, 5e-4 at width 512, for another width: in inverse proportion, as in muP.

    Yang et al. 2022, arXiv:2203.03466, table 3: the rate of Adam for hidden matrices.
    """
    return 5e-4 * 512 / width


def _rates(width: int) -> tuple[float, ...]:
    return tuple(factor * rate_at_width(width) for factor in (0.5, 1.0, 2.0))


CPU = Size(
    ModelSpec(96, 3, 4, 2, 384), 128, 4, 2048, 8192, same_tokens=250_000, tutorial_tokens=150_000,
    searched_lengths=6, adamw_rates=_rates(96),
)  # fmt: skip
CUDA = Size(
    ModelSpec(512, 12, 8, 2, 2048), 512, 256, 16_384, 16_384, same_tokens=150_000_000, tutorial_tokens=230_000_000,
    searched_lengths=6, adamw_rates=_rates(512), device="cuda",
)  # fmt: skip
TINY = Size(
    ModelSpec(16, 1, 2, 1, 32), 16, 4, 300, 320, same_tokens=640, tutorial_tokens=512, searched_lengths=2,
    adamw_rates=(rate_at_width(16),),
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The optimizer, the schedule and the initial weights of a run; all other settings come from its `Size`."""

    name: str
    train: Mapping[str, str] = field(default_factory=dict)
    """Settings of section `train`."""
    init: str = "default"

    def without(self, name: str, init: str | None = None, **train: str) -> "Recipe":
        """Return the recipe with one lever changed."""
        return replace(self, name=name, train={**self.train, **train}, init=init or self.init)


def tutorial_recipe(rate: float) -> Recipe:
    """Return the tutorial's optimizer and schedule, at this learning rate."""
    return Recipe(f"AdamW {rate:.1e}", {"optimizer": "adamw", "learning_rate": str(rate), "schedule": "cosine"})


NEW = Recipe(
    "new",
    {
        "optimizer": "muon",
        "muon_learning_rate": "0.01",
        "learning_rate": "1.6e-2",
        "beta2": "0.95",
        "schedule": "linear",
    },
    "zero_projections",
)


@dataclass(frozen=True)
class Trained:
    """Measurements of a run."""

    recipe: str
    vocab_size: int
    seed: int
    tokens: int
    flops: float
    bits_per_byte: float
    """Bits per byte of the held-out text."""
    seconds: float
    """Wall-clock time of the steps, without start-up and evaluation."""
    other_seconds: float
    """Wall-clock time of the rest of the command."""
    cpu_seconds: float
    """CPU time of the whole command."""
    epochs: float
    """Passes over the text; above 1 some of it repeats."""


class Lab:
    """Texts, vocabularies and shards in a folder, and the runs that were made of them; each is made once.

    Args:
        size: the size of all runs.
        corpus: JSON lines with the field ``text``, as a path or a URL.
        folder: an empty folder for everything.
        precision: ``fp32`` or ``bf16``.
    """

    def __init__(self, size: Size, corpus: str, folder: Path, precision: str) -> None:
        self.size, self.folder, self.precision = size, folder, precision
        self._runs: dict[tuple[Any, ...], Trained] = {}
        self._environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        }
        self.prepare_seconds: dict[str, float] = {}
        """Seconds of making each vocabulary and of preparing its shards."""
        lines = storage.read_bytes(corpus).decode().splitlines()
        texts = [text for line in lines if (text := json.loads(line)["text"])]
        self.text_bytes = sum(len(text.encode()) for text in texts)
        for name, keep in (("all", None), ("train", False)):
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for index, text in enumerate(texts):
                    if keep is None or is_validation(str(index), text, SPLIT_SEED, VALIDATION_FRACTION) == keep:
                        json.dump({"id": str(index), "text": text}, file, ensure_ascii=False)
                        file.write("\n")

    # ---- Vocabularies and shards ----

    def own_tokenizer(self, entries: int) -> Path:
        """Return the folder of a vocabulary trained on the training text."""
        folder = self.folder / f"own-{entries}"
        if not folder.exists():
            corpus = self.folder / "all.jsonl"
            words = [f"--data.source={corpus}", f"--data.validation_fraction={VALIDATION_FRACTION}"]
            words += [f"--data.seed={SPLIT_SEED}", f"--tokenizer.source={folder}", f"--tokenizer.vocab_size={entries}"]
            self._timed(f"vocabulary {entries:,}", "tokenizer", *words)
        return folder

    def tutorial_tokenizer(self) -> Path:
        """Return the folder of the tutorial's vocabulary: Qwen2's, or a stand-in of 400 entries for tiny runs."""
        if self.size is TINY:
            return self.own_tokenizer(400)
        folder = self.folder / "qwen2"
        if not folder.exists():
            import_module("tests.qwen").qwen2_tokenizer_folder(folder)
        return folder

    def shards(self, tokenizer: Path) -> Path:
        """Return the folder of the text in the tokens of a vocabulary."""
        folder = self.folder / f"shards-{tokenizer.name}"
        if not folder.exists():
            words = [f"--data.source={self.folder / 'all.jsonl'}", f"--data.shards={folder}"]
            words += [f"--data.validation_fraction={VALIDATION_FRACTION}", f"--data.seed={SPLIT_SEED}"]
            self._timed(f"shards {tokenizer.name}", "prepare", *words, f"--tokenizer.source={tokenizer}")
        return folder

    def train_tokens(self, tokenizer: Path) -> int:
        """Return the tokens of the training text in a vocabulary."""
        return sum(shard.tokens for shard in load_manifest(str(self.shards(tokenizer))).train)

    def _timed(self, name: str, command: str, *words: str) -> None:
        began = time.monotonic()
        self._job(command, *words)
        self.prepare_seconds[name] = time.monotonic() - began

    # ---- Runs ----

    def train(self, recipe: Recipe, tokenizer: Path, tokens: int, seed: int = 0) -> Trained:
        """Return the measurements of a run of this program, planned to end after about so many tokens."""
        size, shards = self.size, self.shards(tokenizer)
        steps = max(1, round(tokens / size.tokens_per_step))
        key = recipe.name, tokenizer.name, steps, seed
        if key in self._runs:
            return self._runs[key]
        manifest, output = load_manifest(str(shards)), self.folder / f"run-{len(self._runs)}"
        warmup = WARMUP if recipe.train["optimizer"] == "muon" else TUTORIAL_WARMUP
        train = {
            "processes": "1", "strategy": "ddp", "device": size.device, "precision": self.precision,
            "context_length": str(size.context_length), "global_batch_size": str(size.global_batch_size),
            "max_steps": str(steps), "epochs": "1000", "warmup_steps": str(max(1, round(warmup * steps))),
            "seed": str(seed), "log_every": "1", **recipe.train,
        }  # fmt: skip
        model = {
            "hidden_size": size.spec.hidden_size, "num_hidden_layers": size.spec.num_hidden_layers,
            "num_attention_heads": size.spec.num_attention_heads,
            "num_key_value_heads": size.spec.num_key_value_heads,
            "intermediate_size": size.spec.intermediate_size, "init": recipe.init,
        }  # fmt: skip
        words = [f"--train.{name}={value}" for name, value in train.items()]
        words += [f"--model.{name}={value}" for name, value in model.items()]
        words += [f"--data.shards={shards}", f"--data.cache_dir={self.folder / 'cache'}", f"--run.output={output}"]
        words += [f"--data.seed={SPLIT_SEED}", "--tracking.to=[]", "--generate.max_new_tokens=1"]
        words += ["--evaluate.every=1000000", "--checkpoint.every=1000000"]
        began, cpu = time.monotonic(), _cpu_seconds()
        self._job("train", *words)
        elapsed, rows = time.monotonic() - began, read_metrics(str(output))
        seconds = sum(row["speed/seconds_per_step"] for row in rows if "speed/seconds_per_step" in row)
        trained_tokens = steps * size.tokens_per_step
        found = Trained(
            recipe.name,
            manifest.vocab_size,
            seed,
            trained_tokens,
            size.flops(manifest.vocab_size, trained_tokens),
            next(row["validation/bits_per_byte"] for row in reversed(rows) if "validation/bits_per_byte" in row),
            seconds,
            elapsed - seconds,
            _cpu_seconds() - cpu,
            trained_tokens / self.train_tokens(tokenizer),
        )
        return self._keep(key, found)

    def train_tutorial(self, rate: float) -> Trained:
        """Return the measurements of `benchmarks.tutorial`, at this learning rate, on the same training text.

        Its model is evaluated by this program, on the same held-out text.
        """
        size, tokenizer = self.size, self.tutorial_tokenizer()
        steps = max(1, round(size.tutorial_tokens / size.tokens_per_step))
        key = "tutorial", rate
        if key in self._runs:
            return self._runs[key]
        folder = self.folder / f"tutorial-{len(self._runs)}"
        folder.mkdir()
        batch = min(32, size.global_batch_size)
        accumulation = size.global_batch_size // batch
        spec, report = size.spec, folder / "report.json"
        command = [
            sys.executable,
            "-c",
            TUTORIAL,
            f"--corpus={self.folder / 'train.jsonl'}",
            f"--tokenizer={tokenizer}",
        ]
        command += [f"--output={folder}", f"--report={report}", f"--precision={self.precision}"]
        command += [f"--context-length={size.context_length}", f"--hidden-size={spec.hidden_size}"]
        command += [
            f"--num-hidden-layers={spec.num_hidden_layers}",
            f"--num-attention-heads={spec.num_attention_heads}",
        ]
        command += [
            f"--num-key-value-heads={spec.num_key_value_heads}",
            f"--intermediate-size={spec.intermediate_size}",
        ]
        command += [f"--batch={batch}", f"--accumulation={accumulation}", f"--max-steps={steps}"]
        command += [f"--learning-rate={rate}", f"--warmup-steps={max(1, round(TUTORIAL_WARMUP * steps))}"]
        began, cpu = time.monotonic(), _cpu_seconds()
        self._run(command)
        elapsed, cpu = time.monotonic() - began, _cpu_seconds() - cpu
        for file in tokenizer.glob("tokenizer*.json"):  # as it was; the Trainer has written it in another form
            shutil.copy(file, folder / "model")
        measured = json.loads(report.read_text())
        seconds = measured["steps_ended"][-1] - measured["first_step_began"]
        manifest = load_manifest(str(self.shards(tokenizer)))
        tokens = steps * size.tokens_per_step
        sequences = measured["sequences"]["train"]
        found = Trained(
            f"tutorial {rate:.1e}",
            manifest.vocab_size,
            0,
            tokens,
            size.flops(manifest.vocab_size, tokens),
            self._bits_per_byte(folder / "model", tokenizer),
            seconds,
            elapsed - seconds,
            cpu,
            steps * size.global_batch_size / sequences,
        )
        return self._keep(key, found)

    def _bits_per_byte(self, model: Path, tokenizer: Path) -> float:
        """Return the bits per byte of a model folder on the held-out text, from the last line of `job evaluate`."""
        words = [f"--evaluate.model={model}", f"--data.shards={self.shards(tokenizer)}"]
        words += [f"--train.context_length={self.size.context_length}", f"--train.device={self.size.device}"]
        words += [f"--data.cache_dir={self.folder / 'cache'}", f"--train.precision={self.precision}"]
        log = self._job("evaluate", *words)
        row = next(line for line in log.splitlines() if "bits per byte" in line)
        return float(row.split("bits per byte")[1].strip(" │|:=").split()[0])

    def _keep(self, key: tuple[Any, ...], found: Trained) -> Trained:
        self._runs[key] = found
        print(
            f"{found.recipe}, {found.vocab_size:,} entries, seed {found.seed}, {found.tokens:,} tokens: "
            f"{found.bits_per_byte:.4f} bits per byte in {found.seconds:.1f} s of steps (+ {found.other_seconds:.1f} s "
            f"of start-up and evaluation; {found.cpu_seconds:.0f} s of CPU time)",
            flush=True,
        )
        return found

    @property
    def runs(self) -> list[Trained]:
        """All runs so far."""
        return list(self._runs.values())

    def _job(self, command: str, *words: str) -> str:
        return self._run([sys.executable, "-m", "job", command, *words])

    def _run(self, command: Sequence[str]) -> str:
        """Run a command and return what it printed."""
        ended = subprocess.run(
            command, cwd=REPOSITORY, env=self._environment, check=False, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {ended.returncode}\n{ended.stdout}")
        return ended.stdout


def _cpu_seconds() -> float:
    """Return the CPU time of all processes that this one has waited for, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def next_length(tried: Mapping[int, bool], longest: int, at_a_time: int) -> int | None:
    """Return the length to try next in the search for the shortest one that reaches a target.

    Args:
        tried: whether a run reached the target, by its length in tokens.
        longest: length of the first run.
        at_a_time: smallest difference of two lengths, in tokens.

    Returns:
        A length between the longest one that failed and the shortest one that did not, in the middle of their
        logarithms; None if they are within 10 % of each other.
    """
    reached = [length for length, did in tried.items() if did]
    failed = [length for length, did in tried.items() if not did]
    if not tried:
        return longest
    if not reached:
        return 2 * max(failed)
    shortest, too_short = min(reached), max((one for one in failed if one < min(reached)), default=0)
    low = too_short or shortest / 4
    middle = round((low * shortest) ** 0.5 / at_a_time) * at_a_time
    if not too_short < middle < shortest or (too_short and log(shortest / too_short) < log(1.1)):
        return None
    return middle
