"""Tests of whole commands on a GPU, with shards in a local folder: train, resume, evaluate and generate."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gpu_child import GPU_TESTS, REPOSITORY, run_python

pytestmark = pytest.mark.gpu
NeedRealGpu = Callable[[], None]
NEEDED = ("pydantic", "s3fs", "orjson", "yaml", "rich", "psutil")
WRITTEN = REPOSITORY / "tests/compatibility/written_by_99a7a34"
STEPS, SAVED_STEP, LOG_EVERY = 24, 12, 5
COMMAND = "import sys; from job.cli import main; sys.exit(main(sys.argv[1:]))"
"""The program of `python -m job`, which itself refuses to start where packages for other commands are missing."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its settings, what it printed, and the waits before each of its steps."""

    output: Path
    settings: Path
    printed: str
    waits: list[int]


def write_settings(folder: Path, **changes: Any) -> Path:
    import yaml

    tree: dict[str, dict[str, Any]] = {
        "run": {"output": str(folder / "run")},
        "data": {"shards": str(folder / "shards"), "cache_dir": str(folder / "cache")},
        "model": {
            **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
            **{"num_key_value_heads": 2, "intermediate_size": 96},
        },
        "train": {
            **{"processes": 1, "strategy": "ddp", "context_length": 32, "micro_batch_size": 4, "global_batch_size": 8},
            **{"warmup_steps": 2, "learning_rate": 0.01, "max_steps": STEPS, "log_every": LOG_EVERY},
        },
        "checkpoint": {"every": SAVED_STEP, "keep": 3},
        "evaluate": {"every": SAVED_STEP},
        "generate": {"prompts": ["人工智能"], "max_new_tokens": 8},
        "tracking": {"mode": "disabled"},
    }
    for section, values in changes.items():
        tree[section] |= values
    path = folder / f"{tree['run']['output'].rpartition('/')[2]}.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, whose shards an earlier version of the program wrote."""
    for package in NEEDED:
        pytest.importorskip(package, reason=f"`job train` needs {package}")
    made = tmp_path_factory.mktemp("job")
    shutil.copytree(WRITTEN / "shards", made / "shards")
    return made


def train(folder: Path, **changes: Any) -> Run:
    settings = write_settings(folder, **changes)
    output = folder / settings.stem
    counted = folder / f"{settings.stem}-waits"
    printed = run_python(
        "-c", COMMAND, "train", "--config", settings, path=(GPU_TESTS / "count_waits",), COUNTED_WAITS=str(counted)
    )
    return Run(output, settings, printed, [int(line) for line in counted.read_text().split()])


@pytest.fixture(scope="module")
def whole_run(folder: Path) -> Run:
    return train(folder)


@pytest.fixture(scope="module")
def resumed_run(folder: Path, whole_run: Run) -> Run:
    """A run that continues the checkpoint in the middle of the whole one."""
    checkpoint = whole_run.output / f"checkpoints/step-{SAVED_STEP:08d}-a1"
    return train(folder, run={"output": str(folder / "resumed")}, train={"resume": str(checkpoint)})


def measured(run: Run) -> dict[int, dict[str, float]]:
    lines = (run.output / "logs/metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "train/gradient_norm" in row}


def test_job_trains_evaluates_samples_and_exports_on_the_gpu(whole_run: Run, real_gpu: NeedRealGpu) -> None:
    assert "cuda" in whole_run.printed.lower() or "nvidia" in whole_run.printed.lower()
    assert f"step {STEPS}/{STEPS}" in whole_run.printed
    assert f"step {SAVED_STEP}/{STEPS} | validation:" in whole_run.printed
    assert "    人工智能 → " in whole_run.printed
    assert sorted(measured(whole_run)) == [1, *range(LOG_EVERY, STEPS, LOG_EVERY), STEPS]
    assert (whole_run.output / "final/model.safetensors").exists()
    real_gpu()
    losses = [row["train/loss"] for row in measured(whole_run).values()]
    assert losses[-1] < losses[0] - 0.5


def test_job_compiles_its_steps_on_the_gpu(whole_run: Run) -> None:
    assert re.search(r"compiled\W+in \d+ s", whole_run.printed), whole_run.printed


def test_job_resumed_on_the_gpu_ends_with_the_same_bits(
    whole_run: Run, resumed_run: Run, real_gpu: NeedRealGpu
) -> None:
    assert f"step {STEPS}/{STEPS}" in resumed_run.printed
    real_gpu()
    names = ("train/loss", "train/gradient_norm", "train/learning_rate")
    whole, resumed = measured(whole_run), measured(resumed_run)
    after = [step for step in whole if step > SAVED_STEP + LOG_EVERY]
    assert after
    for step in after:
        assert [resumed[step][name] for name in names] == [whole[step][name] for name in names], step
    weights = [(run.output / "final/model.safetensors").read_bytes() for run in (whole_run, resumed_run)]
    assert weights[0] == weights[1]


def test_host_waits_at_most_for_the_step_before_between_lines(whole_run: Run) -> None:
    """Each step is judged by an event while the next one is queued (`BadStepReport.look`)."""
    waits = whole_run.waits
    assert len(waits) == STEPS
    of_steps = {step: after - before for step, (before, after) in enumerate(pairwise(waits), 1)}
    unlogged = [step for step in of_steps if step > SAVED_STEP and step % LOG_EVERY]
    assert len(unlogged) > STEPS - SAVED_STEP - 5
    assert {step: of_steps[step] for step in unlogged if of_steps[step] > 1} == {}
    assert of_steps[LOG_EVERY] > 0, "waits are not counted"


def test_finished_run_generates_on_the_gpu(whole_run: Run) -> None:
    words = ("generate", "--config", whole_run.settings, "--generate.temperature", "0")
    assert run_python("-c", COMMAND, *words).strip()
