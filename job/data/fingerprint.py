"""Identify the content of corpus files without reading all of a large file.

The fingerprint of a file is its size and a sha256: of the whole file below 4 MiB, otherwise of 64 blocks of 64 KiB at
fixed positions, which include the first and the last block. A change that keeps the size and lies between the blocks
is not detected, for example one word of a large file replaced by another of the same length.
"""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile

from job import amounts, storage
from job.data import hub
from job.data.discovery import printable
from job.data.listing import CorpusFile, same_content
from job.errors import UserError
from job.redaction import source_name

BLOCK_BYTES = 64 * 1024
BLOCKS = 64
_PARALLEL_FILES = 8
_PARALLEL_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The identity of a corpus file, which must be the same for every worker that reads the file."""

    name: str
    """Path below the folder that all files of the corpus share."""
    size: int
    """Size in bytes, as stored."""
    sha256: str | None = None
    """Hash of the whole file or of its blocks (see `hash_blocks`)."""
    revision: str | None = None
    """Revision of the data set, if the file comes from a hub."""
    hub_hash: str | None = None
    """Hash of the content, as the hub records it; replaces `sha256`."""
    reader: str | None = None
    """Builder of the `datasets` library and its options, if the library reads the file."""
    version: str | None = None
    """ETag or Last-Modified of a server that cannot send single blocks; replaces `sha256`."""


@dataclass(frozen=True)
class CorpusIdentity:
    """The fingerprints of all files of a corpus."""

    fingerprints: tuple[Fingerprint, ...]
    """One for each file, in the order of the files."""
    versions: tuple[str, ...]
    """`storage.Ranges.version` of each file when it was identified; a later change means that it was replaced."""
    read_bytes: int
    """Bytes that were read to identify the files."""
    seconds: float
    """Seconds that it took to identify the files."""

    @property
    def duplicates(self) -> list[tuple[str, ...]]:
        """Groups of names of files with equal content, whose documents are in the corpus several times."""
        contents = [(file.size, file.sha256 or file.hub_hash) for file in self.fingerprints]
        known = [content if all(content) else None for content in contents]
        return same_content([file.name for file in self.fingerprints], known)

    def __str__(self) -> str:
        files, size = len(self.fingerprints), sum(file.size for file in self.fingerprints)
        return (
            f"{amounts.files(files)}, {amounts.size(size)}; "
            f"identified by {amounts.size(self.read_bytes)} of them, read in {self.seconds:.1f} s"
        )


def identify(files: Sequence[CorpusFile]) -> CorpusIdentity:
    """Return the fingerprints of the files of a corpus; several files and blocks are read at the same time.

    Raises:
        UserError: a file was replaced meanwhile, or its server sends neither single blocks nor a version.
    """
    started = time.monotonic()
    with ThreadPoolExecutor(_PARALLEL_FILES) as file_pool, ThreadPoolExecutor(_PARALLEL_BLOCKS) as block_pool:
        identified = list(file_pool.map(lambda file, name: _identify(file, name, block_pool), files, _names(files)))
    return CorpusIdentity(
        tuple(
            replace(fingerprint, reader=None if file.library_reader is None else str(file.library_reader))
            for file, (fingerprint, _, _) in zip(files, identified, strict=True)
        ),
        tuple(version for _, version, _ in identified),
        sum(read_bytes for _, _, read_bytes in identified),
        time.monotonic() - started,
    )


def check_unchanged(files: Sequence[CorpusFile], versions: Sequence[str]) -> None:
    """Raise a UserError if one of these files was replaced while this worker read it.

    Args:
        files: the files that were read.
        versions: versions of all files of the corpus (see `CorpusIdentity.versions`).
    """

    def check(file: CorpusFile) -> None:
        try:
            # The content of a commit never changes.
            if file.library_reader is not None and file.library_reader.revision:
                return
            version = storage.open_ranges(file.path).version
        except FileNotFoundError:
            version = "gone"
        if version != versions[file.index]:
            raise _replaced(file)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(check, files))


def blocks(size: int) -> list[tuple[int, int]]:
    """Return (start, end) of each block that identifies a file of `size` bytes."""
    if size < BLOCKS * BLOCK_BYTES:
        return [(0, size)] if size else []
    starts = (number * (size - BLOCK_BYTES) // (BLOCKS - 1) for number in range(BLOCKS))
    return [(start, start + BLOCK_BYTES) for start in starts]


def hash_blocks(ranges: storage.Ranges, pool: Executor) -> str:
    """Return the hexadecimal sha256 of a file's `blocks`, which are read through `pool`."""
    digest = hashlib.sha256()
    for content in pool.map(lambda block: ranges.read(*block), blocks(ranges.size)):
        digest.update(content)
    return digest.hexdigest()


def _identify(file: CorpusFile, name: str, pool: Executor) -> tuple[Fingerprint, str, int]:
    """Return the fingerprint of a file, its version, and the number of bytes that were read."""
    if file.library_reader is not None and file.library_reader.revision:
        reader = file.library_reader
        return Fingerprint(name=name, size=file.size, revision=reader.revision, hub_hash=reader.hub_hash), "", 0
    ranges = storage.open_ranges(file.path)
    revision, hub_hash = hub.identity(file.url, file.path)
    if hub_hash is not None:
        return Fingerprint(name=name, size=ranges.size, revision=revision, hub_hash=hub_hash), ranges.version, 0
    try:
        sha256 = hash_blocks(ranges, pool)
    except storage.NoRanges:
        if not ranges.version:
            raise
        return Fingerprint(name=name, size=ranges.size, version=ranges.version), ranges.version, 0
    except (storage.IntegrityError, FileNotFoundError):
        raise _replaced(file) from None
    read_bytes = sum(end - start for start, end in blocks(ranges.size))
    return Fingerprint(name=name, size=ranges.size, revision=revision, sha256=sha256), ranges.version, read_bytes


def _replaced(file: CorpusFile) -> UserError:
    remedy = "wait until no program writes to it, and start again"
    return UserError("data.source", file.url, "was replaced or removed while it was read", remedy)


def _names(files: Sequence[CorpusFile]) -> list[str]:
    """Return the files' paths below the folder that all of them share, because machines may mount it elsewhere.

    The query of an https:// URL is part of the name, except for a signature in it: with a new signature it is still the
    same file.
    """
    paths = [_path_parts(file.url) for file in files]
    folders = zip(*(path[:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda names: len(set(names)) == 1, folders)))
    return [printable("/".join(path[shared:])) for path in paths]


def _path_parts(url: str) -> list[str]:
    """Return the parts of a file's path; the last part is the name, with the query of an https:// URL."""
    if not storage.is_web(url):
        return url.split("/")
    path, mark, query = source_name(url).partition("?")
    parts = path.split("/")
    return [*parts[:-1], f"{parts[-1]}{mark}{query}"]
