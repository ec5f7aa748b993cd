"""The training loop, from the settings to the finished model; reads from top to bottom.

manifest → world → run (→ checkpoint) → model → batches → steps, with evaluations and checkpoints between → final/
"""

import math
import resource
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from job import config as settings
from job import storage
from job.config import Config
from job.data.batching import BatchCut, optimizer_steps
from job.data.loader import BatchLoader
from job.data.manifest import Manifest, load_manifest
from job.data.order import WindowOrder
from job.data.tokenizer import TextTokenizer, load_tokenizer
from job.errors import UserError, one_line
from job.local_dirs import cache_folder, loading_folder, log_folder
from job.model import flops as counts
from job.model.architecture import LanguageModel, build_model
from job.model.attention import why_not_flash_attention_3
from job.model.generation import Sampling, continue_text
from job.model.spec import ModelSpec
from job.report import Report, metrics_line
from job.runs.attempts import DONE, STOPPED
from job.runs.checkpoint import Checkpoint, CheckpointFiles, TrainingState, download_checkpoint
from job.runs.compatibility import identity_of
from job.runs.export import export_model, model_card, usage
from job.runs.export_form import choose_form
from job.runs.launch_context import Start
from job.runs.metrics_file import MetricsLog
from job.runs.resume import OpenedRun, cut_as_before, open_run
from job.runs.setting_changes import change_of_schedule
from job.runs.world import World
from job.tracking.swanlab import choose_mode, start_tracker
from job.training.distributed import Lockstep, agree
from job.training.engine import AdamW, Engine, StepResult, Strategy, start_accelerator
from job.training.evaluation import Evaluation
from job.training.hang_detector import Watchdog
from job.training.process_group import join
from job.training.profiler import StepProfile
from job.training.rank0 import Follower, Keeper
from job.training.rules import Length, remarks
from job.training.schedule import learning_rate
from job.training.skips import Skips
from job.training.validation import HeldOut

_FIRST_EVALUATION_BATCHES = 2
_MOST_DATA_WAIT = 0.02
"""Share of the time; a run that waits longer is told what to change. Not so between its start and its first line."""


@dataclass
class Interval:
    """What is measured between two lines of the log; evaluations and checkpoints are not part of its time."""

    nats: torch.Tensor | float = 0.0
    """Of this rank's targets."""
    targets: torch.Tensor | float = 0.0
    """Of the global batches; those of skipped steps are left out."""
    steps: float = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    """Of those, for batches."""
    stalled_seconds: float = 0.0
    """Beside those, for checkpoints."""

    def add(self, result: StepResult, targets: int) -> None:
        """Adds a step."""
        self.nats = self.nats + result.nats
        self.targets = self.targets + targets * (1 - result.skipped)
        self.steps += 1

    def summed(self, engine: Engine) -> dict[str, float]:
        """The same over all ranks, by name; every rank calls it, and waits for the device."""
        nats = engine.accelerator.reduce(torch.as_tensor(self.nats, device=engine.device).clone(), "sum")
        return {
            "nats": float(nats),
            "targets": float(self.targets),
            "steps": self.steps,
            "seconds": self.seconds,
            "waited_seconds": self.waited_seconds,
            "stalled_seconds": self.stalled_seconds,
        }


def train(config: Config, world: World, start: Start) -> str:
    """Trains until the last step or until asked to stop; every process of the run calls it.

    Args:
        config: all settings.
        world: this process' place among the others.
        start: what whoever started it wants and tells.

    Returns:
        ``done``, or ``stopped``: checkpointed, to be started again.

    Raises:
        UserError: the settings do not fit the data, the world, or the run that is there, or another has taken it over.
        NoProgress: it cannot go on by itself.
        StoreError: the store failed until the deadline, and there was no way on without it.
    """
    with ExitStack() as closing:
        return _train(config, world, start, closing)


