"""Validation loss, summed over the ranks; the same for any number of processes."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from job.model.attention import varying_lengths
from job.runs.evaluation_result import Evaluation


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_sizes: tuple[NDArray[np.int64], NDArray[np.int64]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    goes_on: Callable[[], bool] = lambda: True,
) -> Evaluation | None:
    """Evaluate the batches of this rank and return the sums over all ranks. A collective.

    Args:
        model: a `LanguageModel`.
        batches: ``(input_ids, labels)``, each `[batch, context_length]`; all ranks have the same number of them, and
            the last may be empty.
        token_sizes: `TextTokenizer.token_sizes`.
        device: the device of the model.
        autocast: returns the context that sets the number format.
        goes_on: called before every batch, with the same answer on every rank; False cancels the evaluation.

    Returns:
        None if it was cancelled.
    """
    was_training = model.training
    model.eval()
    sizes_in_bytes, sizes_in_characters = (torch.from_numpy(sizes) for sizes in token_sizes)
    nats: list[float] = []
    counts = torch.zeros(3, dtype=torch.int64)
    remaining = iter(batches)
    while is_complete := goes_on():
        if (batch := next(remaining, None)) is None:
            break
        input_ids, labels = batch
        if len(input_ids):
            with varying_lengths(), autocast():  # the last batch has fewer sequences
                token_nats = model(input_ids.to(device), labels.to(device), reduction="none")
            nats += token_nats.double().sum(dim=-1).tolist()
        targets = labels[labels >= 0]
        counts += torch.stack(
            [torch.tensor(targets.numel()), sizes_in_bytes[targets].sum(), sizes_in_characters[targets].sum()]
        )
    model.train(was_training)
    if not is_complete:
        return None
    gathered: list[Any] = [(nats, counts.tolist())]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (nats, counts.tolist()))
    # fsum is exact, so the result does not depend on which rank has which sequences.
    total = math.fsum(one for ranks_nats, _ in gathered for one in ranks_nats)
    targets, utf8_bytes, characters = (sum(of_rank[i] for _, of_rank in gathered) for i in range(3))
    return Evaluation(total, targets, utf8_bytes, characters)
