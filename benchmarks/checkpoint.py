"""What a checkpoint costs: how long training stands still, the upload beside it, its memory, and the way back.

    python -m benchmarks.checkpoint [--saves 3] [--strategies zero2 ddp]

Two processes hold the model of configs/wiki-123m.yaml, in fp32 with AdamW's moments, and train on with tiny batches.

*saved*: several times the first one takes its copy, which is when training stands still, and uploads it to a real S3
server on this machine while both train on. *not saved*: the same without; what the first process has more at its peak
is what saving takes. *restarted*: new processes build the model, bring the checkpoint from the store, take it in and
make a step; the time until Python has read its libraries is not part of it (`benchmarks.start_up` has it).
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
"""Steps between two saves, and so many without one in their place."""
PARTS = ("not saved", "saved", "restarted")
CONFIG = Path(__file__).parent.parent / "configs" / "wiki-123m.yaml"


# ---- One of the processes ----


def work(part: str, strategy_name: str, sizes: Mapping[str, Any]) -> None:
    """Does one of the `PARTS`; the first process prints what it measured, as JSON."""
    import torch
    import torch.distributed as dist

    from job.launcher.processes import leave
    from job.log_setup import silence_libraries
    from job.model.architecture import LanguageModel, build_model
    from job.model.spec import ModelSpec
    from job.training.engine import AdamW, Engine, Strategy, start_accelerator

    silence_libraries()
    began = time.perf_counter()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    causal_lm = build_model(ModelSpec(**sizes["model"]), sizes["vocab_size"], EOD_ID, CONTEXT_LENGTH, seed=1)
    strategy = Strategy(strategy_name, "fp32", world_size, 1, 1, 1.0)
    engine = Engine(start_accelerator(strategy), LanguageModel(causal_lm), strategy, AdamW(0.1, 0.9, 0.999, 1e-8))
    built_seconds = time.perf_counter() - began
    tokens = torch.randint(sizes["vocab_size"], (1, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(rank))

    def step() -> float:
        asked_at = time.perf_counter()
        engine.step([(tokens, tokens)], CONTEXT_LENGTH * world_size, 1e-4)
        return time.perf_counter() - asked_at

    if part == "restarted":
        measured = {"built": [built_seconds], **_go_on(engine, rank), "stepped": [step()]}
    else:
        measured = _train(engine, rank, step, sizes["saves"], is_saved=part == "saved")
    measured["parameters"] = [sum(parameter.numel() for parameter in causal_lm.parameters())]
    dist.barrier()
    if rank == 0:
        print(json.dumps(measured | {"peak_bytes": [peak_bytes()]}), flush=True)
    dist.barrier()
    leave(0)


def _train(engine: "Engine", rank: int, step: Callable[[], float], saves: int, is_saved: bool) -> dict[str, Any]:
    """Seconds of the steps with nothing beside them, of those beside an upload, stood still, and of the uploads."""
    import torch
    import torch.distributed as dist

    from job.runs.checkpoint import TrainingState, save_checkpoint

    measured: dict[str, list[float]] = {"alone": [], "beside": [], "still": [], "upload": []}
    snapshot = engine.empty_snapshot() if is_saved and rank == 0 else None
    step()  # the first one is slower
    for number in range(1, saves + 1):
        measured["alone"] += [step() for _ in range(STEPS_APART)]
        if not is_saved:
            continue
        dist.barrier()
        began = time.perf_counter()
        engine.copy_state(snapshot)
        measured["still"].append(time.perf_counter() - began)

        def upload(number: int = number) -> None:
            assert snapshot is not None
            begun_at = time.perf_counter()
            state = TrainingState("a-run", 1, number, number, number, {}, {})
            save_checkpoint(os.environ["OUTPUT"], state, snapshot.tensors, b"")
            measured["upload"].append(time.perf_counter() - begun_at)

        saver = threading.Thread(target=upload)
        if snapshot is not None:
            saver.start()
        is_uploading = torch.ones(())
        while is_uploading:
            measured["beside"].append(step())
            is_uploading.fill_(saver.is_alive())
            dist.broadcast(is_uploading, 0)
    return measured


def _go_on(engine: "Engine", rank: int) -> dict[str, Any]:
    """Seconds to bring the newest checkpoint to this machine and to take it in; as the training loop does it."""
    import torch.distributed as dist

    from job.runs.checkpoint import CheckpointFiles, download_checkpoint, list_checkpoints, open_checkpoint

    began, folder = time.perf_counter(), Path(os.environ["SCRATCH"])
    output = os.environ["OUTPUT"]
    checkpoint = open_checkpoint(list_checkpoints(output)[-1].url(output))
    if rank == 0:
        download_checkpoint(checkpoint, folder)
    dist.barrier()
    brought_at = time.perf_counter()
    engine.load_state(checkpoint.state.step, CheckpointFiles(folder))
    dist.barrier()
    return {"brought": [brought_at - began], "taken in": [time.perf_counter() - brought_at]}


# ---- The table ----


def measure(strategy: str, sizes: Mapping[str, Any], output: str) -> dict[str, dict[str, list[float]]]:
    """What the first process measured, by part; each part in new processes."""
    from job.config import Config
    from job.launcher.device import ON_CPU
    from job.launcher.supervisor import worker_environment

    environment = os.environ | worker_environment(ON_CPU, PROCESSES, Config())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += ["-m", "benchmarks.checkpoint", "--worker"]
    measured = {}
    for part in PARTS:
        with tempfile.TemporaryDirectory() as folder:
            places = {"OUTPUT": output, "SCRATCH": folder}
            line = [*command, part, strategy, json.dumps(sizes)]
            done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=environment | places)
            measured[part] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def rows(measured: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, str]:
    """The cells of a strategy."""
    saved, plain, again = measured["saved"], measured["not saved"], measured["restarted"]
    median = statistics.median
    # Of a parameter the checkpoint has the weight and two moments, fp32.
    one_copy_bytes = 12 * saved["parameters"][0]
    more_bytes = saved["peak_bytes"][0] - plain["peak_bytes"][0]
    upload, step = median(saved["upload"]), median(saved["alone"])
    stages = {name: again[name][0] for name in ("built", "brought", "taken in", "stepped")}
    return {
        "a checkpoint": f"{one_copy_bytes / 1e9:.2f} GB",
        "training stands still (median, most)": f"{median(saved['still']):.2f} s, {max(saved['still']):.2f} s",
        "the upload beside it": f"{upload:.1f} s, {one_copy_bytes / 1e6 / upload:.0f} MB/s",
        "a step beside the upload ÷ one alone": f"{median(saved['beside']) / step:.2f} ({step:.2f} s alone)",
        "peak of the first process, not saving": f"{plain['peak_bytes'][0] / 1e9:.2f} GB",
        "more of it, saving": f"{more_bytes / 1e9:.2f} GB: {more_bytes / one_copy_bytes:.2f} copies",
        "peak of the first process, restarted": f"{again['peak_bytes'][0] / 1e9:.2f} GB",
        "restart to the end of the first step": f"{sum(stages.values()):.1f} s: "
        + ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items()),
    }


def report(strategies: Sequence[str], sizes: Mapping[str, Any]) -> None:
    """Prints the table."""
    import torch

    from job.demo.server import S3Server

    cells = []
    for strategy in strategies:
        with S3Server() as server:  # what it holds goes with it
            server.take_over_environment()
            output = f"{server.create_bucket(f'stall-{secrets.token_hex(4)}')}/run"
            measured = measure(strategy, sizes, output)
            cells.append(rows(measured))
    print(
        f"torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}: "
        f"{PROCESSES} processes, {measured['saved']['parameters'][0]:,} parameters, {sizes['saves']} saves\n"
    )
    print("| | " + " | ".join(strategies) + " |\n|---|" + "---|" * len(strategies))
    for name in cells[0]:
        print(f"| {name} | " + " | ".join(of_one[name] for of_one in cells) + " |")


def main() -> None:
    """Measures, or is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=3, metavar=("PART", "STRATEGY", "SIZES"), help="be one of the processes")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--strategies", nargs="+", choices=["zero2", "ddp"], default=["zero2", "ddp"])
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--hidden-size", type=int, help="in place of the config's")
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
