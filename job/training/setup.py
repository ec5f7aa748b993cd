"""Setting up a run, in the order of `train`: the data set, the run, the engine, and everything that watches it."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from job import config as settings
from job import storage
from job.config import Config
from job.data.batching import optimizer_steps
from job.data.loader import BatchLoader
from job.data.manifest import Manifest, load_manifest
from job.data.order import SequenceOrder
from job.data.tokenizer import TextTokenizer, load_tokenizer
from job.local_dirs import cache_folder, loading_folder
from job.model import flops, gpu, gpu_table
from job.model.architecture import tensor_shapes
from job.model.flops import ParameterCounts
from job.model.generation import Sampling
from job.model.optimizer_state import optimizer_state
from job.model.spec import ModelSpec
from job.report import Report
from job.runs.attempts import Attempt, Attempts, Superseded
from job.runs.checkpoint import TrainingState
from job.runs.choices import Choices, choose, largest_micro_batch
from job.runs.compatibility import compatibility_key
from job.runs.export_form import Form, choose_form
from job.runs.launch_context import LaunchContext
from job.runs.metrics_file import MetricsFile
from job.runs.resume import OpenedRun, open_run
from job.runs.run_environment import run_environment
from job.runs.run_tokenizer import check_data_set_tokenizer
from job.runs.world import World
from job.tracking import TrackedRun, Tracker, TrackerGroup, start_trackers
from job.tracking.tracker import Ending
from job.training.bad_steps import BadStepReport
from job.training.distributed import StepSync, broadcast_from_rank0, weakest_hardware
from job.training.engine import Engine
from job.training.engine_setup import build_engine
from job.training.hang_detector import HangDetector
from job.training.profiler import StepProfile
from job.training.rank0 import OtherRanks, Rank0Duties, SavePolicy
from job.training.rules import Length, check_decay_steps, remarks
from job.training.schedule import change_of_schedule, describe, steps_before_decay
from job.training.step_meter import StepMeter
from job.training.validation import ValidationSet
from job.version import code_version

_SAMPLE_SEED = 2333
"""Seed of the samples during training if `generate.seed` is null: the same at every step, so that texts compare."""
_TRIAL_BATCHES = 2
"""Validation batches of each rank that are evaluated before the first step."""


@dataclass(frozen=True)
class TrainingData:
    """The data set, and the model and the steps that follow from it."""

    manifest: Manifest
    tokenizer: TextTokenizer
    spec: ModelSpec
    order: SequenceOrder
    sequences: int
    """Sequences of all epochs."""
    steps: int
    """Optimizer steps of the run, from its first to its last."""
    steps_of_epochs: int
    """Optimizer steps that all epochs would have."""
    decay_after: int | None
    """Step after which the decay of schedule ``wsd`` begins; None without such a decay."""


def open_data(config: Config) -> TrainingData:
    """Read the manifest and the tokenizer of the data set, and compute the run's steps; shards are not read yet.

    Raises:
        UserError: there is no such data set, its tokenizer is not the one that made it, or train.decay_steps is longer
            than the run.
    """
    manifest = load_manifest(config.data.shards)
    tokenizer = load_tokenizer(
        storage.join(config.data.shards, manifest.tokenizer), cache_folder(config.data.cache_dir)
    )
    check_data_set_tokenizer(tokenizer, manifest, config.data.shards)
    order = SequenceOrder(
        [shard.tokens for shard in manifest.train],
        [shard.size for shard in manifest.train],
        config.train.context_length,
        config.data.seed,
        buffer_bytes=int(config.data.shuffle_bytes),
        node_groups=config.data.node_groups,
    )
    sequences = order.position_limit(config.train.epochs)
    steps, steps_of_epochs = optimizer_steps(sequences, config.train.global_batch_size, config.train.max_steps)
    check_decay_steps(config.train, steps)
    decay_after = steps_before_decay(config.train, steps)
    spec = ModelSpec(**config.model.model_dump())
    return TrainingData(manifest, tokenizer, spec, order, sequences, steps, steps_of_epochs, decay_after)


@dataclass(frozen=True)
class ResumedRun:
    """The run that this start continues or begins."""

    opened: OpenedRun
    state: TrainingState
    """Where the run is: at step 0 for a new one."""
    form: Form
    """How the final model will be written."""
    scratch: Path
    """A local folder of this start; on rank 0 it has the checkpoint's tensors."""


