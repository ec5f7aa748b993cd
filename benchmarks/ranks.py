"""Measure the cost of a second process: steps of ZeRO-2 and DDP compared with one process and with plain PyTorch.

    python -m benchmarks.ranks [--micro-batches 1] [--rounds 3]

All cases use the same model, global batch and AdamW, one thread per process, and fp32 on the CPU. They take turns, each
time in new processes. The time of a step is that of the slowest rank. CPU time is the sum over all threads and ranks;
it shows the cost of a step even if other work runs on the machine. Two processes that exchange nothing, with half the
batch each, show how fast two processes can be on this machine: the time beyond that is the exchange and its
bookkeeping. cProfile on rank 0 shows where the time goes. It profiles additional steps, because it slows Python down.
"""

import argparse
import cProfile
import datetime
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.machine import cpu_name

VOCAB_SIZE, EOD_ID, WARMUP_STEPS, PROFILED_STEPS = 16_384, 0, 2, 3
CASES: dict[str, tuple[str, int]] = {
    "plain PyTorch": ("plain", 1),
    "ddp, 1 process": ("ddp", 1),
    "zero2, 1 process": ("zero2", 1),
    "plain PyTorch twice, half the batch each, no exchange": ("plain", 2),
    "PyTorch's DDP, 2 processes": ("torch-ddp", 2),
    "ddp, 2 processes": ("ddp", 2),
    "zero2, 2 processes": ("zero2", 2),
}
"""For each case, by name: its implementation and its number of processes.

A case is compared with the first case that has the same number of processes.
"""
PLACES = ("model", "backward", "exchange", "gradient norm", "AdamW", "DeepSpeed", "accelerate", "other")


# ---- One of the processes ----


def work(way: str, sizes: Mapping[str, int]) -> None:
    """Measure the steps in this process; rank 0 prints the seconds of each step, and by place in a step, as JSON."""
    import torch
    import torch.distributed as dist

    from job.launcher.processes import leave
    from job.log_setup import silence_libraries
    from job.model.language_model import LanguageModel, build_model
    from job.model.spec import ModelSpec

    silence_libraries()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    spec = ModelSpec(
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["hidden"] // 64,
        num_key_value_heads=1,
        intermediate_size=4 * sizes["hidden"],
    )
    model = LanguageModel(build_model(spec, VOCAB_SIZE, EOD_ID, sizes["context"], seed=1))
    micro_batch_size = sizes["batch"] // world_size // sizes["micro_batches"]
    random = torch.Generator().manual_seed(rank)
    shape = micro_batch_size, sizes["context"]
    tokens = [torch.randint(VOCAB_SIZE, shape, generator=random) for _ in range(sizes["micro_batches"])]
    pairs, targets = [(ids, ids.roll(-1, 1)) for ids in tokens], sizes["batch"] * sizes["context"]
    if way in ("plain", "torch-ddp"):
        dist.init_process_group("gloo")
        step = _plain_step(model, pairs, targets, is_ddp=way == "torch-ddp")
    else:
        from job.training.accelerator import Strategy, start_accelerator
        from job.training.engine import Engine
        from job.training.optimizer_settings import OptimizerSettings

        strategy = Strategy(way, "fp32", world_size, micro_batch_size, sizes["micro_batches"], 1.0)
        engine = Engine(start_accelerator(strategy), model, strategy, OptimizerSettings("adamw", 0.1, 0.9, 0.999, 1e-8))

        def step() -> None:
            engine.step(pairs, targets, 1e-4)

    measured = [_measured(step) for _ in range(WARMUP_STEPS + sizes["steps"])][WARMUP_STEPS:]
    profile = cProfile.Profile()
    for _ in range(PROFILED_STEPS):
        dist.barrier()
        profile.runcall(step)
    if rank == 0:
        profiled_seconds = places(pstats.Stats(profile).stats)  # type: ignore[attr-defined]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        by_place = {name: seconds / PROFILED_STEPS for name, seconds in profiled_seconds.items()}
        seconds, cpu_seconds = zip(*measured, strict=True)
        times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        print(json.dumps({"parameters": parameters, "places": by_place, **times}), flush=True)
    dist.barrier()
    leave(0)


def _plain_step(model: Any, pairs: Any, targets: int, is_ddp: bool) -> Callable[[], None]:
    """Return a step written in plain PyTorch, with its DDP if `is_ddp`."""
    import torch
    import torch.distributed as dist

    scale = (dist.get_world_size() if is_ddp else 1) / targets
    trained = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True) if is_ddp else model
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def step() -> None:
        for number, (inputs, labels) in enumerate(pairs):
            if is_ddp:
                trained.require_backward_grad_sync = number + 1 == len(pairs)
            (trained(inputs, labels) * scale).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    return step


