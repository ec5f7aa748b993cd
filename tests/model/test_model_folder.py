"""Tests of loading a model folder: a valid one loads exactly, any other is refused in one line and runs no code."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import CONTEXT_LENGTH, FORMS, NO_SHARDS, SAMPLING, SMALL
from safetensors.torch import load_file, save_file
from tokenizer_kinds import KINDS

from job import storage
from job.cli import main
from job.data.tokenizer import load_tokenizer
from job.errors import EXIT_DONE, EXIT_REFUSED
from job.model.architecture import ARCHITECTURES, architecture_of, tensor_shapes
from job.model.language_model import build_model
from job.model.save_folder import write_model
from job.model.spec import ModelSpec
from job.runs.export import export_model
from job.runs.export_form import choose_form
from job.runs.load_model import load_model

LAYER = "model.layers.1.self_attn"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid model folder, as a run exports it."""
    folder = tmp_path_factory.mktemp("right")
    KINDS["trained here"](folder / "tokenizer")
    tokenizer = load_tokenizer(str(folder / "tokenizer"), folder)
    weights = weights_of(SMALL, tokenizer.vocab_size)
    form = choose_form("shards", NO_SHARDS, tokenizer, SMALL)
    export_model(str(folder / "final"), SMALL, weights, tokenizer, CONTEXT_LENGTH, "card", form, SAMPLING)
    return folder / "final"


def weights_of(spec: ModelSpec, vocab_size: int) -> dict[str, torch.Tensor]:
    model = build_model(spec, vocab_size, 0, CONTEXT_LENGTH, seed=3)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture
def folder(right: Path, tmp_path: Path) -> Path:
    """A copy of the valid folder that a test may damage."""
    return Path(shutil.copytree(right, tmp_path / "model"))


def generate(source: object, tmp_path: Path) -> int:
    words = ["--generate.model", str(source), "--generate.max_new_tokens", "4", "--data.cache_dir", str(tmp_path)]
    return main(["generate", "人工智能", *words])


# ── Damaged folders ──────────────────────────────────────────────────────────────────────────────────────────────────


def content(name: str, value: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(value)


def cut(name: str, share: float) -> Spoil:
    def spoil(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return spoil


def with_json(name: str, **values: Any) -> Spoil:
    """Change values of a JSON file; ``...`` removes a value."""

    def spoil(folder: Path) -> None:
        path = folder / name
        changed = (json.loads(path.read_bytes()) if path.exists() else {}) | values
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))

    return spoil


def config(**values: Any) -> Spoil:
    return with_json("config.json", **values)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return spoil


def number(name: str, value: float) -> Spoil:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[name].view(-1)[3] = value

    return tensors(change)


