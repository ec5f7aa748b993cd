"""A model written as a Hugging Face folder: a config.json and weights that transformers 4 and 5 read alike."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from job.model.architecture import ModelForm, tensor_shapes
from job.model.spec import ModelSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_model(
    folder: Path,
    form: ModelForm,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    *,
    vocab_size: int,
    eod_id: int,
    context_length: int,
) -> None:
    """Write config.json and model.safetensors.

    Args:
        folder: local folder, which exists.
        form: how the model is written, one of `Architecture.forms`.
        spec: the shape of the model.
        weights: fp32 tensors, named as in transformers.
        vocab_size: rows of the embedding.
        eod_id: the end-of-document token.
        context_length: tokens of a sequence in training.

    Raises:
        RuntimeError: names or shapes of the weights are not those of the model.
    """
    expected = tensor_shapes(spec, vocab_size)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise RuntimeError(f"the weights do not fit the model: {wrong[0]} (and {len(wrong) - 1} more)")
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    tensors |= {name: torch.zeros(spec.hidden_size) for name in form.zeros(spec)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(form, spec, vocab_size, eod_id, context_length)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(form: ModelForm, spec: ModelSpec, vocab_size: int, eod_id: int, context_length: int) -> dict[str, object]:
    import transformers

    return {
        "architectures": [form.model_class],
        "model_type": form.model_type,
        "vocab_size": vocab_size,
        "max_position_embeddings": context_length,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "intermediate_size": spec.intermediate_size,
        "hidden_act": "silu",
        "tie_word_embeddings": spec.tie_word_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "initializer_range": spec.initializer_range,
        "attention_dropout": 0.0,
        # transformers 4 reads the first, transformers 5 the second; without it each takes 10,000.
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        **form.values(spec),
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eod_id,
        "pad_token_id": None,
        "dtype": "float32",
        "transformers_version": transformers.__version__,
    }