def _measured(step: Callable[[], None]) -> tuple[float, float]:
    """Run a step on all ranks at once; return its seconds on the slowest rank and the CPU seconds of all ranks."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    began, used = time.perf_counter(), time.process_time()
    step()
    seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    cpu_seconds = torch.tensor(time.process_time() - used, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(cpu_seconds)
    return float(seconds), float(cpu_seconds)


def places(stats: Mapping[Any, Any]) -> Counter[str]:
    """Return the seconds of a profile by place; a function not written in Python counts for its caller's file."""
    totals = Counter[str]()
    for (file, _, name), (_, _, own_seconds, _, callers) in stats.items():
        if file == "~" and callers:
            for (calling_file, _, _), (_, _, seconds, _) in callers.items():
                totals[place(calling_file, name)] += seconds
        else:
            totals[place(file, name)] += own_seconds
    return totals


def place(file: str, name: str) -> str:
    """Return which of `PLACES` a function belongs to, by its name and by the file it is in or called from."""
    by_name = {"c10d": "exchange", "run_backward": "backward", "_fused_adamw": "AdamW"}
    by_file = {
        "/deepspeed/": "DeepSpeed",
        "/accelerate/": "accelerate",
        "/torch/nn/utils/": "gradient norm",
        "/torch/optim/": "AdamW",
        "/torch/distributed/": "exchange",
        "/torch/nn/": "model",
        "/transformers/": "model",
        "/job/model/": "model",
    }
    return next(
        (where for part, where in by_name.items() if part in name),
        next((where for part, where in by_file.items() if part in file), "other"),
    )


# ---- The table ----


def measure(case: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Run a case in new processes and return the measurements that rank 0 prints."""
    from job.config import Config
    from job.launcher.device import ON_CPU
    from job.launcher.supervisor import worker_environment

    way, processes = CASES[case]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "benchmarks.ranks", "--worker", way, json.dumps(dict(sizes))]
    environment = os.environ | worker_environment(ON_CPU, processes, Config()) | {"OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return dict(json.loads(printed.strip().splitlines()[-1]))


def report(sizes: Mapping[str, int], rounds: int) -> None:
    """Measure all cases in turns and print both tables."""
    import torch

    measured: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case, runs in measured.items():
            runs.append(measure(case, sizes))
    medians, used = (
        {case: statistics.median(value for run in runs for value in run[key]) for case, runs in measured.items()}
        for key in ("seconds", "cpu_seconds")
    )
    firsts: dict[int, str] = {}
    for case, (_, processes) in CASES.items():
        firsts.setdefault(processes, case)
    print(
        f"torch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}: "
        f"{measured['plain PyTorch'][0]['parameters']:,} parameters, {sizes['batch']} x {sizes['context']} tokens per "
        f"step, {sizes['micro_batches']} micro-batches per process; medians of {rounds} x {sizes['steps']} steps\n"
    )
    print("| | step | ÷ plain PyTorch | CPU time per step | more than plain PyTorch |\n|---|---|---|---|---|")
    for case, (_, processes) in CASES.items():
        plain = firsts[processes]
        print(
            f"| {case} | {medians[case]:.3f} s | {medians[case] / medians[plain]:.2f} | {used[case]:.3f} s | "
            f"{used[case] - used[plain]:+.3f} s, {used[case] / used[plain] - 1:+.1%} |"
        )
    print("\n| seconds per profiled step | " + " | ".join(PLACES) + " |\n|---|" + "---|" * len(PLACES))
    for case, runs in measured.items():
        cells = [statistics.median(run["places"].get(where, 0.0) for run in runs) for where in PLACES]
        print(f"| {case} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


def main() -> None:
    """Print the tables, or do the work of one process if `--worker` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=2, metavar=("WAY", "SIZES"), help="run as one of the processes")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step, over all processes")
    parser.add_argument("--micro-batches", type=int, default=1, help="gradient accumulation steps")
    parser.add_argument("--steps", type=int, default=6, help="steps to measure in each round")
    parser.add_argument("--rounds", type=int, default=3, help="times that each case is run")
    arguments = vars(parser.parse_args())
    worker, rounds = arguments.pop("worker"), arguments.pop("rounds")
    if worker:
        work(worker[0], json.loads(worker[1]))
    else:
        report(arguments, rounds)


if __name__ == "__main__":
    main()
