"""Continuing a text with a model, token by token."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import GenerationConfig, Qwen2ForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from job.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int

    def for_prompt(self, index: int) -> "Sampling":
        """The same, with a seed of its own for each of several prompts: a young model would continue them all alike."""
        return replace(self, seed=self.seed + index)


@torch.no_grad()
def continue_text(
    model: Qwen2ForCausalLM,
    tokenizer: TextTokenizer,
    prompt: str,
    sampling: Sampling,
    context_length: int,
    on_text: Callable[[str], None] = lambda piece: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> str:
    """The continuation of `prompt`, up to the end of the document or the end of the context.

    The prompt is read as the beginning of a document. The global random state is left as it was.

    Args:
        model: in evaluation or training mode, on any device.
        tokenizer: the model's.
        prompt: any text, also none.
        sampling: how to choose.
        context_length: tokens that the model was trained to see at once.
        on_text: called with each piece of text as it is made.
        should_stop: asked after each token; true ends the continuation there.
    """
    ids = [tokenizer.eod_id, *tokenizer.encode([prompt])[0]][-(context_length - 1) :]
    input_ids = torch.tensor([ids], device=model.device)
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    config = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, context_length - len(ids)),
        use_cache=True,
        eos_token_id=tokenizer.eod_id,
        pad_token_id=tokenizer.eod_id,
        **choice,
    )
    was_training = model.training
    model.eval()
    streamer = _TextStreamer(tokenizer, on_text)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
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
    """Hands text on as soon as its characters are whole: a token may end inside a character."""

    def __init__(self, tokenizer: TextTokenizer, on_text: Callable[[str], None]) -> None:
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
