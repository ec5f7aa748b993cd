"""A model written as a Hugging Face folder: a config.json and weights that transformers 4 and 5 read alike.

There are two forms:

    qwen2   the architecture by its own name
    llama   the same function under another name: Llama with biases, of which those of the output projections are 0

The second is for tokenizers other than Qwen2's. transformers 5 has every model of type qwen2 cut texts as Qwen2's
tokenizer does, whatever tokenizer.json says; for type llama it does what tokenizer.json says, as transformers 4 does.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from job.model.spec import ModelSpec, tensor_shapes

ModelType = Literal["qwen2", "llama"]
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def output_biases(spec: ModelSpec) -> list[str]:
    """The tensors that the form ``llama`` has beside those of `tensor_shapes`: each `[hidden_size]`, and 0."""
    return [f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(spec.num_hidden_layers)]


def write_model(
    folder: Path,
    model_type: ModelType,
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    *,
    vocab_size: int,
    eod_id: int,
    context_length: int,
) -> None:
    """Write config.json and model.safetensors, which transformers 4 and 5 read alike.

    Args:
        folder: a local one, which exists.
        model_type: the form.
        spec: the architecture.
        weights: fp32 tensors, named as in `Qwen2ForCausalLM`.
        vocab_size: rows of the embedding.
        eod_id: the end-of-document token.
        context_length: tokens that the model was trained to see at once.

    Raises:
        RuntimeError: the weights are not those of the model: names or shapes differ.
    """
    expected = tensor_shapes(spec, vocab_size)
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise RuntimeError(f"the weights do not fit the model: {wrong[0]} (and {len(wrong) - 1} more)")
    tensors = {name: weight.detach().contiguous() for name, weight in weights.items()}
    if model_type == "llama":
        tensors |= {name: torch.zeros(spec.hidden_size) for name in output_biases(spec)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(model_type, spec, vocab_size, eod_id, context_length)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config(
    model_type: ModelType, spec: ModelSpec, vocab_size: int, eod_id: int, context_length: int
) -> dict[str, object]:
    import transformers

    own: dict[str, object] = {"use_sliding_window": False}
    if model_type == "llama":
        head_dim = spec.hidden_size // spec.num_attention_heads
        own = {"attention_bias": True, "mlp_bias": False, "head_dim": head_dim}
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
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
        # transformers 4 reads the first of the two, transformers 5 the second; each would take 10,000 without it.
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        **own,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eod_id,
        "pad_token_id": None,
        "dtype": "float32",
        "transformers_version": transformers.__version__,
    }
