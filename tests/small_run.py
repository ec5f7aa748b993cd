"""Starts commands as a user does (`python -m job ...`), with a tiny model and a data set in a real S3 server."""

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
from job.runs.checkpoint import open_checkpoint
from job.runs.checkpoint_list import list_checkpoints

REPOSITORY = Path(__file__).parent.parent
CONTEXT_LENGTH = 32
STEPS = 80
"""Optimizer steps of a run that is not stopped."""
_EXIT_SECONDS = 240
_CLOSED_SECONDS = 60
_PIPE_BYTES = 4096
"""Smallest size of a pipe. If nobody reads the lines of a run, it stops after a few steps."""
_STANDARD_ERROR_BYTES = 2**16
"""Usual size of a pipe."""

ALONE = {"processes": 1, "strategy": "ddp"}
"""Settings of section `train` for a run with one process."""
ENDLESS = {"max_steps": 1_000_000, "epochs": 10_000}
"""Settings of section `train` for a run that ends only when it is asked to stop."""
WriteSettings = Callable[..., Path]
"""Type of the fixture `settings`: `write_settings` with only the changes as arguments."""

MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}


@dataclass(frozen=True)
class DataSet:
    """The bundled sample as token shards."""

    shards: str
    manifest: Manifest
    tokenizer: TextTokenizer
    recipe: Recipe


def prepare_sample(server: S3Server, folder: Path) -> DataSet:
    """Make the data set in a new bucket. The tokenizer is written to `folder`."""
    return prepare_sample_at(f"{server.create_bucket('small-run-data')}/shards", folder)


def prepare_sample_at(shards: str, folder: Path) -> DataSet:
    """Make the data set at a URL or in a folder. The tokenizer is written to `folder`."""
    texts = [json.loads(line)["text"] for line in SAMPLE.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts, 400, folder)
    recipe = Recipe(str(SAMPLE), "text", "id", "stop", slice_bytes=2**15, validation_fraction=0.1, seed=2333)
    manifest = prepare(recipe, tokenizer, shards)
    assert manifest is not None
    return DataSet(shards, manifest, tokenizer, recipe)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run of `STEPS` steps with two processes and ZeRO-2."""

    output: str
    settings: Path
    printed: str


def write_settings(folder: Path, data: DataSet, output: str, **changes: dict[str, Any]) -> Path:
    """Write a settings file of a small run to `folder`. `changes` are sections, such as ``train={"processes": 1}``."""
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
    """A running command, started directly or through the command `under`. Leaving the block kills all its processes."""

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
        # Standard error is read only at the end, so its pipe must be large enough for all warnings.
        fcntl.fcntl(self.process.stderr, fcntl.F_SETPIPE_SZ, _STANDARD_ERROR_BYTES)  # type: ignore[arg-type]
        self.lines: list[str] = []

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.descendants(), self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate(timeout=_CLOSED_SECONDS)  # This fails if a process is left that keeps a pipe open.

    def read_until(self, beginning: str) -> str:
        """Read standard output up to the next line with this beginning, and return the line."""
        self.read_until_matching(re.escape(beginning))
        return self.lines[-1]

    def read_until_matching(self, pattern: str) -> re.Match[str]:
        """Read standard output up to the next line whose beginning matches `pattern`, and return the match."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline().decode():
            self.lines.append(line)
            if (match := re.match(pattern, line)) is not None:
                return match
        raise AssertionError(f"no line began with {pattern!r}:\n{''.join(self.lines)}{self.end()[2]}")

    def descendants(self) -> list[psutil.Process]:
        """Return all processes that the command has started, directly or indirectly."""
        return psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []

    def workers(self) -> list[psutil.Process]:
        """Return the workers (training processes) of the command, sorted by rank."""
        by_rank: dict[int, psutil.Process] = {}
        for process in self.descendants():
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[1:] == ["-u", "-m", "job.launcher.worker"]:
                    by_rank[int(process.environ()["RANK"])] = process
        return [process for _, process in sorted(by_rank.items())]

    def family(self) -> list[psutil.Process]:
        """Return all processes of the command, itself included."""
        return [psutil.Process(self.process.pid), *self.descendants()]

    def end(self, seconds: float = _EXIT_SECONDS) -> tuple[int, str, str]:
        """Wait until the command has ended, and return exit code, standard output and standard error."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, "".join(self.lines) + out.decode(), err.decode()


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def still_alive(processes: list[psutil.Process], seconds: float = 60) -> list[psutil.Process]:
    """Wait until the processes have ended, and return those that have not ended in time. A zombie has ended."""
    deadline = time.monotonic() + seconds
    alive = processes
    while alive and time.monotonic() < deadline:
        alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.02)
    return alive


def run(
    command: str, settings: Path, *words: str, under: Sequence[str] = (), **environment: str
) -> tuple[int, str, str]:
    """Run a command, and return its exit code, standard output and standard error."""
    with Job(command, settings, *words, under=under, **environment) as job:
        return job.end()


def redirected(redirection: str) -> list[str]:
    """Return the words before a command that run it with a redirection of the shell, such as ``>/dev/full``."""
    return ["bash", "-c", f'exec "$@" {redirection}', "bash"]


def train_until(step: int, settings: Path, number: int = signal.SIGTERM) -> tuple[int, str, str]:
    """Train, and send a signal to the command after `step`. The run stops a few steps later."""
    with Job("train", settings) as job:
        job.read_until(f"step {step}/")
        job.process.send_signal(number)
        return job.end()


def saved_steps(output: str) -> list[int]:
    """Return the steps of a run's complete checkpoints."""
    return [open_checkpoint(url).state.step for url in checkpoint_urls(output)]


def checkpoint_urls(output: str) -> list[str]:
    """Return the URLs of a run's complete checkpoints, the oldest first."""
    return [name.url(output) for name in list_checkpoints(output)]


def read_json(url: str) -> Any:
    """Return the value in a JSON file."""
    return json.loads(storage.read_bytes(url))


def stored(url: str) -> dict[str, bytes]:
    """Return the content of every file below `url`, by its URL."""
    return {entry.url: storage.read_bytes(entry.url) for entry in storage.list_files(url)}


def tensor_files(checkpoint: str) -> dict[str, str]:
    """Return the sha256 of each file with weights or moments of a checkpoint."""
    files = open_checkpoint(checkpoint).files
    return {name: files[name].sha256 for name in files if name.endswith(".safetensors")}
