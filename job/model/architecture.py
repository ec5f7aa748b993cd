"""The networks that can be trained: one table for building, counting, exporting and reading them back.

To add an architecture, add an entry here; tests/model/test_architecture.py tests every entry. It has to be one of
transformers' decoders: an embedding, layers that share rotary embeddings, a norm, and a head without a bias.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job.suggestions import find_entry

if TYPE_CHECKING:
    from job.model.spec import ModelSpec

Shape = tuple[int, ...]
HEAD, EMBEDDING, LAST_NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
"""Tensors of every architecture by their names in transformers; the head is one only where it is not tied."""


@dataclass(frozen=True)
class ModelForm:
    """A format of Hugging Face's model folders in which a model can be exported for other programs."""

    model_type: str
    """The value in config.json by which transformers chooses its classes."""
    model_class: str
    """The value of `architectures` in config.json."""
    values: Callable[["ModelSpec"], dict[str, Any]]
    """Return what config.json says beside the values that all forms have."""
    required: Mapping[str, Any]
    """Values that config.json must have for a folder to be of this form."""
    default_head_dim: int | None = None
    """Features of a head if config.json has no `head_dim`; None: hidden_size / num_attention_heads."""
    zeros: Callable[["ModelSpec"], list[str]] = lambda spec: []
    """Return the names of tensors `[hidden_size]` that only this form has, and that are 0."""
    is_for_qwen2_tokenizer: bool = False
    """True if transformers 5 cuts texts as Qwen2's tokenizer does for this model type, whatever tokenizer.json says."""


@dataclass(frozen=True)
class Architecture:
    """A network of transformers."""

    config_class: str
    """Name of its configuration's class in transformers."""
    model_class: str
    """Name of its class in transformers."""
    config_values: Callable[["ModelSpec"], dict[str, Any]]
    """Return the arguments of the configuration beside those that all architectures have."""
    layer_shapes: Callable[["ModelSpec"], dict[str, Shape]]
    """Return the shape of every tensor of one layer, by its name in the layer. FLOPs and parameters are counted from
    it: a matrix multiplies every token once."""
    forms: tuple[ModelForm, ...]
    """How it is exported: the first form that gives the ids of the tokenizer is taken."""
    residual_projections: tuple[str, ...] = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    """Names in the layer of the matrices whose products are added to the residual stream."""
    has_query_key_norm: bool = False
    """True if attention normalizes each head of query and key before the rotary embedding."""

    def form(self, model_type: str) -> ModelForm:
        """Return the form with this value of `model_type` in config.json."""
        return next(form for form in self.forms if form.model_type == model_type)


def _qwen2_layer(spec: "ModelSpec") -> dict[str, Shape]:
    """Qwen2's layer (Yang et al. 2024, arXiv:2407.10671): grouped queries, biases at query, key and value, SwiGLU."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    key_value = hidden // spec.num_attention_heads * spec.num_key_value_heads
    shapes: dict[str, Shape] = {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    for name, width in (("q", hidden), ("k", key_value), ("v", key_value)):
        shapes[f"self_attn.{name}_proj.weight"] = (width, hidden)
        shapes[f"self_attn.{name}_proj.bias"] = (width,)
    shapes["self_attn.o_proj.weight"] = (hidden, hidden)
    shapes |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    return shapes | {"mlp.down_proj.weight": (hidden, inner)}


def _qwen3_layer(spec: "ModelSpec") -> dict[str, Shape]:
    """Qwen3's layer (Yang et al. 2025, arXiv:2505.09388): Qwen2's without biases, with RMSNorm of queries and keys."""
    shapes = {name: shape for name, shape in _qwen2_layer(spec).items() if not name.endswith(".bias")}
    head_size = spec.hidden_size // spec.num_attention_heads
    return shapes | {f"self_attn.{name}_norm.weight": (head_size,) for name in ("q", "k")}


def _qwen3_values(spec: "ModelSpec") -> dict[str, Any]:
    # Without head_dim, transformers takes 128, whatever the width.
    head_dim = spec.hidden_size // spec.num_attention_heads
    return {"head_dim": head_dim, "attention_bias": False, "use_sliding_window": False}


def _output_biases(spec: "ModelSpec") -> list[str]:
    return [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(spec.num_hidden_layers)]


ARCHITECTURES = {
    "qwen2": Architecture(
        config_class="Qwen2Config",
        model_class="Qwen2ForCausalLM",
        config_values=lambda spec: {},
        layer_shapes=_qwen2_layer,
        forms=(
            ModelForm(
                "qwen2",
                "Qwen2ForCausalLM",
                values=lambda spec: {"use_sliding_window": False},
                required={"mlp_bias": False, "use_sliding_window": False},
                is_for_qwen2_tokenizer=True,
            ),
            # The same function under another name: Llama with biases, of which those of the output projections are 0.
            # For type llama, transformers 4 and 5 both do what tokenizer.json says.
            ModelForm(
                "llama",
                "LlamaForCausalLM",
                values=lambda spec: {
                    "attention_bias": True,
                    "mlp_bias": False,
                    "head_dim": spec.hidden_size // spec.num_attention_heads,
                },
                required={"attention_bias": True, "mlp_bias": False, "use_sliding_window": False},
                zeros=_output_biases,
            ),
        ),
    ),
    "qwen3": Architecture(
        config_class="Qwen3Config",
        model_class="Qwen3ForCausalLM",
        config_values=_qwen3_values,
        layer_shapes=_qwen3_layer,
        # For type qwen3, transformers 4 and 5 both do what tokenizer.json says, if the tokenizer's class is the plain
        # one. So one form serves all tokenizers.
        forms=(
            ModelForm(
                "qwen3",
                "Qwen3ForCausalLM",
                values=_qwen3_values,
                required={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
                default_head_dim=128,
            ),
        ),
        has_query_key_norm=True,
    ),
}
"""By the value of `model.architecture`."""


def architecture_of(spec: "ModelSpec") -> Architecture:
    """Return the entry of a shape's architecture.

    Raises:
        UserError: the table has no such architecture.
    """
    return find_entry("model.architecture", spec.architecture, ARCHITECTURES)


def tensor_shapes(spec: "ModelSpec", vocab_size: int) -> dict[str, Shape]:
    """Return the shape of every tensor of the model that `build_model` makes, by name."""
    of_layer = architecture_of(spec).layer_shapes(spec)
    shapes: dict[str, Shape] = {EMBEDDING: (vocab_size, spec.hidden_size), LAST_NORM: (spec.hidden_size,)}
    for layer in range(spec.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    if not spec.tie_word_embeddings:
        shapes[HEAD] = (vocab_size, spec.hidden_size)
    return shapes


def forms_of_type(model_type: str) -> list[tuple[str, ModelForm]]:
    """Return the architectures' names and forms that config.json calls by this type."""
    return [
        (name, form) for name, entry in ARCHITECTURES.items() for form in entry.forms if form.model_type == model_type
    ]
