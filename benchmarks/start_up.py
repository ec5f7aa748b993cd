"""Measure the stages of a run's start, from the command to its first step: the cost of a restart.

    python -m benchmarks.start_up [--tree CHECKOUT] [--times 5]

The run uses two processes with ZeRO-2 on the CPU, a model of two million parameters and a local S3 server. It ends
after its first step. CPU seconds are the sum over all its processes.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from job.demo.server import S3Server

REPOSITORY = Path(__file__).parent.parent
STAGES = ("launcher running", "workers running", "run claimed", "first step done")
MODEL = "hidden_size=256 num_hidden_layers=2 num_attention_heads=4 num_key_value_heads=2 intermediate_size=1024"
TRAIN = "processes=2 precision=fp32 context_length=32 micro_batch_size=2 global_batch_size=8 max_steps=1 log_every=1"
_LOOK_SECONDS = 0.05


def options(section: str, settings: str) -> list[str]:
    """Return the settings of a section, given as ``key=value key=value``, as command-line options."""
    return [f"--{section}.{setting}" for setting in settings.split()]


def measure(tree: Path, shards: str, output: str, cache: Path) -> tuple[list[float], float]:
    """Run `job train` for one step; return the seconds to each of the `STAGES` and the CPU seconds of the run."""
    command = [sys.executable, "-m", "job", "train", f"--data.shards={shards}", f"--run.output={output}"]
    command += [f"--data.cache_dir={cache}", "--tracking.mode=disabled", "--generate.max_new_tokens=1"]
    command += [*options("model", MODEL), *options("train", TRAIN)]
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    reached: dict[str, float] = {}
    command_lines = list[list[str]]()
    log = cache.with_name("log")
    with log.open("wb") as file, subprocess.Popen(command, cwd=tree, stdout=file) as process:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                command_lines = [child.cmdline() for child in psutil.Process(process.pid).children(recursive=True)]
            are_reached = (
                any("job.launcher.agent" in line for line in command_lines),
                any(line[1:] == ["-u", "-m", "job.launcher.worker"] for line in command_lines),
                "\nrun " in f"\n{log.read_text()}",
                "\nstep 1/1 | loss" in log.read_text(),
            )
            for stage, is_reached in zip(STAGES, are_reached, strict=True):
                if is_reached:
                    reached.setdefault(stage, time.monotonic() - began)
            time.sleep(_LOOK_SECONDS)
    assert process.returncode == 0, log.read_text()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [reached[stage] for stage in STAGES], now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    """Measure several runs and print the medians as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="the checkout to measure")
    parser.add_argument("--times", type=int, default=5, help="runs to measure, after one that is not measured")
    arguments = parser.parse_args()
    with S3Server() as server, tempfile.TemporaryDirectory() as folder:
        server.take_over_environment()
        bucket, cache = server.create_bucket("start-up"), Path(folder, "cache")
        data = [
            "--data.source=job/demo/sample.jsonl",
            "--tokenizer.vocab_size=400",
            f"--tokenizer.source={bucket}/tokenizer",
            f"--data.shards={bucket}/shards",
        ]
        for command in ("tokenizer", "prepare"):
            subprocess.run(
                [sys.executable, "-m", "job", command, *data], cwd=REPOSITORY, check=True, capture_output=True
            )
        runs = [
            measure(arguments.tree, f"{bucket}/shards", f"{bucket}/run-{i}", cache) for i in range(arguments.times + 1)
        ]
    runs = runs[1:]  # The first run reads the libraries from disk and is slower, so it does not count.
    print("| seconds from the command to | median | minimum |\n|---|---|---|")
    for i, stage in enumerate(STAGES):
        seconds = [stages[i] for stages, _ in runs]
        print(f"| {stage} | {statistics.median(seconds):.1f} | {min(seconds):.1f} |")
    cpu_seconds = [seconds for _, seconds in runs]
    print(f"| CPU seconds of all processes | {statistics.median(cpu_seconds):.1f} | {min(cpu_seconds):.1f} |")


if __name__ == "__main__":
    main()