def index(change: Callable[[dict[str, str]], object], keep: bool = True) -> Spoil:
    """Split the weights into two files with an index, and change the index."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        names = sorted(found)
        parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
        for file, those in parts.items():
            save_file({name: found[name] for name in those}, folder / file)
        placed = {name: file for file, those in parts.items() for name in those}
        change(placed)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
        if keep:
            (folder / "model.safetensors").unlink()

    return spoil


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("/tmp/a-pickle-was-opened"),)


def trap(name: str, replaces_weights: bool = True) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(Trap()))
        if replaces_weights:
            (folder / "model.safetensors").unlink()

    return spoil


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def move_down(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / "old").mkdir()
        (folder / name).rename(folder / "old" / name)

    return spoil


def as_folder(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


CODE, KERNEL = "asks for code from elsewhere", "asks for a kernel from a hub"
DAMAGED: dict[str, tuple[Spoil, str]] = {
    # Files
    "no config": (remove("config.json"), "config.json is missing"),
    "no weights": (remove("model.safetensors"), "model.safetensors is missing"),
    "no tokenizer": (remove("tokenizer.json"), "its tokenizer"),
    "weights in a folder below": (move_down("model.safetensors"), "model.safetensors is missing"),
    "a folder for a config": (as_folder("config.json"), "config.json is missing"),
    "a folder for weights": (as_folder("model.safetensors"), "model.safetensors is missing"),
    "weights that are cut off": (cut("model.safetensors", 0.7), "model.safetensors is damaged"),
    "weights with half a header": (cut("model.safetensors", 0.01), "model.safetensors is damaged"),
    "empty weights": (content("model.safetensors", b""), "model.safetensors is damaged"),
    "weights that are text": (content("model.safetensors", b"version https://git-lfs"), "model.safetensors is damaged"),
    "a header of 2**60 bytes": (content("model.safetensors", b"\0" * 7 + b"\x10{}"), "model.safetensors is damaged"),
    "a config that is cut off": (cut("config.json", 0.5), "config.json cannot be read"),
    "a config that is a list": (content("config.json", b"[]"), "config.json cannot be read"),
    "a config that is binary": (content("config.json", bytes(range(256))), "config.json cannot be read"),
    "a million brackets": (content("config.json", b"[" * 10**6), "config.json cannot be read"),
    "a generation config cut off": (cut("generation_config.json", 0.5), "generation_config.json cannot be read"),
    "a tokenizer that is cut off": (cut("tokenizer.json", 0.5), "its tokenizer"),
    "a tokenizer config that is text": (content("tokenizer_config.json", b"x"), "tokenizer_config.json cannot be read"),
    # Values of the config
    "a width that is text": (config(hidden_size="32"), "hidden_size"),
    "a width that is a fraction": (config(hidden_size=32.5), "hidden_size"),
    "no width": (config(hidden_size=...), "hidden_size"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads"),
    "heads that do not divide the width": (config(num_attention_heads=5, head_dim=...), "hidden_size"),
    "another head size": (config(head_dim=16), "head_dim"),
    "more layers than the weights": (config(num_hidden_layers=3), "model.layers.2."),
    "fewer layers than the weights": (config(num_hidden_layers=1), "model.layers.1."),
    "a billion layers": (config(num_hidden_layers=10**9), "describes"),
    "a vocabulary of another size": (config(vocab_size=400), "[500, 32]"),
    "fewer entries than the tokenizer": (
        lambda folder: (
            config(vocab_size=400)(folder),
            tensors(lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:400].clone()}))(
                folder
            ),
        ),
        "its tokenizer has 500 entries",
    ),
    "an untied head that is not there": (config(tie_word_embeddings=False), "lm_head.weight is missing"),
    "another kind of model": (config(model_type="gpt2"), "model_type"),
    "another activation": (config(hidden_act="gelu"), "hidden_act"),
    "scaled rotary embeddings": (config(rope_scaling={"type": "linear", "factor": 2.0}), "rotary"),
    "two bases that differ": (config(rope_theta=10_000.0), "rope_theta"),
    "a base of 0": (config(rope_theta=0), "rope_theta"),
    "a sliding window": (config(use_sliding_window=True), "use_sliding_window"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "a Llama without biases": (config(attention_bias=False), "attention_bias"),
    # Tensors
    "a tensor that is missing": (tensors(lambda t: t.pop(f"{LAYER}.k_proj.bias")), f"{LAYER}.k_proj.bias is missing"),
    "a tensor too many": (tensors(lambda t: t.update({f"{LAYER}.k_norm.weight": torch.ones(8)})), "k_norm.weight"),
    "a tensor of another name": (tensors(lambda t: t.update({"norm.weight": t.pop("model.norm.weight")})), "norm"),
    "a tensor of another shape": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(4, 8)})),
        "model.norm.weight has shape [4, 8], config.json says [32]",
    ),
    "a tensor that lies the other way": (
        tensors(lambda t: t.update({(n := "model.layers.0.mlp.up_proj.weight"): t[n].t().contiguous()})),
        "up_proj.weight has shape",
    ),
    "a tensor of whole numbers": (
        tensors(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int64)})),
        "model.norm.weight holds I64",
    ),
    "not a number": (number("model.layers.0.mlp.up_proj.weight", float("nan")), "up_proj.weight holds a number that"),
    "infinity": (number("model.embed_tokens.weight", float("-inf")), "not finite"),
    "an output bias that is not 0": (number(f"{LAYER}.o_proj.bias", 0.5), "o_proj.bias is not 0"),
    "a tied head that differs": (
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2})),
        "lm_head.weight is not model.embed_tokens.weight",
    ),
    # Weights in several files
    "an index that names a missing file": (
        index(lambda placed: placed.update({"model.norm.weight": "model-3.safetensors"})),
        "model-3.safetensors is missing",
    ),
    "an index that leaves the folder": (
        index(lambda placed: placed.update({"model.norm.weight": "../../x.safetensors"})),
        "names '../../x.safetensors'",
    ),
    "an index that names a whole path": (
        index(lambda placed: placed.update({"model.norm.weight": "/etc/x.safetensors"})),
        "names '/etc/x.safetensors'",
    ),
    "an index that names a pickle": (
        index(lambda placed: placed.update({"model.norm.weight": "pytorch_model.bin"})),
        "names 'pytorch_model.bin'",
    ),
    "an index that leaves a tensor out": (index(lambda placed: placed.pop("model.norm.weight")), "model.norm.weight"),
    "an index of another tensor": (
        index(lambda placed: placed.update({"x": placed["model.norm.weight"]})),
        "the tensor x is missing",
    ),
    "an index beside whole weights": (index(lambda placed: None, keep=False), "are both there"),
    "an index of numbers": (
        index(lambda placed: placed.update(x=3)),  # type: ignore[arg-type]
        "index.json cannot be read",
    ),
    # Code from elsewhere
    "a pickle": (trap("pytorch_model.bin"), "pytorch_model.bin is a pickle"),
    "a pickle beside the weights": (trap("pytorch_model.bin", replaces_weights=False), "pytorch_model.bin is a pickle"),
    "a pickle of another name": (trap("weights.pt"), "weights.pt is a pickle"),
    "a pickle that is called safetensors": (content("model.safetensors", pickle.dumps(Trap())), "is damaged"),
    "a model's code": (config(auto_map={"AutoModelForCausalLM": "evil--x.Y"}), CODE),
    "a tokenizer's code": (with_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}), CODE),
    "code that is to be trusted": (config(trust_remote_code=True), CODE),
    "code deeper down": (config(text_config={"auto_map": {"AutoModel": "x.Y"}}), CODE),
    "a loop of its own for generation": (with_json("generation_config.json", custom_generate="evil/loop"), CODE),
    "a hub's attention": (config(attn_implementation="kernels-community/flash-attn2"), KERNEL),
    "a hub's attention, as it is stored": (config(_attn_implementation="evil/kernel@main:fn"), KERNEL),
    "a hub's attention for a part": (config(attn_implementation={"text_config": "evil/kernel"}), KERNEL),
    "a hub's kernels": (config(use_kernels=True), KERNEL),
    "an adapter": (with_json("adapter_config.json", base_model_name_or_path="evil/base"), "adapter_config.json is an"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_folder_is_refused_in_one_line(
    damage: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, named = DAMAGED[damage]
    spoil(folder)
    assert generate(folder, tmp_path) == EXIT_REFUSED
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"generate.model: '{folder}': ") and named in line and len(line) < 600, line
    assert captured.out == ""
    assert not Path("/tmp/a-pickle-was-opened").exists()


# ── Valid folders ────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_same(folder: object, right: Path, tmp_path: Path) -> None:
    found = load_model(str(folder), "generate.model", tmp_path).model.state_dict()
    expected = load_model(str(right), "generate.model", tmp_path).model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def with_computed(found: dict[str, torch.Tensor]) -> None:
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"):
        found[name] = torch.ones(4)


HARMLESS: dict[str, Spoil] = {
    "a tied head beside the embedding": tensors(
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    ),
    "rotary frequencies of older versions": tensors(with_computed),
    "weights in several files": index(lambda placed: None),
    "an old model in a folder below": lambda folder: (
        shutil.copytree(folder, folder / "old"),
        number("model.norm.weight", 7.0)(folder / "old"),
        (folder / "old" / "pytorch_model.bin").write_bytes(b""),
    ),
    "an optimizer's state": lambda folder: (folder / "optimizer.pt").write_bytes(pickle.dumps(Trap())),
    "only the base that transformers 4 reads": config(rope_parameters=...),
    "only the base that transformers 5 reads": config(rope_theta=...),
    "an attention that this program replaces": config(_attn_implementation="flash_attention_2"),
    "no generation config": remove("generation_config.json"),
}


@pytest.mark.parametrize("change", HARMLESS)
def test_harmless_differences_are_accepted(change: str, folder: Path, right: Path, tmp_path: Path) -> None:
    HARMLESS[change](folder)
    assert_same(folder, right, tmp_path)
    assert not Path("/tmp/a-pickle-was-opened").exists()


@pytest.mark.parametrize("change", ["weights in several files", "an old model in a folder below"])
def test_folder_on_s3_is_read_by_exact_names(
    change: str, folder: Path, right: Path, bucket: str, tmp_path: Path
) -> None:
    HARMLESS[change](folder)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.upload_file(path, f"{bucket}/models/one/{path.relative_to(folder).as_posix()}")
    assert_same(f"{bucket}/models/one", right, tmp_path)
    assert_same(f"{bucket}/models/one/", right, tmp_path)


def test_damaged_folder_on_s3_is_refused_in_one_line(
    folder: Path, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    move_down("model.safetensors")(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            storage.upload_file(path, f"{bucket}/{path.relative_to(folder).as_posix()}")
    assert generate(bucket, tmp_path) == EXIT_REFUSED
    assert f"generate.model: '{bucket}': not a model of this program: model.safetensors is missing" in (
        capsys.readouterr().err
    )


def test_folder_of_links_is_read(folder: Path, right: Path, tmp_path: Path) -> None:
    """The cache of a hub stores a model folder as links."""
    (tmp_path / "snapshot").mkdir()
    for path in folder.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_same(tmp_path / "snapshot", right, tmp_path)
    assert generate(tmp_path / "snapshot", tmp_path) == EXIT_DONE


@pytest.mark.parametrize(("architecture", "model_type"), FORMS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_is_read(
    architecture: str, model_type: str, tied: bool, dtype: torch.dtype, folder: Path, tmp_path: Path
) -> None:
    spec = replace(SMALL, architecture=architecture, tie_word_embeddings=tied, rope_theta=5000.0)
    weights = {name: weight.to(dtype) for name, weight in weights_of(spec, 500).items()}
    form = architecture_of(spec).form(model_type)
    write_model(folder, form, spec, weights, vocab_size=500, eod_id=0, context_length=CONTEXT_LENGTH)
    found = load_model(str(folder), "generate.model", tmp_path)
    assert found.model.config.rope_parameters["rope_theta"] == 5000.0
    assert found.model.config.tie_word_embeddings == tied
    assert found.context_length == CONTEXT_LENGTH
    assert type(found.model).__name__ == architecture_of(spec).model_class
    parameters = dict(found.model.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(parameters[name], weight.float()) and parameters[name].dtype == torch.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_folder_saved_by_transformers_is_read(shard_size: str, architecture: str, folder: Path, tmp_path: Path) -> None:
    """Earlier versions of this program exported such folders, and models on a hub look like them."""
    (folder / "model.safetensors").unlink()
    model = build_model(replace(SMALL, architecture=architecture), 520, 0, CONTEXT_LENGTH, seed=3)
    model.save_pretrained(folder, max_shard_size=shard_size)
    assert (folder / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    found = load_model(str(folder), "generate.model", tmp_path).model
    assert found.config.rope_parameters["rope_theta"] == SMALL.rope_theta
    for name, weight in model.named_parameters():
        assert torch.equal(found.get_parameter(name), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_equal_those_of_the_model(tied: bool) -> None:
    spec = ModelSpec(24, 3, 6, 3, 20, tie_word_embeddings=tied)
    assert tensor_shapes(spec, 70) == {name: tuple(weight.shape) for name, weight in weights_of(spec, 70).items()}
