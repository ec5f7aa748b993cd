"""A worker process that trains engines, one after another, on batches that the test can compute too."""

import hashlib
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from flash_stand_in import flash_kernels
from torch import Tensor
from toy_entries import add_toy_entries
from transformers import Qwen2ForCausalLM

from job.config import Train
from job.data.manifest import load_manifest
from job.data.order import rank_slice
from job.data.tokenizer import load_tokenizer
from job.errors import UserError
from job.launcher.environment import world_from_environment
from job.launcher.worker import leave
from job.log_setup import silence_libraries
from job.model.language_model import LanguageModel, build_model
from job.model.spec import ModelSpec
from job.runs.checkpoint import CheckpointFiles, TrainingState, download_checkpoint, open_checkpoint
from job.runs.checkpoint_writer import save_checkpoint
from job.runs.world import World
from job.training import loss_scale
from job.training.accelerator import Strategy, start_accelerator
from job.training.distributed import StepSync
from job.training.engine import Engine
from job.training.engine_setup import try_micro_batches
from job.training.model_state import Snapshot
from job.training.optimizer_settings import OptimizerSettings
from job.training.validation import ValidationSet

SPEC = ModelSpec(
    hidden_size=30, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, intermediate_size=48
)
VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH = 300, 0, 16
GLOBAL_BATCH_SIZE = 24
PYTHONPATH = f"{Path(__file__).parents[1]}:{Path(__file__).parent}"
ENGINE_WORKER = Path(__file__)
"""Script that the worker processes run, with this PYTHONPATH."""
ADAMW = OptimizerSettings("adamw", weight_decay=0.3, beta1=0.9, beta2=0.95, epsilon=1e-5)
"""AdamW with an epsilon so large that a gradient of rounding errors only (of a key bias) does not change a weight."""
MUON_RATE = 0.02
MUON = replace(ADAMW, name="muon", muon_momentum=0.95, muon_rate_ratio=5.0)
"""Muon; AdamW, which trains the other parameters, has a fifth of `MUON_RATE`."""
GRADIENT_CLIPPING = 1.5
"""A limit between the gradient norms of even steps and the larger ones of odd steps, which are clipped."""
SAVED_STEP, LAST_STEP = 3, 6

WORLDS = [(1, "ddp"), (2, "zero2"), (2, "ddp"), (3, "ddp"), (1, "zero2"), (3, "zero2")]
"""World size and strategy, in an order in which each resumes only from earlier ones."""
QUICK_WORLDS = WORLDS[:3]
"""Worlds that `make test` runs; `make test-recovery` runs the others."""
RESUMES_FROM = {
    (1, "ddp"): [],
    (2, "zero2"): [(1, "ddp")],
    (2, "ddp"): [(2, "zero2")],
    (3, "ddp"): [(2, "zero2"), (2, "ddp")],
    (1, "zero2"): [(3, "ddp")],
    (3, "zero2"): [(1, "zero2"), (2, "zero2")],
}
"""The other worlds from whose checkpoints each world resumes."""


@dataclass(frozen=True)
class Case:
    """Steps of an engine, starting with new weights or with a checkpoint."""

    name: str
    precision: str = "fp32"
    accumulation_steps: int = 1
    first_step: int = 0
    last_step: int = LAST_STEP
    resume: str | None = None
    """URL of the checkpoint that the case starts with."""
    saves: dict[int, str] = field(default_factory=dict)
    """URL of the run whose checkpoint is saved, by the number of steps done."""
    faults: dict[int, str] = field(default_factory=dict)
    """Fault in the first micro-batch of the last rank, by step: one of `FAULTS`."""
    left_out: list[int] = field(default_factory=list)
    """Steps that are skipped by the test."""
    spike_factor: float | None = None
    compiled: bool = False
    documents: str = ""
    """How document masking works: ``by a mask``, ``without a mask``, or empty for no document masking."""
    optimizer: str = "adamw"
    """Name of the optimizer: ``momentum`` (of `toy_entries`), or one of the program's. Muon has a constant rate."""
    keeps: int | None = None
    """Number of steps done after which the state is kept for another case."""
    goes_on_from: str | None = None
    """Name of the case whose kept state this case starts with."""
    changed_steps: int | None = None
    """Accumulation steps to which the engine is changed before its first step."""
    gradient_sum: str = "fp32"
    """Number format in which ZeRO-2 adds up the gradients of micro-batches."""
    growth_steps: int = loss_scale.GROWTH_STEPS
    """Steps without an overflow after which fp16's loss scale is doubled."""


def new_model() -> Qwen2ForCausalLM:
    return build_model(SPEC, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH, seed=1)


