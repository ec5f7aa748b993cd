"""A folder like the repository's, with correct launch files and settings, in which a test plants mistakes."""

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import DataSet

from job import config as settings
from job import storage
from job.config import Config
from job.data.tokenizer import store_tokenizer
from job.launcher import device
from job.launcher.device import GpuProbe
from job.model.spec import ModelSpec
from job.preflight.check import preflight
from job.preflight.findings import Finding
from job.runs.attempts import Attempts
from job.runs.checkpoint import TrainingState
from job.runs.checkpoint_writer import save_checkpoint
from job.runs.compatibility import compatibility_key
from job.runs.run import begin_run
from job.runs.run_status import RunStatus

IMAGE = "registry.internal/wikillm@sha256:" + 64 * "0"
HERE, SLURM, KUBERNETES, SWANLAB = None, "slurm", "kubernetes", "swanlab"
MULTI_NODE, TRAINJOB = "kubernetes/multi-node", "kubernetes/trainjob"
OVERLAYS = tuple(f"kubernetes/{name}" for name in ("single", "multi-node", "spot", "jobset", "trainjob", "prepare"))


@dataclass
class Workspace:
    """The working directory of a test, with launch/ and a data set in the store."""

    folder: Path
    bucket: str
    data: DataSet
    tree: dict[str, dict[str, Any]]
    """Settings, as in a YAML file."""
    monkeypatch: pytest.MonkeyPatch
    clean_ups: list[Callable[[], object]] = field(default_factory=list)
    """Functions that are called after the test."""

    @property
    def config(self) -> Config:
        return settings.build(self.tree)

    def set(self, **values: object) -> None:
        """Change settings here and in the pods; `__` in a name stands for the dot."""
        for name, value in values.items():
            section, _, key = name.partition("__")
            self.tree.setdefault(section, {})[key] = value
        (self.folder / "launch/kubernetes/base/config.yaml").write_text(yaml.safe_dump(self.tree, allow_unicode=True))
        if any(name.startswith("store__") for name in values):
            self.connect()

    def environment(self, **variables: str | None) -> None:
        """Set environment variables; None unsets one."""
        for name, value in variables.items():
            if value is None:
                self.monkeypatch.delenv(name, raising=False)
            else:
                self.monkeypatch.setenv(name, value)
        if any(name.startswith("AWS_") for name in variables):
            self.connect()

    def edit(self, file: str, pattern: str, replacement: str) -> None:
        """Change a file of launch/; the pattern must be in it, or the mistake would not be planted."""
        path = self.folder / "launch" / file
        text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
        assert count, f"{pattern} is not in {file}"
        path.write_text(text)

    def copy_shards(self) -> str:
        """Copy the data set, so that a test can damage it; return the URL of the copy."""
        copy = f"{self.bucket}/shards"
        for entry in storage.list_files(self.data.shards):
            storage.write_bytes(entry.url.replace(self.data.shards, copy), storage.read_bytes(entry.url))
        self.set(data__shards=copy)
        return copy

    def begin_run(self, step: int = 10, **changes: Any) -> str:
        """Make a run with one checkpoint and these settings; `changes` replace parts of its identity.

        Return the URL of the checkpoint.
        """
        config = self.config
        spec = ModelSpec(**config.model.model_dump())
        identity = compatibility_key(config.train, config.data, spec, self.data.manifest) | changes
        run = begin_run(config.run.output, None, {})
        store_tokenizer(self.data.tokenizer, f"{config.run.output}/tokenizer")
        attempts = Attempts(config.run.output)
        attempt = attempts.claim(run.id, "a-start", None, "auto")
        attempts.update(dataclasses.replace(attempt, from_step=0, ended=RunStatus.STOPPED))
        state = TrainingState(run.id, attempt.number, step, 8 * step, 256 * step, identity, {})
        tensors = {key: torch.zeros(2) for key in ("param", "exp_avg", "exp_avg_sq")}
        metrics = b'{"step": 10, "speed/tokens_per_second": 1000.0}\n'
        return save_checkpoint(config.run.output, state, {"weight": tensors}, metrics).url

    def nvidia_smi(self, output: str, code: int = 0) -> None:
        """Install a program nvidia-smi that prints `output`, and a torch that finds the same GPUs."""
        program = self.folder / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {code}\n")
        program.chmod(0o755)
        count = len([line for line in output.splitlines() if line[:1].isdigit()])
        self.environment(
            PATH=f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            CUDA_VISIBLE_DEVICES=",".join(map(str, range(count or 1))),
        )
        answer = GpuProbe(tuple("a GPU" for _ in range(count)), "" if count else "no GPU", "torch of a test")
        self.monkeypatch.setattr(device, "_probe_in_subprocess", lambda: answer)

    def connect(self) -> None:
        """Connect to the store of the settings, as the command line does; only called if it changes (it is slow)."""
        storage.configure(storage.StoreOptions(**self.config.store.model_dump()))
        self.clean_ups.append(lambda: storage.configure(storage.StoreOptions()))

    def rows(self, place: str | None, deep: bool = False) -> list[Finding]:
        """Return what the preflight finds."""
        return preflight(self.config, place, deep=deep, config_path="configs/mine.yaml").findings.rows


def marks(rows: list[Finding], name: str) -> list[str]:
    """Return the marks of the rows of this name."""
    return [row.mark for row in rows if row.name == name]


def gpu(index: int = 0, name: str = "NVIDIA GeForce RTX 4090", mib: int = 24564, capability: str = "8.9") -> str:
    """Return a line that nvidia-smi prints for a GPU."""
    return f"{index}, GPU-{index}0000000-1111, {name}, {mib}, 300, 580.65.06, [N/A], {capability}"
