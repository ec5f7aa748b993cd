"""A toy architecture and a toy optimizer: the table entries that a new one needs, and nothing else."""

import torch
from torch import nn

from job.model.architecture import ARCHITECTURES, Architecture, ModelForm, Shape
from job.model.optimizer_state import OPTIMIZER_STATES, OptimizerState
from job.model.spec import ModelSpec
from job.training.optimizer import BUILDERS, Builder
from job.training.optimizer_settings import OptimizerSettings

ARCHITECTURE, OPTIMIZER = "plain_llama", "momentum"


def _llama_layer(spec: ModelSpec) -> dict[str, Shape]:
    """Llama's layer: Qwen2's without biases."""
    shapes = ARCHITECTURES["qwen2"].layer_shapes(spec)
    return {name: shape for name, shape in shapes.items() if not name.endswith("bias")}


PLAIN_LLAMA = Architecture(
    config_class="LlamaConfig",
    model_class="LlamaForCausalLM",
    config_values=lambda spec: {},
    layer_shapes=_llama_layer,
    forms=(
        ModelForm(
            "llama",
            "LlamaForCausalLM",
            values=lambda spec: {"attention_bias": False, "mlp_bias": False},
            required={"attention_bias": False, "mlp_bias": False},
        ),
    ),
)

MOMENTUM_STATE = OptimizerState(("momentum_buffer",), holds=lambda name, shape, tensor: len(shape) >= 2)
"""One tensor for matrices, and nothing for vectors."""


def build_momentum(settings: OptimizerSettings, parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Gradient descent, with momentum for matrices."""
    matrices = [parameter for _, parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for _, parameter in parameters if parameter.ndim < 2]
    return torch.optim.SGD([{"params": matrices, "momentum": settings.beta1}, {"params": vectors}], lr=0.0)


def add_toy_entries() -> None:
    """Put the toys into the tables of this process."""
    ARCHITECTURES[ARCHITECTURE] = PLAIN_LLAMA
    OPTIMIZER_STATES[OPTIMIZER] = MOMENTUM_STATE
    BUILDERS[OPTIMIZER] = Builder(build_momentum)
