"""One process of a real launch that trains engines, one after another, on windows that a test knows as well."""

import hashlib
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from flash_stand_in import flash_kernels
from torch import Tensor
from transformers import Qwen2ForCausalLM

from job import config as settings
from job.data.manifest import load_manifest
from job.data.order import rank_slice
from job.data.tokenizer import load_tokenizer
from job.errors import UserError
from job.launcher.environment import world_from_environment
from job.launcher.worker import leave
from job.log_setup import silence_libraries
from job.model.architecture import LanguageModel, build_model
from job.model.spec import ModelSpec
from job.runs.checkpoint import (
    CheckpointFiles,
    TrainingState,
    download_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from job.runs.world import World
from job.training.distributed import Lockstep
from job.training.engine import AdamW, Engine, Snapshot, Strategy, start_accelerator
from job.training.validation import HeldOut

SPEC = ModelSpec(
    hidden_size=30, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, intermediate_size=48
)
VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH = 300, 0, 16
GLOBAL_BATCH_SIZE = 24
PYTHONPATH = f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}"
"""Of the processes."""
ADAMW = AdamW(weight_decay=0.3, beta1=0.9, beta2=0.95, epsilon=1e-5)
"""An epsilon so large that a gradient of nothing but rounding errors (of a key bias) moves nothing."""
GRADIENT_CLIPPING = 1.5
"""Between the norms of the even steps and those of the odd ones, which are clipped."""
SAVED_STEP, LAST_STEP = 3, 6

WORLDS = [(1, "ddp"), (2, "zero2"), (2, "ddp"), (3, "ddp"), (1, "zero2"), (3, "zero2")]
"""Processes and strategy, in an order in which each resumes only from earlier ones."""
QUICK_WORLDS = WORLDS[:3]
"""Those of `make test`; `make test-recovery` takes the others."""
RESUMES_FROM = {
    (1, "ddp"): [],
    (2, "zero2"): [(1, "ddp")],
    (2, "ddp"): [(2, "zero2")],
    (3, "ddp"): [(2, "zero2"), (2, "ddp")],
    (1, "zero2"): [(3, "ddp")],
    (3, "zero2"): [(1, "zero2"), (2, "zero2")],
}
"""Of which other worlds' checkpoints each world goes on."""


@dataclass(frozen=True)
class Case:
    """Steps of an engine, from new weights or from a checkpoint."""

    name: str
    precision: str = "fp32"
    accumulation_steps: int = 1
    first_step: int = 0
    last_step: int = LAST_STEP
    resume: str | None = None
    """URL of the checkpoint that it begins with."""
    saves: dict[int, str] = field(default_factory=dict)
    """After so many steps it is saved, as a checkpoint of the run at this URL."""
    faults: dict[int, str] = field(default_factory=dict)
    """What goes wrong in a step, in the last rank's first micro-batch: one of `FAULTS`."""
    left_out: list[int] = field(default_factory=list)
    """Steps that are not made at all."""
    spike_factor: float | None = None
    compiled: bool = False
    documents: str = ""
    """How they are kept apart, if they are: ``by a mask`` or ``without a mask``."""
    keeps: int | None = None
    """After so many steps its state is kept for another case."""
    goes_on_from: str | None = None
    """Name of the case whose kept state it begins with."""


def new_model() -> Qwen2ForCausalLM:
    return build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=1)


def infinite_gradient(nats: Tensor, weight: Tensor) -> Tensor:
    return nats + (weight - weight.detach()).sum().sqrt()


FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss not a number": lambda nats, _: nats + torch.nan,
    "infinite gradient": infinite_gradient,
    "spike": lambda nats, _: nats * 1000,
}
"""From the nats of a micro-batch, and a parameter of the model, to nats. Each touches only what its name says: the
first leaves the gradient finite, the second the loss."""


def learning_rate_of(step: int) -> float:
    return 1e-3 * (step + 1)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Input ids and labels of a step, `[GLOBAL_BATCH_SIZE, CONTEXT_LENGTH]`.

    The further behind a window is in the batch, the more targets it has; the first have none. So ranks and
    micro-batches differ as much as they can, and a mean of their means is far from the mean over all targets. Odd
    steps have few targets, hence long gradients.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB_SIZE, (GLOBAL_BATCH_SIZE, CONTEXT_LENGTH + 1), generator=generator)
    targets = torch.tensor([0] * 8 + [0, 0, 0, 0, 1, 1, 0, 2, 1, 0, 3, 2, 9, 14, 16, 16]).unsqueeze(-1)
    if step % 2:
        targets = targets // 4
    labels = tokens[:, 1:].masked_fill(torch.arange(CONTEXT_LENGTH) >= targets, -100)
    return tokens[:, :-1], labels


