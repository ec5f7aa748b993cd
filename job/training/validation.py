"""The validation shards, evaluated by all ranks together: during training and by `job evaluate`."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from job.config import Config
from job.data.loader import EvaluationLoader
from job.data.manifest import Manifest, load_manifest
from job.data.order import EvaluationOrder
from job.data.tokenizer import TextTokenizer
from job.errors import UserError
from job.local_dirs import cache_folder
from job.model.language_model import LanguageModel
from job.report import Report
from job.runs.choices import precision_without_run
from job.runs.evaluation_result import Evaluation
from job.runs.launch_context import LaunchContext
from job.runs.load_model import load_model
from job.runs.run_status import RunStatus
from job.runs.run_tokenizer import check_tokenizer
from job.runs.world import World
from job.training.accelerator import Strategy, autocast, start_accelerator
from job.training.distributed import StepSync, join, weakest_hardware
from job.training.evaluation import evaluate
from job.training.hang_detector import HangDetector

PROGRESS_SECONDS = 30
"""Time between two lines about the progress of an evaluation, where there is no progress bar."""


class Progress:
    """Shows how much of an evaluation is done: with a bar on a terminal, with a line now and then in a log."""

    def __init__(self, report: Report) -> None:
        self._report, self._said_at, self._has_bar = report, time.monotonic(), False

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` batches are evaluated."""
        if not self._has_bar:
            self._report.start_bar("evaluation", total)
            self._has_bar = True
        self._report.advance(done)
        if not self._report.shows_bar and time.monotonic() - self._said_at >= PROGRESS_SECONDS:
            self._said_at = time.monotonic()
            self._report.say(f"evaluated {done / total:.0%} of the validation text")


class ValidationSet:
    """The validation sequences of a data set, cut for one context length.

    Args:
        shards_url: the data set.
        manifest: its manifest.
        tokenizer: the tokenizer that made it.
        context_length: tokens of a sequence.
        world: this process among the others, which all call `evaluate` together.
        seed: chooses the sequences when not all are evaluated.
        batch_size: sequences of a batch on one rank.
        cache_dir: local folder for shards.
        cache_bytes: most bytes of shards in that folder.
    """

    def __init__(
        self,
        shards_url: str,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        context_length: int,
        world: World,
        *,
        seed: int,
        batch_size: int,
        cache_dir: Path,
        cache_bytes: int,
    ) -> None:
        self._shards_url, self._manifest, self._tokenizer = shards_url, manifest, tokenizer
        self._context_length, self._world = context_length, world
        self._seed, self._batch_size = seed, batch_size
        self._cache_dir, self._cache_bytes = cache_dir, cache_bytes

    @property
    def is_empty(self) -> bool:
        """True if the data set has no validation text."""
        return not any(shard.tokens > 1 for shard in self._manifest.validation)

    def evaluate(
        self,
        model: LanguageModel,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        sync: StepSync,
        max_sequences: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Evaluation | None:
        """Return the loss on `max_sequences` sequences spread over the shards, or on all.

        Args:
            model: the model, on `device`.
            device: the device of this rank.
            autocast: returns the context that sets the number format.
            sync: lets all ranks stop together.
            max_sequences: most sequences; None: all.
            progress: called before each batch, with the number of batches that are done and of all.

        Returns:
            None if the set is empty, or if all ranks stop before the end.
        """
        if self.is_empty:
            return None
        order = EvaluationOrder(
            [shard.tokens for shard in self._manifest.validation], self._context_length, self._seed, max_sequences
        )
        with EvaluationLoader(
            self._shards_url,
            self._manifest,
            order,
            batch_size=self._batch_size,
            rank=self._world.rank,
            world_size=self._world.world_size,
            cache_dir=self._cache_dir,
            cache_bytes=self._cache_bytes,
            say=Report(self._world.rank).say,
        ) as loader:
            batches = ((batch.input_ids, batch.labels) for batch in loader)
            sizes = self._tokenizer.token_sizes
            done = count()

            def goes_on() -> bool:
                progress(next(done), loader.rounds)
                return sync.go_on(loader.poll)

            return evaluate(model, batches, sizes, device, autocast, goes_on)


def evaluate_model(config: Config, world: World, context: LaunchContext) -> RunStatus:
    """Evaluate a trained model on all validation sequences, over all processes, and print the result.

    Returns:
        ``done``; or ``stopped``, without a result.

    Raises:
        UserError: there is no model, no data set, or the two have different tokenizers.
    """
    source, setting = (
        (config.evaluate.model, "evaluate.model") if config.evaluate.model else (config.run.output, "run.output")
    )
    manifest = load_manifest(config.data.shards)
    trained = load_model(source, setting, cache_folder(config.data.cache_dir))
    check_tokenizer(
        trained.tokenizer,
        manifest.tokenizer_fingerprint,
        found_in=trained.source,
        product="the data set",
        setting="data.shards",
        value=config.data.shards,
        remedy="prepare the corpus with the model's tokenizer",
    )
    join(world, context.device)
    precision = precision_without_run(config.train, weakest_hardware(world, context.device))
    accelerator = start_accelerator(Strategy("ddp", precision, world.world_size, 1, 1, 0.0))
    model = LanguageModel(trained.model, config.train.loss_chunk_tokens, config.train.document_masking).to(
        accelerator.device
    )
    validation = ValidationSet(
        config.data.shards,
        manifest,
        trained.tokenizer,
        trained.context_length,
        world,
        seed=config.data.seed,
        batch_size=config.evaluate.batch_size,
        cache_dir=cache_folder(config.data.cache_dir),
        cache_bytes=int(config.data.cache_bytes),
    )
    if validation.is_empty:
        expected = "the data set has no validation text"
        raise UserError("data.shards", config.data.shards, expected, "prepare it with data.validation_fraction above 0")
    hang_detector = HangDetector(world, config.train.hang_timeout.seconds, context.on_hang)
    sync = StepSync(world, context.stop_requested, hang_detector.beat)
    report = Report(world.rank)
    report.say(
        f"evaluating {trained.source} on {sum(shard.tokens for shard in manifest.validation):,} validation tokens"
    )
    found = validation.evaluate(
        model, accelerator.device, partial(autocast, accelerator, precision), sync, progress=Progress(report)
    )
    report.end_bar()
    hang_detector.close()
    if found is None:
        report.say("stopped before the end: nothing is kept, the next start begins anew")
        return RunStatus.STOPPED
    report.table(
        trained.source,
        [
            ("validation tokens", f"{found.targets:,}"),
            ("UTF-8 bytes", f"{found.utf8_bytes:,}"),
            ("characters", f"{found.characters:,}"),
            ("nats per token", f"{found.nats_per_token:.6f}"),
            ("bits per byte", f"{found.bits_per_byte:.6f}"),
            ("bits per character", f"{found.bits_per_character:.6f}"),
        ],
    )
    return RunStatus.DONE
