"""The held-out shards as the processes of a run evaluate them together, during training and by `job evaluate`."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from job.config import Config
from job.data.loader import EvaluationLoader
from job.data.manifest import Manifest, load_manifest
from job.data.order import EvaluationOrder
from job.data.tokenizer import TextTokenizer
from job.errors import UserError
from job.local_dirs import cache_folder
from job.model.architecture import LanguageModel
from job.report import Report
from job.runs.launch_context import Start
from job.runs.load_model import load_trained
from job.runs.world import World
from job.training.distributed import Lockstep
from job.training.engine import Strategy, start_accelerator
from job.training.evaluation import Evaluation, evaluate
from job.training.hang_detector import Watchdog
from job.training.process_group import join

DONE, STOPPED = "done", "stopped"


class HeldOut:
    """The held-out windows of a data set, cut for one context length.

    Args:
        config: where the shards are, and how large a batch is.
        manifest: the data set.
        tokenizer: the one that made it.
        context_length: of the model.
        world: this process among the others; all call `evaluate` together.
    """

    def __init__(
        self, config: Config, manifest: Manifest, tokenizer: TextTokenizer, context_length: int, world: World
    ) -> None:
        self._config, self._manifest, self._tokenizer = config, manifest, tokenizer
        self._context_length, self._world = context_length, world

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held out."""
        return not any(shard.tokens > 1 for shard in self._manifest.validation)

    def evaluate(
        self,
        model: LanguageModel,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        lockstep: Lockstep,
        max_windows: int | None = None,
    ) -> Evaluation | None:
        """The loss over `max_windows` windows spread over the shards, or over all; None if the run is to stop."""
        order = EvaluationOrder(
            [shard.tokens for shard in self._manifest.validation],
            self._context_length,
            self._config.data.seed,
            max_windows,
        )
        with EvaluationLoader(
            self._config.data.shards,
            self._manifest,
            order,
            batch_size=self._config.evaluate.batch_size,
            rank=self._world.rank,
            world_size=self._world.world_size,
            cache_dir=cache_folder(self._config.data.cache_dir),
            cache_bytes=int(self._config.data.cache_bytes),
            say=Report(self._world.rank).say,
        ) as loader:
            batches = ((batch.input_ids, batch.labels) for batch in loader)
            sizes = self._tokenizer.token_sizes
            return evaluate(model, batches, sizes, device, autocast, lambda: lockstep.go_on(loader.poll))


def evaluate_trained(config: Config, world: World, start: Start) -> str:
    """`job evaluate`: a trained model on all held-out windows, over all processes.

    Returns:
        ``done``, or ``stopped``: it has found out nothing.

    Raises:
        UserError: there is no model, no data set, or the two have different tokenizers.
    """
    source, setting = (
        (config.evaluate.model, "evaluate.model") if config.evaluate.model else (config.run.output, "run.output")
    )
    manifest = load_manifest(config.data.shards)
    trained = load_trained(source, setting, cache_folder(config.data.cache_dir))
    if trained.tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        expected = f"was made with another tokenizer than the model in {trained.source}"
        raise UserError("data.shards", config.data.shards, expected, "prepare the corpus with the model's tokenizer")
    join(world, start.device)
    accelerator = start_accelerator(Strategy("ddp", config.train.precision, world.world_size, 1, 1, 0.0))
    model = LanguageModel(trained.model, config.train.loss_chunk_tokens, config.train.document_masking).to(
        accelerator.device
    )
    held_out = HeldOut(config, manifest, trained.tokenizer, trained.context_length, world)
    if held_out.is_empty:
        expected = "the data set holds nothing out"
        raise UserError("data.shards", config.data.shards, expected, "prepare it with data.validation_fraction above 0")
    watchdog = Watchdog(world, config.train.hang_timeout.seconds, start.on_hang)
    lockstep = Lockstep(world, start.stop_requested, watchdog.beat)
    found = held_out.evaluate(model, accelerator.device, accelerator.autocast, lockstep)
    watchdog.close()
    if found is None:
        return STOPPED
    Report(world.rank).table(
        trained.source,
        [
            ("held-out tokens", f"{found.targets:,}"),
            ("UTF-8 bytes", f"{found.utf8_bytes:,}"),
            ("characters", f"{found.characters:,}"),
            ("nats per token", f"{found.nats_per_token:.6f}"),
            ("bits per byte", f"{found.bits_per_byte:.6f}"),
            ("bits per character", f"{found.bits_per_character:.6f}"),
        ],
    )
    return DONE
