"""The fingerprint of a corpus file depends only on its name and content, and reads at most 4 MiB."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from corpus_files import json_lines
from test_prepare_command import SAMPLE

from job import storage
from job.data.corpus import CorpusFile, Listing, list_corpus
from job.data.fingerprint import BLOCK_BYTES, BLOCKS, blocks, identify


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5, BLOCKS * BLOCK_BYTES - 1])
def test_small_file_is_hashed_as_a_whole(size: int) -> None:
    assert blocks(size) == ([(0, size)] if size else [])


@pytest.mark.parametrize("size", [BLOCKS * BLOCK_BYTES, BLOCKS * BLOCK_BYTES + 1, 2_000_000_000, 10**13 + 7])
def test_large_file_is_hashed_by_64_evenly_spaced_blocks(size: int) -> None:
    ends = blocks(size)
    assert len(ends) == BLOCKS and {end - start for start, end in ends} == {BLOCK_BYTES}
    assert ends[0][0] == 0 and ends[-1][1] == size
    assert all(end <= start for (_, end), (start, _) in pairwise(ends))
    gaps = {start - end for (_, end), (start, _) in pairwise(ends)}
    assert max(gaps) - min(gaps) <= 1


def fingerprints(source: str) -> Any:
    """Return the fingerprints of the files at a source."""
    return identify(list_corpus(source)).fingerprints


def test_fingerprint_depends_only_on_name_and_content(bucket: str, tmp_path: Path) -> None:
    """Modification time, ETag and the folder above the corpus do not matter."""
    content = json_lines(SAMPLE) * 16
    assert len(content) > BLOCKS * BLOCK_BYTES / 2
    found = []
    for folder in (str(tmp_path / "one"), str(tmp_path / "two"), bucket):
        for name in ("a/x.jsonl", "b/y.jsonl"):
            storage.write_bytes(f"{folder}/corpus/{name}", content)
        found.append(fingerprints(f"{folder}/corpus/"))
    assert found[0] == found[1] == found[2]
    assert [file.name for file in found[0]] == ["a/x.jsonl", "b/y.jsonl"]
    assert found[0][0].sha256 == hashlib.sha256(content).hexdigest()


def test_large_file_fingerprint_reads_4_mib_and_detects_changes(bucket: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    with path.open("wb") as file:
        file.truncate(50_000_000)
    before = identify(list_corpus(str(path)))
    assert before.read_bytes == BLOCKS * BLOCK_BYTES
    expected = hashlib.sha256(bytes(BLOCKS * BLOCK_BYTES)).hexdigest()
    assert before.fingerprints[0].sha256 == expected
    storage.upload_file(path, f"{bucket}/corpus.jsonl")
    assert fingerprints(f"{bucket}/corpus.jsonl") == before.fingerprints
    start, _ = blocks(50_000_000)[17]
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"x")
    assert fingerprints(str(path)) != before.fingerprints


class NoRangesHandler(SimpleHTTPRequestHandler):
    """Sends whole files and ignores ranges; sends size and modification time, as Python's server does."""

    def log_message(self, *arguments: Any) -> None:
        pass

    def copyfile(self, *arguments: Any) -> None:
        # A client that wanted only a part has closed the connection.
        with suppress(ConnectionError):
            super().copyfile(*arguments)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its URL on a server that does not support ranges."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(NoRangesHandler, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_server_without_ranges_is_identified_by_size_and_time(web: tuple[Path, str]) -> None:
    folder, address = web
    (folder / "small.jsonl").write_bytes(json_lines(SAMPLE))
    (folder / "large.jsonl").write_bytes(bytes(5_000_000))
    (small,) = fingerprints(f"{address}/small.jsonl?X-Amz-Signature=secret")
    (large,) = fingerprints(f"{address}/large.jsonl")
    assert (small.name, small.sha256) == ("small.jsonl", hashlib.sha256(json_lines(SAMPLE)).hexdigest())
    assert (large.size, large.sha256) == (5_000_000, None)
    assert large.version is not None and large.version.endswith("GMT")
    listings: list[Listing] = []
    list_corpus(f"{address.replace('//', '//bob:secret@')}/small.jsonl?X-Amz-Signature=secret", listings.append)
    assert listings[0].names == ("small.jsonl",) and "secret" not in listings[0].source + str(listings[0].rows())


def test_hub_files_are_identified_by_revision_and_hash(tmp_path: Path) -> None:
    """Uses the layout of Hugging Face's cache, where a snapshot consists of links to files named after their hash."""
    snapshot = tmp_path / "snapshots" / "0a1b2c"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "5d41402a").write_bytes(b"{}")
    (snapshot / "linked.jsonl").symlink_to("../../blobs/5d41402a")
    (snapshot / "copied.jsonl").write_bytes(b"{}")
    files = [
        CorpusFile(i, f"{prefix}/{name}", str(snapshot / name), 2, "json", None)
        for i, (prefix, name) in enumerate(
            [
                ("hf://datasets/owner/name@0a1b2c", "linked.jsonl"),
                ("hf://datasets/owner/name@0a1b2c", "copied.jsonl"),
            ]
        )
    ]
    linked, copied = identify(files).fingerprints
    assert (linked.revision, linked.hub_hash, linked.sha256) == ("0a1b2c", "5d41402a", None)
    assert (copied.revision, copied.hub_hash) == ("0a1b2c", None)
    assert copied.sha256 == hashlib.sha256(b"{}").hexdigest()


def test_files_with_equal_content_are_reported(tmp_path: Path) -> None:
    for name, content in {"a": b"1", "b": b"2", "c": b"1", "d": b"", "e": b"", "f": b"1"}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    assert identify(list_corpus(str(tmp_path))).duplicates == [("a.jsonl", "c.jsonl", "f.jsonl")]
