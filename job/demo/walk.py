"""The whole path on one machine: documents → S3 → shards → training, stopped and resumed → a model that writes.

Every step is the command that a user would type; only the S3 server is this program's own.
"""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from job import storage
from job.config import Config, to_yaml
from job.demo.loss_curve import draw_loss_curve
from job.demo.server import S3Server
from job.errors import EXIT_DONE, EXIT_STOPPED, UserError
from job.invocation import command, program
from job.launcher.environment import find_place
from job.launcher.supervisor import find_device
from job.local_dirs import log_folder
from job.report import Report
from job.runs.checkpoint import list_checkpoints
from job.runs.metrics_file import read_metrics

SAMPLE = Path(__file__).with_name("sample.jsonl")
FOLDER = Path("demo-output")
_BUCKET = "wikillm"
_POLL_SECONDS = 0.2


def walk(config: Config) -> int:
    """Runs the demonstration with the settings of configs/demo.yaml; returns the exit code.

    Raises:
        UserError: the settings do not name the demonstration's bucket.
    """
    report, began = Report(), time.monotonic()
    config = on_usable_device(config, report.say)
    for setting, url in (
        ("data.source", config.data.source),
        ("data.shards", config.data.shards),
        ("run.output", config.run.output),
    ):
        if not url.startswith(f"s3://{_BUCKET}/"):
            raise UserError(
                setting, url, f"the demonstration keeps everything in s3://{_BUCKET}/", "use configs/demo.yaml"
            )
    with S3Server(FOLDER / "s3") as server:
        report.say(f"1. an S3 server on {server.endpoint_url}, its data in {FOLDER / 's3'}")
        server.take_over_environment()
        server.create_bucket(_BUCKET)
        storage.delete_tree(config.run.output)
        storage.delete_tree(config.data.shards)
        storage.delete_tree(config.tokenizer.source)
        storage.upload_file(SAMPLE, config.data.source)
        settings = FOLDER / "demo.yaml"
        settings.touch(mode=0o600)  # the commands below read the real values from it, passwords in URLs too
        settings.write_text(to_yaml(config), encoding="utf-8")

        report.say("\n2. a tokenizer for this text")
        _run(report, "tokenizer", settings)
        report.say("\n3. the documents as token shards")
        _run(report, "prepare", settings)
        report.say(f"\n4. training, asked to stop after step {config.checkpoint.every}")
        _run_until_checkpoint(report, config, settings)
        resumed_at = list_checkpoints(config.run.output)[-1].step
        report.say("\n5. the same command again: it goes on where it was")
        _run(report, "train", settings)
        report.say("\n6. the held-out articles")
        _run(report, "evaluate", settings)

        rows = read_metrics(config.run.output)
        draw_loss_curve(rows, FOLDER / "loss.png", "WikiLLM demo: loss on the bundled sample", resumed_at)
        (FOLDER / "final").mkdir(exist_ok=True)
        for entry in storage.list_files(storage.join(config.run.output, "final")):
            storage.download_file(entry.url, FOLDER / "final" / entry.url.rpartition("/")[2])
    report.say(
        "\n7. what it writes (a small model of a small text: it has learnt the look of an article, not its facts)"
    )
    _run(report, "generate", settings, "--generate.model", str(FOLDER / "final"))

    first, last = (next(row["train/loss"] for row in order if "train/loss" in row) for order in (rows, rows[::-1]))
    report.say(f"\nloss {first:.2f} → {last:.2f} nats per token, in {time.monotonic() - began:.0f} s")
    report.table(
        "where everything lies",
        [
            ("loss curve", f"{FOLDER / 'loss.png'}"),
            ("model, for AutoModelForCausalLM", f"{FOLDER / 'final'}"),
            ("settings, explained", f"{settings}"),
            ("object store", f"{FOLDER / 's3'}"),
            ("tracker", f"{log_folder(config.tracking.log_dir)}"),
        ],
    )
    report.say(
        "what to try next\n"
        f"  {command('generate', '长城', '--generate.model', str(FOLDER / 'final'))}\n"
        f"  {program('swanlab')} watch {shlex.quote(str(log_folder(config.tracking.log_dir)))}  # until Ctrl-C\n"
        f"  {command('demo', '--train.learning_rate', '1e-3')}  # needs: time\n"
        f"  {command('train', '--help')}"
    )
    return EXIT_DONE


def on_usable_device(config: Config, say: Callable[[str], None]) -> Config:
    """Return the settings, with train.device cpu where GPUs are promised that torch cannot use."""
    try:
        find_device(config, find_place())
    except UserError as error:
        if error.setting != "train.device" or config.train.device != "auto":
            raise
        say(f"! {error.expected}; the demonstration goes on on the CPU")
        return config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
    return config


def _words(name: str, settings: Path, *more: str) -> list[str]:
    return [name, "--config", str(settings), *more]


def _run(report: Report, name: str, settings: Path, *more: str) -> None:
    words = _words(name, settings, *more)
    report.say(f"$ {command(*words)}")
    subprocess.run([sys.executable, "-m", "job", *words], check=True)


def _run_until_checkpoint(report: Report, config: Config, settings: Path) -> None:
    """Trains, and sends SIGTERM as soon as the first checkpoint is complete."""
    words = _words("train", settings)
    report.say(f"$ {command(*words)}")
    training = subprocess.Popen([sys.executable, "-m", "job", *words])
    while training.poll() is None and not list_checkpoints(config.run.output):
        time.sleep(_POLL_SECONDS)
    training.send_signal(signal.SIGTERM)
    if (code := training.wait()) != EXIT_STOPPED:
        raise RuntimeError(f"training was to stop with a checkpoint and exit {EXIT_STOPPED}, it ended with {code}")
