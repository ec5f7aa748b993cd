"""Measure the cost of a checkpoint: the pause of training, the background upload, the memory, and the restart.

    python -m benchmarks.checkpoint [--saves 3] [--strategies zero2 ddp]

Two processes hold the model of configs/wiki-123m.yaml, in fp32 with AdamW's moments, and train with tiny batches.

*saved*: rank 0 copies the training state several times; training pauses for each copy. It uploads each copy to a real
S3 server on this machine while both ranks train. *not saved*: the same without saving; the difference between the two
peaks is the memory that saving needs. *restarted*: new processes build the model, download the checkpoint, load it and
do one step. The time to import the Python libraries is not included (`benchmarks.start_up` measures it).
"""

import argparse
import datetime
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import cpu_name, peak_bytes

if TYPE_CHECKING:
    from job.training.engine import Engine

PROCESSES, VOCAB_SIZE, EOD_ID, CONTEXT_LENGTH = 2, 151_646, 0, 32
STEPS_APART = 3
"""Steps between two saves, during which nothing is uploaded."""
PARTS = ("not saved", "saved", "restarted")
CONFIG = Path(__file__).parent.parent / "configs" / "wiki-123m.yaml"


# ---- One of the processes ----


def work(part: str, strategy_name: str, sizes: Mapping[str, Any]) -> None:
    """Do one of the `PARTS` in this process; rank 0 prints its measurements as JSON."""
    import torch
    import torch.distributed as dist

    from job.launcher.processes import leave
    from job.log_setup import silence_libraries
    from job.model.language_model import LanguageModel, build_model
    from job.model.spec import ModelSpec
    from job.training.accelerator import Strategy, start_accelerator
    from job.training.engine import Engine
    from job.training.optimizer_settings import OptimizerSettings

    silence_libraries()
    began = time.perf_counter()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    causal_lm = build_model(ModelSpec(**sizes["model"]), sizes["vocab_size"], EOD_ID, CONTEXT_LENGTH, seed=1)
    strategy = Strategy(strategy_name, "fp32", world_size, 1, 1, 1.0)
    engine = Engine(
        start_accelerator(strategy),
        LanguageModel(causal_lm),
        strategy,
        OptimizerSettings("adamw", 0.1, 0.9, 0.999, 1e-8),
    )
    built_seconds = time.perf_counter() - began
    tokens = torch.randint(sizes["vocab_size"], (1, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(rank))

    def step() -> float:
        step_began = time.perf_counter()
        engine.step([(tokens, tokens)], CONTEXT_LENGTH * world_size, 1e-4)
        return time.perf_counter() - step_began

    if part == "restarted":
        measured = {"model built": [built_seconds], **_resume(engine, rank), "first step": [step()]}
    else:
        measured = _train(engine, rank, step, sizes["saves"], is_saved=part == "saved")
    measured["parameters"] = [sum(parameter.numel() for parameter in causal_lm.parameters())]
    dist.barrier()
    if rank == 0:
        print(json.dumps(measured | {"peak_bytes": [peak_bytes()]}), flush=True)
    dist.barrier()
    leave(0)


def _train(engine: "Engine", rank: int, step: Callable[[], float], saves: int, is_saved: bool) -> dict[str, Any]:
    """Train, save if `is_saved`, and return the seconds of each step, pause and upload.

    The lists are ``step`` (steps without an upload), ``step during upload``, ``pause`` and ``upload``.
    """
    import torch
    import torch.distributed as dist

    from job.runs.checkpoint import TrainingState
    from job.runs.checkpoint_writer import save_checkpoint

    measured: dict[str, list[float]] = {"step": [], "step during upload": [], "pause": [], "upload": []}
    snapshot = engine.state.empty_snapshot() if is_saved and rank == 0 else None
    step()  # The first step is slower than the others, so it is not measured.
    for number in range(1, saves + 1):
        measured["step"] += [step() for _ in range(STEPS_APART)]
        if not is_saved:
            continue
        dist.barrier()
        began = time.perf_counter()
        engine.state.copy_to(snapshot)
        measured["pause"].append(time.perf_counter() - began)

        def upload(number: int = number) -> None:
            assert snapshot is not None
            upload_began = time.perf_counter()
            state = TrainingState("a-run", 1, number, number, number, {}, {})
            save_checkpoint(os.environ["OUTPUT"], state, snapshot.tensors, b"")
            measured["upload"].append(time.perf_counter() - upload_began)

        saver = threading.Thread(target=upload)
        if snapshot is not None:
            saver.start()
        is_uploading = torch.ones(())
        while is_uploading:
            measured["step during upload"].append(step())
            is_uploading.fill_(saver.is_alive())
            dist.broadcast(is_uploading, 0)
    return measured


def _resume(engine: "Engine", rank: int) -> dict[str, Any]:
    """Download the newest checkpoint and load it as the training loop does; return the seconds of both."""
    import torch.distributed as dist

    from job.runs.checkpoint import CheckpointFiles, download_checkpoint, open_checkpoint
    from job.runs.checkpoint_list import list_checkpoints

    began, folder = time.perf_counter(), Path(os.environ["SCRATCH"])
    output = os.environ["OUTPUT"]
    checkpoint = open_checkpoint(list_checkpoints(output)[-1].url(output))
    if rank == 0:
        download_checkpoint(checkpoint, folder)
    dist.barrier()
    downloaded_at = time.perf_counter()
    engine.load(checkpoint.state.step, CheckpointFiles(folder), None)
    dist.barrier()
    return {"downloaded": [downloaded_at - began], "loaded": [time.perf_counter() - downloaded_at]}


# ---- The table ----


def measure(strategy: str, sizes: Mapping[str, Any], output: str) -> dict[str, dict[str, list[float]]]:
    """Run each part in new processes and return the measurements of rank 0, by part."""
    from job.config import Config
    from job.launcher.device import ON_CPU
    from job.launcher.supervisor import worker_environment

    environment = os.environ | worker_environment(ON_CPU, PROCESSES, Config())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += ["-m", "benchmarks.checkpoint", "--worker"]
    measured = {}
    for part in PARTS:
        with tempfile.TemporaryDirectory() as folder:
            finished = subprocess.run(
                [*command, part, strategy, json.dumps(sizes)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=environment | {"OUTPUT": output, "SCRATCH": folder},
            )
            measured[part] = json.loads(finished.stdout.strip().splitlines()[-1])
    return measured


def rows(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
    """Return the table's cells for one strategy, by row name."""
    saved, not_saved, restarted = measured["saved"], measured["not saved"], measured["restarted"]
    median = statistics.median
    # A checkpoint holds three fp32 numbers for each parameter: the weight and two moments.
    one_copy_bytes = 12 * saved["parameters"][0]
    additional_bytes = saved["peak_bytes"][0] - not_saved["peak_bytes"][0]
    additional = f"{additional_bytes / 1e9:.2f} GB, {additional_bytes / one_copy_bytes:.2f} copies"
    pause, upload, step = median(saved["pause"]), median(saved["upload"]), median(saved["step"])
    slowdown = median(saved["step during upload"]) / step
    stages = {name: restarted[name][0] for name in ("model built", "downloaded", "loaded", "first step")}
    return {
        "checkpoint size": f"{one_copy_bytes / 1e9:.2f} GB",
        "pause of training (median, maximum)": f"{pause:.2f} s, {max(saved['pause']):.2f} s",
        "upload in the background": f"{upload:.1f} s, {one_copy_bytes / 1e6 / upload:.0f} MB/s",
        "step during an upload ÷ step without": f"{slowdown:.2f} ({step:.2f} s without)",
        "peak memory of rank 0, not saving": f"{not_saved['peak_bytes'][0] / 1e9:.2f} GB",
        "additional memory when saving": additional,
        "peak memory of rank 0, restarted": f"{restarted['peak_bytes'][0] / 1e9:.2f} GB",
        "restart to the end of the first step": f"{sum(stages.values()):.1f} s: "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items()),
    }


def report(strategies: Sequence[str], sizes: Mapping[str, Any]) -> None:
    """Measure each strategy and print the table."""
    import torch

    from job.demo.server import S3Server

    columns = []
    for strategy in strategies:
        with S3Server() as server:  # A new server for each strategy: its checkpoints are deleted when it stops.
            server.take_over_environment()
            output = f"{server.create_bucket(f'stall-{secrets.token_hex(4)}')}/run"
            measured = measure(strategy, sizes, output)
            columns.append(rows(measured))
    print(
        f"torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}: "
        f"{PROCESSES} processes, {measured['saved']['parameters'][0]:,} parameters, {sizes['saves']} saves\n"
    )
    print("| | " + " | ".join(strategies) + " |\n|---|" + "---|" * len(strategies))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(cells[name] for cells in columns) + " |")


def main() -> None:
    """Print the table, or do the work of one process if `--worker` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, metavar=("PART", "STRATEGY", "SIZES"), help="run as one of the processes")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", choices=["zero2", "ddp"], default=["zero2", "ddp"])
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--hidden-size", type=int, help="use a one-layer model of this size, not that of the config")
    arguments = parser.parse_args()
    if arguments.worker:
        part, strategy, sizes = arguments.worker
        work(part, strategy, json.loads(sizes))
        return
    from job import config
    from job.model.spec import ModelSpec

    model = asdict(ModelSpec(**config.load(str(CONFIG)).model.model_dump()))
    if arguments.hidden_size:
        model |= {"hidden_size": arguments.hidden_size, "num_hidden_layers": 1, "intermediate_size": 64}
    report(arguments.strategies, {"model": model, "vocab_size": arguments.vocab_size, "saves": arguments.saves})


if __name__ == "__main__":
    main()
