"""Tests of the extension points: a toy optimizer and a toy architecture need only table entries for whole runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_worker import PYTHONPATH
from small_run import ALONE, MODEL, REPOSITORY, DataSet, WriteSettings, checkpoint_urls, free_port, write_settings
from toy_entries import ARCHITECTURE, OPTIMIZER, PLAIN_LLAMA
from transformers import AutoModelForCausalLM

from job.config import Config
from job.errors import EXIT_REFUSED, UserError
from job.launcher.device import ON_CPU
from job.launcher.supervisor import worker_environment
from job.model.architecture import ARCHITECTURES, tensor_shapes
from job.model.flops import parameter_counts
from job.model.language_model import build_model
from job.model.load_folder import read_model
from job.model.optimizer_state import OPTIMIZER_STATES
from job.model.spec import ModelSpec
from job.runs.checkpoint import open_checkpoint
from job.training.optimizer import BUILDERS

PROGRAM = """
import sys
from toy_entries import add_toy_entries
from job.config import load
from job.runs.launch_context import LaunchContext
from job.runs.world import World
from job.training.train import train

add_toy_entries()
context = LaunchContext("", 0.0, None, None, lambda: False, print, "cpu", "a test")
print(train(load(sys.argv[1], [tuple(one.split("=")) for one in sys.argv[2:]]), World(0, 0, 1, 1), context))
"""


def train_with_toys(settings: Path, *overrides: str) -> "subprocess.CompletedProcess[str]":
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    alone["MASTER_PORT"] = str(free_port())
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(settings), *overrides],
        cwd=REPOSITORY,
        env=os.environ | worker_environment(ON_CPU, 1, Config()) | alone | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def toy_run(data_set: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of a run with the toy entries: ten steps, then resumed to twenty."""
    folder = tmp_path_factory.mktemp("toys")
    settings = write_settings(
        folder,
        data_set,
        str(folder / "run"),
        model=MODEL | {"architecture": ARCHITECTURE},
        train=ALONE | {"optimizer": OPTIMIZER, "max_steps": 10, "learning_rate": 0.1, "log_every": 10},
    )
    for steps in (10, 20):
        ended = train_with_toys(settings, f"train.max_steps={steps}")
        assert ended.stdout.endswith("done\n"), ended.stdout + ended.stderr
    assert "from" in ended.stdout and "step-00000010-a1" in ended.stdout
    return folder / "run"


def test_toy_run_learns_and_is_resumed(toy_run: Path) -> None:
    rows = [json.loads(line) for line in (toy_run / "logs" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses[20] < losses[10] < losses[1]


def test_toy_checkpoint_holds_the_state_of_its_optimizer(toy_run: Path) -> None:
    files = {path.name for path in (toy_run / "checkpoints" / "step-00000020-a2").iterdir()}
    assert {"model.safetensors", "momentum_buffer.safetensors"} < files
    assert "exp_avg.safetensors" not in files
    with pytest.raises(UserError, match="expected one of adamw, muon"):  # This process has no toy entries.
        open_checkpoint(checkpoint_urls(str(toy_run))[-1])


def test_toy_model_is_exported_and_read_back(toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, ARCHITECTURE, PLAIN_LLAMA)
    stored = read_model(toy_run / "final")
    assert stored.spec == ModelSpec(**MODEL, architecture=ARCHITECTURE)
    theirs = AutoModelForCausalLM.from_pretrained(toy_run / "final").eval()
    ours = build_model(stored.spec, stored.vocab_size, eod_id=0, context_length=32, seed=0).eval()
    ours.load_state_dict(stored.weights, strict=False)
    ids = torch.arange(32).unsqueeze(0)
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("name", [*ARCHITECTURES, ARCHITECTURE])
def test_shapes_of_an_entry_are_those_of_its_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, ARCHITECTURE, PLAIN_LLAMA)
    spec = ModelSpec(**MODEL, architecture=name)
    with torch.device("meta"):
        model = build_model(spec, vocab_size=100, eod_id=0, context_length=16, seed=0)
    assert tensor_shapes(spec, 100) == {name: tuple(one.shape) for name, one in model.named_parameters()}
    assert parameter_counts(spec, 100).total == sum(one.numel() for one in model.parameters())


def test_every_optimizer_has_a_builder_and_a_state() -> None:
    assert BUILDERS.keys() == OPTIMIZER_STATES.keys()


def test_another_optimizer_than_the_runs_is_refused(toy_run: Path, tmp_path: Path, data_set: DataSet) -> None:
    settings = write_settings(
        tmp_path,
        data_set,
        str(toy_run),
        model=MODEL | {"architecture": ARCHITECTURE},
        train=ALONE | {"optimizer": "adamw", "max_steps": 20},
    )
    ended = train_with_toys(settings)
    assert "train.optimizer was momentum, is adamw" in ended.stderr


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("train.optimizer", "adamv", "train.optimizer: 'adamv': expected one of adamw, muon; did you mean adamw?"),
        (
            "model.architecture",
            "Qwen2",
            "model.architecture: 'Qwen2': expected one of qwen2, qwen3; did you mean qwen2?",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "check"])
def test_unknown_entry_is_one_line(
    settings: WriteSettings, setting: str, value: str, expected: str, command: str
) -> None:
    section, key = setting.split(".")
    values: dict[str, Any] = {"train": ALONE, "model": MODEL}
    path = settings(**{section: values[section] | {key: value}})
    ended = subprocess.run(
        [sys.executable, "-m", "job", command, "--config", str(path)], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert ended.returncode == EXIT_REFUSED
    if command == "train":
        assert ended.stderr == f"{expected}\n"
    else:
        assert value in ended.stdout
