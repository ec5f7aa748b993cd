"""How fast text becomes tokens, beside `datasets.map`, and how much memory that takes.

    python -m benchmarks.prepare [--corpus FILE.jsonl] [--tokenizer FOLDER] [--megabytes 128] [--times 3]
                                 [--processes 1 2 4] [--sizes 0.1 1]

The text is new: clauses of the corpus (the bundled sample, by default) are cut in two and put together again with
others, so that a tokenizer's memory of words it has seen helps as little as with new articles. The vocabulary is
Qwen2's. Each case runs in a process of its own, ours and `map` in turn, and writes to this machine's disk. `map` is the
tutorial's, full windows alone, timed without and with the reading of the JSON before it; ours is timed from the JSON to
the manifest, the start of its processes included. Memory is the sum of the high-water marks of all processes.
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
_DISTINCT_BYTES = 10**8  # then it repeats, in another order
_LOOK_SECONDS = 0.05
_SHORT_SLICE_BYTES = 2**23  # a small corpus has many of them, so that all processes end at about the same time
_USUAL_SLICE_BYTES = 2**26  # the setting's default


# ---- Text ----


def new_articles(texts: list[str], seed: int) -> Iterator[str]:
    """Articles as long as these, for ever, of clauses that are half one of theirs and half another."""
    randomly = random.Random(seed)
    articles = [clauses for text in texts if (clauses := _CLAUSE.findall(text))]
    heads, tails = [], []
    for clause in chain.from_iterable(articles):
        cut = randomly.randrange(len(clause))
        heads.append(clause[:cut])
        tails.append(clause[cut:])
    while True:
        count = len(randomly.choice(articles))
        yield "".join(
            chain.from_iterable(zip(randomly.choices(heads, k=count), randomly.choices(tails, k=count), strict=True))
        )


def write_corpus(path: Path, source: Path, text_bytes: int, seed: int = 1) -> int:
    """Writes JSON lines with at least so many bytes of text; returns how many."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    block, in_block = [], 0
    for article in new_articles(texts, seed):
        if in_block >= min(text_bytes, _DISTINCT_BYTES):
            break
        block.append(json.dumps(article, ensure_ascii=False))
        in_block += len(article.encode())
    written = number = 0
    randomly = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        while written < text_bytes:
            for article in block:
                number += 1
                file.write(f'{{"id": "{number}", "title": "{number}", "tags": "", "text": {article}}}\n')
            written += in_block
            randomly.shuffle(block)
    return written


# ---- One case, in this process ----


def run_ours(
    corpus: str, tokenizer_folder: str, processes: int, slice_bytes: int, scratch: str, engine: str
) -> dict[str, Any]:
    """`prepare` in so many processes."""
    from job import storage
    from job.data.prepare import Recipe
    from job.data.prepare_processes import prepare_in_processes
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
    """The tutorial's preparation in so many processes."""
    import datasets
    from transformers import AutoTokenizer

    from benchmarks.tutorial import full_windows

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    began = time.perf_counter()
    documents = datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=scratch)
    read = time.perf_counter()
    documents.map(
        full_windows,
        fn_kwargs={"tokenizer": tokenizer, "context_length": 512},
        batched=True,
        remove_columns=documents.column_names,
        num_proc=processes if processes > 1 else None,
    )
    ended = time.perf_counter()
    return {"seconds": ended - read, "seconds_with_reading": ended - began}


class Peaks(threading.Thread):
    """Follows the high-water marks of this process and those it starts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._marks: dict[int, int] = {}
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        """Looks until `stop`."""
        while not self._done.wait(_LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Reads the mark of each process that runs."""
        for pid in [os.getpid(), *(one.pid for one in psutil.Process().children(recursive=True))]:
            with suppress(FileNotFoundError, ProcessLookupError, StopIteration):  # one that has ended has no mark
                self._marks[pid] = max(self._marks.get(pid, 0), peak_bytes(pid))

    def stop(self) -> list[int]:
        """Bytes of each process, those that have ended included, this one first."""
        self._done.set()
        self.join()
        self.look()
        return [self._marks.pop(os.getpid()), *self._marks.values()]


