"""Training, from the settings to the finished model: open the data → resume → build → fit → finish.

`fit` is the loop. Rare events (evaluate, sample, save) come first in it, then the step, then the line of the log.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from job import storage
from job.config import Config
from job.errors import UserError, one_line
from job.invocation import command
from job.model.generation import continue_text
from job.model.save_folder import CONFIG
from job.report import Report
from job.run_report.write_report import EndReport
from job.runs.attempts import Attempts
from job.runs.checkpoint_list import lineage, list_checkpoints
from job.runs.evaluation_result import Evaluation
from job.runs.export import export_model, model_card, usage
from job.runs.launch_context import LaunchContext
from job.runs.metrics_file import SAMPLES
from job.runs.retention import newest_up_to
from job.runs.run import FINAL_MODEL
from job.runs.run_status import RunStatus
from job.runs.world import World
from job.step_line import LEAST_SHOWN_WAIT, short_number, step_line
from job.tracking import make_trackers
from job.tracking.tracker import Ending
from job.training.distributed import broadcast_from_rank0, join
from job.training.schedule import begins_decay, extension, learning_rate
from job.training.setup import ResumedRun, Trainer, TrainingData, build, open_data, resume, sampling_of

_LEAST_LINES = 10
"""A run has about this many lines of the log at least, even if train.log_every is too large for that."""
_LISTING_SECONDS = 15
"""Longest time for looking up the checkpoint that the last line names."""
_STOP_REPORT_SECONDS = 5
"""Longest wait for the report at a requested stop, which often has a deadline."""
_REPORT_SECONDS = 60
"""Longest wait for the report when the run is done."""

logger = logging.getLogger(__name__)


def train(config: Config, world: World, context: LaunchContext) -> RunStatus:
    """Train until the last step or until asked to stop; every process of the run calls it.

    Args:
        config: all settings.
        world: this process among the others.
        context: what the launcher asks for and tells.

    Returns:
        ``done``; or ``stopped``: checkpointed, to be started again.

    Raises:
        UserError: the settings do not fit the data, the world or the existing run, or a newer attempt has the run.
        NoProgress: the run cannot continue by itself.
        StoreError: the store failed until the deadline, and training could not continue without it.
    """
    with ExitStack() as closing:
        report = Report(world.rank)
        data = open_data(config)
        trackers = make_trackers(config.tracking)  # refused before the run has a new attempt
        join(world, context.device)
        run = resume(config, world, context, data, report, closing)
        if was_done_before(config, world, data, run, report):
            return RunStatus.DONE
        trainer = build(config, world, context, data, run, trackers, report, closing)
        return finish(trainer, fit(trainer, closing))


def fit(t: Trainer, closing: ExitStack) -> Evaluation | None:
    """Train, evaluate, sample and save until the last step or until asked to stop; the run is saved then.

    Returns:
        The evaluation after the last step; None if there was none.
    """
    config, data, engine, report, sync, meter = t.config, t.data, t.engine, t.report, t.sync, t.meter
    step, sequences, tokens_seen = t.state.step, t.state.windows_consumed, t.state.tokens_seen
    first_step, saved_step = step, step if t.run.opened.checkpoint is not None else None
    evaluation: Evaluation | None = None
    log_every = min(config.train.log_every, max(1, data.steps // _LEAST_LINES))
    # An evaluation that a stop interrupted is left to the next start.
    is_evaluation_due = broadcast_from_rank0(
        t.world, lambda: step % config.evaluate.every == 0 and not t.metrics.has(step, "validation/loss")
    )
    report.start_bar("training", data.steps, step)
    closing.callback(report.end_bar)
    while True:
        t.profile.at(step)  # before the step's time begins, since it writes files
        waited_seconds = t.loader.wait_seconds
        is_last = step >= data.steps
        with meter.step_time():
            decision = sync.decide() if is_last else sync.decide(t.loader.poll)
        t.duties.check()

        # ---- Now and then: evaluate, sample, save ----
        if decision.goes_on and (is_last or (is_evaluation_due and step > 0)):
            if is_last:
                report.say("all steps are done; the last validation follows, then the model is written")
            samples = sample(t)
            evaluation = evaluate(t, None if is_last else config.evaluate.max_windows)
            if not sync.stopped:
                for prompt, text in samples.items():
                    report.sample(prompt, text)
                if samples:
                    t.metrics.add(step, {SAMPLES: samples})
                t.tracker.log_texts("samples", samples, step)
            if evaluation is not None:
                report.say(f"step {step}/{data.steps} | validation: {evaluation}")
                t.metrics.add(step, evaluation.as_dict())
                t.tracker.log_metrics(evaluation.as_dict() | {"train/tokens_seen": tokens_seen}, step)
        if (decision.save or is_last or sync.stopped) and step != saved_step:
            t.bad_steps.look()
            with meter.stall():
                save(t, step, sequences, tokens_seen)
            saved_step = step
        if is_last or sync.stopped:
            return evaluation

        # ---- A step ----
        with meter.step_time():
            batch = next(t.loader)
            sync.post(ready=step + 1 == data.steps or t.loader.poll(0), save=t.duties.wants_save(step + 1))
            rate = learning_rate(
                step,
                schedule=config.train.schedule,
                peak=config.train.learning_rate,
                minimum=config.train.min_learning_rate,
                warmup_steps=config.train.warmup_steps,
                decay_steps=config.train.decay_steps,
                total_steps=data.steps,
            )
            if begins_decay(step, data.decay_after, t.state.decays_after):
                t.state = replace(t.state, decays_after=[*t.state.decays_after, step])
            result = engine.step(batch.micro_batches, batch.global_targets, rate)
            step, sequences = step + 1, batch.next_position
            tokens_seen += batch.global_targets
            meter.add(result, batch.global_targets, t.loader.wait_seconds - waited_seconds)
            t.bad_steps.add(step, result, batch)
            is_evaluation_due = step % config.evaluate.every == 0
            is_logged = step % log_every == 0 or step in (1, data.steps)
            sums = meter.sums() if is_logged else None  # waits for the device, which is part of the step's time

        # ---- A line of the log ----
        report.advance(step)
        if sums is not None:
            t.bad_steps.look()
            epoch = sequences / data.order.sequences_per_epoch
            values = meter.metrics(sums, rate, result, tokens_seen, epoch, t.bad_steps.skipped_steps)
            t.metrics.add(step, values)
            used, whole = sequences - batch.position, config.train.global_batch_size
            t.tracker.log_metrics(values if used == whole else without_norm(values), step)
            seconds_left = meter.seconds_left(data.steps - step, step - first_step)
            seconds_to_save = t.duties.seconds_to_save(step, meter.seconds_left(1, step - first_step))
            note = "" if used == whole else f"{used} of {whole} sequences"
            report.say(step_line(step, data.steps, values, seconds_left, seconds_to_save, note, report.columns))
            report.advance(step, f"{short_number(values['speed/tokens_per_second'])} tokens/s")
            if values["speed/data_wait"] > LEAST_SHOWN_WAIT and step - first_step > log_every:
                report.say(f"    waited for data {values['speed/data_wait']:.1%} of the time: {t.loader.advice()}")


def finish(t: Trainer, evaluation: Evaluation | None) -> RunStatus:
    """Wait for the last save, export the model if the last step is done, and record how the start ended.

    Returns:
        ``done`` or ``stopped``.
    """
    config, report = t.config, t.report
    report.end_bar()
    step, final = t.state.step, storage.join(config.run.output, FINAL_MODEL)
    status = RunStatus.STOPPED if t.sync.stopped else RunStatus.DONE
    is_stopped = status == RunStatus.STOPPED
    deadline_seconds = config.checkpoint.stop_deadline.seconds if is_stopped else config.store.deadline_seconds
    t.sync.wait(t.duties.finish_save(step, deadline_seconds))
    t.hang_detector.close()
    t.duties.check()
    if status == RunStatus.DONE:
        export(t, evaluation, final)
    t.duties.end(status, step, t.metrics.content())
    end_report = EndReport(config.run.output, adds_to_card=not is_stopped) if t.world.rank == 0 else None
    if status == RunStatus.DONE:
        report.say(f"done: {final}")
        say_how_to_extend(t)
    else:
        rest = "to continue" if step < t.data.steps else "for the last validation and the final model"
        report.say(f"stopped after step {step}, checkpointed; start it again {rest}")
    t.tracker.finish(Ending.DONE if status == RunStatus.DONE else Ending.STOPPED)
    if end_report is not None:
        page = end_report.wait(_STOP_REPORT_SECONDS if is_stopped else _REPORT_SECONDS)
        if page is not None and not is_stopped:
            report.say(f"report: {page}")
    if not is_stopped:
        prompt = config.generate.prompts[0]
        report.say(f"continue a text: {command('generate', '--generate.model', final, prompt)}")
    t.engine.accelerator.wait_for_everyone()
    return status


# ---- The rare events ----


def was_done_before(config: Config, world: World, data: TrainingData, run: ResumedRun, report: Report) -> bool:
    """Return True, and say so, if an earlier start has done all steps and written the final model. A collective."""
    final = storage.join(config.run.output, FINAL_MODEL)
    if run.state.step < data.steps or not run.opened.was_done:
        return False
    if not broadcast_from_rank0(world, lambda: storage.exists(storage.join(final, CONFIG))):
        return False
    if world.rank == 0:
        Attempts(config.run.output).end(run.opened.attempt, RunStatus.DONE)
    report.say(f"already done: {final}; to train longer, raise train.epochs or train.max_steps")
    return True


def without_norm(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics of a step with a partial batch for the charts, in which its gradient norm would be a jump.

    The norm of a mean over fewer sequences is larger, because less of its noise cancels out: its expected square is
    that of the true gradient plus the variance of one sequence's gradient over the number of sequences (McCandlish et
    al., An Empirical Model of Large-Batch Training, 2018, appendix A). The log and metrics.jsonl have it.
    """
    return {name: value for name, value in values.items() if name != "train/gradient_norm"}


