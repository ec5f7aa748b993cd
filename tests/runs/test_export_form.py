"""The form of an exported model: other programs get the token ids of the training data, or the run does not start."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_cases import (
    COMPARED,
    CONTEXT_LENGTH,
    FORMS,
    NO_SHARDS,
    PRESETS,
    QWEN3,
    SMALL,
    assert_same,
    export_kind,
    export_preset,
    preset,
)
from exported import read_model, run_card
from tokenizer_kinds import KINDS, LLAMA3, QWEN2, TEXTS, made, tokenizer_of
from tokenizers import normalizers, processors

from job import config as settings
from job.cli import main
from job.data.manifest import load_manifest
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import END_OF_DOCUMENT, TextTokenizer, load_tokenizer
from job.errors import EXIT_REFUSED, UserError
from job.model.architecture import architecture_of
from job.model.generation import Sampling
from job.model.language_model import build_model
from job.model.save_folder import write_model
from job.preflight.data_set import check_data
from job.preflight.findings import WRONG, Findings
from job.runs.export import export_model, usage
from job.runs.export_form import Form, choose_form, tokenizer_mismatch, write_tokenizer

QWEN2_FORM = Form("qwen2", "Qwen2Tokenizer")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_5_computes_the_exported_model(kind: str, tmp_path: Path) -> None:
    exported = export_kind(kind, tmp_path)
    assert exported.form.model_type == ("qwen2" if kind == "Qwen2's" else "llama")
    assert_same(exported, read_model(exported.folder, COMPARED))


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_5_computes_each_preset(name: str, tmp_path: Path) -> None:
    exported = export_preset(name, tmp_path)
    assert_same(exported, read_model(exported.folder, COMPARED))
    config = json.loads((exported.folder / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == preset(name).rope_theta == 1e6


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_5_computes_qwen3_with_each_tokenizer(kind: str, tmp_path: Path) -> None:
    exported = export_kind(kind, tmp_path, QWEN3)
    assert_same(exported, read_model(exported.folder, COMPARED))
    config = json.loads((exported.folder / "config.json").read_text(encoding="utf-8"))
    assert (config["architectures"], config["model_type"]) == (["Qwen3ForCausalLM"], "qwen3")
    assert config["head_dim"] == QWEN3.hidden_size // QWEN3.num_attention_heads != 128, "128 is transformers' default"


def test_comparison_notices_another_rope_theta(tmp_path: Path) -> None:
    exported = export_preset(PRESETS[0], tmp_path)
    path = exported.folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["rope_theta"], config["rope_parameters"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(AssertionError):
        assert_same(exported, read_model(exported.folder, COMPARED))


@pytest.mark.parametrize(("architecture", "model_type"), FORMS)
def test_every_form_computes_the_same_logits(architecture: str, model_type: str, tmp_path: Path) -> None:
    spec = replace(SMALL, architecture=architecture)
    model = build_model(spec, 300, 0, CONTEXT_LENGTH, seed=3).eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    form = architecture_of(spec).form(model_type)
    write_model(tmp_path, form, spec, weights, vocab_size=300, eod_id=0, context_length=CONTEXT_LENGTH)
    from transformers import AutoModelForCausalLM

    loaded, loading_info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading_info.values())
    assert loaded.config.model_type == model_type
    ids = torch.arange(CONTEXT_LENGTH).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-5)


# ── generation_config.json and the example program ───────────────────────────────────────────────────────────────────


def test_generation_config_samples_and_fits_the_context(tmp_path: Path) -> None:
    exported = export_kind("trained here", tmp_path)
    config = json.loads((exported.folder / "generation_config.json").read_text(encoding="utf-8"))
    assert (config["do_sample"], config["temperature"], config["top_p"], config["top_k"]) == (True, 0.8, 0.95, 0)
    assert config["max_new_tokens"] == CONTEXT_LENGTH // 2
    texts = {run_card(exported.folder)[0] for _ in range(3)}
    assert len(texts) > 1, "the same text each time: nothing is sampled"


@pytest.mark.parametrize("context_length", [2, 3, 7, 512])
def test_long_prompt_is_cut_to_leave_room_for_new_tokens(context_length: int, tmp_path: Path) -> None:
    trained = tokenizer_of("trained here", tmp_path)
    sampling = Sampling(200, 0.0, 1.0, 1)
    program = usage(trained, 'He said: "人工智能"\\\n' * 100, sampling, context_length)
    (line,) = [line for line in program.splitlines() if line.startswith("prompt = ")]
    prompt = eval(line.removeprefix("prompt = tokenizer.eos_token + "))
    prompt_tokens, new_tokens = 1 + len(trained.encode([prompt])[0]), min(200, context_length // 2)
    assert context_length - 4 <= prompt_tokens + new_tokens <= context_length


# ── forms that give other ids ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Qwen2's"])
def test_form_that_splits_text_differently_is_detected(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    write_tokenizer(tmp_path, QWEN2_FORM, tokenizer)
    assert "instead of" in tokenizer_mismatch(tmp_path, tokenizer, TEXTS[:50])


def test_documents_of_the_data_set_are_compared_too(tmp_path: Path) -> None:
    """The hard texts do not show this difference: Qwen2's class replaces a normalizer that changes a rare character."""
    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("ඞ", "人")])
    made(tmp_path / "tokenizer", QWEN2, normalizer=normalizer, tokenizer_class="Qwen2Tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), tmp_path)
    assert choose_form("shards", NO_SHARDS, tokenizer, SMALL).model_type == "qwen2"
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    write_tokenizer(tmp_path, QWEN2_FORM, tokenizer)
    assert not tokenizer_mismatch(tmp_path, tokenizer, TEXTS[:3])
    assert "instead of" in tokenizer_mismatch(tmp_path, tokenizer, ["一ඞ二"])


def test_compared_texts_come_from_the_validation_shards(tmp_path: Path) -> None:
    tokenizer, shards = _prepared(tmp_path, None)
    manifest = load_manifest(shards)
    texts = choose_form(shards, manifest, tokenizer, SMALL).texts
    assert 1 < len(texts) <= sum(shard.documents for shard in manifest.validation)
    assert set(texts[:-1]) < set(TEXTS) and any(text.startswith(texts[-1][:-1]) for text in TEXTS)
    for shard in (*manifest.validation, *manifest.train):
        Path(shards, shard.name).unlink()
    assert choose_form(shards, manifest, tokenizer, SMALL).texts == ()


def test_export_refuses_a_form_that_gives_other_ids(tmp_path: Path) -> None:
    KINDS["GPT-2's"](tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"), tmp_path)
    model = build_model(SMALL, tokenizer.vocab_size, tokenizer.eod_id, CONTEXT_LENGTH, seed=3)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    sampling = Sampling(8, 0.8, 0.95, 1)
    destination = tmp_path / "final"
    mismatch = r"run\.output.*AutoTokenizer gives other token ids than the training data: \[\d+.*instead"
    with pytest.raises(UserError, match=mismatch):
        export_model(str(destination), SMALL, weights, tokenizer, CONTEXT_LENGTH, "", QWEN2_FORM, sampling)
    assert not destination.exists()


def _prepared(folder: Path, post_processor: object) -> tuple[TextTokenizer, str]:
    made(folder / "tokenizer", LLAMA3, post_processor=post_processor)
    tokenizer = load_tokenizer(str(folder / "tokenizer"), folder / "cache")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"id": str(i), "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    assert prepare(Recipe(str(corpus), "text", "id", "stop", 2**20, 0.3, 1), tokenizer, str(folder / "shards"))
    return tokenizer, str(folder / "shards")


def test_run_does_not_start_if_autotokenizer_adds_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    around = processors.TemplateProcessing(f"{END_OF_DOCUMENT} $A", special_tokens=[(END_OF_DOCUMENT, 0)])
    _, shards = _prepared(tmp_path, around)
    words = ["--data.shards", shards, "--run.output", str(tmp_path / "run"), "--data.cache_dir", f"{tmp_path}/cache"]
    words += ["--train.processes", "1", "--train.strategy", "ddp", "--train.precision", "fp32", "--tracking.mode"]
    assert main(["train", *words, "disabled"]) == EXIT_REFUSED
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"data.shards: '{shards}': its tokenizer.json makes AutoTokenizer put {END_OF_DOCUMENT} ")
    assert not (tmp_path / "run").exists()
    findings = Findings()
    config = settings.build({"data": {"shards": shards}})
    check_data(findings, config.data, config.tokenizer.source, deep=False)
    assert [row.mark for row in findings.rows if row.name == "tokenizer"] == [WRONG]
    words = ["--tokenizer.source", str(tmp_path / "tokenizer"), "--data.source", str(tmp_path / "corpus.jsonl")]
    assert main(["prepare", *words, "--data.shards", str(tmp_path / "other")]) == EXIT_REFUSED
    assert capfd.readouterr().err.startswith("tokenizer.source: ")
    assert not (tmp_path / "other").exists()
