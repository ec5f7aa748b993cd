"""Measure the time to identify a corpus in object storage, compared with reading all of it.

    python -m benchmarks.identify [--gigabytes 2] [--rate 50] [--latency 0.1]

An S3 server on this machine, each answer of which comes `--latency` seconds later, all of them together no faster than
`--rate` MB/s; and the same server without that. The corpus is one file of random bytes.
"""

import argparse
import datetime
import hashlib
import os
import random
import tempfile
import time
from pathlib import Path

from benchmarks.loader import LongLine
from benchmarks.machine import cpu_name
from job import storage
from job.data.corpus import list_corpus
from job.data.fingerprint import identify
from job.demo.server import S3Server

_PIECE_BYTES = 2**24


def upload_corpus(url: str, size: int) -> None:
    """Upload a file of `size` random bytes."""
    randomly = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="wikillm-identify-") as folder:
        path = Path(folder, "corpus.jsonl")
        with path.open("wb") as file:
            for start in range(0, size, _PIECE_BYTES):
                file.write(randomly.randbytes(min(_PIECE_BYTES, size - start)))
        storage.upload_file(path, url)


def row(place: str, url: str) -> str:
    """A row of the table: identifying the file against reading all of it with one sha256."""
    began = time.perf_counter()
    found = identify(list_corpus(url))
    identified_seconds = time.perf_counter() - began
    began = time.perf_counter()
    digest = hashlib.sha256()
    with storage.open_read(url) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    whole_seconds = time.perf_counter() - began
    return (
        f"| {place} | {found.read_bytes / 1e6:,.1f} | {identified_seconds:.2f} | {whole_seconds:,.1f} "
        f"| {whole_seconds / identified_seconds:,.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=50.0, help="MB/s of the far store")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds by which its answers are late")
    arguments = parser.parse_args()
    rows = []
    with S3Server() as server:
        server.take_over_environment()
        url = f"{server.create_bucket('corpus')}/corpus.jsonl"
        upload_corpus(url, round(arguments.gigabytes * 1e9))
        rows.append(row("this machine's", url))
        with LongLine(server.endpoint_url, arguments.latency, arguments.rate * 1e6) as line:
            os.environ["AWS_ENDPOINT_URL"] = line.endpoint_url
            storage.configure(storage.StoreOptions())
            rows.append(row(f"{arguments.latency * 1e3:g} ms and {arguments.rate:g} MB/s away", url))
    print(f"{cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}; {arguments.gigabytes:g} GB in one file\n")
    print("| store | MB read | seconds to identify | seconds to read all | ratio |")
    print("|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
