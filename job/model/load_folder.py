"""A model read from a Hugging Face folder, if it has one of the forms in `job.model.architecture`.

A value, file or tensor that is missing or unknown, or that changes what the model computes, is an error. No code and no
pickle is ever loaded.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import orjson
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from job.errors import UserError, one_line
from job.json_record import parse_record
from job.model.architecture import ARCHITECTURES, EMBEDDING, HEAD, ModelForm, forms_of_type, tensor_shapes
from job.model.save_folder import CONFIG, WEIGHTS
from job.model.spec import ModelSpec

INDEX = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[\w.-]+\.safetensors")
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)")
_WEIGHTS_PICKLE = re.compile(r"pytorch_model.*\.bin(\.index\.json)?")
_FLOATING = "F32 F16 BF16 F64"
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Tensors that older versions of transformers stored, although they follow from config.json."""
_RUNS_CODE = ("auto_map", "trust_remote_code", "custom_pipelines", "custom_generate")
_NAMES_KERNEL = re.compile(r"kernel|_implementation$")
_ROPE_THETA = 10_000.0
"""Value of transformers if config.json has none."""
_Size = Annotated[int, Field(ge=1, lt=2**31)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class NotAModel(ValueError):
    """A model folder cannot be used; the message says why in one line."""


@dataclass(frozen=True)
class StoredModel:
    """What was read from a model folder: shape, vocabulary size, context length and weights."""

    spec: ModelSpec
    vocab_size: int
    context_length: int
    weights: dict[str, Tensor]
    """fp32, named as in transformers; without the head where it is tied to the embedding."""


@dataclass(frozen=True, kw_only=True)
class _Rope:
    rope_type: str = "default"
    type: str = "default"
    """Earlier name of `rope_type`."""
    rope_theta: _Positive | None = None
    partial_rotary_factor: float = 1.0
    full_attention: Any = None
    """Set if kinds of layers have different bases."""

    @property
    def is_plain(self) -> bool:
        return self == _Rope(rope_theta=self.rope_theta)


@dataclass(frozen=True, kw_only=True)
class _Config:
    """The part of config.json that decides what the model computes, with the defaults of transformers."""

    model_type: str
    vocab_size: _Size
    max_position_embeddings: Annotated[int, Field(ge=2, lt=2**31)]
    hidden_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    intermediate_size: _Size
    head_dim: _Size | None = None
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    rms_norm_eps: _Positive = 1e-6
    initializer_range: _Positive = 0.02
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    layer_types: list[str] | None = None
    rope_theta: _Positive | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    quantization_config: dict[str, Any] | None = None


def files_of_model(names: Collection[str]) -> list[str]:
    """Return the names of a folder's files that `read_model` reads; weight files named in an index are left out.

    Raises:
        NotAModel: the weights are missing, are a pickle, or are there both in one file and in several.
    """
    if CONFIG not in names:
        raise NotAModel(f"{CONFIG} is missing")
    pickles = sorted(name for name in names if _WEIGHTS_PICKLE.fullmatch(name))
    weights = [name for name in (WEIGHTS, INDEX) if name in names]
    if not weights:
        pickles += sorted(name for name in names if _PICKLE.fullmatch(name))
    if pickles:
        raise NotAModel(f"{pickles[0]} is a pickle, which can run any code when it is read; save it as {WEIGHTS}")
    if adapters := sorted(name for name in names if name.startswith("adapter_")):
        raise NotAModel(f"{adapters[0]} is an adapter, which changes another model; merge it into that one")
    if not weights:
        raise NotAModel(f"{WEIGHTS} is missing")
    if len(weights) > 1:
        raise NotAModel(f"{WEIGHTS} and {INDEX} are both there: one of the two is left over, and must go")
    described = [name for name in ("generation_config.json", "tokenizer_config.json") if name in names]
    return [CONFIG, *described, *weights]


def files_of_index(content: bytes) -> list[str]:
    """Return the files that model.safetensors.index.json names, which lie beside it.

    Raises:
        NotAModel: the index is damaged, or names a file in another folder.
    """
    return sorted(set(_weight_map(content).values()))


def read_model(folder: Path) -> StoredModel:
    """Read a model folder on this machine.

    Raises:
        NotAModel: it is damaged, has an unknown architecture, or asks for code from elsewhere.
    """
    with _readable():
        names = files_of_model([path.name for path in folder.iterdir() if path.is_file()])
        for name in names:
            if name.endswith("_config.json") or name == CONFIG:
                _refuse_code(name, (folder / name).read_bytes())
        spec, form, config = _architecture((folder / CONFIG).read_bytes())
        placed = _weight_map((folder / INDEX).read_bytes()) if INDEX in names else None
        weights = _read_weights(_listed(folder, placed), spec, form, config.vocab_size)
    return StoredModel(spec, config.vocab_size, config.max_position_embeddings, weights)


@contextmanager
def _readable() -> Iterator[None]:
    """Turn an OSError into a NotAModel."""
    try:
        yield
    except OSError as error:
        raise NotAModel(f"cannot be read: {error}") from None


def _weight_map(content: bytes) -> dict[str, str]:
    """Return the file of each tensor by the index."""

    @dataclass(frozen=True)
    class Index:
        weight_map: dict[str, str]

    try:
        found = parse_record(content, Index).weight_map
    except ValueError as error:
        raise NotAModel(f"{INDEX} cannot be read: {error}") from None
    for name in found.values():
        if not _FILE_NAME.fullmatch(name):
            raise NotAModel(f"{INDEX} names {name!r}, expected a .safetensors file beside it")
    return found


def _refuse_code(name: str, content: bytes) -> None:
    """Raise NotAModel if a JSON file asks for code from elsewhere, at any depth."""
    try:
        described = orjson.loads(content)
    except ValueError as error:
        raise NotAModel(f"{name} cannot be read: {error}") from None
    if not isinstance(described, dict):
        raise NotAModel(f"{name} cannot be read: expected an object in braces")
    left: list[tuple[str, Any, bool]] = [("", described, False)]
    while left:
        key, value, is_kernel = left.pop()
        is_kernel |= _NAMES_KERNEL.search(key) is not None
        if key in _RUNS_CODE and value:
            raise NotAModel(f"{name} asks for code from elsewhere ({key}), which is never run here")
        if is_kernel and ((isinstance(value, str) and "/" in value) or value is True):
            shown = f"{key}: {value}" if isinstance(value, str) else key
            raise NotAModel(f"{name} asks for a kernel from a hub ({shown}), which is never fetched")
        if isinstance(value, dict):
            left += [(inner, one, is_kernel) for inner, one in value.items()]
        elif isinstance(value, list):
            left += [("", one, is_kernel) for one in value]


def _architecture(content: bytes) -> tuple[ModelSpec, ModelForm, _Config]:
    """Return the shape, the form and the values that config.json describes, if this program has the architecture."""
    try:
        config = parse_record(content, _Config)
    except ValueError as error:
        raise NotAModel(f"{CONFIG} cannot be read: {error}") from None
    heads = config.num_attention_heads
    candidates = forms_of_type(config.model_type)
    if not candidates:
        types = sorted({form.model_type for entry in ARCHITECTURES.values() for form in entry.forms})
        raise NotAModel(
            f"{CONFIG} says model_type {config.model_type!r}, this program only computes {', '.join(types)}"
        )
    wanted: dict[str, Any] = {
        "hidden_act": "silu",
        "head_dim": config.hidden_size // heads,
        "layer_types": set(),
        "quantization_config": None,
    }
    values = vars(config) | {"layer_types": set(config.layer_types or ()) - {"full_attention"}}

    def mistakes(form: ModelForm) -> list[tuple[str, Any, Any]]:
        head_dim = config.head_dim or form.default_head_dim or config.hidden_size // heads
        found = values | {"head_dim": head_dim}
        return [(key, found[key], value) for key, value in {**wanted, **form.required}.items() if found[key] != value]

    architecture, form = min(candidates, key=lambda candidate: len(mistakes(candidate[1])))
    for key, value, computed in mistakes(form):
        raise NotAModel(f"{CONFIG} says {key} {value!r}, this program only computes {computed!r}")
    theta = {one for one in (config.rope_theta, config.rope_parameters and config.rope_parameters.rope_theta) if one}
    if len(theta) > 1:
        raise NotAModel(f"{CONFIG} says two rope_theta that differ: {', '.join(map(str, sorted(theta)))}")
    if not all(rope is None or rope.is_plain for rope in (config.rope_parameters, config.rope_scaling)):
        raise NotAModel(f"{CONFIG} describes scaled rotary embeddings, this program only computes plain ones")
    try:
        spec = ModelSpec(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=config.num_key_value_heads or heads,
            intermediate_size=config.intermediate_size,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_theta=float(theta.pop()) if theta else _ROPE_THETA,
            rms_norm_eps=config.rms_norm_eps,
            initializer_range=config.initializer_range,
            architecture=architecture,
        )
    except UserError as error:
        raise NotAModel(
            f"{CONFIG} says {error.setting.removeprefix('model.')} {error.value}: {error.expected}"
        ) from None
    return spec, form, config


@dataclass
class _Tensors:
    """The tensors of a folder's files: their shapes, and where their numbers are."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)


def _listed(folder: Path, placed: Mapping[str, str] | None) -> _Tensors:
    """Return all tensors of the files; with an index, each has to be in the file that it names."""
    found, names = _Tensors(), [WEIGHTS] if placed is None else sorted(set(placed.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise NotAModel(f"{missing[0]} is missing, which {INDEX} names")
    for name in names:
        try:
            with safe_open(folder / name, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118
                    part = file.get_slice(tensor)
                    if tensor in found.files or (placed is not None and placed.get(tensor) != name):
                        raise NotAModel(f"{name} holds {tensor}, which {INDEX} does not expect there")
                    found.files[tensor] = folder / name
                    found.shapes[tensor], found.types[tensor] = tuple(part.get_shape()), part.get_dtype()
        except SafetensorError as error:
            raise NotAModel(f"{name} is damaged: {one_line(str(error))[:200]}") from None
    if nowhere := sorted((placed or {}).keys() - found.files.keys()):
        raise NotAModel(f"the tensor {nowhere[0]} is missing, which {INDEX} names")
    return found


def _read_weights(found: _Tensors, spec: ModelSpec, form: ModelForm, vocab_size: int) -> dict[str, Tensor]:
    """Return the weights after checking every name, shape and number."""
    # Checked before anything is made for each layer: a damaged config.json may have a billion of them.
    if spec.num_hidden_layers > len(found.shapes):
        raise NotAModel(
            f"{CONFIG} describes {spec.num_hidden_layers:,} layers, the files hold {len(found.shapes)} tensors"
        )
    zeros = form.zeros(spec)
    expected = tensor_shapes(spec, vocab_size) | dict.fromkeys(zeros, (spec.hidden_size,))
    allowed = {HEAD: expected[EMBEDDING]} if spec.tie_word_embeddings else {}
    for name in sorted(found.shapes.keys() - expected.keys() - allowed.keys()):
        if not _COMPUTED.fullmatch(name):
            raise NotAModel(f"the tensor {name} is not part of the model that {CONFIG} describes")
    weights: dict[str, Tensor] = {}
    for name, shape in (expected | {name: shape for name, shape in allowed.items() if name in found.shapes}).items():
        if name not in found.shapes:
            raise NotAModel(f"the tensor {name} is missing")
        if found.shapes[name] != shape:
            raise NotAModel(f"the tensor {name} has shape {list(found.shapes[name])}, {CONFIG} says {list(shape)}")
        if found.types[name] not in _FLOATING.split():
            raise NotAModel(f"the tensor {name} holds {found.types[name]}, expected one of {_FLOATING}")
        with safe_open(found.files[name], framework="pt") as file:
            weights[name] = file.get_tensor(name).float()
        if not weights[name].isfinite().all():
            raise NotAModel(f"the tensor {name} holds a number that is not finite")
    for name in zeros:
        if weights.pop(name).any():
            raise NotAModel(f"the tensor {name} is not 0: this program computes the architecture without it")
    if spec.tie_word_embeddings and not torch.equal(weights.pop(HEAD, weights[EMBEDDING]), weights[EMBEDDING]):
        raise NotAModel(f"the tensor {HEAD} is not {EMBEDDING}, though {CONFIG} says tie_word_embeddings")
    return weights
