"""How long training stands still for a checkpoint: copied and uploaded in the background, and saved on the spot.

    python -m benchmarks.checkpoint_stall

Two processes hold a model of 100 M parameters under ZeRO-2 (or DDP), its fp32 weights and moments spread over them, and
save it to a real S3 server on this machine, several times. Training stands still while rank 0 takes the copy; on the
spot it would until the manifest is written. Both times are of the same save.
"""

import argparse
import datetime
import os
import secrets
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROCESSES, SAVES = 2, 5
SPEC: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 3072,
}
VOCAB_SIZE, CONTEXT_LENGTH = 2048, 128


def work(strategy_name: str) -> None:
    """One of the processes; the first prints a line for each save: parameters, seconds stood still, seconds in all."""
    import torch

    from job.cluster.family import leave
    from job.model.architecture import LanguageModel, build_model
    from job.model.spec import ModelSpec
    from job.quiet import silence_libraries
    from job.training.checkpoint import TrainingState, save_checkpoint
    from job.training.engine import AdamW, Engine, Strategy, start_accelerator

    silence_libraries()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    strategy = Strategy(strategy_name, "fp32", world_size, 1, 1, 1.0)
    causal_lm = build_model(ModelSpec(**SPEC), VOCAB_SIZE, 0, CONTEXT_LENGTH, seed=1)
    accelerator = start_accelerator(strategy)
    engine = Engine(accelerator, LanguageModel(causal_lm, None), strategy, AdamW(0.1, 0.9, 0.999, 1e-8))
    tokens = torch.randint(VOCAB_SIZE, (1, CONTEXT_LENGTH), generator=torch.Generator().manual_seed(rank))
    snapshot = engine.empty_snapshot() if rank == 0 else None
    for step in range(1, SAVES + 1):
        engine.step([(tokens, tokens)], CONTEXT_LENGTH * world_size, 1e-4)
        accelerator.wait_for_everyone()
        began = time.perf_counter()
        engine.copy_state(snapshot)
        stalled_seconds = time.perf_counter() - began
        if snapshot is not None:
            state = TrainingState("a-run", 1, step, step, step, {}, {})
            save_checkpoint(os.environ["OUTPUT"], state, snapshot.tensors, b"")
            parameters = sum(tensor.numel() for tensor in snapshot.flat.values()) // 3
            print(parameters, stalled_seconds, time.perf_counter() - began, flush=True)
        accelerator.wait_for_everyone()
    leave(0)


def report() -> None:
    """The table of both strategies."""
    import torch

    from job.cluster.launch import worker_environment
    from job.config import Config
    from job.demo.server import S3Server

    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line).split(": ")[1]
    print(f"torch {torch.__version__}, {cpu}, {os.cpu_count()} cores, {datetime.date.today()}, {SAVES} saves each\n")
    print("| strategy | parameters | training stands still (median, most) | saved on the spot (median) | ratio |")
    print("|---|---|---|---|---|")
    with S3Server() as server:
        server.take_over_environment()
        for strategy in ("zero2", "ddp"):
            output = f"{server.create_bucket(f'stall-{secrets.token_hex(4)}')}/run"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
            command += ["-m", "benchmarks.checkpoint_stall", "--worker", strategy]
            environment = os.environ | worker_environment(0, PROCESSES, Config()) | {"OUTPUT": output}
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            rows = [tuple(map(float, line.split())) for line in printed.splitlines()]
            stalls, wholes = [row[1] for row in rows], [row[2] for row in rows]
            still, whole = statistics.median(stalls), statistics.median(wholes)
            print(
                f"| {strategy} | {rows[0][0]:,.0f} | {still:.2f} s, {max(stalls):.2f} s | {whole:.1f} s | "
                f"{still / whole:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", metavar="STRATEGY", help="measure, as one of the processes")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
    else:
        report()
