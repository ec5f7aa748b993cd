"""Measure the speed and the memory of `job prepare`, compared with `datasets.map`.

    python -m benchmarks.prepare [--corpus FILE.jsonl] [--tokenizer FOLDER] [--megabytes 128] [--times 3]
                                 [--processes 1 2 4] [--sizes 0.1 1]

The text is generated: the clauses of the corpus (by default, the bundled sample) are cut in two and joined with others,
so that a tokenizer's cache of words helps as little as with new articles. The vocabulary is Qwen2's. Each case runs in
its own process, ours and `map` in turns, and writes to this machine's disk. `map` is the tutorial's, which keeps only
full sequences; it is timed without and with reading the JSON file. Ours is timed from the JSON file to the manifest,
with the start of its processes. Memory is the sum of the peaks of all processes.
"""

import argparse
import datetime
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import cpu_name, peak_bytes

REPOSITORY = Path(__file__).parent.parent
SAMPLE = REPOSITORY / "job" / "demo" / "sample.jsonl"
_CLAUSE = re.compile(r"[^，。、；：！？\n]*[，。、；：！？\n]+")
_DISTINCT_BYTES = 10**8  # After this many bytes the corpus repeats its articles in another order.
_LOOK_SECONDS = 0.05
_SHORT_SLICE_BYTES = 2**23  # Even a small corpus has many short slices, so all processes end at about the same time.
_USUAL_SLICE_BYTES = 2**26  # This is the default of the setting data.slice_bytes.


# ---- Text ----


def new_articles(texts: list[str], seed: int) -> Iterator[str]:
    """Generate articles without end, with as many clauses as those of `texts`; each clause joins halves of two."""
    generator = random.Random(seed)
    articles = [clauses for text in texts if (clauses := _CLAUSE.findall(text))]
    heads, tails = [], []
    for clause in chain.from_iterable(articles):
        cut = generator.randrange(len(clause))
        heads.append(clause[:cut])
        tails.append(clause[cut:])
    while True:
        count = len(generator.choice(articles))
        yield "".join(
            chain.from_iterable(zip(generator.choices(heads, k=count), generator.choices(tails, k=count), strict=True))
        )


def write_corpus(path: Path, source: Path, text_bytes: int, seed: int = 1) -> int:
    """Write JSON lines with at least `text_bytes` bytes of text and return how many bytes of text were written."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    block, block_bytes = [], 0
    for article in new_articles(texts, seed):
        if block_bytes >= min(text_bytes, _DISTINCT_BYTES):
            break
        block.append(json.dumps(article, ensure_ascii=False))
        block_bytes += len(article.encode())
    written = number = 0
    generator = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        while written < text_bytes:
            for article in block:
                number += 1
                file.write(f'{{"id": "{number}", "title": "{number}", "tags": "", "text": {article}}}\n')
            written += block_bytes
            generator.shuffle(block)
    return written


# ---- One case, in this process ----


def run_ours(
    corpus: str, tokenizer_folder: str, processes: int, slice_bytes: int, scratch: str, engine: str
) -> dict[str, Any]:
    """Run `prepare` with this many processes and return its seconds, bytes of text and notices."""
    from job import storage
    from job.data.prepare_processes import prepare_in_processes
    from job.data.recipe import Recipe
    from job.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder, scratch)
    notices: list[str] = []
    began = time.perf_counter()
    manifest = prepare_in_processes(
        Recipe(corpus, "text", "id", "stop", slice_bytes, 0.1, 2333),
        tokenizer,
        f"{scratch}/shards",
        storage.StoreOptions(),
        (0, 1),
        processes,
        lambda documents, utf8_bytes: None,
        lambda record: None,
        notices.append,
        engine,  # type: ignore[arg-type]
    )
    assert manifest is not None
    utf8_bytes = sum(shard.utf8_bytes for shard in manifest.train + manifest.validation)
    return {"seconds": time.perf_counter() - began, "utf8_bytes": utf8_bytes, "notices": notices}


def run_map(corpus: str, tokenizer_folder: str, processes: int, scratch: str) -> dict[str, Any]:
    """Run the tutorial's preparation with this many processes; return its seconds without and with reading."""
    import datasets
    from transformers import AutoTokenizer

    from benchmarks.tutorial import full_sequences

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    began = time.perf_counter()
    documents = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=scratch)
    map_began = time.perf_counter()
    documents.map(
        full_sequences,
        fn_kwargs={"tokenizer": tokenizer, "context_length": 512},
        batched=True,
        remove_columns=documents.column_names,
        num_proc=processes if processes > 1 else None,
    )
    ended = time.perf_counter()
    return {"seconds": ended - map_began, "seconds_with_reading": ended - began}


