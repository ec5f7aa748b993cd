"""Amount of work of a run: optimizer steps, tokens, FLOPs, and the time they take on a given GPU."""

from dataclasses import dataclass

from job.data.batching import optimizer_steps
from job.data.manifest import Manifest
from job.data.order import SequenceOrder
from job.model.flops import TokenFlops


@dataclass(frozen=True)
class Workload:
    """What a run computes from its first step to its last."""

    steps: int
    """Optimizer steps."""
    epochs: float
    """Passes over the training data; a fraction if `train.max_steps` ends the run earlier."""
    sequences_per_epoch: int
    tokens: int
    """Tokens that the model is trained to predict, counted again in each epoch."""
    evaluated_tokens: int
    """Validation tokens that the model predicts, counted again in each evaluation."""
    flops_per_token: int
    """FLOPs of one training token, forward and backward."""
    steps_of_epochs: int
    """Steps that `train.epochs` would take without `train.max_steps`."""

    @property
    def flops(self) -> float:
        """FLOPs of all training steps and evaluations; an evaluated token costs the forward pass alone, a third."""
        return self.flops_per_token * (self.tokens + self.evaluated_tokens / 3)

    @property
    def evaluation_share(self) -> float:
        """Share of `flops` that evaluations take, from 0 to 1."""
        return self.flops_per_token * self.evaluated_tokens / 3 / self.flops

    def hours(self, gpu_flops: float, mfu: float, gpus: int) -> float:
        """Return how long the run takes, without start-up, checkpoints and generated samples.

        Args:
            gpu_flops: peak FLOP/s of one GPU.
            mfu: model FLOPs utilization, from 0 to 1.
            gpus: number of GPUs.
        """
        return self.flops / (gpu_flops * mfu * gpus) / 3600

    def seconds_per_step(self, gpu_flops: float, mfu: float, gpus: int) -> float:
        """Return how long one optimizer step takes; the arguments are those of `hours`."""
        return self.flops_per_token * self.tokens / self.steps / (gpu_flops * mfu * gpus)


def compute_workload(
    manifest: Manifest,
    flops: TokenFlops,
    *,
    context_length: int,
    global_batch_size: int,
    epochs: int,
    max_steps: int | None,
    evaluate_every: int,
    max_evaluated_sequences: int | None,
) -> Workload:
    """Return the work of a run over the data set.

    Args:
        manifest: manifest of the data set.
        flops: FLOPs of one token.
        context_length: tokens that one sequence predicts, at most.
        global_batch_size: sequences of one optimizer step.
        epochs: passes over the training data.
        max_steps: step after which the run ends at the latest; None if only `epochs` ends it.
        evaluate_every: steps between two evaluations; the evaluation after the last step always uses all sequences.
        max_evaluated_sequences: sequences of one evaluation during training; None for all.

    Raises:
        UserError: no shard has a token to predict.
    """
    order = SequenceOrder([shard.tokens for shard in manifest.train], [shard.size for shard in manifest.train],
                        context_length, 0, buffer_bytes=2**62)  # fmt: skip
    steps, steps_of_epochs = optimizer_steps(order.position_limit(epochs), global_batch_size, max_steps)
    epochs_trained = steps / steps_of_epochs * epochs
    # The first token of a shard is never predicted: no token comes before it.
    training_targets = sum(max(0, shard.tokens - 1) for shard in manifest.train)
    validation_targets = sum(max(0, shard.tokens - 1) for shard in manifest.validation)
    evaluations = max(0, (steps - 1) // evaluate_every)
    per_evaluation = validation_targets
    if max_evaluated_sequences is not None:
        per_evaluation = min(validation_targets, max_evaluated_sequences * context_length)
    return Workload(
        steps=steps,
        epochs=epochs_trained,
        sequences_per_epoch=order.sequences_per_epoch,
        tokens=round(training_targets * epochs_trained),
        evaluated_tokens=evaluations * per_evaluation + validation_targets,
        flops_per_token=flops.total,
        steps_of_epochs=steps_of_epochs,
    )
