"""Damaged files of a run or a data set: every command refuses them in one line, or skips them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import MODEL

from job import config as settings
from job.config import Config
from job.data.batching import BatchCut
from job.data.manifest import Manifest, load_manifest
from job.data.order import SequenceOrder
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import load_tokenizer, train_tokenizer
from job.demo.walk import SAMPLE
from job.errors import UserError
from job.model.generation import Sampling
from job.model.language_model import build_model
from job.model.spec import ModelSpec
from job.preflight.check import preflight
from job.runs.checkpoint import CheckpointFiles, TrainingState
from job.runs.checkpoint_writer import save_checkpoint
from job.runs.choices import Choice, Choices
from job.runs.compatibility import compatibility_key
from job.runs.export import export_model
from job.runs.export_form import choose_form
from job.runs.launch_context import LaunchContext
from job.runs.load_model import load_model
from job.runs.metrics_file import MetricsFile, read_metrics
from job.runs.resume import open_run
from job.runs.run_tokenizer import check_data_set_tokenizer
from job.training.bad_steps import BadSteps
from job.training.step_meter import Interval

STEPS = (3, 6)
SPEC = ModelSpec(**MODEL)
CONTEXT_LENGTH = 32
CONTENTS = {
    "empty": b"",
    "cut off": None,
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a text": b'"text"',
    "an empty object": b"{}",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "whole deep list": b"[" * 50_000 + b"]" * 50_000,
    "NaN": b"NaN",
    "a huge number": b"1" + b"0" * 10_000,
    "binary": bytes(range(256)) * 20,
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a megabyte of blanks": b" " * 2**20,
}
WRONG_VALUES = (None, -1, 10**30, 1.5, "x", "", True, [], {}, float("nan"), float("inf"), "../../x", [[[]]])


def config_of(folder: Path) -> Config:
    return settings.build(
        {
            "data": {"source": str(SAMPLE), "shards": str(folder / "shards"), "cache_dir": str(folder / "cache")},
            "tokenizer": {"source": str(folder / "shards" / "tokenizer")},
            "run": {"output": str(folder / "run")},
            "model": MODEL,
            "train": {"context_length": CONTEXT_LENGTH, "global_batch_size": 8, "micro_batch_size": 2},
            "tracking": {"mode": "disabled"},
        }
    )


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and with what training leaves: a run with two checkpoints and a final model."""
    folder = tmp_path_factory.mktemp("right")
    config = config_of(folder)
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts, 300, folder / "tokenizer")
    manifest = prepare(Recipe(str(SAMPLE), "text", "id", "stop", 2**17, 0.1, 1), tokenizer, config.data.shards)
    assert manifest is not None
    key = compatibility_key(config.train, config.data, SPEC, manifest)
    model = build_model(SPEC, tokenizer.vocab_size, tokenizer.eod_id, CONTEXT_LENGTH, seed=0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    snapshot = {name: dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), weight) for name, weight in weights.items()}
    opened = open_run(config.run.output, **arguments(config, key, folder))
    for step in STEPS:
        log = MetricsFile()
        log.add(step, {"train/loss": 1.0, "speed/tokens_per_second": 10.0})
        guard = BadSteps(None, torch.device("cpu"))
        guard.judge(torch.tensor(1.0))
        state = TrainingState(
            opened.record.id, 1, step, 8 * step, 256 * step, key, {}, guard.state(), asdict(Interval())
        )
        save_checkpoint(config.run.output, state, snapshot, log.content())
    (folder / "run" / "logs").mkdir()
    (folder / "run" / "logs" / "metrics.jsonl").write_bytes(log.content())
    form = choose_form(config.data.shards, manifest, tokenizer, SPEC)
    sampling = Sampling(8, 0.8, 0.95, 1)
    export_model(str(folder / "run" / "final"), SPEC, weights, tokenizer, CONTEXT_LENGTH, "card", form, sampling)
    return folder


def arguments(config: Config, key: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of `open_run`."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return {
        "name": None,
        "resume": "auto",
        "start": LaunchContext("a-start", 0.0, None, None, lambda: False, lambda line: None, "cpu", "a test"),
        "tokenizer": load_tokenizer(f"{config.data.shards}/tokenizer", folder / "cache")
        if (folder / "shards").exists()
        else None,
        "compatibility_key": key,
        "config": {},
        "choose": lambda before: Choices(Choice("ddp"), Choice("fp32"), Choice("cpu"), BatchCut(1, 1, 8), Choice("9")),
        "max_attempts": 1000,
        "folder": scratch,
        "say": lambda line: None,
    }


# ---- The parts of each command that read stored files ----


def resume(folder: Path) -> None:
    config = config_of(folder)
    manifest = load_manifest(config.data.shards)
    check_tokenizer_of(folder, manifest)
    opened = open_run(
        config.run.output, **arguments(config, compatibility_key(config.train, config.data, SPEC, manifest), folder)
    )
    # The next attempt would read all records before it: a thousand of them would be slow.
    (folder / "run" / "attempts" / f"{opened.attempt.number:08d}.json").unlink()
    assert opened.checkpoint is not None
    Interval(**opened.checkpoint.state.interval)
    BadSteps(None, torch.device("cpu")).load_state(opened.checkpoint.state.guard)
    MetricsFile(opened.metrics).add(opened.checkpoint.state.step, {})
    files = CheckpointFiles(folder / "scratch")
    assert all(files[name].keys() == {"param", "exp_avg", "exp_avg_sq"} for name in files)


