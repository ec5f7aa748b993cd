"""Runs as a user starts them, `python -m job ...`, so small that a step takes milliseconds, on data in a real store."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from job import storage
from job.data.manifest import Manifest
from job.data.prepare import Recipe, prepare
from job.data.tokenizer import TextTokenizer, train_tokenizer
from job.demo.server import S3Server
from job.demo.walk import SAMPLE
from job.runs.checkpoint import list_checkpoints, open_checkpoint

REPOSITORY = Path(__file__).parent.parent
CONTEXT_LENGTH = 32
STEPS = 80
"""Of every run here that is not stopped."""
_EXIT_SECONDS = 240
_CLOSED_SECONDS = 60
_PIPE_BYTES = 4096
"""The least that a pipe can hold: a run whose lines are not read stands still a few steps later."""
_STANDARD_ERROR_BYTES = 2**16
"""What a pipe usually holds."""

ALONE = {"processes": 1, "strategy": "ddp"}
"""The train settings of a run of one process."""
ENDLESS = {"max_steps": 1_000_000, "epochs": 10_000}
"""Those of a run that ends when it is asked to."""
WriteSettings = Callable[..., Path]
"""As `write_settings`, with changes alone."""

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@dataclass(frozen=True)
class DataSet:
    """The bundled sample as token shards in the store."""

    shards: str
    manifest: Manifest
    tokenizer: TextTokenizer
    recipe: Recipe


def prepare_sample(server: S3Server, folder: Path) -> DataSet:
    """Makes the data set in a bucket of its own; `folder` takes the tokenizer."""
    return prepare_sample_at(f"{server.create_bucket('small-run-data')}/shards", folder)


def prepare_sample_at(shards: str, folder: Path) -> DataSet:
    """Makes the data set at a URL or in a folder; `folder` takes the tokenizer."""
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts, 400, folder)
    recipe = Recipe(str(SAMPLE), "text", "id", "stop", slice_bytes=2**15, validation_fraction=0.1, seed=2333)
    manifest = prepare(recipe, tokenizer, shards)
    assert manifest is not None
    return DataSet(shards, manifest, tokenizer, recipe)


@dataclass(frozen=True)
class FinishedRun:
    """A run of `STEPS` steps without a stop, over two processes under ZeRO-2."""

    output: str
    settings: Path
    printed: str


def write_settings(folder: Path, data: DataSet, output: str, **changes: dict[str, Any]) -> Path:
    """Settings of a small run as a file in `folder`; `changes` are sections, as ``train={"processes": 1}``."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"output": output},
        "data": {"shards": data.shards, "cache_dir": str(folder / "cache")},
        "model": MODEL,
        "train": {
            "processes": 2,
            "precision": "fp32",
            "context_length": CONTEXT_LENGTH,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "warmup_steps": 5,
            "log_every": 1,
        },
        "checkpoint": {"every": 1000},
        "evaluate": {"every": 1000},
        "generate": {"prompts": ["人工智能"], "max_new_tokens": 8},
        "tracking": {"mode": "disabled"},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    path = Path(tempfile.mkstemp(".yaml", dir=folder)[1])
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return path


class Job:
    """A command in a process of its own, or `under` another; at the end of the block nothing of it is left."""

    def __init__(
        self, command: str, settings: Path, *words: str, under: Sequence[str] = (), **environment: str
    ) -> None:
        self.process = subprocess.Popen(
            [*under, sys.executable, "-m", "job", command, "--config", str(settings), *words],
            cwd=REPOSITORY,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pipesize=_PIPE_BYTES,
        )
        # Standard error is read at the end alone: its warnings hold up nothing.
        fcntl.fcntl(self.process.stderr, fcntl.F_SETPIPE_SZ, _STANDARD_ERROR_BYTES)  # type: ignore[arg-type]
        self.lines: list[str] = []

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.descendants(), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate(timeout=_CLOSED_SECONDS)  # as long as anything of it lives, a pipe is open

    def read_until(self, beginning: str) -> str:
        """The first further line on standard output that begins so; what comes after it is left in the pipe."""
        self.read_until_matching(re.escape(beginning))
        return self.lines[-1]

    def read_until_matching(self, pattern: str) -> re.Match[str]:
        """The match of the first further line whose beginning is like `pattern`."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline().decode():
            self.lines.append(line)
            if (found := re.match(pattern, line)) is not None:
                return found
        raise AssertionError(f"no line began with {pattern!r}:\n{''.join(self.lines)}{self.end()[2]}")

    def descendants(self) -> list[psutil.Process]:
        """Every process that it has started, directly or not."""
        return psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []

    def workers(self) -> list[psutil.Process]:
        """Its training processes, by rank."""
        found: dict[int, psutil.Process] = {}
        for one in self.descendants():
            with suppress(psutil.NoSuchProcess):
                if one.cmdline()[1:] == ["-u", "-m", "job.launcher.worker"]:
                    found[int(one.environ()["RANK"])] = one
        return [one for _, one in sorted(found.items())]

    def family(self) -> list[psutil.Process]:
        """All processes of the command, itself among them."""
        return [psutil.Process(self.process.pid), *self.descendants()]

    def end(self, seconds: float = _EXIT_SECONDS) -> tuple[int, str, str]:
        """Exit code, standard output and standard error, when it has ended by itself, which it must in time."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, "".join(self.lines) + out.decode(), err.decode()


def free_port() -> int:
    """A port of this machine that nobody has at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port


def still_alive(processes: list[psutil.Process], seconds: float = 60) -> list[psutil.Process]:
    """Those that do not end in time, which is that of a loaded machine; who has ended may wait to be collected."""
    deadline = time.monotonic() + seconds
    alive = processes
    while alive and time.monotonic() < deadline:
        alive = [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.02)
    return alive


def run(
    command: str, settings: Path, *words: str, under: Sequence[str] = (), **environment: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with Job(command, settings, *words, under=under, **environment) as job:
        return job.end()


def redirected(redirection: str) -> list[str]:
    """What a command is to be started under for a shell's redirection, such as ``>/dev/full``."""
    return ["bash", "-c", f'exec "$@" {redirection}', "bash"]


def train_until(step: int, settings: Path, number: int = signal.SIGTERM) -> tuple[int, str, str]:
    """Trains, and sends the entrypoint a signal after `step`; it takes effect a few steps later."""
    with Job("train", settings) as job:
        job.read_until(f"step {step}/")
        job.process.send_signal(number)
        return job.end()


def saved_steps(output: str) -> list[int]:
    """The steps of a run's complete checkpoints."""
    return [open_checkpoint(url).state.step for url in checkpoint_urls(output)]


def checkpoint_urls(output: str) -> list[str]:
    """A run's complete checkpoints, the oldest first."""
    return [name.url(output) for name in list_checkpoints(output)]


def read_json(url: str) -> Any:
    """The value in a JSON file."""
    return json.loads(storage.read_bytes(url))


def stored(url: str) -> dict[str, bytes]:
    """Every file below `url`."""
    return {entry.url: storage.read_bytes(entry.url) for entry in storage.list_files(url)}


def tensor_files(checkpoint: str) -> dict[str, str]:
    """sha256 of weights and moments."""
    files = open_checkpoint(checkpoint).files
    return {name: files[name].sha256 for name in files if name.endswith(".safetensors")}
