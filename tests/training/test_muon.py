"""Tests of Muon for single matrices: it is torch's. How processes share it is tested in test_engine.py."""

import pytest
import torch
from engine_worker import MUON, MUON_RATE
from torch import Tensor, nn

from job.training import muon
from job.training.muon import Muon, build_muon, orthogonalize

SHAPES = [(24, 24), (24, 60), (60, 24), (24, 24), (7, 3)]


def matrix_of_condition(rows: int, columns: int, condition: float, seed: int) -> Tensor:
    """Return a random matrix whose largest singular value is `condition` times the smallest."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(rows, columns, generator=generator), full_matrices=False)
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), min(rows, columns))
    return left @ values.diag() @ right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_singular_values_of_an_update_are_about_one(
    dtype: torch.dtype, condition: float, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "_product_dtype", lambda device: dtype)
    for shape in ((64, 64), (16, 128), (128, 16), (64, 96)):
        matrices = torch.stack([size * matrix_of_condition(*shape, condition, seed) for seed in range(2)])
        found = orthogonalize(matrices)
        assert found.dtype == dtype
        values = torch.linalg.svdvals(found.float())
        assert float(values.min()) > 0.5 and float(values.max()) < 1.3, (shape, values)


def test_matrices_are_orthogonalized_alike_in_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.stack([matrix_of_condition(12, 20, 30, seed) for seed in range(5)])
    together = orthogonalize(matrices)
    monkeypatch.setattr(muon, "_NUMBERS_AT_A_TIME", 2 * 12 * 20)
    torch.testing.assert_close(orthogonalize(matrices), together)
    monkeypatch.setattr(muon, "_NUMBERS_AT_A_TIME", 1)
    torch.testing.assert_close(orthogonalize(matrices), together)


def test_zero_matrix_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()


def our_muon(parameters: list[nn.Parameter], verdict: tuple[float, float] = (1.0, 0.0)) -> Muon:
    """Return Muon for matrices of the body, ready for steps with this verdict."""
    built = build_muon(MUON, [(f"layers.{index}", one) for index, one in enumerate(parameters)])
    for one in parameters:
        built.state[one] = {"momentum_buffer": torch.zeros_like(one)}
    built.param_groups = built.param_groups[:1]  # The others are empty.
    built.param_groups[0]["lr"] = MUON_RATE
    built.verdict = lambda: (torch.tensor(verdict[0]), torch.tensor(verdict[1]))
    return built


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_each_matrix_moves_as_in_torchs_muon(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch always computes in bf16, whose rounding errors hide small mistakes. Here it computes in both.
    monkeypatch.setattr(muon, "_product_dtype", lambda device: dtype)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.to(dtype, copy=True))
    generator = torch.Generator().manual_seed(1)
    ours = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    theirs = [nn.Parameter(one.detach().clone()) for one in ours]
    optimizer = our_muon(ours)
    reference = torch.optim.Muon(theirs, MUON_RATE, MUON.weight_decay, MUON.muon_momentum)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
            other.data.copy_(mine.data)
        optimizer.step()
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            momenta = optimizer.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"]
            torch.testing.assert_close(*momenta)
            assert float((mine - other).detach().abs().max()) < tolerance * MUON_RATE


def test_skipped_step_leaves_weights_and_momentum() -> None:
    parameters = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    optimizer = our_muon(parameters, (1.0, 1.0))
    for index, one in enumerate(parameters):
        one.grad = torch.full_like(one, [torch.nan, torch.inf, 3.0][index])
        optimizer.state[one]["momentum_buffer"].normal_()
    before = [(one.detach().clone(), optimizer.state[one]["momentum_buffer"].clone()) for one in parameters]
    optimizer.step()
    for one, (weight, momentum) in zip(parameters, before, strict=True):
        assert torch.equal(one, weight)
        assert torch.equal(optimizer.state[one]["momentum_buffer"], momentum)
