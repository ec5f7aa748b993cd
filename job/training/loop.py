"""The training loop, from the settings to the finished model; reads from top to bottom.

manifest → world → run → model (→ checkpoint) → batches → steps, with evaluations and checkpoints between → final/
"""

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import torch.distributed as dist

from job import config as settings
from job import storage
from job.config import Config
from job.data.loader import BatchLoader
from job.data.manifest import Manifest, load_manifest
from job.data.order import WindowOrder
from job.data.tokenizer import TextTokenizer, load_tokenizer, store_tokenizer
from job.errors import UserError, one_line
from job.model import counts
from job.model.architecture import LanguageModel, ModelSpec, build_model
from job.report import Report, metrics_line
from job.training.agreement import StopAgreement, agree
from job.training.batching import accumulation_steps
from job.training.checkpoint import (
    Checkpoint,
    CheckpointFiles,
    TrainingState,
    check_identity,
    delete_old_checkpoints,
    download_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    save_checkpoint,
)
from job.training.engine import AdamW, Engine, Strategy, start_accelerator
from job.training.evaluation import Evaluation
from job.training.export import export_model, model_card
from job.training.generation import Sampling, continue_text
from job.training.held_out import HeldOut
from job.training.metrics import MetricsLog
from job.training.run import RunRecord, open_run
from job.training.schedule import learning_rate
from job.training.tracking import choose_mode, start_tracker
from job.training.trained import TOKENIZER_FOLDER
from job.training.world import World

DONE, STOPPED = "done", "stopped"
_FIRST_EVALUATION_BATCHES = 2


@dataclass
class Interval:
    """What is measured between two lines of the log; evaluations and checkpoints are not part of its time."""

    nats: torch.Tensor | float = 0.0
    targets: int = 0
    steps: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


def train(config: Config, world: World, stop_requested: Callable[[], bool]) -> str:
    """Trains until the last step or until asked to stop; every process of the run calls it.

    Args:
        config: all settings.
        world: this process' place among the others.
        stop_requested: whether this process was asked to stop; what one of them knows, all agree on.

    Returns:
        ``done``, or ``stopped``: checkpointed, to be started again.

    Raises:
        UserError: the settings do not fit the data, the world, or the run that is there.
    """
    with ExitStack() as closing:
        return _train(config, world, stop_requested, closing)


