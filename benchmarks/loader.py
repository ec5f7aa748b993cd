"""Measure the data path: whether two ranks wait for a slow store, and how fast batches are cut.

    python -m benchmarks.loader [waiting] [cutting] [--step-seconds 0.25] [--rate 50] [--latency 0.1]

*waiting*: the store is an S3 server on this machine behind a simulated link, which delays each answer by `--latency`
seconds and carries at most `--rate` MB/s. Two processes, the ranks of one node, take their batches from it. In each
step they sleep for `--step-seconds`; then they meet at a barrier. The shards have several times the size of the cache.
Three times are measured in each step, on the rank where they are longest: how long the loader waited for the batch (the
log calls this `data_wait`), how long the rank needed to get the batch, and how much longer than asked for it slept,
which shows how much other work the machine had. The first batch is reported separately, because it has to wait for the
first shards.

*cutting*: one rank's batches, from shards on disk that the kernel has in memory, compared with torch's `DataLoader`
over the same sequences, memory-mapped: seconds per batch, and CPU seconds of the process and its workers.

Each measurement runs in its own processes. The shards hold random tokens.
"""

import argparse
import datetime
import hashlib
import itertools
import multiprocessing
import os
import resource
import secrets
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import cpu_name, memory_bytes, peak_bytes
from benchmarks.slow_link import LongLine
from job import storage
from job.data.loader import BatchLoader
from job.data.manifest import MANIFEST_NAME, Manifest, Shard, ShardBuilder, load_manifest, manifest_bytes, open_shard
from job.data.order import SequenceOrder
from job.demo.server import S3Server

RANKS, CONTEXT_LENGTH, SEED, VOCAB_SIZE, DOCUMENT_TOKENS = 2, 512, 1, 151_646, 400
PREFETCH_STEPS = 4
_LOOK_SECONDS = 0.02


# ---- Data ----


