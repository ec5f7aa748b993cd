"""The cost of a model, from its shape alone: parameters, FLOPs per token, and the share of a GPU's peak (MFU)."""

import math
from dataclasses import dataclass

from job.model.architecture import architecture_of
from job.model.spec import ModelSpec


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: `total` is `embedding` + `body` + the biases and norms, which are in no matrix product."""

    total: int
    embedding: int
    """Parameters of the embedding, and of the head if it is not tied to it."""
    body: int
    """Weights of the layers' matrix products (N_body)."""


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs to train on one token, for each part of the model; each is the sum of the forward and the backward pass."""

    body: int
    head: int
    attention: int

    @property
    def total(self) -> int:
        """FLOPs of one token."""
        return self.body + self.head + self.attention


def parameter_counts(spec: ModelSpec, vocab_size: int) -> ParameterCounts:
    """Return the numbers of parameters of the model that `build_model` makes of `spec`."""
    of_layer = architecture_of(spec).layer_shapes(spec).values()
    body = spec.num_hidden_layers * sum(math.prod(shape) for shape in of_layer if len(shape) == 2)
    vectors = spec.num_hidden_layers * sum(math.prod(shape) for shape in of_layer if len(shape) == 1)
    embedding = vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    return ParameterCounts(total=embedding + body + vectors + spec.hidden_size, embedding=embedding, body=body)


def flops_per_token(spec: ModelSpec, vocab_size: int, context_length: int) -> TokenFlops:
    """Return the FLOPs of one token: ``6·N_body + 6·V·d + 6·L·d·T``.

    Each weight takes two FLOPs forward and four backward (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). The head
    counts even if it is tied; the embedding's look-up costs nothing. Attention takes ``12·L·d·T`` (Chowdhery et al.
    2022, arXiv:2204.02311, appendix B), of which a causal mask needs half.

    Args:
        spec: the shape of the network, with L layers of width d.
        vocab_size: entries of the vocabulary, V.
        context_length: tokens of a sequence, T.
    """
    return TokenFlops(
        body=6 * parameter_counts(spec, vocab_size).body,
        head=6 * vocab_size * spec.hidden_size,
        attention=6 * spec.num_hidden_layers * spec.hidden_size * context_length,
    )


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None, world_size: int) -> float | None:
    """Return the model FLOPs utilization, 0 to 1: the share of the GPUs' peak that the model's own arithmetic uses.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.

    Args:
        tokens_per_second: tokens of all ranks together.
        flops_per_token: FLOPs of one token.
        peak: peak FLOP/s of one GPU in the precision of the products; None: not known, and neither is the result.
        world_size: ranks.
    """
    return None if peak is None else tokens_per_second * flops_per_token / (peak * world_size)