def _train(config: Config, world: World, stop_requested: Callable[[], bool], closing: ExitStack) -> str:
    report, output = Report(world.rank), config.run.output

    # ---- What there is to train, and on what ----
    manifest = load_manifest(config.data.shards)
    tokenizer = load_tokenizer(storage.join(config.data.shards, manifest.tokenizer), config.data.cache_dir)
    check_tokenizer(tokenizer, manifest, config.data.shards)
    strategy = strategy_of(config, world.world_size)
    spec = ModelSpec(**config.model.model_dump())
    causal_lm = build_model(spec, manifest.vocab_size, manifest.eod_id, config.train.context_length, config.train.seed)
    order = WindowOrder(
        [shard.tokens for shard in manifest.train],
        [shard.size for shard in manifest.train],
        config.train.context_length,
        config.data.seed,
        buffer_bytes=int(config.data.shuffle_bytes),
        node_groups=config.data.node_groups,
    )
    end = order.position_limit(config.train.epochs)
    epochs_steps = math.ceil(end / config.train.global_batch_size)
    total_steps = min(epochs_steps, config.train.max_steps or epochs_steps)

    # ---- The other processes, and the run that they all work on ----
    tracking_mode, why = choose_mode(config.tracking.mode)
    accelerator = start_accelerator(strategy, log_with="swanlab")
    identity = identity_of(config, spec, manifest)
    run, checkpoint = agree(world, lambda: _open(config, tokenizer, identity))
    state = (
        TrainingState(run.id, 0, 0, 0, identity, settings.to_dict(config)) if checkpoint is None else checkpoint.state
    )

    # ---- The model, new or as it was ----
    engine = Engine(
        accelerator,
        LanguageModel(causal_lm, config.train.loss_chunk_tokens),
        strategy,
        AdamW(config.train.weight_decay, config.train.beta1, config.train.beta2, config.train.epsilon),
    )
    if checkpoint is not None:
        _load(engine, checkpoint, world, scratch_dir(config))
    parameters = counts.parameter_counts(spec, manifest.vocab_size)
    flops = counts.flops_per_token(spec, manifest.vocab_size, config.train.context_length).total
    peak = counts.peak_flops(torch.cuda.get_device_name()) if engine.device.type == "cuda" else None
    report.table(
        f"run {run.name} ({run.id})",
        [
            ("parameters", f"{parameters.total:,} ({parameters.embedding:,} embedding)"),
            ("FLOPs per token", f"{flops / 1e6:,.1f} M"),
            ("processes", f"{world.world_size} x {strategy.name}, {strategy.precision}, {engine.device.type}"),
            ("global batch", f"{config.train.global_batch_size} x {config.train.context_length} tokens"),
            (
                "gradient accumulation",
                f"{strategy.gradient_accumulation_steps} x {strategy.micro_batch_size} sequences",
            ),
            ("steps", f"{total_steps:,} ({total_steps / epochs_steps * config.train.epochs:.2f} epochs)"),
            ("training tokens", f"{sum(shard.tokens for shard in manifest.train):,}"),
            ("from", "random weights" if checkpoint is None else checkpoint.url),
        ],
    )

    # ---- What watches it ----
    metrics = MetricsLog(output, state.step)
    tracker = start_tracker(
        accelerator,
        mode=tracking_mode,
        project=config.tracking.project,
        workspace=config.tracking.workspace,
        name=run.name,
        run_id=run.id,
        log_dir=config.tracking.log_dir,
        config=settings.to_dict(config),
    )
    closing.callback(tracker.finish, success=False)  # unless it has been finished as a success before
    report.say(f"tracking: {tracking_mode} ({why}); {tracker.how_to_watch}")

    # ---- Two held-out batches before the first step: what would fail in hours fails now ----
    held_out = HeldOut(config, manifest, tokenizer, config.train.context_length, world)

    def evaluate(max_windows: int | None) -> Evaluation | None:
        return held_out.evaluate(engine.module, engine.device, engine.autocast, max_windows)

    evaluate(config.evaluate.batch_size * _FIRST_EVALUATION_BATCHES * world.world_size)

    loader = closing.enter_context(
        BatchLoader(
            config.data.shards,
            manifest,
            order,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            start_position=state.windows_consumed,
            end_position=end,
            cache_dir=config.data.cache_dir,
            cache_bytes=int(config.data.cache_bytes),
            prefetch_steps=config.data.prefetch_steps,
            workers=config.data.loader_workers,
        )
    )
    stop = StopAgreement(world)
    step, windows_consumed, tokens_seen = state.step, state.windows_consumed, state.tokens_seen
    saved_step = step if checkpoint is not None else -1
    interval, started_at_step, train_seconds = Interval(), step, 0.0
    evaluation: Evaluation | None = None
    report.start_bar("training", total_steps, step)
    closing.callback(report.end_bar)
    batches = iter(loader)
    while True:
        is_last = step >= total_steps
        is_stopping = stop.agreed(stop_requested()) and not is_last

        # ---- Now and then: evaluate, sample, save ----
        if is_last or (step > started_at_step and step % config.evaluate.every == 0 and not is_stopping):
            evaluation = evaluate(None if is_last else config.evaluate.max_windows)
            if evaluation is not None:
                metrics.add(step, evaluation.as_dict())
                tracker.log(evaluation.as_dict(), step)
                report.say(f"step {step}/{total_steps} | held out: {describe(evaluation)}")
            samples = _samples(engine, tokenizer, config) if world.rank == 0 else {}
            tracker.log_texts("samples", samples, step)
            for prompt, text in samples.items():
                report.say(f"    {prompt} → {one_line(text)}")
        if step != saved_step and (is_last or is_stopping or (step > 0 and step % config.checkpoint.every == 0)):
            state = TrainingState(run.id, step, windows_consumed, tokens_seen, identity, settings.to_dict(config))
            if world.rank == 0:
                metrics.store()  # before the checkpoint: lines that are ahead of it are dropped, missing ones are lost
            _save(engine, state, config, world, report)
            saved_step = step
        if is_last or is_stopping:
            break

        # ---- A step ----
        began = time.perf_counter()
        waited = loader.wait_seconds
        batch = next(batches)
        rate = learning_rate(
            step,
            peak=config.train.learning_rate,
            minimum=config.train.min_learning_rate,
            warmup_steps=config.train.warmup_steps,
            total_steps=total_steps,
        )
        nats, gradient_norm = engine.step(batch.micro_batches, batch.global_targets, rate)
        step, windows_consumed = step + 1, batch.next_position
        tokens_seen += batch.global_targets
        interval.nats += nats
        interval.targets += batch.global_targets
        interval.steps += 1
        interval.waited_seconds += loader.wait_seconds - waited
        is_logged = step % config.train.log_every == 0 or step == total_steps
        loss = _mean_loss(interval, engine) if is_logged else None  # waits for the device: its time belongs to the step
        interval.seconds += time.perf_counter() - began

        # ---- A line of the log ----
        report.advance(step)
        if loss is not None:
            train_seconds += interval.seconds
            tokens_per_second = interval.targets / interval.seconds
            values = {
                "train/loss": loss,
                "train/learning_rate": rate,
                "train/gradient_norm": float(gradient_norm),
                "train/tokens_seen": tokens_seen,
                "train/epoch": windows_consumed / order.windows_per_epoch,
                "speed/tokens_per_second": tokens_per_second,
                "speed/seconds_per_step": interval.seconds / interval.steps,
                "speed/data_wait": interval.waited_seconds / interval.seconds,
                "memory/peak_gib": _peak_memory_bytes(engine.device) / 2**30,
            }
            mfu = counts.mfu(tokens_per_second, flops, peak, world.world_size)
            values |= {"speed/mfu": mfu} if mfu is not None else {}
            metrics.add(step, values)
            tracker.log(values, step)
            seconds_left = (total_steps - step) * train_seconds / (step - started_at_step)
            report.say(metrics_line(step, total_steps, values, seconds_left))
            report.advance(step, f"{tokens_per_second:,.0f} tokens/s")
            interval = Interval()

    # ---- The end ----
    report.end_bar()
    if is_last:
        weights = {name: tensors["param"] for name, tensors in engine.full_state() if world.rank == 0}
        if world.rank == 0:
            card = model_card(run.name, parameters.total, manifest, evaluation, state, config.data.source)
            export_model(storage.join(output, "final"), spec, weights, tokenizer, config.train.context_length, card)
        report.say(f"done: {storage.join(output, 'final')}")
    else:
        report.say(f"stopped after step {step}, checkpointed; start it again to go on")
    tracker.finish(success=is_last)
    return DONE if is_last else STOPPED


