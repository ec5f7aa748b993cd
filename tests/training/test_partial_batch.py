"""Test that a partial batch is divided rightly: its gradient norm is larger only by the noise of few sequences."""

from collections.abc import Iterator
from statistics import fmean

import pytest
import torch
import torch.distributed as dist
from engine_worker import ADAMW, CONTEXT_LENGTH, VOCAB_SIZE, forget_accelerate, new_model
from torch import Tensor

from job.config import Config
from job.launcher.device import ON_CPU
from job.launcher.supervisor import worker_environment
from job.model.language_model import LanguageModel
from job.training.accelerator import Strategy, start_accelerator
from job.training.engine import Engine

BATCH, MICRO_BATCH = 16, 2


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make this process the only one of a run on the CPU."""
    for name, value in worker_environment(ON_CPU, 1, Config()).items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    forget_accelerate()


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB_SIZE, (count, CONTEXT_LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def step_of(input_ids: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return loss and gradient norm of one step of a new engine; missing sequences are filled up as by the loader."""
    forget_accelerate()
    strategy = Strategy("ddp", "fp32", 1, MICRO_BATCH, BATCH // MICRO_BATCH, 0.0)
    engine = Engine(start_accelerator(strategy), LanguageModel(new_model(), 24, False), strategy, ADAMW)
    missing = BATCH - len(labels)
    targets = labels.numel()
    input_ids = torch.cat([input_ids, torch.zeros(missing, CONTEXT_LENGTH, dtype=torch.int64)])
    labels = torch.cat([labels, torch.full((missing, CONTEXT_LENGTH), -100)])
    micro_batches = list(zip(input_ids.split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True))
    result = engine.step(micro_batches, targets, learning_rate=1e-3)
    return float(result.nats) / targets, float(result.gradient_norm)


def test_partial_batch_has_the_gradient_of_its_sequences() -> None:
    few = sequences(2, seed=0)
    repeated = few[0].repeat(BATCH // 2, 1), few[1].repeat(BATCH // 2, 1)
    loss, norm = step_of(*few)
    whole_loss, whole_norm = step_of(*repeated)
    assert abs(loss / whole_loss - 1) < 1e-5
    assert abs(norm / whole_norm - 1) < 1e-4, "14 empty sequences changed the gradient of the mean"


def test_norm_of_few_sequences_is_larger_because_of_noise() -> None:
    whole = sequences(BATCH, seed=0)
    _, norm = step_of(*whole)
    parts = [step_of(whole[0][first : first + 2], whole[1][first : first + 2])[1] for first in range(0, BATCH, 2)]
    # The gradients of random sequences are all noise, so their squared norm falls with the number of sequences.
    assert fmean(part**2 for part in parts) == pytest.approx(norm**2 * BATCH / 2, rel=0.1)
