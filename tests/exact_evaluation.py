"""Computes the validation loss of a new model in fp64 with the project's own evaluation."""

from contextlib import nullcontext
from pathlib import Path

import torch
from engine_worker import CONTEXT_LENGTH, SPEC
from small_run import DataSet
from transformers import Qwen2ForCausalLM

from job import storage
from job.data.loader import EvaluationLoader
from job.data.manifest import open_shard
from job.data.order import EvaluationOrder
from job.model.language_model import LanguageModel, build_model
from job.runs.evaluation_result import Evaluation
from job.training.evaluation import evaluate


def validation_shards(data: DataSet, folder: Path) -> list[torch.Tensor]:
    """Return the tokens of each validation shard."""
    shards = []
    for shard in data.manifest.validation:
        storage.download_file(f"{data.shards}/{shard.name}", folder / "shard")
        shards.append(torch.tensor(open_shard(folder / "shard", shard, data.manifest.dtype)[0].tolist()))
    return shards


def new_model(data: DataSet) -> Qwen2ForCausalLM:
    return build_model(SPEC, data.manifest.vocab_size, data.manifest.eod_id, CONTEXT_LENGTH, seed=1)


def exact(data: DataSet, batch_size: int, folder: Path) -> Evaluation:
    """Return the validation result of the new model in fp64."""
    order = EvaluationOrder([shard.tokens for shard in data.manifest.validation], CONTEXT_LENGTH, seed=5)
    model = LanguageModel(new_model(data).double(), loss_chunk_tokens=24)
    with EvaluationLoader(
        data.shards,
        data.manifest,
        order,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        cache_dir=folder,
        cache_bytes=2**20,
    ) as loader:
        batches = ((batch.input_ids, batch.labels) for batch in loader)
        found = evaluate(model, batches, data.tokenizer.token_sizes, torch.device("cpu"), nullcontext)
    assert model.training, "evaluation must restore the training mode"
    return found