def run_case(name: str, corpus: str, tokenizer_folder: str, processes: int, slice_bytes: int) -> None:
    """Prints what a case took as JSON."""
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
    """A case in a fresh process; without threads of its own where `one_thread` says so."""
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
    """Rows of the table of throughput: ours and `map` in turn, and once ours without the faster tokenizer."""
    rows = []
    for count in processes:
        runs: dict[str, list[dict[str, Any]]] = {"map": [], "auto": []}
        for _ in range(times):
            for name, results in runs.items():
                results.append(case(name, corpus, tokenizer_folder, count))
        runs["reference"] = [case("reference", corpus, tokenizer_folder, count)]

        def rate(name: str, seconds: str = "seconds", runs: dict[str, list[dict[str, Any]]] = runs) -> float:
            return text_bytes / 1e6 / statistics.median(one[seconds] for one in runs[name])

        ours, theirs, read = rate("auto"), rate("map"), rate("map", "seconds_with_reading")
        rows.append(
            f"| {count} | {theirs:.2f} | {read:.2f} | {rate('reference'):.2f} | {ours:.1f} | {ours / theirs:.1f} |"
        )
        print(rows[-1], flush=True)
    return rows


def scale(corpus: Path, text_bytes: int, tokenizer_folder: str, processes: list[int], times: int) -> list[str]:
    """Rows of the table of processes, each with one thread: MB/s beside that of as many runs which share nothing.

    Those have all of the text each; together they show what the machine gives to so many.
    """

    def alone(_: int) -> float:
        seconds: float = case("auto", corpus, tokenizer_folder, 1, one_thread=True)["seconds"]
        return seconds

    rates: dict[int, list[float]] = {count: [] for count in processes}
    apart: dict[int, list[float]] = {count: [] for count in processes}
    for _ in range(times):
        for count in processes:
            together = case("auto", corpus, tokenizer_folder, count, one_thread=True)["seconds"]
            rates[count].append(text_bytes / 1e6 / together)
            with ThreadPoolExecutor(count) as pool:
                apart[count].append(count * text_bytes / 1e6 / max(pool.map(alone, range(count))))
    medians = {count: (statistics.median(rates[count]), statistics.median(apart[count])) for count in processes}
    first, first_apart = medians[processes[0]]
    return [
        f"| {count} | {rate:.1f} | {rate / first:.2f} | {of_apart:.1f} | {of_apart / first_apart:.2f} |"
        for count, (rate, of_apart) in medians.items()
    ]


def memory(source: Path, folder: Path, tokenizer_folder: str, sizes: list[float], processes: list[int]) -> list[str]:
    """Rows of the table of memory."""
    rows = []
    for size in sizes:
        corpus = folder / "sized.jsonl"
        text_bytes = write_corpus(corpus, source, round(size * 1e9))
        for count in processes:
            found = case("auto", corpus, tokenizer_folder, count, slice_bytes=_USUAL_SLICE_BYTES)
            rate = text_bytes / 1e6 / found["seconds"]
            most = max(found["peaks"])
            rows.append(f"| {size:g} | {count} | {sum(found['peaks']) / 1e6:,.0f} | {most / 1e6:,.0f} | {rate:.1f} |")
            print(rows[-1], flush=True)
        corpus.unlink()
    return rows


def machine() -> str:
    """This machine, and what it runs, in a line."""

    def of(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    libraries = ", ".join(map(of, ("datasets", "transformers", "tokenizers", "fastokens")))
    return f"{cpu_name()}, {os.cpu_count()} cores, {libraries}, {datetime.date.today()}"


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=SAMPLE, help="JSON lines of which the text is made")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; Qwen2's by default")
    parser.add_argument("--megabytes", type=float, default=128, help="text for the first two tables")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="for the scaling")
    parser.add_argument("--sizes", type=float, nargs="*", default=[], help="GB of text for the table of memory")
    parser.add_argument("--only", choices=["compare", "scale", "memory"], nargs="+")
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
        print("| processes | `map`, MB/s | with reading | ours, reference alone | ours | ours ÷ `map` |")
        print("|---|---|---|---|---|---|", *compared, sep="\n")
    if scaled:
        print("\n| processes of one thread | MB/s | of the first | as many runs at once, MB/s | of the first |")
        print("|---|---|---|---|---|", *scaled, sep="\n")
    if measured:
        print("\n| GB of text | processes | peak memory, MB, all | the largest | MB/s |")
        print("|---|---|---|---|---|", *measured, sep="\n")


if __name__ == "__main__":
    main()
