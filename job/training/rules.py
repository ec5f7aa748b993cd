"""Rules about settings and data that can be checked before the first step; `job check` and `job train` print them."""

from collections.abc import Iterator
from dataclasses import dataclass

from job.config import Checkpoint, Data, Model, Train
from job.data.cache_quota import check_cache_bytes
from job.data.manifest import Manifest
from job.data.order import largest_buffer_bytes
from job.errors import UserError
from job.model.optimizer_state import optimizer_state
from job.model.spec import ModelSpec
from job.training.schedule import default_decay


@dataclass(frozen=True)
class Length:
    """The length of a run."""

    steps: int
    """Optimizer steps of the run."""
    steps_of_epochs: int
    """Optimizer steps that all of its epochs would have."""
    sequences_per_epoch: int


@dataclass(frozen=True)
class Remark:
    """A setting that is probably not what the user wants."""

    name: str
    """What the rule is about."""
    found: str
    remedy: str
    is_wrong: bool = False
    """True if the run cannot work like this."""

    def __str__(self) -> str:
        return f"! {self.name}: {self.found}; {self.remedy}"


def check_schedule(train: Train) -> None:
    """Raise a UserError if the learning rate would rise instead of decay, or if its schedule has no `decay_steps`."""
    if train.min_learning_rate > train.learning_rate:
        expected = f"expected at most train.learning_rate ({train.learning_rate:g}), where the decay begins"
        raise UserError("train.min_learning_rate", train.min_learning_rate, expected, "lower it")
    if train.decay_steps is not None and train.schedule != "wsd":
        expected = f"expected null with train.schedule {train.schedule}, which decays from the warm-up to the end"
        raise UserError("train.decay_steps", train.decay_steps, expected, "leave it out, or set train.schedule to wsd")


def check_model_and_schedule(model: Model, train: Train) -> None:
    """Raise a UserError if there is no such model, optimizer or schedule; this needs no data and takes no time."""
    check_schedule(train)
    ModelSpec(**model.model_dump())
    optimizer_state(train.optimizer)


def check_decay_steps(train: Train, steps: int) -> None:
    """Raise a UserError if warm-up and `train.decay_steps` are longer than the run of so many steps."""
    most = max(0, steps - train.warmup_steps)
    if train.decay_steps is not None and train.decay_steps > most:
        expected = f"expected at most {most:,}: the run has {steps:,} steps, the warm-up takes {train.warmup_steps:,}"
        raise UserError("train.decay_steps", train.decay_steps, expected, "lower it, or train longer")


def remarks(
    model: Model, train: Train, data: Data, checkpoint: Checkpoint, manifest: Manifest, length: Length, nodes: int
) -> Iterator[Remark]:
    """Yield the remarks of all rules, for a run of this length on so many nodes."""
    yield from about_initialisation(model, train)
    yield from about_schedule(train, checkpoint, length)
    yield from about_data(train, data, manifest, length)
    yield from about_nodes(data, nodes)


def about_initialisation(model: Model, train: Train) -> Iterator[Remark]:
    """Compare `model.init` with the optimizer.

    The numbers are those of pilot runs on a CPU: 3 layers of width 96, 250,000 tokens, linear decay.
    """
    if model.init == "zero_projections" and train.optimizer == "adamw":
        found = (
            "model.init is zero_projections with train.optimizer adamw, for which it made the result of pilot runs "
            "worse (from 3.268 to 3.303 bits per byte)"
        )
        yield Remark("initialisation", found, "set model.init to default, or train.optimizer to muon")


def about_schedule(train: Train, checkpoint: Checkpoint, length: Length) -> Iterator[Remark]:
    """Compare warm-up, decay and checkpoint interval with the number of steps."""
    steps = length.steps
    if train.max_steps is not None and train.max_steps > length.steps_of_epochs:
        found = f"train.max_steps is {train.max_steps:,}, but train.epochs ({train.epochs}) end after {steps:,} steps"
        yield Remark("schedule", found, "raise train.epochs, or leave train.max_steps out")
    if train.warmup_steps >= steps:
        found = f"all {steps:,} steps are in the warm-up ({train.warmup_steps:,}): train.learning_rate is never reached"
        yield Remark("schedule", found, f"set train.warmup_steps to {max(1, steps // 20)} or so")
    elif train.schedule == "wsd" and train.decay_steps is None and steps - train.warmup_steps < default_decay(steps):
        found = (
            f"the warm-up ({train.warmup_steps:,}) leaves {steps - train.warmup_steps:,} of {steps:,} steps for the "
            f"decay, which has {default_decay(steps):,} by default"
        )
        yield Remark("schedule", found, f"set train.warmup_steps to {max(1, steps // 20)} or so")
    try:
        check_decay_steps(train, steps)
    except UserError as error:
        found = f"train.decay_steps is {train.decay_steps:,}, {error.expected}"
        yield Remark("schedule", found, error.remedy, is_wrong=True)
    if checkpoint.every > steps and checkpoint.every_minutes is None:
        found = (
            f"checkpoint.every is {checkpoint.every:,}, but the run has only {steps:,} steps: it is saved only at its "
            "end or when it is stopped"
        )
        yield Remark("schedule", found, f"set checkpoint.every to {max(1, steps // 10)} or so")


def about_data(train: Train, data: Data, manifest: Manifest, length: Length) -> Iterator[Remark]:
    """Compare batch, context length and cache with the shards."""
    sequences = length.sequences_per_epoch
    if sequences < train.global_batch_size:
        found = f"an epoch has {sequences:,} sequences, fewer than the {train.global_batch_size:,} of a step"
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
        remedy = f"prepare more documents, or with a data.validation_fraction above {manifest.validation_fraction:g}"
        yield Remark("validation data", "there is none: no evaluation", remedy)
    buffer_bytes = largest_buffer_bytes([shard.size for shard in manifest.train], int(data.shuffle_bytes))
    try:
        check_cache_bytes(data.shards, buffer_bytes, data.node_groups, int(data.cache_bytes))
    except UserError as error:
        found = f"data.cache_bytes is {int(data.cache_bytes):,}, but {error.expected}"
        yield Remark("shard cache", found, error.remedy, is_wrong=True)


def about_nodes(data: Data, nodes: int) -> Iterator[Remark]:
    """Compare `data.node_groups` with the number of nodes."""
    if data.node_groups > nodes:
        found = f"data.node_groups is {data.node_groups} for {nodes} nodes: each reads several parts"
        yield Remark("node groups", found, f"set data.node_groups to {nodes} or less")
