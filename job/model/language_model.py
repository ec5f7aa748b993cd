"""The network that is trained: a decoder of transformers with the chunked loss behind one forward."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from job.model.architecture import HEAD, architecture_of
from job.model.attention import PACKED, same_document
from job.model.loss import GradLogits, grad_logits_, linear_cross_entropy, token_nats
from job.model.spec import ModelSpec


def build_model(spec: ModelSpec, vocab_size: int, eod_id: int, context_length: int, seed: int) -> PreTrainedModel:
    """Return a new fp32 model. Its weights depend on the arguments alone, so every rank makes the same ones.

    The global random state stays as it was.

    Args:
        spec: the shape of the network.
        vocab_size: rows of the embedding.
        eod_id: the end-of-document token, at which generation stops. Padding has no id, so that it cannot be the same.
        context_length: longest sequence in tokens.
        seed: seed of the weights.
    """
    architecture = architecture_of(spec)
    config_class: Any = getattr(transformers, architecture.config_class)
    model_class: Any = getattr(transformers, architecture.model_class)
    config = config_class(
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
        attn_implementation="sdpa",
        **architecture.config_values(spec),
    )
    # Only the CPU's generator: torch.manual_seed would also seed every GPU's, and those are not forked here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
    if spec.init == "zero_projections":
        # After all weights were drawn, so that the others are those of the default.
        for layer in model.model.layers:
            for name in architecture.residual_projections:
                nn.init.zeros_(layer.get_parameter(name))
    return model


def load_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a model.

    Args:
        model: from `build_model`.
        weights: tensors by their names in transformers.

    Raises:
        RuntimeError: their names or shapes are not those of the model.
    """
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    tied = {HEAD} if model.config.tie_word_embeddings else set()
    if set(missing) - tied or unexpected:
        raise RuntimeError(f"the weights do not fit the model: missing {missing}, unexpected {unexpected}")
    model.tie_weights()


class LanguageModel(nn.Module):
    """The module that DDP and DeepSpeed wrap: tokens and labels in, nats out, so that the loss is part of the forward.

    Args:
        causal_lm: from `build_model`; also the attribute for `generate` and `save_pretrained`.
        loss_chunk_tokens: `chunk_tokens` of `linear_cross_entropy`.
        document_masking: let a token attend to its own document only (see `same_document`): by a mask, or without one
            if `forward` is given the documents' bounds.
    """

    def __init__(
        self, causal_lm: PreTrainedModel, loss_chunk_tokens: int | None = None, document_masking: bool = False
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
        """Run training steps as compiled code: each layer of the decoder, and the loss between its matrix products.

        A layer is compiled when a step first has its shape, once for all layers. So gradients are ready layer by layer,
        and can be reduced while those of the next layer are computed. Evaluation and generation, whose shapes vary, run
        as before.

        Args:
            options: options of ``torch.compile``.
        """
        self._layer = torch.compile(_layer, dynamic=False, fullgraph=True, **options)
        self._grad_logits = torch.compile(grad_logits_, dynamic=False, fullgraph=True, **options)

    def interpret(self) -> None:
        """Undo `compile`."""
        self._layer, self._grad_logits = _layer, None

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        reduction: Literal["sum", "none"] = "sum",
        bounds: Tensor | None = None,
        gradient_scale: Tensor | None = None,
    ) -> Tensor:
        """Return the loss in nats.

        Args:
            input_ids: ``[batch, context_length]``.
            labels: ``[batch, context_length]``; ``labels[b, t]`` is the token after ``input_ids[b, t]``, or
                `IGNORE_INDEX`.
            reduction: ``sum``: a differentiable scalar; ``none``: the nats of each label ``[batch, context_length]``, 0
                where ignored, for evaluation.
            bounds: the documents' bounds, with `document_masking` (see `job.model.attention.document_bounds`).
            gradient_scale: scalar fp32 factor of the gradients, but not of the returned loss; fp16 needs it (see
                `linear_cross_entropy`).
        """
        hidden, head = self._hidden_states(input_ids, bounds), self.causal_lm.lm_head.weight
        if reduction == "none":
            return token_nats(hidden, head, labels, self.loss_chunk_tokens)
        return linear_cross_entropy(
            hidden,
            head,
            labels,
            self.loss_chunk_tokens,
            compiled=self._grad_logits,
            gradient_scale=gradient_scale,
        )

    def _hidden_states(self, input_ids: Tensor, bounds: Tensor | None) -> Tensor:
        """Return the decoder's output, ``[batch, context_length, hidden_size]``.

        This does what the model's own forward does, except to look for packed documents in the positions: the host
        would wait for the device there.
        """
        decoder, layer = self.causal_lm.model, self._layer if self.training else _layer
        # Without a mask, attention is causal by SDPA's flag, which is fastest.
        mask = None
        if self.document_masking and bounds is None:
            mask = same_document(input_ids, self.causal_lm.config.eos_token_id)
        hidden: Tensor = decoder.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        position_embeddings = decoder.rotary_emb(hidden, positions)
        for one in decoder.layers:
            hidden = layer(one, hidden, mask, bounds, position_embeddings)
        return decoder.norm(hidden)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and cast as every module does, but keep the rotary frequencies in fp32.

        `bfloat16()` would round them to other angles than those that the saved model computes when it is loaded.
        """
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