# ---- In the processes ----

KEPT: dict[str, tuple[int, dict[str, dict[str, Tensor]], str]] = {}
"""By case: the steps done, weights and moments, and the guard's state as JSON."""


def main(folder: Path) -> None:
    silence_libraries()
    orders = json.loads((folder / "orders.json").read_text())
    world = world_from_environment()
    assert world is not None
    seen: dict[str, Any] = {}
    for order in orders["cases"]:
        for key in ("saves", "faults"):
            order[key] = {int(step): what for step, what in order[key].items()}
        case = Case(**order)
        seen[case.name] = train_case(case, orders["strategy"], world)
    if "shards" in orders:
        seen["held out"] = evaluate_held_out(orders["shards"], world, folder)
        seen["refusals"] = list(refusals(orders["strategy"], world))
    else:
        seen["out of memory"] = run_out_of_memory(orders["strategy"], world)
    if world.rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))


def strategy_of(case: Case, name: str, world: World) -> Strategy:
    micro_batch_size = GLOBAL_BATCH_SIZE // world.world_size // case.accumulation_steps
    return Strategy(
        name,
        case.precision,
        world.world_size,
        micro_batch_size,
        case.accumulation_steps,
        GRADIENT_CLIPPING,
        case.spike_factor,
    )


def train_case(case: Case, name: str, world: World) -> dict[str, Any]:
    """What each step came to, what the engine was after it, and where the last checkpoint is."""
    with ExitStack() as closing:
        return _train_case(case, name, world, closing)


