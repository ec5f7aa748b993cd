"""Walk through all steps on one machine: documents → S3 → shards → training, stopped and resumed → generated text.

Each step runs the command that a user would type; only the S3 server is started by this program itself.
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
from job.launcher.environment import detect_environment
from job.launcher.supervisor import find_device
from job.local_dirs import log_folder
from job.report import Report
from job.run_report.write_report import make_report
from job.runs.checkpoint_list import list_checkpoints
from job.runs.metrics_file import read_metrics
from job.runs.run import FINAL_MODEL

SAMPLE = Path(__file__).with_name("sample.jsonl")
OUTPUT_FOLDER = Path("demo-output")
_BUCKET = "wikillm"
_POLL_SECONDS = 0.2


def walk(config: Config) -> int:
    """Run the demonstration with the settings of configs/demo.yaml; return the exit code.

    Raises:
        UserError: a setting names a place outside the demonstration's bucket.
    """
    report, started_at = Report(), time.monotonic()
    config = on_usable_device(config, report.say)
    for setting, url in (
        ("data.source", config.data.source),
        ("data.shards", config.data.shards),
        ("run.output", config.run.output),
    ):
        if not url.startswith(f"s3://{_BUCKET}/"):
            expected = f"expected a URL below s3://{_BUCKET}/, the bucket of the demonstration"
            raise UserError(setting, url, expected, "use the URL that configs/demo.yaml has for this setting")
    with S3Server(OUTPUT_FOLDER / "s3") as server:
        report.say(f"1. start an S3 server on {server.endpoint_url}, with its data in {OUTPUT_FOLDER / 's3'}")
        server.take_over_environment()
        server.create_bucket(_BUCKET)
        storage.delete_tree(config.run.output)
        storage.delete_tree(config.data.shards)
        storage.delete_tree(config.tokenizer.source)
        storage.upload_file(SAMPLE, config.data.source)
        # The commands below read the real values from this file, also passwords in URLs.
        settings = OUTPUT_FOLDER / "demo.yaml"
        settings.touch(mode=0o600)
        settings.write_text(to_yaml(config), encoding="utf-8")

        report.say("\n2. train a tokenizer on the sample")
        _run(report, "tokenizer", settings)
        report.say("\n3. turn the documents into token shards")
        _run(report, "prepare", settings)
        report.say(f"\n4. train, and ask the training to stop after step {config.checkpoint.every}")
        _run_until_checkpoint(report, config, settings)
        resumed_at = list_checkpoints(config.run.output)[-1].step
        report.say("\n5. run the same command again: training continues where it stopped")
        _run(report, "train", settings)
        report.say("\n6. evaluate the model on the validation articles")
        _run(report, "evaluate", settings)

        rows = read_metrics(config.run.output)
        draw_loss_curve(rows, OUTPUT_FOLDER / "loss.png", "WikiLLM demo: loss on the bundled sample", resumed_at)
        (OUTPUT_FOLDER / FINAL_MODEL).mkdir(exist_ok=True)
        for entry in storage.list_files(storage.join(config.run.output, FINAL_MODEL)):
            storage.download_file(entry.url, OUTPUT_FOLDER / FINAL_MODEL / entry.url.rpartition("/")[2])
        page, *_ = make_report([config.run.output]).store(str(OUTPUT_FOLDER))
    report.say(
        "\n7. generate text (a tiny model, trained on little text: it has learnt how articles look, but no facts)"
    )
    # Without prompts, this command would ask a person at a terminal for them.
    _run(report, "generate", settings, *config.generate.prompts, "--generate.model", str(OUTPUT_FOLDER / FINAL_MODEL))

    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    seconds = time.monotonic() - started_at
    report.say(f"\nloss {losses[0]:.2f} → {losses[-1]:.2f} nats per token, in {seconds:.0f} s")
    report.table(
        "where the results are",
        [
            ("report, for a browser", page),
            ("loss curve", f"{OUTPUT_FOLDER / 'loss.png'}"),
            ("model, for AutoModelForCausalLM", f"{OUTPUT_FOLDER / 'final'}"),
            ("settings, with comments", f"{settings}"),
            ("files of the S3 server, which has ended", f"{OUTPUT_FOLDER / 's3'}"),
            ("SwanLab files", f"{log_folder(config.tracking.log_dir)}"),
        ],
    )
    report.say(
        "what to try next\n"
        f"  {command('generate', '长城', '--generate.model', str(OUTPUT_FOLDER / 'final'))}\n"
        f"  {program('swanlab')} watch {shlex.quote(str(log_folder(config.tracking.log_dir)))}  # until Ctrl-C\n"
        f"  {command('demo', '--train.learning_rate', '4e-3')}  # needs: time\n"
        f"  {command('train', '--help')}"
    )
    return EXIT_DONE


def on_usable_device(config: Config, say: Callable[[str], None]) -> Config:
    """Return the settings; with `train.device: cpu` if this machine has GPUs that torch cannot use.

    Args:
        config: all settings.
        say: prints a line that says why the CPU is used.
    """
    try:
        find_device(config, detect_environment())
    except UserError as error:
        if error.setting != "train.device" or config.train.device != "auto":
            raise
        say(f"! {error.expected}; the demonstration continues on the CPU")
        return config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})})
    return config


def _arguments(name: str, settings: Path, *more: str) -> list[str]:
    """Return the words of a command line after ``python -m job``."""
    return [name, "--config", str(settings), *more]


def _run(report: Report, name: str, settings: Path, *more: str) -> None:
    arguments = _arguments(name, settings, *more)
    report.say(f"$ {command(*arguments)}")
    subprocess.run([sys.executable, "-m", "job", *arguments], check=True)


def _run_until_checkpoint(report: Report, config: Config, settings: Path) -> None:
    """Start the training, and send SIGTERM as soon as the first checkpoint is complete."""
    arguments = _arguments("train", settings)
    report.say(f"$ {command(*arguments)}")
    training = subprocess.Popen([sys.executable, "-m", "job", *arguments])
    while training.poll() is None and not list_checkpoints(config.run.output):
        time.sleep(_POLL_SECONDS)
    training.send_signal(signal.SIGTERM)
    if (code := training.wait()) != EXIT_STOPPED:
        raise RuntimeError(f"expected training to write a checkpoint and exit with code {EXIT_STOPPED}, not {code}")
