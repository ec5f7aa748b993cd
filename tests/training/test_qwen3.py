"""A whole run of Qwen3: trained in bf16, resumed, exported, read back, and kept apart from a run of Qwen2."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import (
    ALONE,
    CONTEXT_LENGTH,
    MODEL,
    DataSet,
    WriteSettings,
    checkpoint_urls,
    read_json,
    run,
    tensor_files,
    write_settings,
)
from transformers import AutoModelForCausalLM

from job import commands
from job import config as settings_of
from job.data.tokenizer import load_tokenizer
from job.errors import EXIT_DONE, EXIT_REFUSED
from job.model.language_model import build_model, load_weights
from job.model.load_folder import read_model
from job.model.spec import ModelSpec
from job.runs.metrics_file import read_metrics

QWEN3 = MODEL | {"architecture": "qwen3"}
STEPS = 12
TRAIN: dict[str, Any] = {"processes": 2, "strategy": "zero2", "precision": "bf16", "max_steps": STEPS}


@pytest.fixture(scope="module")
def finished(data_set: DataSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The settings file and the folder of a finished run, with a checkpoint in its middle."""
    folder = tmp_path_factory.mktemp("qwen3")
    path = write_settings(
        folder, data_set, str(folder / "run"), model=QWEN3, train=TRAIN, checkpoint={"every": STEPS // 2}
    )
    code, out, err = run("train", path)
    assert (code, err) == (EXIT_DONE, ""), out + err
    return path, folder / "run"


def test_run_in_bf16_learns_and_resumes_bit_for_bit(
    finished: tuple[Path, Path], data_set: DataSet, tmp_path: Path
) -> None:
    _, straight = finished
    losses = [row["train/loss"] for row in read_metrics(str(straight)) if "train/loss" in row]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
    first, last = checkpoint_urls(str(straight))
    path = write_settings(
        tmp_path, data_set, str(tmp_path / "run"), model=QWEN3, train=TRAIN | {"resume": first}, checkpoint={"every": 6}
    )
    code, out, err = run("train", path)
    assert (code, err) == (EXIT_DONE, ""), out + err
    assert tensor_files(checkpoint_urls(str(tmp_path / "run"))[-1]) == tensor_files(last)
    resumed = [row["train/loss"] for row in read_metrics(str(tmp_path / "run")) if "train/loss" in row]
    assert resumed == losses[STEPS // 2 :]


def test_final_model_is_a_qwen3_that_transformers_computes(finished: tuple[Path, Path], data_set: DataSet) -> None:
    final = finished[1] / "final"
    assert read_json(str(final / "config.json"))["architectures"] == ["Qwen3ForCausalLM"]
    assert "A Qwen3-style language model" in (final / "README.md").read_text(encoding="utf-8")
    stored = read_model(final)
    assert stored.spec == ModelSpec(**QWEN3)
    ours = build_model(stored.spec, stored.vocab_size, data_set.manifest.eod_id, CONTEXT_LENGTH, seed=0).eval()
    load_weights(ours, stored.weights)
    theirs = AutoModelForCausalLM.from_pretrained(final).eval()
    ids = torch.arange(CONTEXT_LENGTH).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert load_tokenizer(str(final), final).fingerprint == data_set.manifest.tokenizer_fingerprint


def test_checkpoint_and_final_model_continue_a_text_alike(
    finished: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = finished
    said = set()
    for source in (checkpoint_urls(str(output))[-1], str(output / "final")):
        config = settings_of.load(str(path), [("generate.model", source), ("generate.temperature", "0")])
        assert commands.generate(config, ["人工智能"]) == EXIT_DONE
        said.add(capsys.readouterr().out)
    assert len(said) == 1 and said.pop().startswith("[人工智能]")


def test_evaluation_of_the_final_model_is_that_of_the_run(finished: tuple[Path, Path]) -> None:
    path, output = finished
    code, out, err = run("evaluate", path, "--evaluate.model", str(output / "final"), "--train.processes", "1")
    assert (code, err) == (EXIT_DONE, ""), out + err
    (bits_per_byte,) = re.findall(r"│ bits per byte +│ +([\d.]+) │", out)
    # The run evaluates with weights in bf16, the command with those in fp32.
    of_run = read_metrics(str(output))[-1]["validation/bits_per_byte"]
    assert float(bits_per_byte) == pytest.approx(of_run, rel=2e-3)


@pytest.mark.parametrize("command", ["train", "check"])
def test_checkpoint_of_another_architecture_is_refused(
    finished: tuple[Path, Path], settings: WriteSettings, command: str
) -> None:
    checkpoint = checkpoint_urls(str(finished[1]))[-1]
    code, out, err = run(command, settings(train=ALONE | {"max_steps": STEPS, "resume": checkpoint}))
    assert code == EXIT_REFUSED
    (line,) = [line for line in (err if command == "train" else out).splitlines() if "model.architecture" in line]
    assert "model.architecture was qwen3, is qwen2" in line
    assert "hidden_size" not in line
    if command == "train":
        assert err == f"{line}\n" and line.startswith(f"train.resume: '{checkpoint}'")
