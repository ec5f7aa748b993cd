"""Measure how long it takes to identify a corpus in object storage, compared with reading all of it.

    python -m benchmarks.identify [--gigabytes 2] [--rate 50] [--latency 0.1]

The store is an S3 server on this machine: once as it is, and once behind a simulated link that delays each answer by
`--latency` seconds and carries at most `--rate` MB/s. The corpus is one file of random bytes.
"""

import argparse
import datetime
import hashlib
import os
import random
import tempfile
import time
from pathlib import Path

from benchmarks.machine import cpu_name
from benchmarks.slow_link import LongLine
from job import storage
from job.data.corpus import list_corpus
from job.data.fingerprint import identify
from job.demo.server import S3Server

_PIECE_BYTES = 2**24


def upload_corpus(url: str, size: int) -> None:
    """Upload a file of `size` random bytes."""
    generator = random.Random(1)
    with tempfile.TemporaryDirectory(prefix="wikillm-identify-") as folder:
        path = Path(folder, "corpus.jsonl")
        with path.open("wb") as file:
            for start in range(0, size, _PIECE_BYTES):
                file.write(generator.randbytes(min(_PIECE_BYTES, size - start)))
        storage.upload_file(path, url)


def row(store: str, url: str) -> str:
    """Time identifying the file and reading all of it with one sha256, and return the row of the table."""
    began = time.perf_counter()
    identified = identify(list_corpus(url))
    identify_seconds = time.perf_counter() - began
    began = time.perf_counter()
    digest = hashlib.sha256()
    with storage.open_read(url) as file:
        while piece := file.read(2**20):
            digest.update(piece)
    read_seconds = time.perf_counter() - began
    return (
        f"| {store} | {identified.read_bytes / 1e6:,.1f} | {identify_seconds:.2f} | {read_seconds:,.1f} "
        f"| {read_seconds / identify_seconds:,.0f} |"
    )


def main() -> None:
    """Measure both stores and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rate", type=float, default=50.0, help="MB/s of the simulated link")
    parser.add_argument("--latency", type=float, default=0.1, help="seconds by which the link delays each answer")
    arguments = parser.parse_args()
    rows = []
    with S3Server() as server:
        server.take_over_environment()
        url = f"{server.create_bucket('corpus')}/corpus.jsonl"
        upload_corpus(url, round(arguments.gigabytes * 1e9))
        rows.append(row("on this machine", url))
        with LongLine(server.endpoint_url, arguments.latency, arguments.rate * 1e6) as link:
            os.environ["AWS_ENDPOINT_URL"] = link.endpoint_url
            storage.configure(storage.StoreOptions())
            rows.append(row(f"behind a link of {arguments.latency * 1e3:g} ms and {arguments.rate:g} MB/s", url))
    print(f"{cpu_name()}, {os.cpu_count()} cores, {datetime.date.today()}; {arguments.gigabytes:g} GB in one file\n")
    print("| store | MB read | seconds to identify | seconds to read all | ratio |")
    print("|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