def infinite_gradient(nats: Tensor, weight: Tensor) -> Tensor:
    return nats + (weight - weight.detach()).sum().sqrt()


FAULTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss not a number": lambda nats, _: nats + torch.nan,
    "infinite gradient": infinite_gradient,
    "spike": lambda nats, _: nats * 1000,
}
"""Function for each fault that changes the nats of a micro-batch, given a parameter of the model. The first keeps the
gradient finite, the second keeps the loss finite."""


def learning_rate_of(step: int) -> float:
    return 1e-3 * (step + 1)


def global_batch(step: int) -> tuple[Tensor, Tensor]:
    """Return input ids and labels of a step, each `[GLOBAL_BATCH_SIZE, CONTEXT_LENGTH]`.

    Later sequences of the batch have more targets, and the first have none. Ranks and micro-batches thus differ, and a
    mean of their means is far from the mean over all targets. Odd steps have few targets, and so large gradients.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB_SIZE, (GLOBAL_BATCH_SIZE, CONTEXT_LENGTH + 1), generator=generator)
    targets = torch.tensor([0] * 8 + [0, 0, 0, 0, 1, 1, 0, 2, 1, 0, 3, 2, 9, 14, 16, 16]).unsqueeze(-1)
    if step % 2:
        targets = targets // 4
    labels = tokens[:, 1:].masked_fill(torch.arange(CONTEXT_LENGTH) >= targets, -100)
    return tokens[:, :-1], labels


# ---- In the worker processes ----

KEPT: dict[str, tuple[int, dict[str, dict[str, Tensor]], str]] = {}
"""Steps done, weights and moments, and the guard's state as JSON, by the name of the case that kept them."""


def main(folder: Path) -> None:
    silence_libraries()
    add_toy_entries()
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
        seen["validation"] = evaluate_validation(orders["shards"], world, folder)
        seen["refusals"] = list(refusals(orders["strategy"], world))
    else:
        seen["out of memory"] = run_out_of_memory(orders["strategy"], world)
        seen["fitted"] = of_all_ranks(world, fit_micro_batch(orders["strategy"], world))
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
        case.gradient_sum,
    )


def train_case(case: Case, name: str, world: World) -> dict[str, Any]:
    """Run a case. Returns the results of each step, a digest of the engine after it, and the last checkpoint's URL."""
    with ExitStack() as closing:
        return _train_case(case, name, world, closing)


