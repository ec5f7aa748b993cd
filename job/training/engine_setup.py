"""Building the engine of a start: the model with its weights, how it is spread, and what computes it."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from job.config import Train
from job.data.manifest import Manifest
from job.model import gpu
from job.model.attention import why_not_flash_attention_3
from job.model.language_model import LanguageModel, build_model
from job.model.spec import ModelSpec
from job.runs.checkpoint import Checkpoint, CheckpointFiles, download_checkpoint
from job.runs.choices import Choices
from job.runs.resume import OpenedRun
from job.runs.world import World
from job.training.accelerator import Strategy, start_accelerator
from job.training.distributed import all_ranks
from job.training.engine import DoesNotFit, Engine
from job.training.optimizer_settings import OptimizerSettings


def build_engine(
    train: Train, world: World, spec: ModelSpec, manifest: Manifest, opened: OpenedRun, folder: Path
) -> tuple[Engine, list[tuple[str, str]]]:
    """Return the engine with the weights to continue from, and rows of the start's table about it. A collective.

    Args:
        train: the settings of training.
        world: this process among the others.
        spec: the shape of the network.
        manifest: the data set, which decides the vocabulary.
        opened: the run.
        folder: local folder of this start; on rank 0 it has the checkpoint's tensors.

    Raises:
        DoesNotFit: a micro-batch does not fit into memory.
    """
    choices = opened.choices
    causal_lm = build_model(spec, manifest.vocab_size, manifest.eod_id, train.context_length, train.seed)
    strategy = strategy_of(train, choices)
    engine = Engine(
        start_accelerator(strategy),
        LanguageModel(causal_lm, int(choices.chunk_tokens.value), train.document_masking),
        strategy,
        OptimizerSettings(
            train.optimizer,
            train.weight_decay,
            train.beta1,
            train.beta2,
            train.epsilon,
            train.muon_momentum,
            train.muon_learning_rate / train.learning_rate,
        ),
    )
    if opened.checkpoint is not None:
        _load(engine, opened.checkpoint, world, folder)
    attention = _choose_attention(train, engine)
    compiled, too_large = try_micro_batches(train, choices.may_shrink, engine, world)
    cut = replace(
        choices.cut,
        micro_batch_size=engine.strategy.micro_batch_size,
        gradient_accumulation_steps=engine.strategy.gradient_accumulation_steps,
        reason=f"{' and '.join(map(str, too_large))} did not fit" if too_large else choices.cut.reason,
    )
    return engine, [
        ("strategy", str(choices.strategy)),
        ("precision", str(choices.precision)),
        ("device", f"{device_name(engine.device)}{f' ({choices.device.reason})' if choices.device.reason else ''}"),
        ("micro-batches", str(cut)),
        ("tokens in a chunk of the loss", str(choices.chunk_tokens)),
        ("attention", attention),
        ("compiled", compiled),
    ]


def try_micro_batches(train: Train, may_shrink: bool, engine: Engine, world: World) -> tuple[str, list[int]]:
    """Compile the step if it is to be, and find a micro-batch that fits into the memory of every rank. A collective.

    Args:
        train: the settings of training.
        may_shrink: True if a micro-batch that does not fit is replaced by a smaller one.
        engine: before its first step.
        world: this process among the others.

    Raises:
        DoesNotFit: the micro-batch does not fit on some rank, and there is no smaller one or it may not be changed.

    Returns:
        The row about compiling, and the sizes that did not fit.
    """
    is_compiled, too_large = train.compiles(gpu.is_gpu(engine.device)), list[int]()
    while True:
        began, compiled, is_tried, fits = time.perf_counter(), "no", False, True
        try:
            if is_compiled:
                why_not = engine.compile(train.context_length)
                is_tried = why_not is None  # `compile` makes a trial itself.
                compiled = f"no: {why_not}" if why_not else f"in {time.perf_counter() - began:.0f} s"
            if may_shrink and not is_tried:
                engine.try_micro_batch(train.context_length)
        except DoesNotFit:
            fits = False
        if all_ranks(world, fits, engine.device):
            return compiled, too_large
        smaller = engine.smaller_micro_batches
        if not may_shrink or not smaller:
            raise engine.does_not_fit()
        too_large.append(engine.strategy.micro_batch_size)
        engine.change_micro_batch(smaller[-1])
        torch.compiler.reset()  # It refuses the ninth version of a function.
        gpu.free_cached_memory()


def strategy_of(train: Train, choices: Choices) -> Strategy:
    """Return the engine's settings for these choices."""
    cut = choices.cut
    return Strategy(
        choices.strategy.value,
        choices.precision.value,
        cut.world_size,
        cut.micro_batch_size,
        cut.gradient_accumulation_steps,
        train.gradient_clipping,
        train.spike_factor,
        choices.gradient_sum,
    )


def _load(engine: Engine, checkpoint: Checkpoint, world: World, folder: Path) -> None:
    """Load a checkpoint into every process. Each node downloads it once; rank 0 has it in its `folder` already.

    Each `folder` is empty again afterwards.
    """
    if world.local_rank == 0 and world.rank != 0:
        download_checkpoint(checkpoint, folder)
    folders: list[Any] = [str(folder)]
    if world.world_size > 1:
        folders = [None] * world.world_size
        dist.all_gather_object(folders, str(folder))
    files = CheckpointFiles(Path(folders[world.rank - world.local_rank]))
    engine.load(checkpoint.state.step, files, checkpoint.state.guard)
    engine.accelerator.wait_for_everyone()
    for path in folder.iterdir():
        path.unlink()


def _choose_attention(train: Train, engine: Engine) -> str:
    """Set up what computes attention, and return what that is."""
    on_gpu = gpu.is_gpu(engine.device)
    chosen = ["SDPA"]
    if train.flash_attention_3:
        why_not = why_not_flash_attention_3(engine.module.causal_lm.config, train.context_length, engine.device)
        chosen = [f"SDPA, no FlashAttention-3: {why_not}" if why_not else "FlashAttention-3"]
    if train.document_masking:
        why_not = engine.pack_documents(train.context_length) if on_gpu else "no GPU"
        chosen.append(f"documents apart by a mask: {why_not}" if why_not else "documents apart without a mask")
    return "; ".join(chosen)


def device_name(device: torch.device) -> str:
    """Return ``cpu``, or the name of the GPU."""
    return gpu.name(device) if gpu.is_gpu(device) else device.type
