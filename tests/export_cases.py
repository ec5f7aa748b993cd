"""Exports models, one for each kind of tokenizer and one for each preset, and compares what they compute."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from exported import thinned
from tokenizer_kinds import TEXTS, tokenizer_of

from job import config as settings
from job.data.manifest import Manifest
from job.data.tokenizer import TextTokenizer
from job.model.architecture import ARCHITECTURES
from job.model.generation import Sampling
from job.model.language_model import build_model
from job.model.spec import ModelSpec
from job.runs.export import export_model, usage
from job.runs.export_form import HARD_TEXTS, Form, choose_form

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
CONTEXT_LENGTH = 48
PROMPT = "人工智能"
COMPARED = [*HARD_TEXTS, *TEXTS[20:30]]
SAMPLING = Sampling(max_new_tokens=200, temperature=0.8, top_p=0.95, seed=1)
SMALL = ModelSpec(32, 2, 4, 2, 48, initializer_range=0.3)
QWEN3 = replace(SMALL, architecture="qwen3")
FORMS = [(name, form.model_type) for name, entry in ARCHITECTURES.items() for form in entry.forms]
"""Every architecture with every type as which it can be exported."""
NO_SHARDS = Manifest(
    fingerprint="", tokenizer_fingerprint="", vocab_size=1, dtype="uint16", eod_id=0, seed=1, validation_fraction=0.0,
    split_rule="", train=(), validation=(), statistics={},
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """An exported model folder, with the logits of the model before the export."""

    folder: Path
    form: Form
    tokenizer: TextTokenizer
    logits: Any


def preset(name: str) -> ModelSpec:
    """Return the architecture of a preset with much smaller sizes."""
    model = settings.load(str(CONFIGS / f"{name}.yaml")).model.model_dump()
    heads = model["num_attention_heads"]
    small = {"hidden_size": 8 * heads, "num_hidden_layers": 2, "intermediate_size": 40, "initializer_range": 0.3}
    return ModelSpec(**(model | small))


def export(folder: Path, tokenizer: TextTokenizer, spec: ModelSpec = SMALL) -> Exported:
    """Export a new model. Its weights are large enough to show a wrong base of the rotary embedding."""
    form = choose_form("shards", NO_SHARDS, tokenizer, spec)
    model = build_model(spec, tokenizer.vocab_size, tokenizer.eod_id, CONTEXT_LENGTH, seed=3).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    card = f"# A model\n\n```python\n{usage(tokenizer, PROMPT, SAMPLING, CONTEXT_LENGTH)}\n```\n"
    export_model(str(folder), spec, weights, tokenizer, CONTEXT_LENGTH, card, form, SAMPLING)
    ids = max(tokenizer.encode(COMPARED), key=len)[:CONTEXT_LENGTH]
    with torch.no_grad():
        return Exported(folder, form, tokenizer, thinned(model(input_ids=torch.tensor([ids])).logits[0]))


def export_kind(kind: str, folder: Path, spec: ModelSpec = SMALL) -> Exported:
    """Export a model with a tokenizer of this kind."""
    return export(folder / "final", tokenizer_of(kind, folder / "tokenizer"), spec)


def export_preset(name: str, folder: Path) -> Exported:
    """Export a model with the structure of a preset in configs/."""
    return export(folder / "final", tokenizer_of("trained here", folder / "tokenizer"), preset(name))


def assert_same(exported: Exported, found: dict[str, Any]) -> None:
    """Assert that transformers, whose answer is the result of `read_model`, computes the same as our model."""
    assert found["ids"] == exported.tokenizer.encode(COMPARED)
    assert found["texts"] == [exported.tokenizer.decode(ids) for ids in exported.tokenizer.encode(COMPARED)]
    assert found["eos_token_id"] == exported.tokenizer.eod_id
    assert found["dtype"] == "torch.float32"
    torch.testing.assert_close(torch.tensor(found["logits"]), exported.logits, rtol=0, atol=1e-5)
    assert found["printed"].startswith(PROMPT) and len(found["printed"]) > len(PROMPT) + 1
    assert found["tokens"] <= CONTEXT_LENGTH