def check_tokenizer_of(folder: Path, manifest: Manifest) -> None:
    tokenizer = load_tokenizer(f"{folder}/shards/{manifest.tokenizer}", folder / "cache")
    check_data_set_tokenizer(tokenizer, manifest, f"{folder}/shards")


def use_data(folder: Path) -> None:
    config = config_of(folder)
    manifest = load_manifest(config.data.shards)
    check_tokenizer_of(folder, manifest)
    tokens, sizes = [shard.tokens for shard in manifest.train], [shard.size for shard in manifest.train]
    order = SequenceOrder(tokens, sizes, CONTEXT_LENGTH, 1, buffer_bytes=2**20)
    order.position_limit(1)


def load_run(folder: Path) -> None:
    load_model(str(folder / "run"), "run.output", folder / "cache")


def load_checkpoint(folder: Path) -> None:
    load_model(str(folder / "run" / "checkpoints" / f"step-{STEPS[-1]:08d}-a1"), "run.output", folder / "cache")


def load_final(folder: Path) -> None:
    load_model(str(folder / "run" / "final"), "generate.model", folder / "cache")


def run_preflight(folder: Path) -> None:
    rows = preflight(config_of(folder)).findings.rows
    assert all("\n" not in row.found + row.remedy for row in rows)


def read_run_metrics(folder: Path) -> None:
    read_metrics(str(folder / "run"))


CHECKPOINT = f"run/checkpoints/step-{STEPS[-1]:08d}-a1"
FILES: dict[str, tuple[Callable[[Path], None], ...]] = {
    # Each stored file, and the commands that read it.
    "shards/manifest.json": (use_data, run_preflight),
    "shards/tokenizer/tokenizer.json": (use_data,),
    "shards/tokenizer/tokenizer_config.json": (use_data,),
    "run/run.json": (resume, load_run, run_preflight),
    f"{CHECKPOINT}/manifest.json": (resume, load_run, load_checkpoint, run_preflight),
    f"{CHECKPOINT}/state.json": (resume, load_run, load_checkpoint, run_preflight),
    f"{CHECKPOINT}/metrics.jsonl": (resume, run_preflight),
    f"{CHECKPOINT}/model.safetensors": (resume, load_run, load_checkpoint),
    f"{CHECKPOINT}/exp_avg.safetensors": (resume,),
    "run/logs/metrics.jsonl": (read_run_metrics,),
    "run/tokenizer/tokenizer.json": (load_run, run_preflight),
    "run/tokenizer/tokenizer_config.json": (load_run,),
    "run/final/config.json": (load_final,),
    "run/final/generation_config.json": (load_final,),
    "run/final/model.safetensors": (load_final,),
    "run/final/tokenizer.json": (load_final,),
    "run/final/tokenizer_config.json": (load_final,),
}
OPTIONAL = ("run/final/generation_config.json", "run/logs/metrics.jsonl", "run/final/tokenizer_config.json")


def replace_file(folder: Path, name: str, content: bytes) -> None:
    """Replace the content of a file, and its size and sha256 in the checkpoint's manifest if it is in a checkpoint."""
    path = folder / name
    path.write_bytes(content)
    manifest_path = path.parent / "manifest.json"
    if "checkpoints" in name and path != manifest_path:
        manifest = json.loads(manifest_path.read_bytes())
        manifest["files"][path.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest_path.write_text(json.dumps(manifest))


def outcome(command: Callable[[Path], None], folder: Path) -> str:
    """Run the command and return its error message; empty if there is none. The message must be one line."""
    try:
        command(folder)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2000, message
        return message
    return ""


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(intact, tmp_path / "copy")


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_refused_in_one_line_or_skipped(folder: Path, name: str) -> None:
    original = (folder / name).read_bytes()
    for kind, content in CONTENTS.items():
        replace_file(folder, name, original[: len(original) // 2] if content is None else content)
        for command in FILES[name]:
            message = outcome(command, folder)
            # Commands on a run fall back to its other checkpoint or its final model, and some files are optional.
            assert message or command in (resume, load_run, run_preflight) or name in OPTIONAL, (kind, command)


@pytest.mark.recovery
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_wrong_json_values_are_refused_in_one_line_or_skipped(folder: Path, name: str) -> None:
    original = json.loads((folder / name).read_bytes())
    for number, path in enumerate(leaves(original)):
        for value in WRONG_VALUES[number % len(WRONG_VALUES) :: len(WRONG_VALUES)]:
            replace_file(folder, name, json.dumps(changed(original, path, value)).encode())
            for command in FILES[name]:
                if command is not run_preflight:
                    outcome(command, folder)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value; of long lists and mappings, such as a vocabulary, only of the first three."""
    if path:
        yield path
    children = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    for key, value in children if len(children) < 30 else children[:3]:
        yield from leaves(value, (*path, key))


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(tree))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return copy
