"""Where the time goes until a run is at its first step: what a restart costs.

    python -m benchmarks.start_up [--tree CHECKOUT] [--times 5]

Two processes under ZeRO-2 on the CPU, a model of two million parameters, an S3 server of its own. CPU seconds are those
of all processes together, of a run that ends after its first step.
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
STAGES = ("the launcher runs", "the workers run", "the run is taken over", "the first step is done")
MODEL = "hidden_size=256 num_hidden_layers=2 num_attention_heads=4 num_key_value_heads=2 intermediate_size=1024"
TRAIN = "processes=2 precision=fp32 context_length=32 micro_batch_size=2 global_batch_size=8 max_steps=1 log_every=1"
_LOOK_SECONDS = 0.05


def options(section: str, settings: str) -> list[str]:
    """Settings as they stand on a command line."""
    return [f"--{section}.{one}" for one in settings.split()]


def measure(tree: Path, shards: str, output: str, cache: Path) -> tuple[list[float], float]:
    """Seconds to each of the `STAGES`, and CPU seconds in all."""
    command = [sys.executable, "-m", "job", "train", f"--data.shards={shards}", f"--run.output={output}"]
    command += [f"--data.cache_dir={cache}", "--tracking.mode=disabled", "--generate.max_new_tokens=1"]
    command += [*options("model", MODEL), *options("train", TRAIN)]
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    found: dict[str, float] = {}
    words = list[list[str]]()
    log = cache.with_name("log")
    with log.open("wb") as file, subprocess.Popen(command, cwd=tree, stdout=file) as process:
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                words = [one.cmdline() for one in psutil.Process(process.pid).children(recursive=True)]
            have = (
                any("job.launcher.agent" in one for one in words),
                any(one[1:] == ["-u", "-m", "job.launcher.worker"] for one in words),
                "\nrun " in f"\n{log.read_text()}",
                "\nstep 1/1 | loss" in log.read_text(),
            )
            for stage, is_there in zip(STAGES, have, strict=True):
                if is_there:
                    found.setdefault(stage, time.monotonic() - began)
            time.sleep(_LOOK_SECONDS)
    assert process.returncode == 0, log.read_text()
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return [found[stage] for stage in STAGES], now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    """Prints the medians as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=REPOSITORY, help="the checkout to measure")
    parser.add_argument("--times", type=int, default=5)
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
    runs = runs[1:]  # the first one reads the libraries from the disk
    print("| seconds from the start until | median | least |\n|---|---|---|")
    for i, stage in enumerate(STAGES):
        seconds = [stages[i] for stages, _ in runs]
        print(f"| {stage} | {statistics.median(seconds):.1f} | {min(seconds):.1f} |")
    used = [cpu for _, cpu in runs]
    print(f"| CPU seconds in all | {statistics.median(used):.1f} | {min(used):.1f} |")


if __name__ == "__main__":
    main()