def write_data_set(url: str, shards: int, shard_tokens: int) -> Manifest:
    """Write shards of `shard_tokens` random tokens each, as `prepare` writes them for Qwen2's vocabulary."""
    random, written = np.random.default_rng(SEED), []
    lengths = np.full(shard_tokens // DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    for number in range(shards):
        builder = ShardBuilder("uint32")
        builder.add(random.integers(VOCAB_SIZE, size=shard_tokens, dtype=np.uint32), lengths)
        content = builder.finish()
        name = f"train-{number:05d}.bin"
        storage.write_bytes(storage.join(url, name), content)
        written.append(
            Shard(
                name=name,
                tokens=shard_tokens,
                documents=builder.documents,
                utf8_bytes=4 * shard_tokens,
                characters=shard_tokens,
                size=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        )
    manifest = Manifest(
        fingerprint="random",
        tokenizer_fingerprint="random",
        vocab_size=VOCAB_SIZE,
        dtype="uint32",
        eod_id=0,
        seed=SEED,
        validation_fraction=0.0,
        split_rule="no validation",
        train=tuple(written),
        validation=(),
        statistics={},
    )
    storage.write_bytes(storage.join(url, MANIFEST_NAME), manifest_bytes(manifest))
    return load_manifest(url)


# ---- Waiting ----


@dataclass(frozen=True)
class Scene:
    """The inputs and settings of the ranks."""

    shards_url: str
    cache_dir: str
    buffer_bytes: int
    cache_bytes: int
    sequences_per_rank: int
    """Sequences that each rank takes in a step."""
    epochs: int
    step_seconds: float


@dataclass(frozen=True)
class Seen:
    """Measurements that one rank took while it read its batches."""

    waited: list[float]
    """Seconds that the loader waited for each batch."""
    taking: list[float]
    """Seconds that the rank needed to get each batch, by its own clock."""
    overslept: list[float]
    """Seconds that the rank slept longer than asked for, in each step."""
    were_ready: list[bool]
    """For each batch, whether it was ready when the rank asked for it."""
    loop_seconds: float
    """Seconds from the first batch to the end."""
    cpu_seconds: float
    """CPU seconds of the whole process in that time; its threads fetch, verify and cut."""
    grown_bytes: int
    """Peak memory of the process minus its memory before the loader was created."""
    downloads: int
    """Number of shards that this rank downloaded."""


@dataclass(frozen=True)
class Watched:
    """One run of all ranks and its measurements."""

    scene: Scene
    seen: list[Seen]
    most_disk_bytes: int
    """Largest size of the cache on disk."""
    carried_bytes: int
    """Bytes that the link carried."""

    def share(self, name: str) -> str:
        """Return a table cell: the waits in `name` in percent of the time after the first batch, and the longest."""
        seconds = slowest(getattr(rank, name) for rank in self.seen)
        whole_seconds = max(rank.loop_seconds for rank in self.seen)
        return f"{sum(seconds) / whole_seconds:.2%}, at most {max(seconds):.3f} s"


def rank_of(manifest: Manifest, scene: Scene, rank: int, ranks: int, workers: int = 1) -> BatchLoader:
    """Return the loader of a rank, with the default of each setting that the scene does not give."""
    shards = manifest.train
    sizes = [shard.size for shard in shards]
    order = SequenceOrder([shard.tokens for shard in shards], sizes, CONTEXT_LENGTH, SEED, scene.buffer_bytes)
    return BatchLoader(
        scene.shards_url,
        manifest,
        order,
        global_batch_size=ranks * scene.sequences_per_rank,
        micro_batch_size=scene.sequences_per_rank,
        rank=rank,
        world_size=ranks,
        start_position=0,
        end_position=order.position_limit(scene.epochs),
        cache_dir=scene.cache_dir,
        cache_bytes=scene.cache_bytes,
        prefetch_steps=PREFETCH_STEPS,
        workers=workers,
    )


def train(scene: Scene, rank: int, meeting: Barrier, results: Any) -> None:
    """Take batches as one rank, sleep instead of computing, and put the measurements into `results`."""
    torch.set_num_threads(1)
    manifest = load_manifest(scene.shards_url)
    Path("/proc/self/clear_refs").write_text("5")  # Reset the kernel's record of this process's peak memory.
    before_bytes = memory_bytes("VmRSS")
    meeting.wait()
    waited, taking, overslept, were_ready = list[float](), list[float](), list[float](), list[bool]()
    began = used = 0.0
    with rank_of(manifest, scene, rank, RANKS) as loader:
        while True:
            asked_at, waited_before = time.perf_counter(), loader.wait_seconds
            is_ready = loader.poll(0)
            if next(loader, None) is None:
                break
            taken_at = time.perf_counter()
            taking.append(taken_at - asked_at)
            waited.append(loader.wait_seconds - waited_before)
            were_ready.append(is_ready)
            if len(taking) == 1:
                meeting.wait()
                began, used = time.perf_counter(), time.process_time()
            slept_at = time.perf_counter()
            time.sleep(scene.step_seconds)
            overslept.append(time.perf_counter() - slept_at - scene.step_seconds)
            meeting.wait()
        loop_seconds, cpu_used = time.perf_counter() - began, time.process_time() - used
        grown_bytes = peak_bytes() - before_bytes
        seen = Seen(waited, taking, overslept, were_ready, loop_seconds, cpu_used, grown_bytes, loader.downloads)
        results.put((rank, seen))


def slowest(of_ranks: Iterable[Sequence[float]]) -> list[float]:
    """Return the seconds of each step except the first, on its slowest rank, for which the others wait."""
    return [max(step) for step in zip(*of_ranks, strict=True)][1:]


def disk_bytes(cache: Path) -> int:
    """Return the size on disk of all shards in the cache, unfinished downloads included."""
    total = 0
    for path in [*cache.glob("*.shard"), *cache.glob("*.partial")]:
        with suppress(FileNotFoundError):  # The cache may rename or delete a file at any time.
            total += path.stat().st_size
    return total


def watch(scene: Scene) -> tuple[list[Seen], int]:
    """Run the ranks and return their measurements, by rank, and the largest size of the cache on disk."""
    spawn = multiprocessing.get_context("spawn")
    results, meeting = spawn.SimpleQueue(), spawn.Barrier(RANKS)
    ranks = [spawn.Process(target=train, args=(scene, rank, meeting, results)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    most_bytes = 0
    while any(process.is_alive() for process in ranks) and results.empty():
        most_bytes = max(most_bytes, disk_bytes(Path(scene.cache_dir)))
        time.sleep(_LOOK_SECONDS)
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.kill()
            raise RuntimeError("a rank failed; its error is above")
    seen = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join()
    return [seen[rank] for rank in range(RANKS)], most_bytes


def report_waiting(arguments: argparse.Namespace) -> None:
    """Measure waiting and print its table, with one column for each size of the cache."""
    shard_tokens = arguments.shard_mib * 2**18 // DOCUMENT_TOKENS * DOCUMENT_TOKENS
    columns = list[Watched]()
    with S3Server() as server, tempfile.TemporaryDirectory() as folder:
        server.take_over_environment()
        url = f"{server.create_bucket(f'far-{secrets.token_hex(4)}')}/shards"
        manifest = write_data_set(url, arguments.shards, shard_tokens)
        buffer_bytes = arguments.buffer_shards * manifest.train[0].size
        for buffers in arguments.cache_buffers:
            with LongLine(server.endpoint_url, arguments.latency, arguments.rate * 1e6) as link:
                os.environ["AWS_ENDPOINT_URL"] = link.endpoint_url
                scene = Scene(
                    url,
                    str(Path(folder, f"cache-{buffers}")),
                    buffer_bytes,
                    int(buffers * buffer_bytes),
                    arguments.step_tokens // CONTEXT_LENGTH,
                    arguments.epochs,
                    arguments.step_seconds,
                )
                columns.append(Watched(scene, *watch(scene), link.carried_bytes))
    batches_bytes = (PREFETCH_STEPS + 1) * 16 * columns[0].scene.sequences_per_rank * CONTEXT_LENGTH
    print(
        f"\n{RANKS} ranks, {arguments.step_tokens:,} tokens per rank and step, steps of {arguments.step_seconds} s; "
        f"{arguments.shards} shards of {manifest.train[0].size / 2**20:.0f} MiB, {arguments.epochs} epochs; "
        f"link of {arguments.latency * 1e3:.0f} ms and {arguments.rate} MB/s\n"
    )
    rows = {
        "`data.cache_bytes`": lambda run: f"{mib(run.scene.cache_bytes)} MiB",
        "peak size of the cache on disk": lambda run: f"{mib(run.most_disk_bytes)} MiB",
        "steps": lambda run: f"{len(run.seen[0].taking):,}",
        "first batch after": lambda run: f"{max(rank.taking[0] for rank in run.seen):.1f} s",
        "of that, transfer over the link": lambda run: f"{run.scene.buffer_bytes / 1e6 / arguments.rate:.1f} s",
        "later batches that were not ready": lambda run: (
            f"{sum(rank.were_ready[1:].count(False) for rank in run.seen)}"
        ),
        "waiting for later batches": lambda run: run.share("waited"),
        "getting all later batches": lambda run: run.share("taking"),
        "sleeping longer than asked for": lambda run: run.share("overslept"),
        "shards downloaded by both ranks": lambda run: f"{sum(rank.downloads for rank in run.seen)}",
        "bytes over the link": lambda run: f"{mib(run.carried_bytes)} MiB",
        f"memory of a rank's loader ({PREFETCH_STEPS + 1} batches are {mib(batches_bytes)} MiB)": lambda run: (
            f"{mib(max(rank.grown_bytes for rank in run.seen))} MiB"
        ),
        "CPU time of a rank per step": lambda run: (
            f"{1e3 * max(rank.cpu_seconds for rank in run.seen) / len(run.seen[0].taking):.1f} ms"
        ),
    }
    print("| cache, in buffers | " + " | ".join(f"{buffers:g}" for buffers in arguments.cache_buffers) + " |")
    print("|---|" + "---|" * len(columns))
    for name, cell in rows.items():
        print(f"| {name} | " + " | ".join(map(cell, columns)) + " |")


def mib(count: float) -> str:
    """Return a number of bytes in MiB, as text."""
    return f"{count / 2**20:,.0f}"


# ---- Cutting ----


class Sequences(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """A plain data set for torch's `DataLoader`: the full sequences of memory-mapped shards."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self._shards = [open_shard(Path(folder, shard.name), shard, "uint32")[0] for shard in manifest.train]
        self._sequences_per_shard = (manifest.train[0].tokens - 1) // CONTEXT_LENGTH

    def __len__(self) -> int:
        return self._sequences_per_shard * len(self._shards)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard, sequence = divmod(index, self._sequences_per_shard)
        first = sequence * CONTEXT_LENGTH
        tokens = torch.from_numpy(self._shards[shard][first : first + CONTEXT_LENGTH + 1].astype(np.int64))
        return tokens[:-1], tokens[1:]


def cut(loader_name: str, threads: int, folder: str, cache_dir: str, batch_size: int, batches: int) -> dict[str, float]:
    """Return the seconds that a batch takes, and the CPU seconds of all processes of the loader.

    `threads` is the number of threads of our loader, and of processes of torch's `DataLoader`.
    """
    torch.set_num_threads(1)
    manifest = load_manifest(folder)
    if loader_name == "ours":
        scene = Scene(folder, cache_dir, 2**60, 2**60, batch_size, 1000, 0)
        ours = rank_of(manifest, scene, 0, 1, threads)
        loader: Any = ours
    else:
        theirs = torch.utils.data.DataLoader(
            Sequences(folder, manifest),
            batch_size=batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(SEED),
            num_workers=threads,
            multiprocessing_context="spawn" if threads else None,  # A fork hangs after the S3 client was used.
        )
        loader = itertools.chain.from_iterable(theirs for _ in itertools.count())
    iterator = iter(loader)
    for _ in range(PREFETCH_STEPS + 1):  # Skip the batches that were prefetched before the measurement.
        next(iterator)
    began, used = time.perf_counter(), cpu_seconds()
    for _ in range(batches):
        next(iterator)
    measured = {"seconds": (time.perf_counter() - began) / batches, "cpu_seconds": (cpu_seconds() - used) / batches}
    if loader_name == "ours":
        ours.close()
    return measured


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its running children."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    total = own.ru_utime + own.ru_stime
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def report_cutting(arguments: argparse.Namespace) -> None:
    """Measure cutting and print its table."""
    batch_size = arguments.step_tokens // CONTEXT_LENGTH
    shard_tokens = arguments.shard_mib * 2**18 // DOCUMENT_TOKENS * DOCUMENT_TOKENS
    cases = [("ours", 1), ("ours", 2), ("torch", 0), ("torch", 1), ("torch", 2)]
    measured: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(f"{folder}/data", arguments.shards, shard_tokens)
        for _ in range(arguments.times):
            for case in cases:
                # Each case gets a new process: a pool of one that is used once.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    task = pool.submit(cut, *case, f"{folder}/data", f"{folder}/cache", batch_size, arguments.batches)
                    measured[case].append(task.result())
    print(f"\nBatches of {batch_size} sequences of {CONTEXT_LENGTH} tokens, medians of {arguments.times}\n")
    print("| loader | time per batch | CPU time per batch | tokens per second of CPU time |\n|---|---|---|---|")
    names = {"ours": "`BatchLoader`, {} threads", "torch": "`torch.utils.data.DataLoader`, {} workers"}
    for (name, threads), runs in measured.items():
        seconds, used = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds"))
        rate = batch_size * CONTEXT_LENGTH / used
        print(f"| {names[name].format(threads)} | {1e3 * seconds:.2f} ms | {1e3 * used:.2f} ms | {rate / 1e6:.1f} M |")


def main() -> None:
    """Measure what the command line asks for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"cutting": report_cutting, "waiting": report_waiting}
    parser.add_argument("tables", nargs="*", choices=[*tables, []], help="tables to measure (default: both)")
    parser.add_argument("--step-tokens", type=int, default=131_072, help="tokens of one rank in a step")
    parser.add_argument("--step-seconds", type=float, default=0.25, help="seconds that a rank sleeps in a step")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds by which the link delays each answer")
    parser.add_argument("--rate", type=float, default=50, help="MB/s of the link")
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--shard-mib", type=int, default=8, help="size of a shard in MiB")
    parser.add_argument("--buffer-shards", type=int, default=4, help="shards that are shuffled together")
    parser.add_argument("--cache-buffers", type=float, nargs="+", default=[2], help="data.cache_bytes, in buffers")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batches", type=int, default=300, help="batches to cut in one measurement")
    parser.add_argument("--times", type=int, default=5, help="measurements of cutting")
    arguments = parser.parse_args()
    for name in arguments.tables or tables:
        tables[name](arguments)
    print(f"\ntorch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}")


if __name__ == "__main__":
    main()