def evaluate(t: Trainer, max_sequences: int | None) -> Evaluation | None:
    """Return the loss on `max_sequences` validation sequences, or on all; None if there are none or all ranks stop."""
    return t.validation.evaluate(t.engine.module, t.engine.device, t.engine.autocast, t.sync, max_sequences)


def sample(t: Trainer) -> dict[str, str]:
    """Return continuations of the prompts, made by rank 0 while the others wait; fewer if all ranks stop."""
    samples: dict[str, str] = {}
    if t.world.rank == 0:
        sampling = sampling_of(t.config)
        with t.engine.autocast():
            for index, prompt in enumerate(t.config.generate.prompts):
                if not t.sync.stopped:
                    samples[prompt] = continue_text(
                        t.engine.module.causal_lm,
                        t.data.tokenizer,
                        prompt,
                        sampling.for_prompt(index),
                        t.config.train.context_length,
                        should_stop=t.sync.hold_up,
                    )
    t.sync.go_on()
    return samples


def save(t: Trainer, step: int, sequences: int, tokens_seen: int) -> None:
    """Begin to save the run; `job.training.rank0` describes what follows."""
    if t.sync.stopped:
        t.duties.cancel_save()
    t.sync.wait(t.duties.can_save)
    t.state = replace(
        t.state,
        step=step,
        windows_consumed=sequences,
        tokens_seen=tokens_seen,
        guard=t.engine.bad_steps.state(),
        interval=t.meter.sums(),
    )
    t.duties.save(t.state, t.metrics.content())