# ---- What has to fit together ----


def strategy_of(config: Config, world_size: int) -> Strategy:
    """How the global batch is spread over `world_size` processes; errors as `accumulation_steps`."""
    train = config.train
    steps = accumulation_steps(train.global_batch_size, train.micro_batch_size, world_size)
    return Strategy(train.strategy, train.precision, world_size, train.micro_batch_size, steps, train.gradient_clipping)


def check_tokenizer(tokenizer: TextTokenizer, manifest: Manifest, shards_url: str) -> None:
    """Raises a UserError if the tokenizer beside the shards is not the one that made them."""
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        expected = f"the tokenizer in {manifest.tokenizer}/ is not the one that made the shards"
        raise UserError("data.shards", shards_url, expected, "put the right one back, or prepare again")


def identity_of(config: Config, spec: ModelSpec, manifest: Manifest) -> dict[str, Any]:
    """What cannot change within a run: with another of these, a checkpoint or its cursor would mean something else."""
    return {
        "model": asdict(spec),
        "data": manifest.fingerprint,
        "tokenizer": manifest.tokenizer_fingerprint,
        "context_length": config.train.context_length,
        "global_batch_size": config.train.global_batch_size,
        "order": {
            "seed": config.data.seed,
            "shuffle_bytes": min(int(config.data.shuffle_bytes), sum(shard.size for shard in manifest.train)),
            "node_groups": config.data.node_groups,
        },
    }


