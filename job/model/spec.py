"""The shape of the network: known, checked and counted without any of the libraries that build it."""

from dataclasses import dataclass

from job.errors import UserError

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
"""Tensors of the model, named as in `Qwen2ForCausalLM`; the head is one only where it is not tied."""


@dataclass(frozen=True)
class ModelSpec:
    """The shape of the decoder; what depends on the data (vocabulary, context length) is not part of it.

    Raises:
        UserError: a size that no network can have, named as ``model.<field>``.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool = True
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
        ):
            if getattr(self, field) < 1:
                raise UserError(f"model.{field}", getattr(self, field), "must be at least 1")
        heads, key_value_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads):
            raise UserError(
                "model.hidden_size",
                self.hidden_size,
                f"must be a multiple of twice model.num_attention_heads ({heads}), "
                "so that rotary embeddings find pairs in every head",
                f"take {max(1, round(self.hidden_size / (2 * heads))) * 2 * heads}, or another number of heads",
            )
        if heads % key_value_heads:
            raise UserError(
                "model.num_key_value_heads",
                key_value_heads,
                f"must divide model.num_attention_heads ({heads})",
                f"take one of {[n for n in range(1, heads + 1) if heads % n == 0]}",
            )


def tensor_shapes(spec: ModelSpec, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the model that `build_model` makes, by name."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    key_value = hidden // spec.num_attention_heads * spec.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab_size, hidden), "model.norm.weight": (hidden,)}
    for layer in range(spec.num_hidden_layers):
        within = f"model.layers.{layer}."
        shapes |= {f"{within}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        for name, width in (("q", hidden), ("k", key_value), ("v", key_value)):
            shapes[f"{within}self_attn.{name}_proj.weight"] = (width, hidden)
            shapes[f"{within}self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{within}self_attn.o_proj.weight"] = (hidden, hidden)
        shapes |= {f"{within}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{within}mlp.down_proj.weight"] = (hidden, inner)
    if not spec.tie_word_embeddings:
        shapes[HEAD] = (vocab_size, hidden)
    return shapes
