"""A newcomer's folder: a tiny corpus, its tokenizer and shards, and the commands that are run on them."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from small_run import Job, run

from job import cli
from job.demo.server import S3Server
from job.launcher import device
from job.launcher.device import GpuProbe
from job.preflight import nvidia_driver
from job.preflight.nvidia_driver import Cuda

GOOD = [{"id": str(i), "title": "", "tags": "", "text": f"第{i}篇文章，讲的是数字{i}。" * 3} for i in range(40)]
SETTINGS: dict[str, dict[str, object]] = {
    "run": {"output": "run"},
    "data": {"source": "wiki.jsonl", "shards": "shards", "cache_dir": "cache", "processes": 1},
    "tokenizer": {"source": "tokenizer", "vocab_size": 300},
    "model": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 16,
    },
    "train": {
        "context_length": 16,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "max_steps": 20,
        "warmup_steps": 2,
        "precision": "fp32",
        "processes": 1,
        "strategy": "ddp",
    },
    "checkpoint": {"every": 5},
    "evaluate": {"every": 1_000_000},
    "generate": {"prompts": ["一"], "max_new_tokens": 2},
    "tracking": {"mode": "disabled", "log_dir": "logs"},
}


@dataclass(frozen=True)
class Printed:
    """What a command printed, and its exit code; None if the command goes on after the message."""

    code: int | None
    text: str


@dataclass
class Newcomer:
    """A folder with a corpus, a tokenizer and shards, in which a test makes a mistake."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]
    start_server: Callable[[], S3Server]
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def file(self, **changes: object) -> Path:
        """Write a settings file; `__` in a name stands for the dot."""
        tree = {section: dict(values) for section, values in SETTINGS.items()}
        for section, key in (("data", "source"), ("data", "shards"), ("data", "cache_dir"), ("tokenizer", "source"),
                             ("run", "output"), ("tracking", "log_dir")):  # fmt: skip
            tree[section][key] = str(self.folder / str(tree[section][key]))
        for name, value in changes.items():
            section, _, key = name.partition("__")
            tree.setdefault(section, {})[key] = value
        path = self.folder / f"settings-{len(list(self.folder.glob('settings-*')))}.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return path

    def runs(self, command: str, **changes: object) -> Printed:
        """Run a command in this process."""
        self.capfd.readouterr()
        code = cli.main([command, "--config", str(self.file(**changes))])
        return Printed(code, "".join(self.capfd.readouterr()))

    def starts(self, **changes: object) -> Job:
        """Start `train` as a user does."""
        return Job("train", self.file(**changes))

    def trains(self, **changes: object) -> Printed:
        """Run `train` as a user does."""
        code, out, err = run("train", self.file(**changes))
        return Printed(code, out + err)

    def environment(self, **variables: str) -> None:
        for name, value in variables.items():
            self.monkeypatch.setenv(name, value)

    def gpu(self, name: str, mib: int, capability: str, driver: str = "580.65.06") -> None:
        """Let this machine have one GPU, which torch for CUDA 13 can use."""
        program = self.folder / "bin" / "nvidia-smi"
        program.parent.mkdir()
        line = f"0, GPU-00000000-1111, {name}, {mib}, 300, {driver}, [N/A], {capability}"
        program.write_text(f"#!/bin/sh\necho '{line}'\n")
        program.chmod(0o755)
        self.environment(PATH=f"{program.parent}{os.pathsep}{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="0")
        self.monkeypatch.setattr(device, "_probe_in_subprocess", lambda: GpuProbe((name,), "", "torch of a test"))
        self.monkeypatch.setattr(nvidia_driver, "torch_cuda", lambda: Cuda(13, 0))

    def bucket(self) -> str:
        return self.start_server().create_bucket(f"messages-{self.folder.name.replace('_', '-').lower()[-40:]}")
