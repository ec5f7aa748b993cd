"""The sizes that fit an amount of text and a machine, and the reason for them.

    bytes of text → training tokens → the largest model that they are enough for → epochs, checkpoints

A model is large enough for its text if it sees at least `_TOKENS_PER_PARAMETER` tokens for each parameter. The preset
configs/wiki-54m.yaml has 12 (2 epochs of 329 M tokens for 54.0 M parameters), and Hoffmann et al. 2022 ("Training
Compute-Optimal Large Language Models") recommend 20. Up to 4 passes over the same text are nearly as good as new text
(Muennighoff et al. 2023, "Scaling Data-Constrained Language Models").
"""

import math
from dataclasses import dataclass

from job.config import Model
from job.data.tokenizer_training import BYTES_PER_BYTE
from job.model.architecture import tensor_shapes
from job.model.flops import parameter_counts
from job.model.optimizer_state import optimizer_state
from job.model.spec import ModelSpec
from job.preflight.assumed_data import own_bytes_per_token

_TOKENS_PER_PARAMETER = 10
_MOST_EPOCHS = 4
_MiB = 2**20


@dataclass(frozen=True)
class Size:
    """A model, and the batch and schedule that go with it."""

    name: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    context_length: int
    global_batch_size: int
    warmup_steps: int
    num_key_value_heads: int = 2

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        return ModelSpec(**Model(**{name: getattr(self, name) for name in names}).model_dump())

    @property
    def parameters(self) -> int:
        """Parameters of the model, with its embedding."""
        return parameter_counts(self.spec, self.vocab_size).total

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint with Muon's state."""
        return optimizer_state("muon").checkpoint_bytes(tensor_shapes(self.spec, self.vocab_size))


SMALL = Size("configs/laptop.yaml", 4096, 128, 4, 4, 512, 128, 8, 30)
MIDDLE = Size("between the presets", 8192, 256, 8, 4, 1024, 512, 64, 100)
LARGE = Size("configs/wiki-54m.yaml", 16384, 512, 12, 8, 2048, 512, 256, 200)
_SMALL_STEPS = 600
"""Longest training of the small model: minutes on one core, and measured (configs/laptop.yaml)."""
_LITTLE_TOKENS = 1_000_000
"""Fewer training tokens than these are said to be too few for a model."""


@dataclass(frozen=True)
class Choice:
    """The sizes for this text and machine."""

    size: Size
    epochs: int
    max_steps: int | None
    global_batch_size: int
    warmup_steps: int
    """Steps of the warm-up: at most a fifth of all."""
    every: int
    """Steps between two checkpoints, and between two evaluations."""
    keep: int
    """Checkpoints that are kept."""
    tokenizer_bytes: int
    """Text on which the tokenizer is trained."""
    reason: str
    """Why this model."""
    warnings: tuple[str, ...] = ()
    """Lines about what does not fit."""


def choose_sizes(
    text_bytes: int | None, validation_fraction: float, gpus: int, memory_bytes: int | None, disk_bytes: int
) -> Choice:
    """Return the sizes that fit.

    Args:
        text_bytes: bytes of text in UTF-8; None if that is not known, and then taken as enough for each model.
        validation_fraction: share of the documents that is not trained on.
        gpus: GPUs of this machine.
        memory_bytes: free main memory; None if not known.
        disk_bytes: free bytes on the disk of the checkpoints.
    """
    training_bytes = None if text_bytes is None else text_bytes * (1 - validation_fraction)
    size, reason = _fitting(training_bytes, gpus)
    tokens = None if training_bytes is None else _tokens(training_bytes, size)
    needed = _TOKENS_PER_PARAMETER * size.parameters
    epochs = 2 if tokens is None else min(_MOST_EPOCHS, max(1, math.ceil(needed / tokens)))
    max_steps = _SMALL_STEPS if size is SMALL else None
    # A multiple of the number of processes, which have to share it equally.
    global_batch_size = math.ceil(size.global_batch_size / max(1, gpus)) * max(1, gpus)
    steps = math.inf if tokens is None else epochs * tokens / (global_batch_size * size.context_length)
    steps = min(steps, max_steps or math.inf)
    every = min(200 if size is SMALL else 500, steps / 3)
    # The newest checkpoint is written before the oldest is deleted, and the final model takes a third of one.
    room = int(0.8 * disk_bytes / size.checkpoint_bytes - 4 / 3)
    most = 2 if size is SMALL else 10
    warnings = []
    if tokens is not None and tokens < _LITTLE_TOKENS:
        warnings.append(
            f"about {_rounded(tokens):,} training tokens are enough to try the commands, but too few for a model: more "
            "text helps more than any setting"
        )
    if room < 1:
        warnings.append(
            f"the disk has {disk_bytes / 2**30:,.2f} GiB free, too little for two checkpoints of "
            f"{size.checkpoint_bytes / 2**30:,.2f} GiB: free some, or set run.output to another disk or store"
        )
    largest = 32 * _MiB if size is SMALL else 200 * _MiB
    affordable = largest if memory_bytes is None else memory_bytes // 2 // BYTES_PER_BYTE // _MiB * _MiB
    return Choice(
        size=size,
        epochs=epochs,
        max_steps=max_steps,
        global_batch_size=global_batch_size,
        warmup_steps=int(min(size.warmup_steps, max(1, steps / 5))),
        every=int(max(1, every)),
        keep=max(1, min(most, room)),
        tokenizer_bytes=max(_MiB, min(largest, affordable)),
        reason=reason,
        warnings=tuple(warnings),
    )


def _tokens(training_bytes: float, size: Size) -> float:
    """Return the tokens that the tokenizer of a size makes of so many bytes of text."""
    return training_bytes / own_bytes_per_token(size.vocab_size)


def _fitting(training_bytes: float | None, gpus: int) -> tuple[Size, str]:
    """Return the largest size whose number of parameters suits the text and the processor, and the reason."""
    if not gpus:
        return SMALL, f"without a GPU, {_millions(SMALL.parameters)} parameters train in minutes"
    if training_bytes is None:
        return LARGE, "the recommended model; how much text there is was not looked up"
    for size in (LARGE, MIDDLE):
        tokens = _tokens(training_bytes, size)
        if _MOST_EPOCHS * tokens >= _TOKENS_PER_PARAMETER * size.parameters:
            return size, (
                f"{_millions(tokens)} training tokens, read up to {_MOST_EPOCHS} times, are at least "
                f"{_TOKENS_PER_PARAMETER} for each of {_millions(size.parameters)} parameters"
            )
    return SMALL, (
        f"{_millions(tokens)} training tokens, read {_MOST_EPOCHS} times, are less than {_TOKENS_PER_PARAMETER} for "
        f"each of the {_millions(MIDDLE.parameters)} parameters of the next larger model"
    )


def _rounded(number: float) -> int:
    """Return a number with two digits, as the estimate that it is."""
    return int(float(f"{number:.1e}"))


def _millions(number: float) -> str:
    return f"{number / 1e6:,.1f} M"
