"""The second half of `benchmarks.tour`: a token in the step that trains on it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from job.config import Config
from job.data.batching import cut_batch
from job.data.loader import Batch, BatchLoader
from job.data.manifest import Manifest
from job.data.order import SequenceOrder
from job.model.flops import parameter_counts
from job.model.language_model import LanguageModel, build_model
from job.model.loss import default_chunk_tokens
from job.model.spec import ModelSpec
from job.training.accelerator import Strategy, start_accelerator
from job.training.engine import Engine
from job.training.optimizer_settings import OptimizerSettings

Station = tuple[str, dict[str, object]]
"""A part of the program that the token passes, and the numbers there by name."""


def train_stations(
    config: Config,
    manifest: Manifest,
    order: SequenceOrder,
    rates: Sequence[float],
    token: int,
    row: int,
    column: int,
) -> Iterator[Station]:
    """Train one step for each of the `rates`, and yield the stations in the last step, which has the token as a label.

    Args:
        config: all settings.
        manifest: the data set.
        order: the order of training.
        rates: learning rate of each step.
        token: id of the token.
        row: row of the global batch that has the token.
        column: position in the sequence at which it is the label.
    """
    train, spec = config.train, ModelSpec(**config.model.model_dump())
    assert isinstance(train.micro_batch_size, int) and train.processes is not None
    cut = cut_batch(train.global_batch_size, train.micro_batch_size, train.processes)
    engine = _engine(config, manifest, cut.micro_batch_size)
    loader = BatchLoader(
        config.data.shards,
        manifest,
        order,
        global_batch_size=train.global_batch_size,
        micro_batch_size=cut.micro_batch_size,
        rank=0,
        world_size=1,
        start_position=0,
        end_position=len(rates) * train.global_batch_size,
        cache_dir=str(config.data.cache_dir),
        cache_bytes=int(config.data.cache_bytes),
        prefetch_steps=1,
        workers=1,
    )
    with loader:
        *earlier, batch = loader
    for one, rate in zip(earlier, rates[:-1], strict=True):
        engine.step(one.micro_batches, one.global_targets, rate)
    share = train.global_batch_size // cut.world_size
    sizes = {"micro-batches": cut.gradient_accumulation_steps, "sequences of a micro-batch": cut.micro_batch_size}
    targets = {"targets of the batch": batch.global_targets}
    yield "micro-batch", {"sequences of a rank": share, **sizes, "rank": row // share, **targets}

    weight: Any = engine.module.causal_lm.get_input_embeddings().weight
    before = weight[token].detach().clone()
    counts = parameter_counts(spec, manifest.vocab_size)
    numbers = {"parameters": f"{counts.total:,}", "of the embedding": f"{counts.embedding:,}"}
    yield "embedding", {**numbers, "norm of the token's row": f"{before.norm():.3f}"}

    micro, place = row // cut.micro_batch_size, (row % cut.micro_batch_size, column)
    hidden, nats = _forward(engine, batch, micro)
    logits = hidden[place] @ weight.detach().T
    vector = {"shape": " x ".join(map(str, hidden.shape)), "norm at the position": f"{hidden[place].norm():.3f}"}
    rank_of_logit = int((logits > logits[token]).sum()) + 1
    yield "hidden state", {**vector, "logit": f"{logits[token]:.3f}", "its place, largest first": rank_of_logit}

    gradients: list[torch.Tensor] = []
    hook = weight.register_post_accumulate_grad_hook(lambda one: gradients.append(one.grad[token].clone()))
    result = engine.step(batch.micro_batches, batch.global_targets, rates[-1])
    hook.remove()
    loss, uniform = float(nats[place]), math.log(manifest.vocab_size)
    chunk = min(train.loss_chunk_tokens or default_chunk_tokens(manifest.vocab_size, engine.device), nats.numel())
    of_token = {
        "nats": f"{loss:.3f}",
        "probability": f"{math.exp(-loss):.5f}",
        "nats of a uniform guess": f"{uniform:.3f}",
    }
    yield (
        "loss",
        {"positions of a chunk": chunk, **of_token, "mean": f"{float(result.nats) / batch.global_targets:.3f}"},
    )

    norms = {"norm": f"{float(result.gradient_norm):.3f}", "limit": f"{train.gradient_clipping:g}"}
    of_row = {"norm for the token's row": f"{gradients[-1].norm():.4f}"}
    yield "gradient", {"of the logit": f"{math.expm1(-loss):.5f}", **norms, **of_row}

    change, (_, after) = (weight[token] - before).norm(), _forward(engine, batch, micro)
    changes = {"norm of the row's change": f"{change:.4f}", "nats afterwards": f"{float(after[place]):.3f}"}
    yield "update", {"learning rate": f"{rates[-1]:.3e}", **changes}


def _engine(config: Config, manifest: Manifest, micro_batch_size: int) -> Engine:
    """Return the demonstration's model and optimizer, in this process alone."""
    train, spec = config.train, ModelSpec(**config.model.model_dump())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # otherwise torchrun does this
    micro_batches = train.global_batch_size // micro_batch_size
    strategy = Strategy("ddp", train.precision, 1, micro_batch_size, micro_batches, train.gradient_clipping)
    causal_lm = build_model(spec, manifest.vocab_size, manifest.eod_id, train.context_length, train.seed)
    model = LanguageModel(causal_lm, train.loss_chunk_tokens, train.document_masking)
    optimizer = OptimizerSettings(train.optimizer, train.weight_decay, train.beta1, train.beta2, train.epsilon)
    return Engine(start_accelerator(strategy), model, strategy, optimizer)


@torch.no_grad()
def _forward(engine: Engine, batch: Batch, micro: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a micro-batch's hidden states `[rows, context_length, hidden_size]` and nats `[rows, context_length]`."""
    hidden: list[torch.Tensor] = []
    hook = engine.module.causal_lm.model.norm.register_forward_hook(lambda *given: hidden.append(given[-1]))
    nats = engine.module(*batch.micro_batches[micro], reduction="none")
    hook.remove()
    return hidden[-1], nats
