"""Export of a trained model to `final/`: a Hugging Face folder with a model card."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from job import storage
from job.data.manifest import Manifest
from job.data.tokenizer import TextTokenizer
from job.errors import UserError
from job.model.architecture import architecture_of
from job.model.generation import Sampling
from job.model.save_folder import CONFIG, write_model
from job.model.spec import ModelSpec
from job.redaction import redacted
from job.runs.checkpoint import TrainingState
from job.runs.evaluation_result import Evaluation
from job.runs.export_form import Form, tokenizer_mismatch, write_tokenizer


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
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` can read.

    The files are written and checked in a temporary folder, and then uploaded.

    Args:
        destination: folder or URL to write to.
        spec: the shape of the model.
        weights: fp32 tensors, named as in transformers.
        tokenizer: the tokenizer that the model was trained with.
        context_length: longest input that the model was trained on, in tokens.
        card: content of the model's README.md.
        form: classes of model and tokenizer, from `choose_form`.
        sampling: the defaults of `generate`, written to generation_config.json.

    Raises:
        RuntimeError: names or shapes of `weights` do not fit the model.
        UserError: `AutoTokenizer` does not reproduce the token ids from the written files.
    """
    with tempfile.TemporaryDirectory(prefix="wikillm-") as scratch:
        folder = Path(scratch)
        write_model(
            folder,
            architecture_of(spec).form(form.model_type),
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
        if mismatch := tokenizer_mismatch(folder, tokenizer, form.texts):
            expected = (
                f"cannot be exported, because AutoTokenizer gives other token ids than the training data: {mismatch}"
            )
            remedy = (
                "use its checkpoints with `job generate`, or prepare the data with another tokenizer and train again"
            )
            raise UserError("run.output", destination, expected, remedy)
        # Readers look for config.json first, so it is uploaded last: if it is there, everything else is.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG):
            storage.upload_file(path, storage.join(destination, path.name))
    storage.abort_uploads(destination)


def _generation_config(sampling: Sampling, eod_id: int, context_length: int) -> dict[str, object]:
    """Return the content of generation_config.json. Without it, `generate` is greedy and soon repeats itself."""
    method: dict[str, object] = {"do_sample": False}
    if sampling.temperature > 0:
        method = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    length = sampling.reserved_tokens(context_length)
    return {**method, "max_new_tokens": length, "eos_token_id": eod_id, "pad_token_id": eod_id}


def usage(tokenizer: TextTokenizer, prompt: str, sampling: Sampling, context_length: int) -> str:
    """Return a Python program for the model card that continues `prompt` with the model in the current folder.

    A prompt that is too long is cut, so that prompt and continuation fit into the context.
    """
    max_prompt_tokens = context_length - 1 - sampling.reserved_tokens(context_length)
    (ids,) = tokenizer.encode([prompt])
    # A cut text may be tokenized in another way, and be too long again. Almost always one cut is enough.
    while len(ids) > max_prompt_tokens:
        prompt = tokenizer.decode(ids[:max_prompt_tokens]).rstrip("\N{REPLACEMENT CHARACTER}")[: len(prompt) - 1]
        (ids,) = tokenizer.encode([prompt])
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
prompt = tokenizer.eos_token + {json.dumps(prompt, ensure_ascii=False)}  # every document in training follows this token
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs)
print(tokenizer.decode(output[0, 1:]))"""


def model_card(
    name: str,
    spec: ModelSpec,
    parameters: int,
    manifest: Manifest,
    evaluation: Evaluation | None,
    state: TrainingState,
    source: str,
    usage: str,
) -> str:
    """Return the model's README.md: training data, sizes, validation results and an example program.

    Args:
        name: name of the run.
        spec: the shape of the model, which has the architecture.
        parameters: number of parameters of the model.
        manifest: the data set that it was trained on.
        evaluation: result on the whole validation data; None if there is no validation data.
        state: the state after the last step.
        source: where the training text comes from (`data.source`).
        usage: example program, from `usage`.
    """
    style = architecture_of(spec).model_class.removesuffix("ForCausalLM")
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
            "validation tokens": f"{evaluation.targets:,}",
            "validation nats per token": f"{evaluation.nats_per_token:.4f}",
            "validation bits per byte": f"{evaluation.bits_per_byte:.4f}",
            "validation bits per character": f"{evaluation.bits_per_character:.4f}",
        }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
language: zh
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A {style}-style language model, pretrained from random weights on `{source}` with WikiLLM.
It continues text. It was not trained to follow instructions, and what it writes may be wrong.

| | |
|---|---|
{table}

Bits per byte is the sum of nats over all validation tokens, including end-of-document tokens, divided by ln 2 and by
the UTF-8 bytes of the validation text.

```python
{usage}
```
"""
