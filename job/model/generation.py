"""Continuing a text with a model, token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from job.model import gpu
from job.model.attention import varying_lengths


class Tokenizer(Protocol):
    """The methods of a tokenizer that generation needs; `job.data.tokenizer.TextTokenizer` implements them."""

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the token ids of each text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these token ids."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def for_prompt(self, index: int) -> "Sampling":
        """Return the same with another seed for each prompt; else a young model continues all prompts alike."""
        return replace(self, seed=self.seed + index)

    def reserved_tokens(self, context_length: int) -> int:
        """Return how many tokens of the context a long prompt leaves free: at most half of them."""
        return min(self.max_new_tokens, context_length // 2)

    def most_new_tokens(self, prompt_tokens: int, context_length: int) -> int:
        """Return how many tokens a continuation has at most after a prompt of so many, with the token before it."""
        read = min(prompt_tokens, context_length - self.reserved_tokens(context_length))
        return min(self.max_new_tokens, context_length - read)


@torch.no_grad()
def continue_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    context_length: int,
    on_text: Callable[[str], None] = lambda piece: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Return the continuation of `prompt`, up to the end of the document or of the context.

    The prompt is read as the beginning of a document. Of a prompt that leaves too little of the context free, only the
    end is read. The global random state stays as it was.

    Args:
        model: in evaluation or training mode, on any device.
        tokenizer: the tokenizer of the model.
        prompt: any text, also an empty one.
        sampling: how tokens are chosen.
        context_length: tokens of a sequence in the model's training.
        on_text: called with each piece of text as it is made.
        should_stop: called after each token; True ends the continuation.
    """
    ids = [tokenizer.eod_id, *tokenizer.encode([prompt])[0]]
    ids = ids[-(context_length - sampling.reserved_tokens(context_length)) :]
    input_ids = torch.tensor([ids], device=model.device)
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=sampling.most_new_tokens(len(ids), context_length),
        use_cache=True,
        eos_token_id=tokenizer.eod_id,
        pad_token_id=tokenizer.eod_id,
        **choice,
    )
    was_training = model.training
    model.eval()
    streamer = _TextStreamer(tokenizer, on_text)
    with varying_lengths(), torch.random.fork_rng(devices=[model.device] if gpu.is_gpu(model.device) else []):
        torch.manual_seed(sampling.seed)
        cast(Any, model).generate(  # its self type is one that no model has
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList(
                [lambda ids, scores, **_: torch.full((len(ids),), should_stop(), device=ids.device)]
            ),
        )
    model.train(was_training)
    return streamer.text


class _TextStreamer(BaseStreamer):
    """Passes text on as soon as its characters are complete: a token may end within a character."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        self.text = ""
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._in_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._in_prompt:
            self._in_prompt = False
            return
        self._ids += [i for i in value.flatten().tolist() if i != self._tokenizer.eod_id]
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._hand_on(text)

    def end(self) -> None:
        self._hand_on(self._tokenizer.decode(self._ids))

    def _hand_on(self, text: str) -> None:
        piece, self.text = text[len(self.text) :], text
        if piece:
            self._on_text(piece)