def _train(config: Config, world: World, start: Start, closing: ExitStack) -> str:
    report, output = Report(world.rank), config.run.output

    # ---- What there is to train, and on what ----
    manifest = load_manifest(config.data.shards)
    cache = cache_folder(config.data.cache_dir)
    tokenizer = load_tokenizer(storage.join(config.data.shards, manifest.tokenizer), cache)
    check_tokenizer(tokenizer, manifest, config.data.shards)
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
    total_steps, epochs_steps = optimizer_steps(end, config.train.global_batch_size, config.train.max_steps)

    # ---- The other processes, and the run that they all work on ----
    tracking_mode, why = choose_mode(config.tracking.mode)
    join(world, start.device)
    identity = identity_of(config, spec, manifest)
    form = agree(world, lambda: choose_form(config.data.shards, manifest, tokenizer))
    scratch = Path(closing.enter_context(TemporaryDirectory(prefix="wikillm-", dir=scratch_dir(config))))
    opened: OpenedRun = agree(
        world,
        lambda: open_run(
            output,
            name=config.run.name,
            resume=config.train.resume,
            start=start,
            tokenizer=tokenizer,
            identity=identity,
            config=settings.to_dict(config),
            cut=partial(cut_as_before, config.train, world.world_size),
            max_attempts=config.train.max_attempts_without_progress,
            folder=scratch,
            say=report.say,
        ),
    )
    run, attempt, checkpoint = opened.record, opened.attempt, opened.checkpoint
    state = TrainingState(run.id, attempt.number, 0, 0, 0, identity, settings.to_dict(config))
    if checkpoint is not None:
        state = replace(checkpoint.state, run_id=run.id, attempt=attempt.number, config=state.config)

    # ---- The model, new or as it was ----
    strategy = strategy_of(config, opened.batch_cut)
    accelerator = start_accelerator(strategy, log_with="swanlab")
    engine = Engine(
        accelerator,
        LanguageModel(causal_lm, config.train.loss_chunk_tokens, config.train.document_masking),
        strategy,
        AdamW(config.train.weight_decay, config.train.beta1, config.train.beta2, config.train.epsilon),
    )
    if checkpoint is not None:
        _load(engine, checkpoint, world, scratch)
    attention = _choose_attention(config, engine)
    compiled = "no"
    if config.train.compiles(engine.device.type == "cuda"):
        began = time.perf_counter()
        why_not = engine.compile(config.train.context_length)
        compiled = f"no: {why_not}" if why_not else f"in {time.perf_counter() - began:.0f} s"
    parameters = counts.parameter_counts(spec, manifest.vocab_size)
    flops = counts.flops_per_token(spec, manifest.vocab_size, config.train.context_length).total
    peak = counts.peak_flops(torch.cuda.get_device_name()) if engine.device.type == "cuda" else None
    report.table(
        f"run {run.name} ({run.id}), attempt {attempt.number}",
        [
            ("parameters", f"{parameters.total:,} ({parameters.embedding:,} embedding)"),
            ("FLOPs per token", f"{flops / 1e6:,.1f} M"),
            ("processes", f"{world.world_size} x {strategy.name}, {strategy.precision}"),
            ("device", f"{device_name(engine.device)} ({start.device_reason})"),
            ("attention", attention),
            ("compiled", compiled),
            ("global batch", f"{config.train.global_batch_size} x {config.train.context_length} tokens"),
            ("gradient accumulation", str(opened.batch_cut)),
            ("steps", f"{total_steps:,} ({total_steps / epochs_steps * config.train.epochs:.2f} epochs)"),
            ("training tokens", f"{sum(shard.tokens for shard in manifest.train):,}"),
            ("from", "random weights" if checkpoint is None else checkpoint.url),
        ],
    )

    length = Length(total_steps, epochs_steps, order.windows_per_epoch)
    for remark in remarks(config, manifest, length, nodes=world.world_size // world.local_world_size):
        report.say(str(remark))
    if opened.settings_before and checkpoint is not None:
        changed = change_of_schedule(opened.settings_before, config, order.windows_per_epoch, state.step)
        if changed is not None:
            report.say(f"! schedule: {changed}")

    # ---- What watches it, and what may stop it ----
    metrics = MetricsLog(opened.metrics)
    tracker = start_tracker(
        accelerator,
        mode=tracking_mode,
        project=config.tracking.project,
        workspace=config.tracking.workspace,
        name=run.name,
        run_id=run.id,
        log_dir=log_folder(config.tracking.log_dir),
        config=settings.to_dict(config),
    )
    closing.callback(tracker.finish, success=False)  # unless it has been finished as a success before
    report.say(f"tracking: {tracking_mode} ({why}); {tracker.how_to_watch}")
    keeper = Follower(start, engine)
    if world.rank == 0:
        keeper = Keeper(config, start, opened, engine, parameters.total, report)
    closing.callback(keeper.close)
    watchdog = Watchdog(world, config.train.hang_timeout.seconds, start.on_hang)
    closing.callback(watchdog.close)
    lockstep = Lockstep(world, keeper.stop_requested, watchdog.beat)
    skips = Skips(
        config.train.max_skipped_steps,
        state.guard.get("skipped_steps", 0),
        state.guard.get("skipped_in_a_row", 0),
        order,
        [shard.name for shard in manifest.train],
        lambda scalar: engine.accelerator.reduce(scalar, "sum"),
        report.say,
    )

    # ---- Two held-out batches before the first step: what would fail in hours fails now ----
    held_out = HeldOut(config, manifest, tokenizer, config.train.context_length, world)

    def evaluate(max_windows: int | None) -> Evaluation | None:
        if held_out.is_empty:
            return None
        return held_out.evaluate(engine.module, engine.device, engine.autocast, lockstep, max_windows)

    evaluate(config.evaluate.batch_size * _FIRST_EVALUATION_BATCHES * world.world_size)

    loader = closing.enter_context(
        BatchLoader(
            config.data.shards,
            manifest,
            order,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=strategy.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            start_position=state.windows_consumed,
            end_position=end,
            cache_dir=cache,
            cache_bytes=int(config.data.cache_bytes),
            prefetch_steps=config.data.prefetch_steps,
            workers=config.data.loader_workers,
            say=report.say,
            pin_memory=engine.device.type == "cuda",
        )
    )
    profiled = config.train.profile_steps
    profile = closing.enter_context(
        StepProfile(profiled.ends if profiled and world.rank == 0 else None, output, scratch, report.say)
    )
    step, windows_consumed, tokens_seen = state.step, state.windows_consumed, state.tokens_seen
    saved_step = step if checkpoint is not None else None
    interval, started_at_step, train_seconds = Interval(**state.interval), step, 0.0
    if world.rank != 0:
        interval.nats = 0.0  # what the checkpoint holds is the sum over all ranks
    evaluation: Evaluation | None = None
    # A stop in the middle of an evaluation leaves it to the next start.
    is_evaluation_due = agree(
        world, lambda: step % config.evaluate.every == 0 and not metrics.has(step, "validation/loss")
    )
    report.start_bar("training", total_steps, step)
    closing.callback(report.end_bar)
    while True:
        profile.at(step)  # what it writes is no part of the interval's time
        began, waited = time.perf_counter(), loader.wait_seconds
        is_last = step >= total_steps
        goes_on = lockstep.go_on() if is_last else lockstep.go_on(loader.poll)
        interval.seconds += time.perf_counter() - began
        keeper.check()

        # ---- Now and then: evaluate, sample, save ----
        if goes_on and (is_last or (is_evaluation_due and step > 0)):
            samples = _samples(engine, tokenizer, config, world, lockstep)
            evaluation = evaluate(None if is_last else config.evaluate.max_windows)
            if not lockstep.stopped:
                for prompt, text in samples.items():
                    report.say(f"    {prompt} → {one_line(text)}")
                tracker.log_texts("samples", samples, step)
            if evaluation is not None:
                report.say(f"step {step}/{total_steps} | held out: {describe(evaluation)}")
                metrics.add(step, evaluation.as_dict())
                tracker.log(evaluation.as_dict(), step)
        is_save_due = lockstep.takes_save() or is_last or lockstep.stopped
        if is_save_due and step != saved_step:
            skips.look()
            began = time.perf_counter()
            if lockstep.stopped:
                keeper.give_up_save()
            lockstep.wait(keeper.is_free)
            state = replace(
                state,
                step=step,
                windows_consumed=windows_consumed,
                tokens_seen=tokens_seen,
                guard=engine.guard_state(),
                interval=interval.summed(engine),
            )
            keeper.save(state, metrics.content())
            interval.stalled_seconds += time.perf_counter() - began
            saved_step = step
        if is_last or lockstep.stopped:
            break

        # ---- A step ----
        began = time.perf_counter()
        batch = next(loader)
        lockstep.post(ready=step + 1 == total_steps or loader.poll(0), save=keeper.wants_save(step + 1))
        rate = learning_rate(
            step,
            peak=config.train.learning_rate,
            minimum=config.train.min_learning_rate,
            warmup_steps=config.train.warmup_steps,
            total_steps=total_steps,
        )
        result = engine.step(batch.micro_batches, batch.global_targets, rate)
        step, windows_consumed = step + 1, batch.next_position
        tokens_seen += batch.global_targets
        interval.add(result, batch.global_targets)
        skips.take(step, result, batch)
        is_evaluation_due = step % config.evaluate.every == 0
        is_logged = step % config.train.log_every == 0 or step in (1, total_steps)
        summed = interval.summed(engine) if is_logged else None  # waits for the device: its time belongs to the step
        interval.seconds += time.perf_counter() - began
        interval.waited_seconds += loader.wait_seconds - waited

        # ---- A line of the log ----
        report.advance(step)
        if summed is not None:
            skips.look()
            train_seconds += interval.seconds
            tokens_per_second = summed["targets"] / interval.seconds
            values = {
                "train/loss": summed["nats"] / summed["targets"] if summed["targets"] else math.nan,
                "train/learning_rate": rate,
                "train/gradient_norm": float(result.gradient_norm),
                "train/tokens_seen": tokens_seen,
                "train/epoch": windows_consumed / order.windows_per_epoch,
                "train/skipped_steps": skips.total,
                "speed/tokens_per_second": tokens_per_second,
                "speed/seconds_per_step": interval.seconds / interval.steps,
                "speed/data_wait": interval.waited_seconds / interval.seconds,
                "speed/stall": interval.stalled_seconds / (interval.seconds + interval.stalled_seconds),
                "memory/peak_gib": _peak_memory_bytes(engine.device) / 2**30,
            }
            mfu = counts.mfu(tokens_per_second, flops, peak, world.world_size)
            values |= {"speed/mfu": mfu} if mfu is not None else {}
            values = {name: value for name, value in values.items() if math.isfinite(value)}
            metrics.add(step, values)
            tracker.log(values, step)
            seconds_left = (total_steps - step) * train_seconds / (step - started_at_step)
            report.say(metrics_line(step, total_steps, values, seconds_left))
            report.advance(step, f"{tokens_per_second:,.0f} tokens/s")
            if values["speed/data_wait"] > _MOST_DATA_WAIT and step - started_at_step > config.train.log_every:
                report.say(f"    waited for data {values['speed/data_wait']:.1%} of the time: {loader.advice()}")
            interval = Interval()

    # ---- The end ----
    report.end_bar()
    status = STOPPED if lockstep.stopped else DONE
    patience = config.checkpoint.stop_deadline.seconds if status == STOPPED else config.store.deadline_seconds
    lockstep.wait(keeper.finish_save(step, patience))
    watchdog.close()
    keeper.check()
    if status == DONE:
        weights = {name: tensors["param"] for name, tensors in engine.full_state() if world.rank == 0}
        if world.rank == 0:
            keeper.check_is_ours()
            context_length, sampling = config.train.context_length, sampling_of(config)
            example = usage(tokenizer, config.generate.prompts[0], sampling, context_length)
            card = model_card(run.name, parameters.total, manifest, evaluation, state, config.data.source, example)
            export_model(storage.join(output, "final"), spec, weights, tokenizer, context_length, card, form, sampling)
    keeper.end(status, step, metrics.content())
    if status == DONE:
        report.say(f"done: {storage.join(output, 'final')}")
    else:
        report.say(f"stopped after step {step}, checkpointed; start it again to go on")
    tracker.finish(success=status == DONE)
    engine.accelerator.wait_for_everyone()
    return status


def strategy_of(config: Config, cut: BatchCut) -> Strategy:
    """Return the engine's settings for this division of the batch."""
    train = config.train
    return Strategy(
        train.strategy,
        train.precision,
        cut.world_size,
        cut.micro_batch_size,
        cut.gradient_accumulation_steps,
        train.gradient_clipping,
        train.spike_factor,
    )


def sampling_of(config: Config) -> Sampling:
    """How continuations are made."""
    return Sampling(**config.generate.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"}))


def check_tokenizer(tokenizer: TextTokenizer, manifest: Manifest, shards_url: str) -> None:
    """Raises a UserError if the tokenizer beside the shards is not the one that made them."""
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        expected = f"the tokenizer in {manifest.tokenizer}/ is not the one that made the shards"
        raise UserError("data.shards", shards_url, expected, "put the right one back, or prepare again")


def scratch_dir(config: Config) -> Path:
    """Where checkpoints are put together; made if it is not there."""
    folder = loading_folder(config.checkpoint.scratch_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def describe(evaluation: Evaluation) -> str:
    """An evaluation in a line."""
    return (
        f"{evaluation.nats_per_token:.4f} nats/token, {evaluation.bits_per_byte:.4f} bits/byte, "
        f"{evaluation.bits_per_character:.4f} bits/character ({evaluation.targets:,} tokens)"
    )


# ---- The parts of the loop ----


def _load(engine: Engine, checkpoint: Checkpoint, world: World, folder: Path) -> None:
    """Brings a checkpoint into every process, and once to every node: the first process has it in its `folder` already.

    Each `folder` is empty again afterwards.
    """
    if world.local_rank == 0 and world.rank != 0:
        download_checkpoint(checkpoint, folder)
    folders: list[Any] = [str(folder)]
    if world.world_size > 1:
        folders = [None] * world.world_size
        dist.all_gather_object(folders, str(folder))
    files = CheckpointFiles(Path(folders[world.rank - world.local_rank]))
    engine.load_state(checkpoint.state.step, files, checkpoint.state.guard)
    engine.accelerator.wait_for_everyone()
    for path in folder.iterdir():
        path.unlink()


def _choose_attention(config: Config, engine: Engine) -> str:
    """Sets up what computes attention, and says what that is."""
    train, on_gpu = config.train, engine.device.type == "cuda"
    chosen = ["SDPA"]
    if train.flash_attention_3:
        why_not = why_not_flash_attention_3(engine.module.causal_lm.config, train.context_length, engine.device)
        chosen = [f"SDPA, no FlashAttention-3: {why_not}" if why_not else "FlashAttention-3"]
    if train.document_masking:
        why_not = engine.pack_documents(train.context_length) if on_gpu else "no GPU"
        chosen.append(f"documents apart by a mask: {why_not}" if why_not else "documents apart without a mask")
    return "; ".join(chosen)


def _samples(
    engine: Engine, tokenizer: TextTokenizer, config: Config, world: World, lockstep: Lockstep
) -> dict[str, str]:
    """Continuations by the first process, for which the others wait; fewer if the run is to stop."""
    if world.rank != 0:
        lockstep.go_on()
        return {}
    sampling = sampling_of(config)
    found: dict[str, str] = {}
    with engine.autocast():
        for index, prompt in enumerate(config.generate.prompts):
            if not lockstep.stopped:
                found[prompt] = continue_text(
                    engine.module.causal_lm,
                    tokenizer,
                    prompt,
                    sampling.for_prompt(index),
                    config.train.context_length,
                    should_stop=lockstep.hold_up,
                )
    lockstep.go_on()
    return found


def device_name(device: torch.device) -> str:
    """Return ``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