def _train_case(case: Case, name: str, world: World, closing: ExitStack) -> dict[str, Any]:
    forget_accelerate()
    strategy = strategy_of(case, name, world)
    accelerator = start_accelerator(strategy)
    model = LanguageModel(new_model(), loss_chunk_tokens=24, document_masking=bool(case.documents))
    engine = Engine(accelerator, model, strategy, ADAMW)
    kernels: list[torch.dtype] = []
    if case.documents == "without a mask":
        kernels = closing.enter_context(flash_kernels())
        assert engine.pack_documents(CONTEXT_LENGTH) is None
        kernels.clear()
    if case.compiled:
        torch._dynamo.config.disable = False  # type: ignore[attr-defined]  # DeepSpeed is imported sooner without it
        assert engine.compile(CONTEXT_LENGTH, backend="aot_eager") is None
    if case.resume is not None:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = open_checkpoint(case.resume)
            download_checkpoint(checkpoint, Path(scratch))
            assert checkpoint.state.step == case.first_step
            engine.load_state(case.first_step, CheckpointFiles(Path(scratch)), checkpoint.state.guard)
    if case.goes_on_from is not None:
        kept_step, parameters, guard_state = KEPT[case.goes_on_from]
        assert kept_step == case.first_step
        engine.load_state(kept_step, parameters, json.loads(guard_state))
    snapshot = engine.empty_snapshot() if world.rank == 0 else None
    seen: dict[str, Any] = {key: [] for key in ("losses", "norms", "skipped", "finite", "guard", "engines")}
    seen |= {"checkpoint": None, "snapshot": True}
    mine = rank_slice(GLOBAL_BATCH_SIZE, world.rank, world.world_size)
    for step in range(case.first_step, case.last_step):
        if step in case.left_out:
            continue
        input_ids, labels = (side[mine] for side in global_batch(step))
        if case.documents:
            input_ids[:, CONTEXT_LENGTH // 2] = EOD_ID
        micro_batches = zip(
            input_ids.split(strategy.micro_batch_size), labels.split(strategy.micro_batch_size), strict=True
        )
        targets = int((global_batch(step)[1] >= 0).sum())
        if step in case.faults and world.rank == world.world_size - 1:
            break_once(engine, FAULTS[case.faults[step]])
        result = engine.step(list(micro_batches), targets, learning_rate_of(step))
        seen["losses"].append(float(accelerator.reduce(result.nats, "sum")) / targets)
        seen["norms"].append(float(result.gradient_norm))
        seen["skipped"].append(of_all_ranks(world, float(result.skipped)))
        seen["finite"].append(of_all_ranks(world, bool(result.computed_nats.isfinite())))
        seen["guard"].append(engine.guard_state())
        seen["engines"].append(of_all_ranks(world, digest(engine)))
        if step + 1 in {SAVED_STEP, case.last_step, case.keeps, *case.saves}:
            full_state = dict(engine.full_state())
            engine.copy_state(snapshot)
            seen["snapshot"] &= snapshot is None or is_filled_with(snapshot, full_state)
            if step + 1 == case.keeps:
                copied = {name: {key: t.clone() for key, t in of.items()} for name, of in full_state.items()}
                KEPT[case.name] = step + 1, copied, json.dumps(engine.guard_state())
        if step + 1 in case.saves and snapshot is not None:
            windows, guard = GLOBAL_BATCH_SIZE * (step + 1), engine.guard_state()
            state = TrainingState("a-run", 1, step + 1, windows, 0, {}, {}, guard)
            seen["checkpoint"] = save_checkpoint(case.saves[step + 1], state, snapshot.tensors, metrics=b"").url
        accelerator.wait_for_everyone()
    return seen | {"kernels": len(kernels)}


def break_once(engine: Engine, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The next forward of the model, and no other, goes wrong."""

    def broken(module: LanguageModel, inputs: object, nats: Tensor) -> Tensor:
        hook.remove()
        return fault(nats, module.causal_lm.model.norm.weight)

    hook = engine.module.register_forward_hook(broken)


def digest(engine: Engine) -> str:
    """Of all the numbers that this rank has of weights, moments and AdamW's counters."""
    found = hashlib.sha256()
    tensors = [*engine.module.parameters()]
    for tensor, state in engine._adamw.state.items():
        tensors += [tensor, *state.values()]
    for tensor in tensors:
        found.update(tensor.detach().to(torch.float32).numpy().tobytes())
    return found.hexdigest()


def of_all_ranks(world: World, mine: Any) -> list[Any]:
    found: list[Any] = [None] * world.world_size
    dist.all_gather_object(found, mine)
    return found


def is_filled_with(snapshot: Snapshot, full_state: dict[str, dict[str, Tensor]]) -> bool:
    """Whether the snapshot has all of the state, by name and, in the same order, without a gap."""
    return snapshot.tensors.keys() == full_state.keys() and all(
        torch.equal(flat, torch.cat([full_state[name][key].flatten() for name in snapshot.tensors]))
        and all(torch.equal(snapshot.tensors[name][key], full_state[name][key]) for name in full_state)
        for key, flat in snapshot.flat.items()
    )


def run_out_of_memory(name: str, world: World) -> str:
    """What is said where this process has room for the engine, but not for what a micro-batch needs."""
    forget_accelerate()
    micro_batch_size = 3 * 2**12
    strategy = Strategy(name, "fp32", world.world_size, micro_batch_size, 1, GRADIENT_CLIPPING)
    engine = Engine(start_accelerator(strategy), LanguageModel(new_model()), strategy, ADAMW)
    tokens = torch.ones((micro_batch_size, CONTEXT_LENGTH), dtype=torch.int64)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + 2**27, limits[1]))
    try:
        engine.step([(tokens, tokens)], tokens.numel() * world.world_size, 0.0)
        return "nothing"
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def evaluate_held_out(shards: str, world: World, folder: Path) -> dict[str, float]:
    """The new model on the held-out shards, over all processes."""
    manifest = load_manifest(shards)
    tokenizer = load_tokenizer(f"{shards}/{manifest.tokenizer}", folder)
    config = settings.build(
        {"data": {"shards": shards, "cache_dir": str(folder / "cache")}, "evaluate": {"batch_size": 7}}
    )
    model = LanguageModel(build_model(SPEC, manifest.vocab_size, manifest.eod_id, CONTEXT_LENGTH, seed=1))
    found = HeldOut(config, manifest, tokenizer, CONTEXT_LENGTH, world).evaluate(
        model, torch.device("cpu"), nullcontext, Lockstep(world, lambda: False, lambda: None)
    )
    assert found is not None
    return asdict(found)


def refusals(name: str, world: World) -> Iterator[str]:
    """What is said where the world or the strategy that forms is not the one asked for."""
    right = strategy_of(Case("any"), name, world)
    wrong = [(replace(right, world_size=world.world_size + 1), {})]
    # Variables of accelerate's, which make it count otherwise, or leave DeepSpeed out, without a word.
    wrong += [(right, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7"})] if name == "ddp" else []
    wrong += [(right, {"ACCELERATE_USE_CPU": "true"})] if name == "zero2" else []
    for strategy, environment in wrong:
        forget_accelerate()
        os.environ |= environment
        try:
            start_accelerator(strategy)
            yield "nothing"
        except RuntimeError as error:
            yield str(error)
        for variable in environment:
            del os.environ[variable]


def forget_accelerate() -> None:
    """Lets the next Accelerator of this process be another one."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


if __name__ == "__main__":
    code = 1
    try:
        main(Path(sys.argv[1]))
        dist.barrier()
        code = 0
    except Exception:
        traceback.print_exc()
    leave(code)
