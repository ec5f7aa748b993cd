"""Fingerprints that identify the content of corpus files without reading all of a large file.

    size, and the sha256 of the whole file below 4 MiB, else of 64 blocks of 64 KiB at fixed places

The first and the last block are among them. Sampling cannot see a change that keeps the size and lies between the
blocks, such as one word of a large file replaced by another of the same length.
"""

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile

from job import storage
from job.data import hub
from job.data.discovery import shown
from job.data.listing import CorpusFile, same_content
from job.errors import UserError
from job.redaction import source_name

BLOCK_BYTES = 64 * 1024
BLOCKS = 64
_PARALLEL_FILES = 8
_PARALLEL_BLOCKS = 16


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The identity of a corpus file, which must be the same for every worker that reads it."""

    name: str
    """Path below the folder that all files of the corpus share."""
    size: int
    sha256: str | None = None
    """Hash of the whole file or of its blocks (see `sample`)."""
    revision: str | None = None
    """Revision of the data set, if the file comes from a hub."""
    hub_hash: str | None = None
    """The hub's own hash of the content; replaces `sha256`."""
    reader: str | None = None
    """Builder of the `datasets` library and its options, if that reads the file."""
    version: str | None = None
    """ETag or Last-Modified of a server that does not send single blocks; replaces `sha256`."""


@dataclass(frozen=True)
class Identified:
    """The files of a corpus, identified."""

    fingerprints: tuple[Fingerprint, ...]
    """In the order of the files."""
    versions: tuple[str, ...]
    """`storage.Ranges.version` of each file when it was identified: another one means that it was replaced since."""
    read_bytes: int
    seconds: float

    @property
    def equal(self) -> list[tuple[str, ...]]:
        """Names of files with equal content: their documents are in the corpus several times."""
        contents = [(one.size, one.sha256 or one.hub_hash) for one in self.fingerprints]
        known = [content if all(content) else None for content in contents]
        return same_content([one.name for one in self.fingerprints], known)

    def __str__(self) -> str:
        files, size = len(self.fingerprints), sum(one.size for one in self.fingerprints)
        return (
            f"{files:,} file{'s' * (files != 1)}, {size / 1e6:,.1f} MB; "
            f"identified by {self.read_bytes / 1e6:,.1f} MB of them, read in {self.seconds:.1f} s"
        )


def identify(files: Sequence[CorpusFile]) -> Identified:
    """Read what identifies the files of a corpus, several files and blocks at a time.

    Raises:
        UserError: a file was replaced meanwhile, or cannot be identified because its server tells too little.
    """
    began = time.monotonic()
    with ThreadPoolExecutor(_PARALLEL_FILES) as many_files, ThreadPoolExecutor(_PARALLEL_BLOCKS) as many_blocks:
        found = list(many_files.map(lambda file, name: _identify(file, name, many_blocks), files, _names(files)))
    return Identified(
        tuple(
            replace(fingerprint, reader=None if file.rows is None else str(file.rows))
            for file, (fingerprint, _, _) in zip(files, found, strict=True)
        ),
        tuple(version for _, version, _ in found),
        sum(read for _, _, read in found),
        time.monotonic() - began,
    )


def check_unchanged(files: Sequence[CorpusFile], versions: Sequence[str]) -> None:
    """Raise a UserError if one of these files was replaced while this worker read it.

    Args:
        files: the files that were read.
        versions: of all files of the corpus, when they were identified.
    """

    def check(file: CorpusFile) -> None:
        try:
            if file.rows is not None and file.rows.revision:  # what a commit holds never changes
                return
            now = storage.open_ranges(file.path).version
        except FileNotFoundError:
            now = "gone"
        if now != versions[file.index]:
            raise _changed(file)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        list(pool.map(check, files))


def blocks(size: int) -> list[tuple[int, int]]:
    """Start and end of each part of a file of `size` bytes that identifies it."""
    if size < BLOCKS * BLOCK_BYTES:
        return [(0, size)] if size else []
    starts = (number * (size - BLOCK_BYTES) // (BLOCKS - 1) for number in range(BLOCKS))
    return [(start, start + BLOCK_BYTES) for start in starts]


def sample(ranges: storage.Ranges, pool: Executor) -> str:
    """The hexadecimal sha256 of a file's `blocks`, read through `pool`."""
    digest = hashlib.sha256()
    for content in pool.map(lambda ends: ranges.read(*ends), blocks(ranges.size)):
        digest.update(content)
    return digest.hexdigest()


def _identify(file: CorpusFile, name: str, pool: Executor) -> tuple[Fingerprint, str, int]:
    """The fingerprint of a file, its version, and how many bytes were read."""
    if file.rows is not None and file.rows.revision:
        pinned = Fingerprint(name=name, size=file.size, revision=file.rows.revision, hub_hash=file.rows.hub_hash)
        return pinned, "", 0
    ranges = storage.open_ranges(file.path)
    revision, hub_hash = hub.identity(file.url, file.path)
    known = Fingerprint(name=name, size=ranges.size, revision=revision, hub_hash=hub_hash)
    if hub_hash is not None:
        return known, ranges.version, 0
    try:
        sha256 = sample(ranges, pool)
    except storage.NoRanges:
        if not ranges.version:
            raise
        return Fingerprint(name=name, size=ranges.size, version=ranges.version), ranges.version, 0
    except (storage.IntegrityError, FileNotFoundError):
        raise _changed(file) from None
    read = sum(end - start for start, end in blocks(ranges.size))
    return Fingerprint(name=name, size=ranges.size, revision=revision, sha256=sha256), ranges.version, read


def _changed(file: CorpusFile) -> UserError:
    remedy = "wait until no program writes to it, and start again"
    return UserError("data.source", file.url, "was replaced or removed while it was read", remedy)


def _names(files: Sequence[CorpusFile]) -> list[str]:
    """The files' paths below the folder that they share: machines may mount it in different places.

    Of an https:// URL, a query is a part of the name, but for the signature in it: signed anew, it is the same file.
    """
    paths = [_folders(one.url) for one in files]
    shared = len(
        list(takewhile(lambda folders: len(set(folders)) == 1, zip(*(path[:-1] for path in paths), strict=False)))
    )
    return [shown("/".join(path[shared:])) for path in paths]


def _folders(url: str) -> list[str]:
    """The parts of a file's path; the last one is its name, with the query of an https:// URL."""
    if not storage.is_web(url):
        return url.split("/")
    path, mark, query = source_name(url).partition("?")
    folders = path.split("/")
    return [*folders[:-1], f"{folders[-1]}{mark}{query}"]