def resume(
    config: Config, world: World, context: LaunchContext, data: TrainingData, report: Report, closing: ExitStack
) -> ResumedRun:
    """Take the run over from an earlier attempt, or begin it. A collective; rank 0 decides.

    Raises:
        UserError: no checkpoint can be used although there are some, or the settings do not fit the run.
        NoProgress: too many starts have made no progress.
    """
    key = compatibility_key(config.train, config.data, data.spec, data.manifest)
    form = broadcast_from_rank0(
        world, lambda: choose_form(config.data.shards, data.manifest, data.tokenizer, data.spec)
    )
    folder = loading_folder(config.checkpoint.scratch_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = Path(closing.enter_context(TemporaryDirectory(prefix="wikillm-", dir=folder)))
    hardware = weakest_hardware(world, context.device)

    def choose_here(before: Attempt | None) -> Choices:
        fitting = partial(
            largest_micro_batch, config.train, data.spec, data.manifest.vocab_size, world.world_size, hardware
        )
        return choose(
            config.train,
            data.manifest.vocab_size,
            world.world_size,
            hardware,
            fitting,
            before,
            context.device_reason,
        )

    opened: OpenedRun = broadcast_from_rank0(
        world,
        lambda: open_run(
            config.run.output,
            name=config.run.name,
            resume=config.train.resume,
            start=context,
            tokenizer=data.tokenizer,
            compatibility_key=key,
            config=settings.to_dict(config),
            choose=choose_here,
            max_attempts=config.train.max_attempts_without_progress,
            folder=scratch,
            say=report.say,
            environment=run_environment(world, hardware),
        ),
    )
    run, attempt = opened.record, opened.attempt
    state = TrainingState(run.id, attempt.number, 0, 0, 0, key, settings.to_dict(config))
    if opened.checkpoint is not None:
        state = replace(opened.checkpoint.state, run_id=run.id, attempt=attempt.number, config=state.config)
    return ResumedRun(opened, state, form, scratch)


@dataclass
class Trainer:
    """Everything that the training loop uses."""

    config: Config
    world: World
    report: Report
    data: TrainingData
    run: ResumedRun
    parameters: ParameterCounts
    engine: Engine
    metrics: MetricsFile
    tracker: TrackerGroup
    duties: OtherRanks
    hang_detector: HangDetector
    sync: StepSync
    bad_steps: BadStepReport
    validation: ValidationSet
    loader: BatchLoader
    profile: StepProfile
    meter: StepMeter
    state: TrainingState
    """Where the run is, as of its last save or its end."""


def build(
    config: Config,
    world: World,
    context: LaunchContext,
    data: TrainingData,
    run: ResumedRun,
    trackers: Mapping[str, Tracker],
    report: Report,
    closing: ExitStack,
) -> Trainer:
    """Build the engine, as it was when the run was saved, and all that runs beside it; print the start's table.

    Raises:
        UserError: a micro-batch does not fit into memory, a tracker refuses its settings, or validation does not work.
    """
    manifest, opened, state = data.manifest, run.opened, run.state
    engine, table = build_engine(config.train, world, data.spec, manifest, opened, run.scratch)
    if world.rank == 0 and engine.strategy.micro_batch_size != opened.attempt.micro_batch_size:
        attempt = replace(opened.attempt, micro_batch_size=engine.strategy.micro_batch_size)
        opened = replace(opened, attempt=Attempts(config.run.output).update(attempt))
    parameters = flops.parameter_counts(data.spec, manifest.vocab_size)
    flops_per_token = flops.flops_per_token(data.spec, manifest.vocab_size, config.train.context_length).total
    report.table(
        f"run {opened.record.name} ({opened.record.id}), attempt {opened.attempt.number}",
        [
            ("parameters", f"{parameters.total:,} ({parameters.embedding:,} embedding)"),
            ("FLOPs per token", f"{flops_per_token / 1e6:,.1f} M"),
            ("processes", str(world.world_size)),
            *table,
            ("global batch", f"{config.train.global_batch_size} x {config.train.context_length} tokens"),
            ("steps", f"{data.steps:,} ({data.steps / data.steps_of_epochs * config.train.epochs:.2f} epochs)"),
            ("schedule", describe(config.train, data.steps)),
            ("training tokens", f"{sum(shard.tokens for shard in manifest.train):,}"),
            ("from", "random weights" if opened.checkpoint is None else opened.checkpoint.url),
        ],
    )
    _say_remarks(config, world, data, run, report)

    computed_with = opened.choices.record() | {"micro_batch_size": engine.strategy.micro_batch_size}
    shown_settings = settings.to_dict(config) | {
        "choices": computed_with,
        "parameters": asdict(parameters),
        "data_set": {
            "training_tokens": sum(shard.tokens for shard in manifest.train),
            "validation_tokens": sum(shard.tokens for shard in manifest.validation),
            "fingerprint": manifest.fingerprint,
        },
        "version": code_version(),
        "attempt": {"number": opened.attempt.number, "from_step": state.step},
    }
    tracked_run = TrackedRun(
        opened.record.id, opened.record.name, state.step, shown_settings, attempt=opened.attempt.number
    )
    tracker = start_trackers(trackers if world.rank == 0 else {}, tracked_run, report.say)
    closing.push(partial(_end_early, tracker))

    duties = OtherRanks(context, engine.state)
    if world.rank == 0:
        shapes = tensor_shapes(data.spec, manifest.vocab_size)
        duties = Rank0Duties(
            _save_policy(config, data.decay_after),
            context,
            config.run.output,
            opened,
            engine.state,
            optimizer_state(config.train.optimizer).checkpoint_bytes(shapes),
            report.say,
        )
    closing.callback(duties.close)
    hang_detector = HangDetector(world, config.train.hang_timeout.seconds, context.on_hang)
    closing.callback(hang_detector.close)
    sync = StepSync(world, duties.stop_requested, hang_detector.beat)
    validation = ValidationSet(
        config.data.shards,
        manifest,
        data.tokenizer,
        config.train.context_length,
        world,
        seed=config.data.seed,
        batch_size=config.evaluate.batch_size,
        cache_dir=cache_folder(config.data.cache_dir),
        cache_bytes=int(config.data.cache_bytes),
    )
    # Evaluate two batches on each rank before the first step, so that a fault of the evaluation shows now.
    trial_sequences = config.evaluate.batch_size * _TRIAL_BATCHES * world.world_size
    validation.evaluate(engine.module, engine.device, engine.autocast, sync, trial_sequences)

    loader = closing.enter_context(
        BatchLoader(
            config.data.shards,
            manifest,
            data.order,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=engine.strategy.micro_batch_size,
            rank=world.rank,
            world_size=world.world_size,
            start_position=state.windows_consumed,
            end_position=data.sequences,
            cache_dir=cache_folder(config.data.cache_dir),
            cache_bytes=int(config.data.cache_bytes),
            prefetch_steps=config.data.prefetch_steps,
            workers=config.data.loader_workers,
            say=report.say,
            pin_memory=gpu.is_gpu(engine.device),
        )
    )
    profiled = config.train.profile_steps
    profile = closing.enter_context(
        StepProfile(profiled.ends if profiled and world.rank == 0 else None, config.run.output, run.scratch, report.say)
    )
    peak = gpu_table.peak_flops(gpu.name(), engine.strategy.precision) if gpu.is_gpu(engine.device) else None
    return Trainer(
        config=config,
        world=world,
        report=report,
        data=data,
        run=run,
        parameters=parameters,
        engine=engine,
        metrics=MetricsFile(opened.metrics, opened.attempt.number),
        tracker=tracker,
        duties=duties,
        hang_detector=hang_detector,
        sync=sync,
        bad_steps=BadStepReport(
            config.train.max_skipped_steps,
            state.guard.get("skipped_steps", 0),
            data.order,
            [shard.name for shard in manifest.train],
            lambda scalar: engine.accelerator.reduce(scalar, "sum"),
            report.say,
        ),
        validation=validation,
        loader=loader,
        profile=profile,
        meter=StepMeter(
            flops_per_token, peak, world.world_size, engine.device, state.interval, is_rank0=world.rank == 0
        ),
        state=state,
    )


# ---- Small parts ----


def _say_remarks(config: Config, world: World, data: TrainingData, run: ResumedRun, report: Report) -> None:
    """Print which settings are probably wrong, and how those changed since the last start alter the schedule."""
    nodes = world.world_size // world.local_world_size
    length = Length(data.steps, data.steps_of_epochs, data.order.sequences_per_epoch)
    for remark in remarks(config.model, config.train, config.data, config.checkpoint, data.manifest, length, nodes):
        report.say(str(remark))
    if run.opened.settings_before and run.opened.checkpoint is not None:
        changed = change_of_schedule(
            run.opened.settings_before,
            config.train,
            data.order.sequences_per_epoch,
            run.state.step,
            run.state.decays_after,
        )
        if changed is not None:
            report.say(f"! schedule: {changed}")


def _end_early(tracker: TrackerGroup, kind: Any, error: BaseException | None, trace: Any) -> None:
    """End the tracking of an attempt that an error ended; do nothing if `finish` has ended it."""
    tracker.finish(Ending.SUPERSEDED if isinstance(error, Superseded) else Ending.FAILED)


def _save_policy(config: Config, decay_after: int | None) -> SavePolicy:
    return SavePolicy(
        every=config.checkpoint.every,
        every_minutes=config.checkpoint.every_minutes,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        stop_file=config.train.stop_file,
        max_time=config.train.max_time,
        decay_after=decay_after,
    )


def sampling_of(config: Config) -> Sampling:
    """Return how the samples during training, and the exported model, choose their tokens."""
    generate = config.generate
    seed = _SAMPLE_SEED if generate.seed is None else generate.seed
    return Sampling(generate.max_new_tokens, generate.temperature, generate.top_p, seed)
