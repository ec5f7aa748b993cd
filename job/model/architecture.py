"""The network: Qwen2's decoder from transformers, at any size, with the chunked loss behind one forward."""

from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from job.model.loss import linear_cross_entropy, token_nats
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


class LanguageModel(nn.Module):
    """What DDP and DeepSpeed wrap: tokens and labels in, nats out, so that the loss is part of the one forward.

    `causal_lm` is the Hugging Face model, for generate and save_pretrained.
    """

    def __init__(self, causal_lm: Qwen2ForCausalLM, loss_chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(self, input_ids: Tensor, labels: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
        """The loss in nats.

        Args:
            input_ids: ``[batch, context_length]``.
            labels: ``[batch, context_length]``; ``labels[b, t]`` is the token after ``input_ids[b, t]``; -100: ignored.
            reduction: ``sum``, a differentiable scalar; ``none``, the nats of each label ``[batch, context_length]``,
                0 where ignored, for evaluation.
        """
        # The mask is given as already prepared, and as none: attention is causal by SDPA's flag. Left to itself the
        # model looks for packed documents in the positions, and the host waits for the device at every forward.
        hidden = self.causal_lm.model(
            input_ids=input_ids, attention_mask={"full_attention": None}, use_cache=False
        ).last_hidden_state
        loss = {"sum": linear_cross_entropy, "none": token_nats}[reduction]
        return loss(hidden, self.causal_lm.lm_head.weight, labels, self.loss_chunk_tokens)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts as every module does, but the rotary frequencies stay fp32: `bfloat16()` would turn them to
        other angles than those that the saved model computes when it is loaded."""
        super()._apply(fn, recurse)
        rotary: Any = self.causal_lm.model.rotary_emb
        frequencies, _ = rotary.compute_default_rope_parameters(self.causal_lm.config)
        rotary.inv_freq = frequencies.to(rotary.inv_freq.device)
        return self
