"""A process that trains one engine after another on the GPU, under one strategy: gpu_engines.py STRATEGY FILE.

FILE gets what each case saw. Nothing is judged here, since on the fake GPU all values are garbage.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from gpu_child import become_only_rank
from gpu_steps import (
    BAD_STEP,
    BETAS,
    COMPILED,
    CONTEXT_LENGTH,
    EPSILON,
    GLOBAL_BATCH_SIZE,
    GRADIENT_CLIPPING,
    PRECISIONS,
    SAVED_STEP,
    STEPS,
    WEIGHT_DECAY,
    global_batch,
    learning_rate_of,
    new_model,
)
from torch import Tensor

from job.errors import UserError
from job.log_setup import silence_libraries
from job.model.language_model import LanguageModel
from job.runs.checkpoint import CheckpointFiles, TrainingState, download_checkpoint, open_checkpoint
from job.runs.checkpoint_writer import save_checkpoint
from job.training.accelerator import Strategy, start_accelerator
from job.training.engine import Engine
from job.training.optimizer_settings import OptimizerSettings

ADAMW = OptimizerSettings("adamw", WEIGHT_DECAY, *BETAS, EPSILON)


@dataclass(frozen=True)
class Case:
    """The steps of an engine from new weights, or from the checkpoint of the case with the same precision."""

    precision: str
    accumulation_steps: int = 1
    is_compiled: bool = False
    is_resumed: bool = False
    documents: str = ""
    """How tokens of one document are kept from those of another: ``masked``, ``packed``, or not at all."""
    has_bad_step: bool = False


def cases(strategy: str) -> Iterator[tuple[str, Case]]:
    """Yield the cases by name; tests look for these names."""
    for precision in PRECISIONS[strategy]:
        yield precision, Case(precision)
        yield f"{precision} again", Case(precision)
        yield f"{precision} accumulated", Case(precision, accumulation_steps=4)
        if precision in COMPILED:
            yield f"{precision} compiled", Case(precision, accumulation_steps=4, is_compiled=True)
        yield f"{precision} resumed", Case(precision, is_resumed=True)
    yield "bad step", Case("bf16", has_bad_step=True)
    yield "masked", Case("bf16", documents="masked")
    yield "packed", Case("bf16", documents="packed")


def train_case(case: Case, name: str, checkpoints: Path) -> dict[str, Any]:
    """Run a case and return its losses, gradient norms, skipped steps, weights, and why something was not used."""
    engine = new_engine(name, case.precision, case.accumulation_steps, bool(case.documents))
    seen: dict[str, Any] = {"why not": None, "losses": [], "norms": [], "skipped": []}
    if case.documents == "packed":
        seen["why not"] = engine.pack_documents(CONTEXT_LENGTH)
    if case.is_compiled:
        seen["why not"] = engine.compile(CONTEXT_LENGTH)
    first_step = SAVED_STEP if case.is_resumed else 0
    if case.is_resumed:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = open_checkpoint(saved_at(checkpoints, case.precision))
            download_checkpoint(checkpoint, Path(folder))
            engine.load(first_step, CheckpointFiles(Path(folder)), checkpoint.state.guard)
    for step in range(first_step, STEPS):
        input_ids, labels = global_batch(step)
        micro_batches = list(
            zip(input_ids.chunk(case.accumulation_steps), labels.chunk(case.accumulation_steps), strict=True)
        )
        if case.has_bad_step and step == BAD_STEP:
            seen["weights before"] = weights_of(engine)
            hook = engine.module.register_forward_hook(lambda module, given, nats: nats + torch.nan)
        result = engine.step(micro_batches, targets_of(step), learning_rate_of(step))
        if case.has_bad_step and step == BAD_STEP:
            hook.remove()
            seen["weights after"] = weights_of(engine)
        seen["losses"].append(float(result.nats) / targets_of(step))
        seen["norms"].append(float(result.gradient_norm))
        seen["skipped"].append(float(result.skipped))
        if step + 1 == SAVED_STEP:
            seen["saved"] = weights_of(engine)
            seen["stored"] = save(engine, checkpoints, case.precision)
    seen["weights"] = weights_of(engine)
    return seen


def new_engine(name: str, precision: str, accumulation_steps: int, document_masking: bool = False) -> Engine:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    micro_batch_size = GLOBAL_BATCH_SIZE // accumulation_steps
    strategy = Strategy(name, precision, 1, micro_batch_size, accumulation_steps, GRADIENT_CLIPPING)
    accelerator = start_accelerator(strategy)
    model = LanguageModel(new_model(), loss_chunk_tokens=48, document_masking=document_masking)
    return Engine(accelerator, model, strategy, ADAMW)


def targets_of(step: int) -> int:
    return int((global_batch(step)[1] >= 0).sum())


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return {name: of["param"].clone() for name, of in engine.state.read()}


def saved_at(checkpoints: Path, precision: str) -> str:
    return f"{checkpoints}/{precision}/checkpoints/step-{SAVED_STEP:08d}-a1"


def save(engine: Engine, checkpoints: Path, precision: str) -> dict[str, Tensor]:
    """Save a checkpoint, unless another case of this precision did, and return the weights in that checkpoint."""
    url = saved_at(checkpoints, precision)
    if not Path(url).exists():
        snapshot = engine.state.empty_snapshot()
        engine.state.copy_to(snapshot)
        state = TrainingState("a-run", 1, SAVED_STEP, 0, 0, {}, {}, engine.bad_steps.state())
        save_checkpoint(f"{checkpoints}/{precision}", state, snapshot.tensors, metrics=b"")
    with tempfile.TemporaryDirectory() as folder:
        download_checkpoint(open_checkpoint(url), Path(folder))
        files = CheckpointFiles(Path(folder))
        return {name: files[name]["param"].clone() for name in files}


def run_out_of_memory(name: str) -> str:
    """Return the error of a step for which the GPU has too little memory left."""
    engine = new_engine(name, "fp32", 1)
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**26) / total_bytes)
    tokens = torch.ones((2**16 // CONTEXT_LENGTH * 8, CONTEXT_LENGTH), dtype=torch.int64)
    try:
        engine.step([(tokens, tokens)], tokens.numel(), 0.0)
        return "nothing"
    except UserError as error:
        return str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main(strategy: str, file: Path) -> None:
    silence_libraries()
    become_only_rank()
    with tempfile.TemporaryDirectory() as checkpoints:
        seen = {name: train_case(case, strategy, Path(checkpoints)) for name, case in cases(strategy)}
    torch.save(seen | {"out of memory": run_out_of_memory(strategy)}, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
