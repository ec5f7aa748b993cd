"""The network: Qwen2's decoder from transformers, at any size, with the chunked loss behind one forward."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from job.model.attention import PACKED, same_document
from job.model.loss import GradLogits, grad_logits_, linear_cross_entropy, token_nats
from job.model.spec import ModelSpec


def build_model(spec: ModelSpec, vocab_size: int, eod_id: int, context_length: int, seed: int) -> Qwen2ForCausalLM:
    """A new fp32 model. The weights depend on the arguments alone, so every rank makes the same ones; the global RNG
    stays where it was.

    Args:
        vocab_size: rows of the embedding.
        eod_id: the end-of-document token, at which generation stops; padding is deliberately not given the same id.
        context_length: longest sequence in tokens; rotary embeddings do not learn it.
    """
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        intermediate_size=spec.intermediate_size,
        tie_word_embeddings=spec.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        rms_norm_eps=spec.rms_norm_eps,
        initializer_range=spec.initializer_range,
        max_position_embeddings=context_length,
        bos_token_id=None,
        eos_token_id=eod_id,
        pad_token_id=None,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    # The CPU's generator alone: torch.manual_seed would also reseed every GPU, and those are not forked here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def load_weights(model: Qwen2ForCausalLM, weights: Mapping[str, Tensor]) -> None:
    """Put `weights`, named as in `Qwen2ForCausalLM`, into a model.

    Raises:
        RuntimeError: they are not those of the model: names or shapes differ.
    """
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise RuntimeError(f"the weights do not fit the model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()


class LanguageModel(nn.Module):
    """What DDP and DeepSpeed wrap: tokens and labels in, nats out, so that the loss is part of the one forward.

    `causal_lm` is the Hugging Face model, for generate and save_pretrained.

    Args:
        causal_lm: from `build_model`.
        loss_chunk_tokens: of `linear_cross_entropy`.
        document_masking: a token sees those of its own document only (see `same_document`), by a mask, or without one
            where the bounds of the documents are given.
    """

    def __init__(
        self, causal_lm: Qwen2ForCausalLM, loss_chunk_tokens: int | None = None, document_masking: bool = False
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.loss_chunk_tokens = loss_chunk_tokens
        self.document_masking = document_masking
        self._layer: Callable[..., Tensor]
        self._grad_logits: GradLogits | None
        if document_masking:
            causal_lm.set_attn_implementation(PACKED)
        self.interpret()

    def compile(self, **options: Any) -> None:
        """Has training steps run as compiled code: each layer of the decoder, and what is between the products of the
        loss.

        It is made when a step first meets a shape, and for that shape, once for all layers; so gradients come layer by
        layer, and can travel while those of the next are computed. Evaluation and generation, whose shapes vary, go on
        as before.

        Args:
            options: of ``torch.compile``.
        """
        self._layer = torch.compile(_layer, dynamic=False, fullgraph=True, **options)
        self._grad_logits = torch.compile(grad_logits_, dynamic=False, fullgraph=True, **options)

    def interpret(self) -> None:
        """Undoes `compile`."""
        self._layer, self._grad_logits = _layer, None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        reduction: Literal["sum", "none"] = "sum",
        bounds: Tensor | None = None,
    ) -> Tensor:
        """The loss in nats.

        Args:
            input_ids: ``[batch, context_length]``.
            labels: ``[batch, context_length]``; ``labels[b, t]`` is the token after ``input_ids[b, t]``; -100: ignored.
            reduction: ``sum``, a differentiable scalar; ``none``, the nats of each label ``[batch, context_length]``,
                0 where ignored, for evaluation.
            bounds: of the documents, with `document_masking` (see `job.model.attention.document_bounds`).
        """
        hidden, head = self._hidden_states(input_ids, bounds), self.causal_lm.lm_head.weight
        if reduction == "none":
            return token_nats(hidden, head, labels, self.loss_chunk_tokens)
        return linear_cross_entropy(hidden, head, labels, self.loss_chunk_tokens, compiled=self._grad_logits)

    def _hidden_states(self, input_ids: Tensor, bounds: Tensor | None) -> Tensor:
        """What the decoder makes of the tokens, ``[batch, context_length, hidden_size]``.

        It is what the model's own forward does, short of looking for packed documents in the positions, for which the
        host would wait for the device.
        """
        decoder, layer = self.causal_lm.model, self._layer if self.training else _layer
        # Without a mask attention is causal by SDPA's flag, the fastest there is.
        mask = None
        if self.document_masking and bounds is None:
            mask = same_document(input_ids, self.causal_lm.config.eos_token_id)  # type: ignore[arg-type]
        hidden: Tensor = decoder.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        position_embeddings = decoder.rotary_emb(hidden, positions)
        for one in decoder.layers:
            hidden = layer(one, hidden, mask, bounds, position_embeddings)
        return decoder.norm(hidden)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as every module does, but the rotary frequencies stay fp32: `bfloat16()` would turn them to
        other angles than those that the saved model computes when it is loaded."""
        super()._apply(fn, recurse)
        rotary: Any = self.causal_lm.model.rotary_emb
        frequencies, _ = rotary.compute_default_rope_parameters(self.causal_lm.config)
        rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
        return self


def _layer(
    layer: nn.Module,
    hidden: Tensor,
    mask: Tensor | None,
    bounds: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
) -> Tensor:
    return layer(hidden, attention_mask=mask, bounds=bounds, position_embeddings=position_embeddings)