def _train_case(case: Case, name: str, world: World, closing: ExitStack) -> dict[str, Any]:
    forget_accelerate()
    strategy = strategy_of(case, name, world)
    accelerator = start_accelerator(strategy)
    model = LanguageModel(new_model(), loss_chunk_tokens=24, document_masking=bool(case.documents))
    is_muon = case.optimizer == "muon"
    engine = Engine(accelerator, model, strategy, MUON if is_muon else replace(ADAMW, name=case.optimizer))
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
            engine.load(case.first_step, CheckpointFiles(Path(scratch)), checkpoint.state.guard)
    if case.goes_on_from is not None:
        kept_step, parameters, guard_state = KEPT[case.goes_on_from]
        assert kept_step == case.first_step
        engine.load(kept_step, parameters, json.loads(guard_state))
    loss_scale.GROWTH_STEPS = case.growth_steps
    if case.changed_steps is not None:
        engine.change_micro_batch(strategy.micro_batch_size // case.changed_steps)
        strategy = engine.strategy
    snapshot = engine.state.empty_snapshot() if world.rank == 0 else None
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
        rate = MUON_RATE / MUON.muon_rate_ratio if is_muon else learning_rate_of(step)
        result = engine.step(list(micro_batches), targets, rate)
        seen["losses"].append(float(accelerator.reduce(result.nats, "sum")) / targets)
        seen["norms"].append(float(result.gradient_norm))
        seen["skipped"].append(of_all_ranks(world, float(result.skipped)))
        seen["finite"].append(of_all_ranks(world, bool(result.computed_nats.isfinite())))
        seen["guard"].append(engine.bad_steps.state())
        seen["engines"].append(of_all_ranks(world, digest(engine)))
        if step + 1 in {SAVED_STEP, case.last_step, case.keeps, *case.saves}:
            full_state = dict(engine.state.read())
            engine.state.copy_to(snapshot)
            seen["snapshot"] &= snapshot is None or is_filled_with(snapshot, full_state)
            if step + 1 == case.keeps:
                copied = {name: {key: t.clone() for key, t in of.items()} for name, of in full_state.items()}
                KEPT[case.name] = step + 1, copied, json.dumps(engine.bad_steps.state())
        if step + 1 in case.saves and snapshot is not None:
            windows, guard = GLOBAL_BATCH_SIZE * (step + 1), engine.bad_steps.state()
            key = {"optimizer": case.optimizer}
            state = TrainingState("a-run", 1, step + 1, windows, 0, key, {}, guard)
            seen["checkpoint"] = save_checkpoint(case.saves[step + 1], state, snapshot.tensors, metrics=b"").url
        accelerator.wait_for_everyone()
    return seen | {"kernels": len(kernels)}


def break_once(engine: Engine, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Inject a fault into the next forward pass of the model only."""

    def broken(module: LanguageModel, inputs: object, nats: Tensor) -> Tensor:
        hook.remove()
        return fault(nats, module.causal_lm.model.norm.weight)

    hook = engine.module.register_forward_hook(broken)


def digest(engine: Engine) -> str:
    """Return a digest of the weights and optimizer state on this rank."""
    sha256 = hashlib.sha256()
    tensors = [*engine.module.parameters()]
    for tensor, state in engine._optimizer.state.items():
        tensors += [tensor, *state.values()]
    for tensor in tensors:
        sha256.update(tensor.detach().to(torch.float32).numpy().tobytes())
    return sha256.hexdigest()


def of_all_ranks(world: World, value: Any) -> list[Any]:
    values: list[Any] = [None] * world.world_size
    dist.all_gather_object(values, value)
    return values


def is_filled_with(snapshot: Snapshot, full_state: dict[str, dict[str, Tensor]]) -> bool:
    """Return True if the snapshot has the whole state, by name, and flat in the same order without gaps."""

    def is_filled(key: str) -> bool:
        names = [name for name in snapshot.tensors if key in full_state[name]]
        whole = torch.cat([full_state[name][key].flatten() for name in names])
        return torch.equal(snapshot.flat[key], whole) and all(
            torch.equal(snapshot.tensors[name][key], full_state[name][key]) for name in names
        )

    return snapshot.tensors.keys() == full_state.keys() and all(is_filled(key) for key in snapshot.flat)


def run_out_of_memory(name: str, world: World) -> str:
    """Return the error of a step for which this process has too little memory."""
    forget_accelerate()
    micro_batch_size = 3 * 2**12
    strategy = Strategy(name, "fp32", world.world_size, micro_batch_size, 1, GRADIENT_CLIPPING)
    engine = Engine(start_accelerator(strategy), LanguageModel(new_model()), strategy, ADAMW)
    tokens = torch.ones((micro_batch_size, CONTEXT_LENGTH), dtype=torch.int64)
    try:
        with little_memory():
            engine.step([(tokens, tokens)], tokens.numel() * world.world_size, 0.0)
        return "nothing"
    except UserError as error:
        return str(error)


def fit_micro_batch(name: str, world: World) -> list[Any]:
    """Return which micro-batches did not fit, and the size that did, if the last rank has too little memory."""
    forget_accelerate()
    strategy = Strategy(name, "fp32", world.world_size, 3 * 2**12, 2, GRADIENT_CLIPPING)
    engine = Engine(start_accelerator(strategy), LanguageModel(new_model()), strategy, ADAMW)
    train = Train(context_length=CONTEXT_LENGTH, compile=False)
    with little_memory() if world.rank == world.world_size - 1 else nullcontext():
        _, too_large = try_micro_batches(train, True, engine, world)
    return [too_large, asdict(engine.strategy)]


@contextmanager
def little_memory() -> Iterator[None]:
    """Let this process allocate only 128 MiB more."""
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + 2**27, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def evaluate_validation(shards: str, world: World, folder: Path) -> dict[str, float]:
    """Return the validation result of a new model, computed by all processes together."""
    manifest = load_manifest(shards)
    tokenizer = load_tokenizer(f"{shards}/{manifest.tokenizer}", folder)
    model = LanguageModel(build_model(SPEC, manifest.vocab_size, manifest.eod_id, CONTEXT_LENGTH, seed=1))
    validation = ValidationSet(
        shards,
        manifest,
        tokenizer,
        CONTEXT_LENGTH,
        world,
        seed=2333,
        batch_size=7,
        cache_dir=folder / "cache",
        cache_bytes=2**30,
    )
    found = validation.evaluate(model, torch.device("cpu"), nullcontext, StepSync(world, lambda: False, lambda: None))
    assert found is not None
    return asdict(found)


def refusals(name: str, world: World) -> Iterator[str]:
    """Yield the error for each case in which accelerate forms another world or strategy than requested."""
    right = strategy_of(Case("any"), name, world)
    wrong = [(replace(right, world_size=world.world_size + 1), {})]
    # These variables of accelerate silently change the number of accumulation steps, or disable DeepSpeed.
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
    """Reset the global state of accelerate, so that this process can make another Accelerator."""
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