def scratch_dir(config: Config) -> Path:
    """Where checkpoints are put together; made if it is not there."""
    folder = Path(config.checkpoint.scratch_dir or gettempdir()).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe(evaluation: Evaluation) -> str:
    """An evaluation in a line."""
    return (
        f"{evaluation.nats_per_token:.4f} nats/token, {evaluation.bits_per_byte:.4f} bits/byte, "
        f"{evaluation.bits_per_character:.4f} bits/character ({evaluation.targets:,} tokens)"
    )


# ---- The parts of the loop ----


def _open(config: Config, tokenizer: TextTokenizer, identity: dict[str, Any]) -> tuple[RunRecord, Checkpoint | None]:
    """The run and where it goes on; the tokenizer is kept with it, so that a checkpoint is usable without shards.

    Whatever is refused is refused before anything is written.
    """
    output, resume = config.run.output, config.train.resume
    checkpoint = None if resume in ("auto", "never") else open_checkpoint(resume)
    if checkpoint is not None:
        check_identity(checkpoint.state, identity, checkpoint.url)
    store_tokenizer(tokenizer, storage.join(output, TOKENIZER_FOLDER), "run.output")
    run = open_run(output, config.run.name, settings.to_dict(config), start_over=resume == "never")
    if resume == "auto" and (checkpoint := newest_checkpoint(output, run.id)) is not None:
        check_identity(checkpoint.state, identity, checkpoint.url)
    return run, checkpoint


def _load(engine: Engine, checkpoint: Checkpoint, world: World, scratch: Path) -> None:
    """Brings a checkpoint to this node once, and into every process."""
    folder = [""]
    with TemporaryDirectory(prefix="wikillm-", dir=scratch) as own:
        if world.local_rank == 0:
            download_checkpoint(checkpoint, Path(own))
            folder = [own]
        if world.world_size > 1:
            gathered: list[Any] = [None] * world.world_size
            dist.all_gather_object(gathered, folder[0])
            folder = [gathered[world.rank - world.local_rank]]
        engine.load_state(checkpoint.state.step, CheckpointFiles(Path(folder[0])))
        engine.accelerator.wait_for_everyone()


def _save(engine: Engine, state: TrainingState, config: Config, world: World, report: Report) -> None:
    began = time.perf_counter()
    if world.rank == 0:
        saved = save_checkpoint(config.run.output, state, engine.full_state(), scratch_dir(config))
        delete_old_checkpoints(config.run.output, config.checkpoint.keep, state)
        report.say(f"step {state.step} | saved {saved.url} in {time.perf_counter() - began:.1f} s")
    else:
        for _ in engine.full_state():
            pass
    engine.accelerator.wait_for_everyone()


def _samples(engine: Engine, tokenizer: TextTokenizer, config: Config) -> dict[str, str]:
    sampling = Sampling(**config.generate.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"}))
    with engine.autocast():
        return {
            prompt: continue_text(
                engine.module.causal_lm, tokenizer, prompt, sampling.for_prompt(index), config.train.context_length
            )
            for index, prompt in enumerate(config.generate.prompts)
        }


def _mean_loss(interval: Interval, engine: Engine) -> float:
    """Mean nats per target since the last line, over all ranks."""
    total = engine.accelerator.reduce(torch.as_tensor(interval.nats).clone(), "sum")
    return float(total) / interval.targets


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
