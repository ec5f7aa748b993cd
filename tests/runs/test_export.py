"""The exported model: a Hugging Face folder that gives the same results as the trained model."""

import re
from pathlib import Path

import pytest
import torch
from engine_worker import CONTEXT_LENGTH, SPEC
from exported import run_card
from small_run import CONTEXT_LENGTH as RUNS_LENGTH
from small_run import STEPS, DataSet, FinishedRun, checkpoint_urls
from transformers import AutoModelForCausalLM, AutoTokenizer

from job import storage
from job.data.tokenizer import load_tokenizer
from job.model.generation import Sampling
from job.model.language_model import LanguageModel, build_model
from job.model.spec import ModelSpec
from job.runs.checkpoint import CheckpointFiles, download_checkpoint, open_checkpoint
from job.runs.export import export_model
from job.runs.export_form import Form, choose_form
from job.runs.metrics_file import read_metrics

SAMPLING = Sampling(max_new_tokens=8, temperature=0.8, top_p=0.95, seed=1)
TEXT = "人工智能（AI）是研究如何让机器完成工作的学科。\nIt began in 1956 🤖。"


def download(url: str, folder: Path) -> Path:
    for entry in storage.list_files(url):
        storage.download_file(entry.url, folder / entry.url.rpartition("/")[2])
    return folder


def assert_same_results(folder: Path, ours: LanguageModel, data: DataSet) -> None:
    """Load model and tokenizer with transformers, and compare ids, logits and loss with the trained model `ours`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, : CONTEXT_LENGTH + 1]
    assert ids[0].tolist() == data.tokenizer.encode([TEXT])[0][: CONTEXT_LENGTH + 1]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer.eos_token_id == data.manifest.eod_id == model.generation_config.eos_token_id
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, ours.causal_lm(input_ids=ids).logits, rtol=0, atol=1e-5)
        nats = ours(ids[:, :-1], ids[:, 1:].contiguous()).item() / CONTEXT_LENGTH
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(nats, rel=1e-5)
    assert model.dtype == torch.float32


def test_final_model_gives_the_same_results_in_transformers(
    finished_run: FinishedRun, data_set: DataSet, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(checkpoint_urls(finished_run.output)[-1])
    download_checkpoint(checkpoint, tmp_path, only=["param"])
    weights = CheckpointFiles(tmp_path)
    spec = ModelSpec(**checkpoint.state.identity["model"])
    causal_lm = build_model(spec, data_set.manifest.vocab_size, data_set.manifest.eod_id, 32, seed=0)
    with torch.no_grad():
        for name, parameter in causal_lm.named_parameters():
            parameter.copy_(weights[name]["param"])
    folder = download(f"{finished_run.output}/final", tmp_path / "final")
    assert_same_results(folder, LanguageModel(causal_lm.eval()), data_set)
    # The model can be evaluated on the data set only if its tokenizer has the same fingerprint.
    assert load_tokenizer(str(folder), tmp_path).fingerprint == data_set.manifest.tokenizer_fingerprint


def test_model_card_holds_the_results_of_the_run(finished_run: FinishedRun) -> None:
    card = storage.read_bytes(f"{finished_run.output}/final/README.md").decode()
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", card, re.MULTILINE))
    (last,) = [row for row in read_metrics(finished_run.output) if row["step"] == STEPS]
    assert rows["validation nats per token"] == f"{last['validation/loss']:.4f}"
    assert rows["validation bits per byte"] == f"{last['validation/bits_per_byte']:.4f}"
    assert rows["validation bits per character"] == f"{last['validation/bits_per_character']:.4f}"
    assert rows["optimizer steps"] == str(STEPS)
    assert rows["tokens seen"] == f"{last['train/tokens_seen']:,}"
    assert rows["context length"] == "32 tokens"


def test_example_program_of_the_card_continues_a_prompt(finished_run: FinishedRun, tmp_path: Path) -> None:
    printed, tokens = run_card(download(f"{finished_run.output}/final", tmp_path))
    assert printed.startswith("人工智能") and len(printed) > len("人工智能\n")
    assert tokens <= RUNS_LENGTH


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_are_exported(data_set: DataSet, bucket: str, tmp_path: Path, tied: bool) -> None:
    spec = ModelSpec(**(vars(SPEC) | {"tie_word_embeddings": tied}))
    causal_lm = build_model(spec, data_set.manifest.vocab_size, data_set.manifest.eod_id, CONTEXT_LENGTH, seed=3)
    weights = {name: parameter.detach() for name, parameter in causal_lm.named_parameters()}
    assert ("lm_head.weight" in weights) == (not tied)
    destination = bucket if tied else str(tmp_path / "final")
    form = choose_form(data_set.shards, data_set.manifest, data_set.tokenizer, SPEC)
    export_model(destination, spec, weights, data_set.tokenizer, CONTEXT_LENGTH, "# 一个模型\n", form, SAMPLING)
    folder = download(bucket, tmp_path / "downloaded") if tied else Path(destination)
    assert_same_results(folder, LanguageModel(causal_lm.eval()), data_set)
    assert (folder / "README.md").read_text(encoding="utf-8") == "# 一个模型\n"


@pytest.mark.parametrize("fault", ["missing", "unknown"])
def test_weights_that_do_not_fit_the_model_are_refused(data_set: DataSet, tmp_path: Path, fault: str) -> None:
    causal_lm = build_model(SPEC, data_set.manifest.vocab_size, data_set.manifest.eod_id, CONTEXT_LENGTH, seed=3)
    weights = {name: parameter.detach() for name, parameter in causal_lm.named_parameters()}
    weight = weights.pop("model.norm.weight")
    if fault == "unknown":
        weights |= {"model.norm.weight": weight, "model.norm.bias": weight}
    form, destination = Form("llama", "PreTrainedTokenizerFast"), str(tmp_path / "final")
    with pytest.raises(RuntimeError, match=f"model.norm.{'weight' if fault == 'missing' else 'bias'}"):
        export_model(destination, SPEC, weights, data_set.tokenizer, CONTEXT_LENGTH, "", form, SAMPLING)
    assert not (tmp_path / "final").exists()