def say_how_to_extend(t: Trainer) -> None:
    """Print the checkpoint before the last decay, and the settings with which a longer run continues from it."""
    train, output, decays_after = t.config.train, t.config.run.output, t.state.decays_after
    if t.world.rank != 0 or not decays_after:
        return
    try:
        with storage.limits(deadline_seconds=_LISTING_SECONDS):
            checkpoint = newest_up_to(lineage(Attempts(output), list_checkpoints(output)), decays_after[-1])
    except (OSError, UserError) as error:
        logger.warning("the checkpoint before the decay could not be looked up: %s", one_line(str(error)))
        return
    if checkpoint is not None:
        options = extension(train, t.data.steps, t.data.order.sequences_per_epoch)
        t.report.say(
            "to train longer, continue from the checkpoint before the decay, here with twice the steps: --train.resume "
            f"{checkpoint.url(output)} {options} (to keep what this run has after it, set another run.output)"
        )


def export(t: Trainer, evaluation: Evaluation | None, final: str) -> None:
    """Write the final model. A collective: the weights are brought together on rank 0."""
    weights = {name: tensors["param"] for name, tensors in t.engine.state.read() if t.world.rank == 0}
    if t.world.rank != 0:
        return
    t.duties.check_is_ours()
    context_length, sampling = t.config.train.context_length, sampling_of(t.config)
    example = usage(t.data.tokenizer, t.config.generate.prompts[0], sampling, context_length)
    card = model_card(
        t.run.opened.record.name,
        t.data.spec,
        t.parameters.total,
        t.data.manifest,
        evaluation,
        t.state,
        t.config.data.source,
        example,
    )
    export_model(final, t.data.spec, weights, t.data.tokenizer, context_length, card, t.run.form, sampling)
