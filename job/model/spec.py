"""The shape of the network, checked without the libraries that build it."""

from dataclasses import dataclass

from job.config_training import Initialisation
from job.errors import UserError
from job.model.architecture import architecture_of

IGNORE_INDEX = -100
"""Label of a position that predicts nothing (padding); it is PyTorch's default."""


@dataclass(frozen=True)
class ModelSpec:
    """The shape of the network; what depends on the data (vocabulary, context length) is not part of it.

    Raises:
        UserError: a size that no network can have, or an unknown architecture; it names ``model.<field>``.
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
    architecture: str = "qwen2"
    """An entry of `job.model.architecture.ARCHITECTURES`."""
    init: Initialisation = "default"
    """`zero_projections`: `Architecture.residual_projections` start at zero."""

    def __post_init__(self) -> None:
        architecture_of(self)
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
            nearest = max(1, round(self.hidden_size / (2 * heads))) * 2 * heads
            raise UserError(
                "model.hidden_size",
                self.hidden_size,
                f"must be a multiple of {2 * heads} (2 x model.num_attention_heads), "
                "because rotary embeddings need an even number of features in each head",
                f"set it to {nearest}, or change model.num_attention_heads",
            )
        if heads % key_value_heads:
            raise UserError(
                "model.num_key_value_heads",
                key_value_heads,
                f"must divide model.num_attention_heads ({heads})",
                f"take one of {[n for n in range(1, heads + 1) if heads % n == 0]}",
            )
