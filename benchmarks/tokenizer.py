"""Measure the time and the peak memory of `job tokenizer` for samples of several sizes.

    python -m benchmarks.tokenizer [--train 50 200] [--read 1024] [--vocab-size 16384] [--corpus FILE.jsonl]

For each size in MiB of `--train`, a corpus with a quarter more text is generated, and the command runs on it. For each
size of `--read`, the sample is only chosen, which shows what choosing costs by itself. The text is generated: the
clauses of the corpus (by default, the bundled sample) are cut in two and joined with others, without end. Memory
depends on how much of the text is in pieces that did not occur before; the larger the corpus of clauses, the more the
text is like real text. Memory is the peak of each process.
"""

import argparse
import datetime
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.machine import cpu_name, peak_bytes
from benchmarks.prepare import REPOSITORY, SAMPLE, Peaks, new_articles
from job.data.recipe import Recipe
from job.data.text_sample import sample_corpus

_MORE_TEXT = 1.25
"""Size of the corpus divided by that of the sample. A tenth of the documents is for validation."""
_RECIPE = ("text", "id", "stop", 2**26, 0.1, 2333)
MiB = 2**20


def write_corpus(path: Path, source: Path, size_bytes: int) -> None:
    """Write JSON lines with at least `size_bytes` bytes of text, in articles that never repeat."""
    texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        for number, article in enumerate(new_articles(texts, 1)):
            if written >= size_bytes:
                return
            file.write(json.dumps({"id": str(number), "text": article}, ensure_ascii=False) + "\n")
            written += len(article.encode())


def read_only(corpus: str, sample_bytes: int) -> None:
    """Choose a sample in this process and print its seconds and the peak memory as JSON."""
    before = peak_bytes()
    began = time.perf_counter()
    train, _ = sample_corpus(Recipe(corpus, *_RECIPE), sample_bytes, MiB)
    assert train.size == sample_bytes
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": peak_bytes() - before}))


def read_row(corpus: Path, mebibytes: int) -> str:
    """Measure choosing a sample, in a new process, and return the row of the table."""
    command = [sys.executable, "-m", "benchmarks.tokenizer", "--case", str(corpus), str(mebibytes)]
    printed = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = json.loads(printed.splitlines()[-1])
    per_byte = result["bytes"] / (mebibytes * MiB)
    return f"| {mebibytes:,} MiB | {result['seconds']:,.1f} | {result['bytes'] / 2**30:.2f} GiB | {per_byte:.2f} |"


def cpu_seconds() -> float:
    """Return the CPU seconds of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train_row(corpus: Path, mebibytes: int, vocab_size: int, folder: Path) -> str:
    """Run `job tokenizer` with a sample of this size and return the row of the table."""
    settings = {
        "data.source": corpus,
        "tokenizer.source": folder / f"tokenizer-{mebibytes}",
        "tokenizer.vocab_size": vocab_size,
        "tokenizer.train_bytes": f"{mebibytes}MiB",
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    peaks, cpu_before, began = Peaks(), cpu_seconds(), time.perf_counter()
    command = [sys.executable, "-m", "job", "tokenizer", *words]
    printed = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.perf_counter() - began
    _, *children = peaks.stop()
    reading, training = children[0], max(children[1:])
    bytes_per_token = re.search(r"([\d.]+) bytes per token", printed)
    print(printed, flush=True)
    return (
        f"| {mebibytes:,} MiB | {seconds:,.0f} | {cpu_seconds() - cpu_before:,.0f} | {reading / 2**30:.2f} GiB "
        f"| {training / 2**30:.2f} GiB | {training / (mebibytes * MiB):.1f} "
        f"| {bytes_per_token[1] if bytes_per_token else ''} |"
    )


def main() -> None:
    """Measure all sizes and print the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, nargs="*", default=[50, 200], help="MiB of text to train on")
    parser.add_argument("--read", type=int, nargs="*", default=[1024], help="MiB of text to choose only")
    parser.add_argument("--vocab-size", type=int, default=16384, help="tokens of the vocabulary")
    parser.add_argument("--corpus", type=Path, default=SAMPLE, help="JSON lines whose clauses make the text")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        read_only(arguments.case[0], int(arguments.case[1]) * MiB)
        return
    train_rows, read_rows = [], []
    with tempfile.TemporaryDirectory(prefix="wikillm-tokenizer-") as name:
        corpus = Path(name, "corpus.jsonl")
        for mebibytes in arguments.read:
            write_corpus(corpus, arguments.corpus, int(mebibytes * MiB * _MORE_TEXT))
            read_rows.append(read_row(corpus, mebibytes))
        for mebibytes in arguments.train:
            write_corpus(corpus, arguments.corpus, int(mebibytes * MiB * _MORE_TEXT))
            train_rows.append(train_row(corpus, mebibytes, arguments.vocab_size, Path(name)))
    print(f"{cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}; {arguments.vocab_size:,} tokens\n")
    print("| sample, only chosen | seconds | peak memory added | bytes per byte |", "|---|---|---|---|", sep="\n")
    print(*read_rows, "", sep="\n")
    print("| sample | seconds | CPU seconds | reading process | training process | bytes per byte | bytes per token |")
    print("|---|---|---|---|---|---|---|", *train_rows, sep="\n")


if __name__ == "__main__":
    main()
