"""`final/`: the trained model as a Hugging Face folder, with a card that holds its numbers."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from job import storage
from job.data.manifest import Manifest
from job.data.tokenizer import TextTokenizer
from job.errors import UserError
from job.model.generation import Sampling
from job.model.save_folder import CONFIG, write_model
from job.model.spec import ModelSpec
from job.redaction import redacted
from job.runs.checkpoint import TrainingState
from job.runs.export_form import Form, other_ids, write_tokenizer
from job.training.evaluation import Evaluation


def export_model(
    destination: str,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    context_length: int,
    card: str,
    form: Form,
    sampling: Sampling,
) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Args:
        destination: folder or URL.
        spec: the architecture.
        weights: fp32 tensors, named as in `Qwen2ForCausalLM`.
        tokenizer: the model's.
        context_length: tokens that the model was trained to see at once.
        card: README.md of the model.
        form: of the files, from `choose_form`.
        sampling: how `generate` chooses the next token where it is not told.

    Raises:
        RuntimeError: the weights are not those of the model: names or shapes differ.
        UserError: `AutoTokenizer` gives other ids for what was written.
    """
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        folder = Path(scratch)
        write_model(
            folder,
            form.model_type,
            spec,
            weights,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            context_length=context_length,
        )
        write_tokenizer(folder, form, tokenizer, context_length)
        generation = _generation_config(sampling, tokenizer.eod_id, context_length)
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(redacted(card), encoding="utf-8")
        if why_not := other_ids(folder, tokenizer, form.texts):
            raise UserError("run.output", destination, f"AutoTokenizer would not give the ids trained on: {why_not}")
        # Readers look for config.json first: where it is, the rest is.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
            storage.upload_file(path, storage.join(destination, path.name))
    storage.abort_uploads(destination)


def _generation_config(sampling: Sampling, eod_id: int, context_length: int) -> dict[str, object]:
    """What `generate` does where it is not told: without it, the likeliest token each time, which repeats itself."""
    chosen: dict[str, object] = {"do_sample": False}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    length = _new_tokens(sampling, context_length)
    return {**chosen, "max_new_tokens": length, "eos_token_id": eod_id, "pad_token_id": eod_id}


def _new_tokens(sampling: Sampling, context_length: int) -> int:
    """How long a continuation is where `generate` is not told: at least half of the context is left to the prompt."""
    return min(sampling.max_new_tokens, context_length // 2)


def usage(tokenizer: TextTokenizer, prompt: str, sampling: Sampling, context_length: int) -> str:
    """A program that continues `prompt`, or as much of it as leaves room in the context, with a model folder."""
    room = context_length - 1 - _new_tokens(sampling, context_length)
    (ids,) = tokenizer.encode([prompt])
    while len(ids) > room:  # once for almost every text, since most tokens stay as they were
        prompt = tokenizer.decode(ids[:room]).rstrip("\N{REPLACEMENT CHARACTER}")[: len(prompt) - 1]
        (ids,) = tokenizer.encode([prompt])
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
prompt = tokenizer.eos_token + {json.dumps(prompt, ensure_ascii=False)}  # a document begins where another one ends
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0, 1:]))"""


def model_card(
    name: str,
    parameters: int,
    manifest: Manifest,
    evaluation: Evaluation | None,
    state: TrainingState,
    source: str,
    usage: str,
) -> str:
    """The model's README.md: what it is, what it was trained on, how good it is, in numbers, and how it is used."""
    train_bytes = sum(shard.utf8_bytes for shard in manifest.train)
    rows = {
        "parameters": f"{parameters:,}",
        "vocabulary": f"{manifest.vocab_size:,}",
        "context length": f"{state.identity['context_length']:,} tokens",
        "training text": f"{train_bytes:,} UTF-8 bytes, {sum(shard.tokens for shard in manifest.train):,} tokens",
        "optimizer steps": f"{state.step:,}",
        "tokens seen": f"{state.tokens_seen:,}",
    }
    if evaluation is not None:
        rows |= {
            "held-out tokens": f"{evaluation.targets:,}",
            "held-out nats per token": f"{evaluation.nats_per_token:.4f}",
            "held-out bits per byte": f"{evaluation.bits_per_byte:.4f}",
            "held-out bits per character": f"{evaluation.bits_per_character:.4f}",
        }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
language: zh
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A Qwen2-style language model, pretrained from random weights on `{source}` with WikiLLM.
It continues text; it was not taught to follow instructions, and what it writes may be wrong.

| | |
|---|---|
{table}

Bits per byte is the sum of nats over all held-out targets, end-of-document tokens included, divided by ln 2 and by
the UTF-8 bytes of the held-out text.

```python
{usage}
```
"""
