"""What settings and data say of a run before its first step: the rules that `check` shows and `train` says as well."""

from collections.abc import Iterator
from dataclasses import dataclass

from job import storage
from job.config import Config, Train
from job.data.manifest import Manifest
from job.errors import UserError


@dataclass(frozen=True)
class Length:
    """How long a run is."""

    steps: int
    """Optimizer steps, from the first to the last."""
    steps_of_epochs: int
    """Those that all of its epochs would have."""
    windows_per_epoch: int


@dataclass(frozen=True)
class Remark:
    """Something that may not be what the person who starts the run wants."""

    name: str
    """What was looked at."""
    found: str
    remedy: str
    is_wrong: bool = False
    """Whether it cannot go well."""

    def __str__(self) -> str:
        return f"! {self.name}: {self.found}; {self.remedy}"


def check_learning_rates(train: Train) -> None:
    """Raise a UserError if the learning rate would end above where it begins."""
    if train.min_learning_rate > train.learning_rate:
        expected = f"is above train.learning_rate ({train.learning_rate:g}), from which the cosine comes down to it"
        raise UserError("train.min_learning_rate", train.min_learning_rate, expected, "let it end where it is lower")


def remarks(config: Config, manifest: Manifest, length: Length, nodes: int) -> Iterator[Remark]:
    """All rules, for a run of `length` over the data set on so many nodes."""
    yield from about_schedule(config, length)
    yield from about_data(config, manifest, length)
    yield from about_nodes(config, nodes)


def about_schedule(config: Config, length: Length) -> Iterator[Remark]:
    """Intervals against the number of steps."""
    train, checkpoint, steps = config.train, config.checkpoint, length.steps
    if train.max_steps is not None and train.max_steps > length.steps_of_epochs:
        found = f"train.max_steps is {train.max_steps:,}, but train.epochs ({train.epochs}) end after {steps:,} steps"
        yield Remark("schedule", found, "raise train.epochs, or leave train.max_steps out")
    if train.warmup_steps >= steps:
        found = f"all {steps:,} steps are in the warm-up ({train.warmup_steps:,}): train.learning_rate is never reached"
        yield Remark("schedule", found, f"set train.warmup_steps to {max(1, steps // 20)} or so")
    if checkpoint.every > steps and checkpoint.every_minutes is None:
        found = f"a checkpoint every {checkpoint.every:,} of {steps:,} steps: none before the end"
        yield Remark("schedule", found, f"set checkpoint.every to {max(1, steps // 10)} or so")


def about_data(config: Config, manifest: Manifest, length: Length) -> Iterator[Remark]:
    """The batch, the context and the cache against the shards."""
    train, windows = config.train, length.windows_per_epoch
    if windows < train.global_batch_size:
        found = f"an epoch has {windows:,} sequences, fewer than the {train.global_batch_size:,} of a step"
        yield Remark("batch", found, "set train.global_batch_size or train.context_length to less, or take more text")
    documents = sum(shard.documents for shard in manifest.train)
    mean = sum(shard.tokens for shard in manifest.train) / max(1, documents)
    if train.context_length > mean and not train.document_masking:
        found = (
            f"train.context_length is {train.context_length:,}, and the documents have {mean:,.0f} tokens on average: "
            "most sequences hold several"
        )
        yield Remark("context", found, "shorten it, or let tokens see their own document only: train.document_masking")
    if not any(shard.tokens > 1 for shard in manifest.validation):
        yield Remark("held-out data", "there is none: no evaluation", "prepare with data.validation_fraction 0.1")
    sizes = [shard.size for shard in manifest.train]
    most, room = max([*sizes, min(int(config.data.shuffle_bytes), sum(sizes))]), int(config.data.cache_bytes)
    if storage.is_remote(config.data.shards) and config.data.node_groups == 1 and most > room:
        found = f"{most:,} bytes of shards are shuffled together, data.cache_bytes has room for {room:,}"
        remedy = f"set data.cache_bytes to {most} or more, or data.shuffle_bytes to less"
        yield Remark("shard cache", found, remedy, is_wrong=True)


def about_nodes(config: Config, nodes: int) -> Iterator[Remark]:
    """Groups of nodes against their number."""
    if config.data.node_groups > nodes:
        found = f"data.node_groups is {config.data.node_groups} for {nodes} nodes: each reads several parts"
        yield Remark("node groups", found, f"set data.node_groups to {nodes} or less")
