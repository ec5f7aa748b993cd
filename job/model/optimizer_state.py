"""The state that each optimizer keeps between two steps: one table for checkpoints, memory estimates and resuming.

To add an optimizer, add an entry here and its builder in `job.training.optimizer`.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from job.model.architecture import EMBEDDING, HEAD, Shape
from job.suggestions import find_entry

WEIGHT = "param"
"""Name of a parameter's fp32 weight among its tensors in a checkpoint."""
MOMENTUM = "momentum_buffer"
BYTES_PER_NUMBER = 4
"""Weights and optimizer state are fp32 in every checkpoint."""
_NEWTON_SCHULZ_BYTES = 4 + 5 * 2


def _all(name: str, shape: Shape, key: str) -> bool:
    return True


@dataclass(frozen=True)
class OptimizerState:
    """The state that an optimizer keeps for each parameter."""

    tensors: tuple[str, ...]
    """Names of its fp32 tensors, which have the parameter's shape, as torch's optimizer calls them. Each is a file of a
    checkpoint, in this order."""
    counters: tuple[str, ...] = ()
    """Names of its scalars that count the steps taken. Checkpoints do not hold them: they follow from the step."""
    holds: Callable[[str, Shape, str], bool] = _all
    """Return True if the parameter `name` of this shape has this state tensor or counter; by default each has all."""

    step_bytes: Callable[[Mapping[str, Shape], str, int], int] = lambda shapes, strategy, world_size: 0
    """Return the bytes of the copies that a process makes during a step, for parameters of these names and shapes, the
    value of `train.strategy` and the number of processes."""

    @property
    def is_uniform(self) -> bool:
        """True if every parameter has every tensor."""
        return self.holds is _all

    def tensors_of(self, name: str, shape: Shape) -> tuple[str, ...]:
        """Return the names of the state tensors of the parameter `name`."""
        return tuple(tensor for tensor in self.tensors if self.holds(name, shape, tensor))

    def counters_of(self, name: str, shape: Shape) -> tuple[str, ...]:
        """Return the names of the counters of the parameter `name`."""
        return tuple(counter for counter in self.counters if self.holds(name, shape, counter))

    def bytes_of(self, shapes: Mapping[str, Shape]) -> int:
        """Return the bytes of the state of all parameters with these names and shapes."""
        return sum(BYTES_PER_NUMBER * math.prod(shape) * len(self.tensors_of(n, shape)) for n, shape in shapes.items())

    def checkpoint_bytes(self, shapes: Mapping[str, Shape]) -> int:
        """Return the bytes of a checkpoint's tensors: weights and state."""
        return BYTES_PER_NUMBER * sum(map(math.prod, shapes.values())) + self.bytes_of(shapes)


def is_body_matrix(name: str, shape: Shape) -> bool:
    """Return True for the matrices of the layers, and False for embedding, head, norms and biases."""
    return len(shape) == 2 and name not in (EMBEDDING, HEAD)


def _of_muon(name: str, shape: Shape, key: str) -> bool:
    return is_body_matrix(name, shape) == (key == MOMENTUM)


def _muon_step_bytes(shapes: Mapping[str, Shape], strategy: str, world_size: int) -> int:
    """Count what `job.training.muon` holds at the peak of a step on a GPU, where matrices of one shape go together.

    The Newton-Schulz iteration takes a copy in fp32 and five in 16 bits of what it works on.
    """
    of_shape = Counter[Shape]()
    for name, shape in shapes.items():
        if is_body_matrix(name, shape):
            of_shape[shape] += math.prod(shape)
    group, body = max(of_shape.values(), default=0), of_shape.total()
    if strategy == "zero2":  # the update and its direction, the update of all ranks, and matrices with their results
        return 10 * -(-body // world_size) + 2 * body + (4 + _NEWTON_SCHULZ_BYTES) * group
    share = -(-group // world_size)
    return (4 + 2 + _NEWTON_SCHULZ_BYTES) * share + (2 + 4) * group  # updates of a share; results of all, twice


OPTIMIZER_STATES = {
    # Loshchilov and Hutter 2019, arXiv:1711.05101: the moving averages of the gradient and of its square.
    "adamw": OptimizerState(("exp_avg", "exp_avg_sq"), counters=("step",)),
    # Jordan et al. 2024: the momentum of the body's matrices. All other parameters are AdamW's.
    "muon": OptimizerState(
        (MOMENTUM, "exp_avg", "exp_avg_sq"), counters=("step",), holds=_of_muon, step_bytes=_muon_step_bytes
    ),
}
"""By the value of `train.optimizer`."""


def optimizer_state(name: str) -> OptimizerState:
    """Return the entry of an optimizer.

    Raises:
        UserError: the table has no such optimizer.
    """
    return find_entry("train.optimizer", name, OPTIMIZER_STATES)
