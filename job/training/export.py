"""`final/`: the trained model as a Hugging Face folder, with a card that holds its numbers."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from job import storage
from job.data.manifest import Manifest
from job.data.tokenizer import TextTokenizer
from job.model.architecture import build_model, load_weights
from job.model.spec import ModelSpec
from job.redaction import redacted
from job.training.checkpoint import TrainingState
from job.training.evaluation import Evaluation


def export_model(
    destination: str,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    tokenizer: TextTokenizer,
    context_length: int,
    card: str,
) -> None:
    """Writes what `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Args:
        destination: folder or URL.
        spec: the architecture.
        weights: fp32 tensors, named as in `Qwen2ForCausalLM`.
        tokenizer: the model's.
        context_length: tokens that the model was trained to see at once.
        card: README.md of the model.
    """
    model = build_model(
        spec, vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, context_length=context_length, seed=0
    )
    load_weights(model, weights)
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder)
        for path in tokenizer.files():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "README.md").write_text(redacted(card), encoding="utf-8")
        # Readers look for config.json first: where it is, the rest is.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            storage.upload_file(path, storage.join(destination, path.name))
    storage.abort_uploads(destination)


def model_card(
    name: str, parameters: int, manifest: Manifest, evaluation: Evaluation | None, state: TrainingState, source: str
) -> str:
    """The model's README.md: what it is, what it was trained on, and how good it is, in numbers."""
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
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
inputs = tokenizer("人工智能", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
"""
