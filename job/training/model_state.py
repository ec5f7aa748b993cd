"""Weights and optimizer state of a model in training, by parameter name, in the same form under DDP and ZeRO-2.

Under DDP every rank has all of it. Under ZeRO-2, DeepSpeed lays the parameters of a group one after the other and cuts
that into equal parts, one a rank; the end of the last parts is padding.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from job.model import gpu
from job.model.optimizer_state import WEIGHT, OptimizerState

_PIECE_NUMBERS = 2**24
"""Numbers of a part that are sent at a time, so that rank 0's GPU needs 64 MiB for what others send."""


@dataclass(frozen=True)
class GroupState:
    """Names of what the optimizer keeps of each parameter of a group."""

    tensors: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Memory on the CPU for all tensors of a checkpoint, which `ModelState.copy_to` fills again and again."""

    flat: dict[str, Tensor]
    """``param`` and each state tensor: fp32 `[numbers]`, one parameter after the other without a gap."""
    tensors: dict[str, dict[str, Tensor]]
    """Views of the same by the parameter's name, in that order, in the parameter's shape."""


class ModelState:
    """The tensors of a checkpoint, as the ranks of a run hold them.

    Args:
        names: parameters of the model by name.
        optimizer: torch's optimizer after `Accelerator.prepare`: under ZeRO-2 its parameters are this rank's parts.
        groups: the model's parameters by group of the optimizer, in its order.
        kept: what the optimizer keeps of each parameter.
        is_zero2: True under ZeRO-2, False under DDP.
    """

    def __init__(
        self,
        names: Iterable[tuple[str, nn.Parameter]],
        optimizer: Optimizer,
        groups: list[list[nn.Parameter]],
        kept: OptimizerState,
        is_zero2: bool,
    ) -> None:
        self._parameters = dict(names)
        self._optimizer, self._groups, self._is_zero2 = optimizer, groups, is_zero2
        self._tensors = {name: kept.tensors_of(name, tuple(one.shape)) for name, one in self._parameters.items()}
        self._keys, self._counters = (WEIGHT, *kept.tensors), set(kept.counters)
        names_of = {parameter: name for name, parameter in self._parameters.items()}
        self._names_of_groups = [[names_of[parameter] for parameter in group] for group in groups]
        self._is_rank0 = not dist.is_initialized() or dist.get_rank() == 0
        self._device = next(iter(self._parameters.values())).device

    # ---- Reading ----

    def read(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield the name and the fp32 tensors (``param`` and the optimizer's state) of each parameter, on the CPU.

        A collective: every rank has to read to the end, and gets the same.
        """
        for name, parameter in self._parameters.items():
            if self._is_zero2:
                from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

                tensors = {WEIGHT: safe_get_full_fp32_param(parameter)}
                tensors |= {key: safe_get_full_optimizer_state(parameter, key) for key in self._tensors[name]}
            else:
                state = self._optimizer.state[parameter]
                tensors = {WEIGHT: parameter} | {key: state[key] for key in self._tensors[name]}
            yield name, {key: tensor.detach().to("cpu", torch.float32) for key, tensor in tensors.items()}

    def empty_snapshot(self) -> Snapshot:
        """Return memory for `copy_to`, page-locked for a GPU."""
        flat: dict[str, Tensor] = {}
        tensors: dict[str, dict[str, Tensor]] = {name: {} for names in self._names_of_groups for name in names}
        for key in self._keys:
            having = [name for name in tensors if self._has(name, key)]
            sizes = [self._parameters[name].numel() for name in having]
            # Ones, since the system gives memory only to pages that were written.
            flat[key] = torch.ones(sum(sizes), pin_memory=gpu.is_gpu(self._device), device="cpu")
            for name, piece in zip(having, flat[key].split(sizes), strict=True):
                tensors[name][key] = piece.view_as(self._parameters[name])
        return Snapshot(flat, tensors)

    @torch.no_grad()
    def copy_to(self, snapshot: Snapshot | None) -> None:
        """Copy everything into the snapshot of rank 0; training stands still meanwhile.

        A collective: every rank calls it, all but rank 0 with None.
        """
        if self._is_zero2:
            for key in self._keys:
                self._collect(key, snapshot)
        elif snapshot is not None:
            for name, parameter in self._parameters.items():
                state = {WEIGHT: parameter, **self._optimizer.state[parameter]}
                for key, destination in snapshot.tensors[name].items():
                    destination.copy_(state[key], non_blocking=True)
        gpu.synchronize()

    def _collect(self, key: str, snapshot: Snapshot | None) -> None:
        """Bring the parts of all ranks of one kind of tensor into rank 0's snapshot."""
        start = 0
        for names, group in zip(self._names_of_groups, self._optimizer.param_groups, strict=True):
            if not any(self._has(name, key) for name in names):
                continue
            (part,) = group["params"]
            source = part if key == WEIGHT else self._optimizer.state[part][key]
            end = start + sum(self._parameters[name].numel() for name in names)
            for owner in range(dist.get_world_size()):
                first = start + owner * len(source)
                for begin in range(first, min(first + len(source), end), _PIECE_NUMBERS):
                    until = min(begin + _PIECE_NUMBERS, first + len(source), end)
                    destination = None if snapshot is None else snapshot.flat[key][begin:until]
                    _send_to_rank0(source[begin - first : until - first], owner, destination)
            start = end

    # ---- Writing ----

    def load(self, steps_taken: int, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Replace weights and optimizer state by those that `read` or a checkpoint gives.

        `steps_taken` is the number of optimizer steps that made them, without the skipped ones."""
        for state in self._optimizer.state.values():
            for key in self._counters & state.keys():
                state[key].fill_(steps_taken)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self.set_weight(parameter, tensors[name][WEIGHT])
                for key in self._tensors[name]:
                    if self._is_zero2:
                        from deepspeed.utils import safe_set_full_optimizer_state

                        safe_set_full_optimizer_state(parameter, tensors[name][key], key)
                    else:
                        self._optimizer.state[parameter][key].copy_(tensors[name][key])

    def set_weight(self, parameter: nn.Parameter, exact: Tensor) -> None:
        """Set a weight, and under ZeRO-2 the fp32 weight that it is rounded from."""
        if self._is_zero2:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, exact)
        with torch.no_grad():
            parameter.copy_(exact)

    def _has(self, name: str, key: str) -> bool:
        return key == WEIGHT or key in self._tensors[name]


def states_of_groups(
    names: Iterable[tuple[str, nn.Parameter]], groups: list[list[nn.Parameter]], kept: OptimizerState
) -> list[GroupState]:
    """Return what the optimizer keeps, by parameter group.

    Raises:
        RuntimeError: it keeps different states in one group; ZeRO-2 keeps one flat tensor for a whole group.
    """
    names_of = {parameter: name for name, parameter in names}
    found: list[GroupState] = []
    for group in groups:
        ids = [(names_of[parameter], tuple(parameter.shape)) for parameter in group]
        kinds = {GroupState(kept.tensors_of(*one), kept.counters_of(*one)) for one in ids}
        if len(kinds) > 1:
            tensors = sorted(kind.tensors for kind in kinds)
            raise RuntimeError(f"a parameter group of the optimizer has different state tensors: {tensors}")
        found += kinds or [GroupState()]
    return found


def _send_to_rank0(piece: Tensor, owner: int, destination: Tensor | None) -> None:
    """Copy the `piece` of rank `owner` to the `destination`, which rank 0 alone has."""
    if destination is not None:
        if owner:
            piece = torch.empty_like(piece) if gpu.is_gpu(piece.device) else destination
            dist.recv(piece, owner)
        if piece is not destination:
            destination.copy_(piece, non_blocking=True)
    elif owner == dist.get_rank():
        dist.send(piece, 0)
