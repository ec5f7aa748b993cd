"""Held-out loss: nats per token, bits per byte, bits per character; the same for any number of processes."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """Sums over held-out windows, each target counted once.

    The end-of-document token is a target, but it has no bytes and no characters: its nats are part of what a text
    costs, its name is not part of the text.
    """

    nats: float
    targets: int
    utf8_bytes: int
    characters: int

    @property
    def nats_per_token(self) -> float:
        """Mean loss over all targets."""
        return self.nats / max(1, self.targets)

    @property
    def bits_per_byte(self) -> float:
        """Bits for each UTF-8 byte of text; comparable between tokenizers."""
        return self.nats / math.log(2) / max(1, self.utf8_bytes)

    @property
    def bits_per_character(self) -> float:
        """Bits for each character of text."""
        return self.nats / math.log(2) / max(1, self.characters)

    def as_dict(self) -> dict[str, float]:
        """The numbers as they are logged."""
        return {
            "validation/loss": self.nats_per_token,
            "validation/bits_per_byte": self.bits_per_byte,
            "validation/bits_per_character": self.bits_per_character,
        }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_sizes: tuple[NDArray[np.int64], NDArray[np.int64]],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    goes_on: Callable[[], bool] = lambda: True,
) -> Evaluation | None:
    """Evaluates this rank's batches, and adds the ranks up.

    Args:
        model: a `LanguageModel`.
        batches: ``(input_ids, labels)``, each `[batch, context_length]`; as many on every rank, the last may be empty.
        token_sizes: `TextTokenizer.token_sizes`.
        device: where the model is.
        autocast: makes the context that sets the number format.
        goes_on: asked before every batch, with the same answer on every rank; false gives the evaluation up.

    Returns:
        The sums over all ranks; None if it was given up.
    """
    was_training = model.training
    model.eval()
    sizes_in_bytes, sizes_in_characters = (torch.from_numpy(sizes) for sizes in token_sizes)
    nats: list[float] = []
    counts = torch.zeros(3, dtype=torch.int64)
    remaining = iter(batches)
    while is_going := goes_on():
        if (batch := next(remaining, None)) is None:
            break
        input_ids, labels = batch
        if len(input_ids):
            with autocast():
                token_nats = model(input_ids.to(device), labels.to(device), reduction="none")
            nats += token_nats.double().sum(dim=-1).tolist()
        targets = labels[labels >= 0]
        counts += torch.stack(
            [torch.tensor(targets.numel()), sizes_in_bytes[targets].sum(), sizes_in_characters[targets].sum()]
        )
    model.train(was_training)
    if not is_going:
        return None
    gathered: list[Any] = [(nats, counts.tolist())]
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (nats, counts.tolist()))
    # fsum is exact, so the order in which ranks hold the windows leaves no trace.
    total = math.fsum(one for ranks_nats, _ in gathered for one in ranks_nats)
    targets, utf8_bytes, characters = (sum(of_rank[i] for _, of_rank in gathered) for i in range(3))
    return Evaluation(total, targets, utf8_bytes, characters)