class Peaks(threading.Thread):
    """A thread that records the peak memory of this process and of its child processes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak_bytes: dict[int, int] = {}
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        """Look at regular intervals until `stop` is called."""
        while not self._done.wait(_LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Read the peak memory of each running process."""
        for pid in [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]:
            with suppress(FileNotFoundError, ProcessLookupError, StopIteration):  # The process has just ended.
                self._peak_bytes[pid] = max(self._peak_bytes.get(pid, 0), peak_bytes(pid))

    def stop(self) -> list[int]:
        """Stop the thread and return the peak bytes of each process, ended ones included, this process first."""
        self._done.set()
        self.join()
        self.look()
        return [self._peak_bytes.pop(os.getpid()), *self._peak_bytes.values()]


def run_case(name: str, corpus: str, tokenizer_folder: str, processes: int, slice_bytes: int) -> None:
    """Run a case in this process and print its measurements as JSON."""
    peaks = Peaks()
    with tempfile.TemporaryDirectory(dir=Path(corpus).parent) as scratch:
        if name == "map":
            result = run_map(corpus, tokenizer_folder, processes, scratch)
        else:
            result = run_ours(corpus, tokenizer_folder, processes, slice_bytes, scratch, name)
    print(json.dumps(result | {"peaks": peaks.stop()}))


# ---- All cases ----


def case(
    name: str,
    corpus: Path,
    tokenizer_folder: str,
    processes: int,
    slice_bytes: int = _SHORT_SLICE_BYTES,
    one_thread: bool = False,
) -> dict[str, Any]:
    """Run a case in a new process, with one thread if `one_thread`, and return its measurements."""
    command = [sys.executable, "-m", "benchmarks.prepare"]
    command += ["--case", name, str(corpus), tokenizer_folder, str(processes), str(slice_bytes)]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    if one_thread:
        environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1"}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    for notice in result.get("notices", []):
        print(f"notice: {notice}", flush=True)
    return result


def compare(corpus: Path, text_bytes: int, tokenizer_folder: str, processes: list[int], times: int) -> list[str]:
    """Measure the throughput and return the rows of its table.

    Ours and `map` run in turns. Ours also runs once with only the reference tokenizer, which is slower.
    """
    rows = []
    for count in processes:
        runs: dict[str, list[dict[str, Any]]] = {"map": [], "auto": []}
        for _ in range(times):
            for name, results in runs.items():
                results.append(case(name, corpus, tokenizer_folder, count))
        runs["reference"] = [case("reference", corpus, tokenizer_folder, count)]

        def rate(name: str, seconds: str = "seconds", runs: dict[str, list[dict[str, Any]]] = runs) -> float:
            return text_bytes / 1e6 / statistics.median(run[seconds] for run in runs[name])

        ours, reference, theirs = rate("auto"), rate("reference"), rate("map")
        with_reading = rate("map", "seconds_with_reading")
        rows.append(
            f"| {count} | {theirs:.2f} | {with_reading:.2f} | {reference:.2f} | {ours:.1f} | {ours / theirs:.1f} |"
        )
        print(rows[-1], flush=True)
    return rows


def scale(corpus: Path, text_bytes: int, tokenizer_folder: str, processes: list[int], times: int) -> list[str]:
    """Measure the scaling with the number of processes and return the rows of its table.

    Each process has one thread. The rate of one run with several processes is compared with the rate of as many
    independent runs of one process, each of which prepares the whole text. The independent runs share nothing, so they
    show the rate that the machine itself allows.
    """

    def independent_run(_: int) -> float:
        seconds: float = case("auto", corpus, tokenizer_folder, 1, one_thread=True)["seconds"]
        return seconds

    rates: dict[int, list[float]] = {count: [] for count in processes}
    independent_rates: dict[int, list[float]] = {count: [] for count in processes}
    for _ in range(times):
        for count in processes:
            seconds = case("auto", corpus, tokenizer_folder, count, one_thread=True)["seconds"]
            rates[count].append(text_bytes / 1e6 / seconds)
            with ThreadPoolExecutor(count) as pool:
                slowest_seconds = max(pool.map(independent_run, range(count)))
            independent_rates[count].append(count * text_bytes / 1e6 / slowest_seconds)
    medians = {
        count: (statistics.median(rates[count]), statistics.median(independent_rates[count])) for count in processes
    }
    first, first_independent = medians[processes[0]]
    return [
        f"| {count} | {rate:.1f} | {rate / first:.2f} | {independent:.1f} | {independent / first_independent:.2f} |"
        for count, (rate, independent) in medians.items()
    ]


