"""The data path: whether two ranks ever wait for a store that is far away, and how fast batches are cut.

    python -m benchmarks.loader [waiting] [cutting] [--step-seconds 0.25] [--rate 50] [--latency 0.1]

*waiting*: an S3 server on this machine, each answer of which comes `--latency` seconds later, all of them together no
faster than `--rate` MB/s. Two processes, the ranks of one node, take their batches from it; a step takes
`--step-seconds`, in which they sleep, and they meet after each. The shards are several times what the cache may hold.
Of each step the slower rank counts: how long its loader waited for the batch (what the log calls `data_wait`), how long
it was before the consumer had it, and, of a machine that others use too, how much longer it slept than it asked for.
The first batch is apart: it takes the time that the first shards take to come.

*cutting*: one rank's batches from shards on the disk that the kernel has in memory, against torch's `DataLoader` over
the same windows, memory-mapped: seconds per batch, and CPU seconds of the process and its workers.

Every measured thing runs in a process of its own. The shards hold random tokens.
"""

import argparse
import asyncio
import datetime
import hashlib
import itertools
import math
import multiprocessing
import os
import resource
import secrets
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from benchmarks.machine import cpu_name, memory_bytes, peak_bytes
from job import storage
from job.data.loader import BatchLoader
from job.data.manifest import MANIFEST_NAME, Manifest, Shard, ShardBuilder, load_manifest, manifest_bytes, open_shard
from job.data.order import WindowOrder
from job.demo.server import S3Server

RANKS, CONTEXT_LENGTH, SEED, VOCAB_SIZE, DOCUMENT_TOKENS = 2, 512, 1, 151_646, 400
PREFETCH_STEPS = 4
_PIECE_BYTES = 2**16
_LOOK_SECONDS = 0.02


# ---- A store that is far away ----


