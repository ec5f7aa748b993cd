"""Whatever is stored with a run or a data set may be damaged: every command says so in one line, or passes it by."""

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
from job.data.manifest import load_manifest
from job.data.order import WindowOrder
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import load_tokenizer, train_tokenizer
from job.demo.walk import SAMPLE
from job.errors import UserError
from job.model.architecture import build_model
from job.model.generation import Sampling
from job.model.spec import ModelSpec
from job.preflight.check import preflight
from job.runs.checkpoint import CheckpointFiles, TrainingState, save_checkpoint
from job.runs.compatibility import identity_of
from job.runs.export import export_model
from job.runs.export_form import choose_form
from job.runs.launch_context import Start
from job.runs.load_model import load_trained
from job.runs.metrics_file import MetricsLog, read_metrics
from job.runs.resume import open_run
from job.training.bad_steps import Guard
from job.training.train import Interval, check_tokenizer

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
LEAVES = (None, -1, 10**30, 1.5, "x", "", True, [], {}, float("nan"), float("inf"), "../../x", [[[]]])


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
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and a run on it with two checkpoints and a final model: what training leaves."""
    folder = tmp_path_factory.mktemp("right")
    config = config_of(folder)
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts, 300, folder / "tokenizer")
    manifest = prepare(Recipe(str(SAMPLE), "text", "id", "stop", 2**17, 0.1, 1), tokenizer, config.data.shards)
    assert manifest is not None
    identity = identity_of(config, SPEC, manifest)
    model = build_model(SPEC, tokenizer.vocab_size, tokenizer.eod_id, CONTEXT_LENGTH, seed=0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    snapshot = {name: dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), weight) for name, weight in weights.items()}
    opened = open_run(config.run.output, **told(config, identity, folder))
    for step in STEPS:
        log = MetricsLog()
        log.add(step, {"train/loss": 1.0, "speed/tokens_per_second": 10.0})
        guard = Guard(None, torch.device("cpu"))
        guard.judge(torch.tensor(1.0))
        state = TrainingState(
            opened.record.id, 1, step, 8 * step, 256 * step, identity, {}, guard.state(), asdict(Interval())
        )
        save_checkpoint(config.run.output, state, snapshot, log.content())
    (folder / "run" / "logs").mkdir()
    (folder / "run" / "logs" / "metrics.jsonl").write_bytes(log.content())
    form = choose_form(config.data.shards, manifest, tokenizer)
    sampling = Sampling(8, 0.8, 0.95, 1)
    export_model(str(folder / "run" / "final"), SPEC, weights, tokenizer, CONTEXT_LENGTH, "card", form, sampling)
    return folder


def told(config: Config, identity: dict[str, Any], folder: Path) -> dict[str, Any]:
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    return {
        "name": None,
        "resume": "auto",
        "start": Start("a-start", 0.0, None, None, lambda: False, lambda line: None, "cpu", "a test"),
        "tokenizer": load_tokenizer(f"{config.data.shards}/tokenizer", folder / "cache")
        if (folder / "shards").exists()
        else None,
        "identity": identity,
        "config": {},
        "cut": lambda before: BatchCut(1, 1, 8),
        "max_attempts": 1000,
        "folder": scratch,
        "say": lambda line: None,
    }


# ---- What the commands do with it, as far as they can in one process ----


def resume(folder: Path) -> None:
    config = config_of(folder)
    manifest = load_manifest(config.data.shards)
    check_tokenizer(load_tokenizer(f"{config.data.shards}/{manifest.tokenizer}", folder / "cache"), manifest, "")
    opened = open_run(config.run.output, **told(config, identity_of(config, SPEC, manifest), folder))
    (folder / "run" / "attempts" / f"{opened.attempt.number:08d}.json").unlink()  # a thousand of them would take time
    assert opened.checkpoint is not None
    Interval(**opened.checkpoint.state.interval)
    Guard(None, torch.device("cpu")).load_state(opened.checkpoint.state.guard)
    MetricsLog(opened.metrics).add(opened.checkpoint.state.step, {})
    files = CheckpointFiles(folder / "scratch")
    assert all(files[name].keys() == {"param", "exp_avg", "exp_avg_sq"} for name in files)


def use_data(folder: Path) -> None:
    config = config_of(folder)
    manifest = load_manifest(config.data.shards)
    tokenizer = load_tokenizer(f"{config.data.shards}/{manifest.tokenizer}", folder / "cache")
    check_tokenizer(tokenizer, manifest, config.data.shards)
    tokens, sizes = [one.tokens for one in manifest.train], [one.size for one in manifest.train]
    order = WindowOrder(tokens, sizes, CONTEXT_LENGTH, 1, buffer_bytes=2**20)
    order.position_limit(1)


def load(folder: Path) -> None:
    load_trained(str(folder / "run"), "run.output", folder / "cache")


def load_checkpoint(folder: Path) -> None:
    load_trained(str(folder / "run" / "checkpoints" / f"step-{STEPS[-1]:08d}-a1"), "run.output", folder / "cache")


def load_final(folder: Path) -> None:
    load_trained(str(folder / "run" / "final"), "generate.model", folder / "cache")


def look(folder: Path) -> None:
    rows = preflight(config_of(folder)).findings.rows
    assert all("\n" not in row.found + row.remedy for row in rows)


def read_log(folder: Path) -> None:
    read_metrics(str(folder / "run"))


CHECKPOINT = f"run/checkpoints/step-{STEPS[-1]:08d}-a1"
FILES: dict[str, tuple[Callable[[Path], None], ...]] = {
    "shards/manifest.json": (use_data, look),
    "shards/tokenizer/tokenizer.json": (use_data,),
    "shards/tokenizer/tokenizer_config.json": (use_data,),
    "run/run.json": (resume, load, look),
    f"{CHECKPOINT}/manifest.json": (resume, load, load_checkpoint, look),
    f"{CHECKPOINT}/state.json": (resume, load, load_checkpoint, look),
    f"{CHECKPOINT}/metrics.jsonl": (resume, look),
    f"{CHECKPOINT}/model.safetensors": (resume, load, load_checkpoint),
    f"{CHECKPOINT}/exp_avg.safetensors": (resume,),
    "run/logs/metrics.jsonl": (read_log,),
    "run/tokenizer/tokenizer.json": (load, look),
    "run/tokenizer/tokenizer_config.json": (load,),
    "run/final/config.json": (load_final,),
    "run/final/generation_config.json": (load_final,),
    "run/final/model.safetensors": (load_final,),
    "run/final/tokenizer.json": (load_final,),
    "run/final/tokenizer_config.json": (load_final,),
}


OPTIONAL = ("run/final/generation_config.json", "run/logs/metrics.jsonl", "run/final/tokenizer_config.json")


def put(folder: Path, name: str, content: bytes) -> None:
    """Damages a file; a checkpoint's manifest is made to agree, as if it had been written like that."""
    path = folder / name
    path.write_bytes(content)
    manifest_path = path.parent / "manifest.json"
    if "checkpoints" in name and path != manifest_path:
        manifest = json.loads(manifest_path.read_bytes())
        manifest["files"][path.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest_path.write_text(json.dumps(manifest))


def outcome(command: Callable[[Path], None], folder: Path) -> str:
    """What the command said, if anything; whatever is not one line fails."""
    try:
        command(folder)
    except UserError as error:
        said = str(error)
        assert "\n" not in said and len(said) < 2000, said
        return said
    return ""


@pytest.fixture
def place(right: Path, tmp_path: Path) -> Iterator[Path]:
    yield shutil.copytree(right, tmp_path / "place")


@pytest.mark.parametrize("name", FILES)
def test_a_stored_file_of_any_content_is_one_line_or_passed_by(place: Path, name: str) -> None:
    original = (place / name).read_bytes()
    for kind, content in CONTENTS.items():
        put(place, name, original[: len(original) // 2] if content is None else content)
        for command in FILES[name]:
            said = outcome(command, place)
            # A run has another checkpoint, or its final model; some of a model folder need not be there.
            assert said or command in (resume, load, look) or name in OPTIONAL, (kind, command)


@pytest.mark.recovery
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_values_of_any_type_in_a_stored_file_are_one_line_or_passed_by(place: Path, name: str) -> None:
    original = json.loads((place / name).read_bytes())
    for number, path in enumerate(leaves(original)):
        for value in LEAVES[number % len(LEAVES) :: len(LEAVES)]:
            put(place, name, json.dumps(changed(original, path, value)).encode())
            for command in FILES[name]:
                if command is not look:
                    outcome(command, place)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value; of long lists and tables, such as a vocabulary, the first three."""
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