def memory(source: Path, folder: Path, tokenizer_folder: str, sizes: list[float], processes: list[int]) -> list[str]:
    """Measure the memory for each size of corpus and return the rows of its table."""
    rows = []
    for size in sizes:
        corpus = folder / "sized.jsonl"
        text_bytes = write_corpus(corpus, source, round(size * 1e9))
        for count in processes:
            measured = case("auto", corpus, tokenizer_folder, count, slice_bytes=_USUAL_SLICE_BYTES)
            rate = text_bytes / 1e6 / measured["seconds"]
            total_mb, most_mb = sum(measured["peaks"]) / 1e6, max(measured["peaks"]) / 1e6
            rows.append(f"| {size:g} | {count} | {total_mb:,.0f} | {most_mb:,.0f} | {rate:.1f} |")
            print(rows[-1], flush=True)
        corpus.unlink()
    return rows


def machine() -> str:
    """Return one line that describes this machine and the versions of its libraries."""

    def of(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    libraries = ", ".join(map(of, ("datasets", "transformers", "tokenizers", "fastokens")))
    return f"{cpu_name()}, {os.cpu_count()} cores, {libraries}, {datetime.date.today()}"


def main() -> None:
    """Measure what the command line asks for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=SAMPLE, help="JSON lines file to generate the text from")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: Qwen2's)")
    parser.add_argument("--megabytes", type=float, default=128, help="MB of text for the first two tables")
    parser.add_argument("--times", type=int, default=3, help="repetitions of each case")
    parser.add_argument(
        "--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes in the table of scaling"
    )
    parser.add_argument("--sizes", type=float, nargs="*", default=[], help="GB of text for the table of memory")
    parser.add_argument(
        "--only", choices=["compare", "scale", "memory"], nargs="+", help="tables to measure (default: all)"
    )
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        name, corpus, tokenizer_folder, processes, slice_bytes = arguments.case
        run_case(name, corpus, tokenizer_folder, int(processes), int(slice_bytes))
        return
    wanted = arguments.only or ["compare", "scale", "memory"]
    with tempfile.TemporaryDirectory(prefix="wikillm-prepare-") as name:
        folder = Path(name)
        if not (tokenizer_folder := arguments.tokenizer):
            from tests.qwen import qwen2_tokenizer_folder

            tokenizer_folder = str(qwen2_tokenizer_folder(folder / "qwen2"))
        corpus = folder / "corpus.jsonl"
        text_bytes = write_corpus(corpus, arguments.corpus, round(arguments.megabytes * 1e6))
        compared = scaled = measured = list[str]()
        if "compare" in wanted:
            compared = compare(corpus, text_bytes, tokenizer_folder, [1, 2], arguments.times)
        if "scale" in wanted:
            scaled = scale(corpus, text_bytes, tokenizer_folder, arguments.processes, arguments.times)
        corpus.unlink()
        if "memory" in wanted:
            measured = memory(arguments.corpus, folder, tokenizer_folder, arguments.sizes, [1, 2])
    print(f"\n{machine()}; {text_bytes / 1e6:.0f} MB of text; medians of {arguments.times}\n")
    if compared:
        print("| processes | `map`, MB/s | with reading | ours, reference only | ours | ours ÷ `map` |")
        print("|---|---|---|---|---|---|", *compared, sep="\n")
    if scaled:
        print("\n| processes of one thread | MB/s | ÷ first row | independent runs, MB/s | ÷ first row |")
        print("|---|---|---|---|---|", *scaled, sep="\n")
    if measured:
        print("\n| GB of text | processes | peak memory of all, MB | of the largest, MB | MB/s |")
        print("|---|---|---|---|---|", *measured, sep="\n")


if __name__ == "__main__":
    main()