class LongLine:
    """Listens on a free port inside the block and passes bytes on: answers late, and no faster than the line carries.

    Args:
        target_url: the S3 server's ``http://host:port``.
        latency_seconds: by which every answer, and every new connection, is late.
        bytes_per_second: of all answers together.
    """

    def __init__(self, target_url: str, latency_seconds: float, bytes_per_second: float) -> None:
        host, _, port = target_url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._latency_seconds, self._bytes_per_second = latency_seconds, bytes_per_second
        self._free_at = 0.0
        self.carried_bytes = 0
        """Of answers, so far."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="long-line", daemon=True)
        self.endpoint_url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1"), self._loop).result()
        self.endpoint_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _hang_up(self) -> None:
        """Close what is still connected."""
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self._latency_seconds)
        from_store, to_store = await asyncio.open_connection(*self._target)
        await asyncio.gather(self._ask(reader, to_store), self._answer(from_store, writer), return_exceptions=True)

    async def _ask(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while piece := await source.read(_PIECE_BYTES):
            target.write(piece)
            await target.drain()
        target.close()

    async def _answer(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        sent_at = 0.0
        while piece := await source.read(_PIECE_BYTES):
            # The line carries one piece after the other, whosever it is; this connection's next waits for this one.
            self._free_at = max(self._free_at, self._loop.time()) + len(piece) / self._bytes_per_second
            sent_at = self._free_at
            self._loop.call_at(sent_at + self._latency_seconds, target.write, piece)
            self.carried_bytes += len(piece)
            await asyncio.sleep(sent_at - self._loop.time())
        # Of two calls at one time either may be the first.
        self._loop.call_at(math.nextafter(sent_at + self._latency_seconds, math.inf), target.close)


def write_data_set(url: str, shards: int, shard_tokens: int) -> Manifest:
    """Shards of so many random tokens, as `prepare` writes them for Qwen2's vocabulary."""
    random, found = np.random.default_rng(SEED), []
    lengths = np.full(shard_tokens // DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    for number in range(shards):
        builder = ShardBuilder("uint32")
        builder.add(random.integers(VOCAB_SIZE, size=shard_tokens, dtype=np.uint32), lengths)
        content = builder.finish()
        name = f"train-{number:05d}.bin"
        storage.write_bytes(storage.join(url, name), content)
        found.append(
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
        split_rule="none is held out",
        train=tuple(found),
        validation=(),
        statistics={},
    )
    storage.write_bytes(storage.join(url, MANIFEST_NAME), manifest_bytes(manifest))
    return load_manifest(url)


# ---- Waiting ----


@dataclass(frozen=True)
class Scene:
    """What the ranks are given."""

    shards_url: str
    cache_dir: str
    buffer_bytes: int
    cache_bytes: int
    windows_per_rank: int
    """Of one step."""
    epochs: int
    step_seconds: float


@dataclass(frozen=True)
class Seen:
    """What a rank saw."""

    waited: list[float]
    """Seconds that the loader waited for each batch."""
    taking: list[float]
    """Seconds until the consumer had it, by its own clock."""
    overslept: list[float]
    """Seconds that it slept too long in each step."""
    were_ready: list[bool]
    """Whether each batch was there when it was asked for."""
    loop_seconds: float
    """From the first batch to the end."""
    cpu_seconds: float
    """Of the whole process meanwhile: its threads fetch, verify and cut."""
    grown_bytes: int
    """Most memory of the process less what it had before the loader."""
    downloads: int


@dataclass(frozen=True)
class Watched:
    """A run of the ranks."""

    scene: Scene
    seen: list[Seen]
    most_disk_bytes: int
    carried_bytes: int
    """Over the line."""

    def share(self, name: str) -> str:
        """Of the time after the first batch, what one of `Seen`'s lists comes to, and its longest."""
        seconds = slowest(getattr(one, name) for one in self.seen)
        whole = max(one.loop_seconds for one in self.seen)
        return f"{sum(seconds) / whole:.2%}, at most {max(seconds):.3f} s"


def rank_of(manifest: Manifest, scene: Scene, rank: int, ranks: int) -> BatchLoader:
    """The loader of a rank, with the settings' defaults where the scene says nothing."""
    shards = manifest.train
    sizes = [shard.size for shard in shards]
    order = WindowOrder([shard.tokens for shard in shards], sizes, CONTEXT_LENGTH, SEED, scene.buffer_bytes)
    return BatchLoader(
        scene.shards_url,
        manifest,
        order,
        global_batch_size=ranks * scene.windows_per_rank,
        micro_batch_size=scene.windows_per_rank,
        rank=rank,
        world_size=ranks,
        start_position=0,
        end_position=order.position_limit(scene.epochs),
        cache_dir=scene.cache_dir,
        cache_bytes=scene.cache_bytes,
        prefetch_steps=PREFETCH_STEPS,
        workers=1,
    )


def train(scene: Scene, rank: int, meeting: Barrier, results: Any) -> None:
    """A rank that computes nothing."""
    torch.set_num_threads(1)
    manifest = load_manifest(scene.shards_url)
    Path("/proc/self/clear_refs").write_text("5")  # the most memory, from here on
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
    """Seconds of each step but the first, on the rank where they were most: the others wait for it."""
    return [max(step) for step in zip(*of_ranks, strict=True)][1:]


def disk_bytes(cache: Path) -> int:
    """What shards, and those that are on their way, take on the disk."""
    found = 0
    for path in [*cache.glob("*.shard"), *cache.glob("*.partial")]:
        with suppress(FileNotFoundError):  # renamed or dropped this moment
            found += path.stat().st_size
    return found


def watch(scene: Scene) -> tuple[list[Seen], int]:
    """What each rank saw, and the most that the cache took on the disk."""
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
            raise RuntimeError("a rank has failed")
    seen = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join()
    return [seen[rank] for rank in range(RANKS)], most_bytes


def report_waiting(arguments: argparse.Namespace) -> None:
    """The table of waiting, one column for each size of the cache."""
    shard_tokens = arguments.shard_mib * 2**18 // DOCUMENT_TOKENS * DOCUMENT_TOKENS
    columns = list[Watched]()
    with S3Server() as server, tempfile.TemporaryDirectory() as folder:
        server.take_over_environment()
        url = f"{server.create_bucket(f'far-{secrets.token_hex(4)}')}/shards"
        manifest = write_data_set(url, arguments.shards, shard_tokens)
        buffer_bytes = arguments.buffer_shards * manifest.train[0].size
        for buffers in arguments.cache_buffers:
            with LongLine(server.endpoint_url, arguments.latency, arguments.rate * 1e6) as line:
                os.environ["AWS_ENDPOINT_URL"] = line.endpoint_url
                scene = Scene(
                    url,
                    str(Path(folder, f"cache-{buffers}")),
                    buffer_bytes,
                    int(buffers * buffer_bytes),
                    arguments.step_tokens // CONTEXT_LENGTH,
                    arguments.epochs,
                    arguments.step_seconds,
                )
                columns.append(Watched(scene, *watch(scene), line.carried_bytes))
    made_bytes = (PREFETCH_STEPS + 1) * 16 * columns[0].scene.windows_per_rank * CONTEXT_LENGTH
    print(
        f"\n{RANKS} ranks, {arguments.step_tokens:,} tokens a step and rank, a step of {arguments.step_seconds} s; "
        f"{arguments.shards} shards of {manifest.train[0].size / 2**20:.0f} MiB, {arguments.epochs} epochs; "
        f"{arguments.latency * 1e3:.0f} ms, {arguments.rate} MB/s\n"
    )
    rows = {
        "`data.cache_bytes`": lambda it: f"{mib(it.scene.cache_bytes)} MiB",
        "most disk taken": lambda it: f"{mib(it.most_disk_bytes)} MiB",
        "steps": lambda it: f"{len(it.seen[0].taking):,}",
        "first batch after": lambda it: f"{max(one.taking[0] for one in it.seen):.1f} s",
        "of that, the line needs": lambda it: f"{it.scene.buffer_bytes / 1e6 / arguments.rate:.1f} s",
        "later batches that were not there": lambda it: f"{sum(one.were_ready[1:].count(False) for one in it.seen)}",
        "waiting for them": lambda it: it.share("waited"),
        "taking all of them": lambda it: it.share("taking"),
        "sleeping too long meanwhile": lambda it: it.share("overslept"),
        "shards fetched, of both ranks": lambda it: f"{sum(one.downloads for one in it.seen)}",
        "bytes over the line": lambda it: f"{mib(it.carried_bytes)} MiB",
        f"memory of a rank's loader ({PREFETCH_STEPS + 1} batches are {mib(made_bytes)} MiB)": lambda it: (
            f"{mib(max(one.grown_bytes for one in it.seen))} MiB"
        ),
        "CPU time of a rank, per step": lambda it: (
            f"{1e3 * max(one.cpu_seconds for one in it.seen) / len(it.seen[0].taking):.1f} ms"
        ),
    }
    print("| cache, in buffers | " + " | ".join(f"{buffers:g}" for buffers in arguments.cache_buffers) + " |")
    print("|---|" + "---|" * len(columns))
    for name, cell in rows.items():
        print(f"| {name} | " + " | ".join(map(cell, columns)) + " |")


def mib(count: float) -> str:
    """Bytes, in MiB."""
    return f"{count / 2**20:,.0f}"


# ---- Cutting ----


class Windows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What one writes for torch's DataLoader: full windows of memory-mapped shards."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self._shards = [open_shard(Path(folder, shard.name), shard, "uint32")[0] for shard in manifest.train]
        self._windows = (manifest.train[0].tokens - 1) // CONTEXT_LENGTH

    def __len__(self) -> int:
        return self._windows * len(self._shards)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        shard, window = divmod(index, self._windows)
        first = window * CONTEXT_LENGTH
        tokens = torch.from_numpy(self._shards[shard][first : first + CONTEXT_LENGTH + 1].astype(np.int64))
        return tokens[:-1], tokens[1:]


def cut(loader_name: str, threads: int, folder: str, cache_dir: str, windows: int, batches: int) -> dict[str, float]:
    """Seconds, and CPU seconds of all its processes, that a batch takes."""
    torch.set_num_threads(1)
    manifest = load_manifest(folder)
    if loader_name == "ours":
        scene = Scene(folder, cache_dir, 2**60, 2**60, windows, 1000, 0)
        ours = rank_of(manifest, scene, 0, 1)
        found: Any = ours
    else:
        theirs = torch.utils.data.DataLoader(
            Windows(folder, manifest),
            batch_size=windows,
            shuffle=True,
            generator=torch.Generator().manual_seed(SEED),
            num_workers=threads,
            multiprocessing_context="spawn" if threads else None,  # a fork after S3 was touched hangs
        )
        found = itertools.chain.from_iterable(theirs for _ in itertools.count())
    taken = iter(found)
    for _ in range(PREFETCH_STEPS + 1):  # those that were made ahead
        next(taken)
    began, used = time.perf_counter(), cpu_seconds()
    for _ in range(batches):
        next(taken)
    measured = {"seconds": (time.perf_counter() - began) / batches, "cpu_seconds": (cpu_seconds() - used) / batches}
    if loader_name == "ours":
        ours.close()
    return measured


def cpu_seconds() -> float:
    """Of this process and of its children that run."""
    mine = resource.getrusage(resource.RUSAGE_SELF)
    found = mine.ru_utime + mine.ru_stime
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        found += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


def report_cutting(arguments: argparse.Namespace) -> None:
    """The table of cutting."""
    windows = arguments.step_tokens // CONTEXT_LENGTH
    shard_tokens = arguments.shard_mib * 2**18 // DOCUMENT_TOKENS * DOCUMENT_TOKENS
    cases = [("ours", 1), ("ours", 2), ("torch", 0), ("torch", 1), ("torch", 2)]
    measured: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        write_data_set(f"{folder}/data", arguments.shards, shard_tokens)
        for _ in range(arguments.times):
            for case in cases:
                # Fresh for each: a pool of one process that is thrown away.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                    task = fresh.submit(cut, *case, f"{folder}/data", f"{folder}/cache", windows, arguments.batches)
                    measured[case].append(task.result())
    print(f"\nBatches of {windows} windows of {CONTEXT_LENGTH}, medians of {arguments.times}\n")
    print("| cut by | a batch takes | CPU time of a batch | tokens per second of CPU time |\n|---|---|---|---|")
    names = {"ours": "`BatchLoader`, {} threads", "torch": "`torch.utils.data.DataLoader`, {} workers"}
    for (name, threads), runs in measured.items():
        seconds, used = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds"))
        rate = windows * CONTEXT_LENGTH / used
        print(f"| {names[name].format(threads)} | {1e3 * seconds:.2f} ms | {1e3 * used:.2f} ms | {rate / 1e6:.1f} M |")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"cutting": report_cutting, "waiting": report_waiting}
    parser.add_argument("tables", nargs="*", choices=[*tables, []], help="which; by default both")
    parser.add_argument("--step-tokens", type=int, default=131_072, help="of one rank")
    parser.add_argument("--step-seconds", type=float, default=0.25)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds")
    parser.add_argument("--rate", type=float, default=50, help="MB/s")
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--shard-mib", type=int, default=8)
    parser.add_argument("--buffer-shards", type=int, default=4, help="shards that are shuffled together")
    parser.add_argument("--cache-buffers", type=float, nargs="+", default=[2], help="data.cache_bytes, in buffers")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batches", type=int, default=300, help="cut in one measurement")
    parser.add_argument("--times", type=int, default=5, help="measurements of cutting")
    arguments = parser.parse_args()
    for name in arguments.tables or tables:
        tables[name](arguments)
    print(f"\ntorch {torch.__version__}, {cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}")


if __name__ == "__main__":
    main()
