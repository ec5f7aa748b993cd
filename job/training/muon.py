"""Muon: gradient descent with momentum whose update is orthogonalised, for the matrices of the body.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the update of a matrix by a nearby matrix
whose singular values are all about 1, so that all directions of the matrix are learned at the same speed. Definition,
coefficients and scaling ("original") are those of `torch.optim.Muon`. The embedding, the head, norms and biases are
trained by AdamW in the same optimizer, at their own learning rate.

An update can only be orthogonalised as a whole matrix. The processes share the work:

* Under DDP every rank has all gradients and all of the momentum. Each rank orthogonalises its share of the matrices and
  gathers the others.
* Under ZeRO-2 a rank has a part of one flat tensor of all matrices; its part may begin and end inside a matrix. The
  momentum lies like the part. The ranks gather the update, and each orthogonalises the matrices that touch its part.

DeepSpeed 0.19.8 has a Muon of its own. It is not used, because it measures the gradient norm after orthogonalisation,
and because its momentum does not lie like the part, so that no checkpoint can be read from it.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from job.model import gpu
from job.model.architecture import Shape
from job.model.optimizer_state import MOMENTUM, is_body_matrix
from job.runs.choices import BF16_CAPABILITY
from job.training.optimizer_settings import OptimizerSettings, Verdict

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b and c of the Newton-Schulz iteration x -> ax + b(xxᵀ)x + c(xxᵀ)²x. Five iterations bring singular
values from 0.01 to 1 to values from 0.68 to 1.13."""
_ITERATIONS = 5
_LEAST_NORM = 1e-7
"""Smaller matrices are not enlarged to size 1."""
_NUMBERS_AT_A_TIME = 2**26
"""Numbers that are orthogonalised together, so that temporary copies take at most a few hundred megabytes."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return for each matrix UVᵀ of its singular value decomposition USVᵀ, approximately.

    Five Newton-Schulz iterations, which need products only. On a GPU they are computed in bf16 (in fp16 before Ampere,
    which has no bf16), as `torch.optim.Muon` does; on a CPU in fp32, because its batched products in bf16 took 18 to
    60 times as long.

    Args:
        matrices: `[count, rows, columns]` in fp32 or bf16.

    Returns:
        A tensor of the same shape. The singular values of each matrix are about 1: between 0.5 and 1.3 if those of the
        argument differ by a factor of at most 100.
    """
    count, rows, columns = matrices.shape
    at_a_time = max(1, _NUMBERS_AT_A_TIME // (rows * columns))
    found = torch.empty(matrices.shape, dtype=_product_dtype(matrices.device), device=matrices.device)
    for begin in range(0, count, at_a_time):
        piece = slice(begin, begin + at_a_time)
        found[piece] = _newton_schulz(matrices[piece].float(), found.dtype)
    return found


def _newton_schulz(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    is_tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if is_tall else matrices  # the smaller of the two squares is multiplied
    # Divided before it is rounded: small gradients would be 0 in fp16.
    x = (wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=_LEAST_NORM)).to(dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _product_dtype(device: torch.device) -> torch.dtype:
    if not gpu.is_gpu(device):
        return torch.float32
    return torch.bfloat16 if gpu.capability(device) >= BF16_CAPABILITY else torch.float16


def scale_of(shape: Shape) -> float:
    """Return the factor of the learning rate for a matrix `(rows, columns)`, which `torch.optim.Muon` calls original.

    A tall matrix gets more, so that the change of its outputs has the size of theirs.
    """
    rows, columns = shape
    return math.sqrt(max(1.0, rows / columns))


class Muon(Optimizer):
    """Muon for the first group, which holds matrices, and AdamW for the others.

    Both clip their gradients and skip bad steps as `verdict` says, without a copy of weights or state.

    Args:
        groups: of the first, ``shapes`` are those of its parameters: under ZeRO-2 they become one flat part.
        settings: rates, decay and momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimizerSettings) -> None:
        super().__init__(groups, {"lr": 0.0, "shapes": None})
        self._settings = settings
        self.verdict: Verdict
        """The function that judges each step. `skip_bad_steps_of_muon` sets it before the first one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is called
        """Take one step with the gradients of all parameters. A collective if there are several processes."""
        divisor, skipped = self.verdict()
        for group in self.param_groups:  # one at a time under ZeRO-2, which calls this for each
            parameters: list[Tensor] = group["params"]
            if group["shapes"] is None:
                self._step_adamw(parameters, group, divisor, skipped)
            elif parameters[0].ndim == 1:
                self._step_part(parameters[0], group, divisor, skipped)
            else:
                self._step_matrices(parameters, group, divisor, skipped)

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any], divisor: Tensor, skipped: Tensor) -> None:
        def states(key: str) -> list[Tensor]:
            return [self.state[parameter][key] for parameter in parameters]

        adamw(
            parameters,
            [_gradient_of(parameter) for parameter in parameters],
            states("exp_avg"),
            states("exp_avg_sq"),
            [],
            states("step"),
            fused=True,
            grad_scale=divisor,
            found_inf=skipped,
            amsgrad=False,
            beta1=self._settings.beta1,
            beta2=self._settings.beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=self._settings.epsilon,
            maximize=False,
        )

    def _step_matrices(self, parameters: list[Tensor], group: dict[str, Any], divisor: Tensor, skipped: Tensor) -> None:
        """Change whole matrices, as each rank has them under DDP; matrices of one shape are taken together."""
        rank, world_size = _world()
        by_shape: dict[Shape, list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        for shape, matrices in by_shape.items():
            share = -(-len(matrices) // world_size)
            first = rank * share
            updates = torch.zeros((share, *shape), device=matrices[0].device)
            for index, matrix in enumerate(matrices):
                gradient = self._add_to_momentum(matrix, divisor, skipped)
                if first <= index < first + share:
                    self._update(matrix, gradient, out=updates[index - first])
            directions = _gathered(orthogonalize(updates), world_size)[: len(matrices)].float()
            rate, decay = _rates(group, skipped)
            torch._foreach_mul_(matrices, 1 - decay)
            torch._foreach_sub_(matrices, list(directions.mul_(rate * scale_of(shape)).unbind()))

    def _step_part(self, part: Tensor, group: dict[str, Any], divisor: Tensor, skipped: Tensor) -> None:
        """Change this rank's part of the flat tensor of all matrices, as ZeRO-2 lays them out."""
        rank, world_size = _world()
        gradient = self._add_to_momentum(part, divisor, skipped)
        update = self._update(part, gradient, out=gradient)
        whole = _gathered(update.bfloat16() if gpu.is_gpu(part.device) else update, world_size)
        first = rank * len(part)
        touched: dict[Shape, list[int]] = {}
        for shape, begin in _places(group["shapes"]):
            if begin < first + len(part) and begin + math.prod(shape) > first:
                touched.setdefault(shape, []).append(begin)
        direction = torch.zeros_like(part)
        for shape, begins in touched.items():
            size = math.prod(shape)
            matrices = torch.stack([whole[begin : begin + size].view(shape) for begin in begins])
            for begin, found in zip(begins, orthogonalize(matrices), strict=True):
                here = slice(max(begin, first) - first, min(begin + size, first + len(part)) - first)
                there = slice(here.start + first - begin, here.stop + first - begin)
                direction[here] = found.flatten()[there].float() * scale_of(shape)
        rate, decay = _rates(group, skipped)
        part.mul_(1 - decay).sub_(direction.mul_(rate))

    def _add_to_momentum(self, parameter: Tensor, divisor: Tensor, skipped: Tensor) -> Tensor:
        """Add the gradient to the momentum, and return it; a skipped step leaves the momentum as it was."""
        gradient = torch.where(skipped.bool(), 0, _gradient_of(parameter) / divisor)
        self.state[parameter][MOMENTUM].lerp_(gradient, (1 - self._settings.muon_momentum) * (1 - skipped))
        return gradient

    def _update(self, parameter: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
        """Return the update of Nesterov's method before orthogonalisation, in the tensor `out`."""
        return torch.lerp(gradient, self.state[parameter][MOMENTUM], self._settings.muon_momentum, out=out)


def build_muon(settings: OptimizerSettings, parameters: list[tuple[str, nn.Parameter]]) -> Muon:
    """Return Muon for the matrices of the body, and AdamW for embedding, head, norms and biases.

    Weight decay is for matrices only, the embedding among them; each decays in proportion to its own learning rate.
    """
    body = [one for name, one in parameters if is_body_matrix(name, tuple(one.shape))]
    others = [one for name, one in parameters if not is_body_matrix(name, tuple(one.shape))]
    groups = [
        {
            "params": body,
            "weight_decay": settings.weight_decay,
            "rate_ratio": settings.muon_rate_ratio,
            "shapes": [tuple(one.shape) for one in body],
        },
        {"params": [one for one in others if one.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [one for one in others if one.ndim < 2], "weight_decay": 0.0},
    ]
    return Muon(groups, settings)


def skip_bad_steps_of_muon(optimizer: Optimizer, verdict: Verdict) -> None:
    """Let Muon clip and skip by itself."""
    assert isinstance(optimizer, Muon)
    optimizer.verdict = verdict


def _rates(group: dict[str, Any], skipped: Tensor) -> tuple[Tensor, Tensor]:
    """Return the learning rate and the share by which weights shrink, both scalars that are 0 in a skipped step."""
    rate = group["lr"] * (1 - skipped)
    return rate, rate * group["weight_decay"]


def _places(shapes: list[Shape]) -> Iterator[tuple[Shape, int]]:
    """Yield each shape, and where the matrix begins in the flat tensor."""
    begin = 0
    for shape in shapes:
        yield shape, begin
        begin += math.prod(shape)


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _gathered(mine: Tensor, world_size: int) -> Tensor:
    """Return the tensors of all ranks, one after the other along the first dimension."""
    if world_size == 1:
        return mine
    whole = mine.new_empty((world_size * len(mine), *mine.shape[1:]))
    dist.all_gather_into_tensor(whole, mine)
    return whole


def _gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
