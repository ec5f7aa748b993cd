"""Every byte that is not on this machine: read in ranges, written whole or not at all, tried again until a deadline.

A place is a path, ``file://…``, ``s3://bucket/key`` or, to read only, ``https://…``; the same functions serve them all.
Credentials come from the environment alone, as botocore finds them there: no setting holds a secret.

The parts, each of which imports only those before it: deadline, connection, retry, s3 and local, creation.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
from fsspec.spec import AbstractBufferedFile

from job.errors import UserError
from job.json_record import Record, parse_record
from job.redaction import learn_environment, redacted_tree
from job.storage import connection, creation, local, s3
from job.storage.connection import StoreOptions, addressing, is_remote, is_web, url_path
from job.storage.deadline import Cancelled, IntegrityError, StoreError, current, limits
from job.storage.local import path_of
from job.storage.retry import NoRanges, run, sent_whole
from job.storage.s3 import PART_BYTES

__all__ = [
    "PART_BYTES",
    "Cancelled",
    "Entry",
    "IntegrityError",
    "NoRanges",
    "Ranges",
    "StoreError",
    "StoreOptions",
    "abort_uploads",
    "addressing",
    "configure",
    "create_bytes",
    "creation_way",
    "delete",
    "delete_tree",
    "download_file",
    "exists",
    "glob",
    "is_remote",
    "is_web",
    "join",
    "limits",
    "list_files",
    "open_ranges",
    "open_read",
    "path_of",
    "read_bytes",
    "read_record",
    "sha256_file",
    "size",
    "upload_file",
    "url_path",
    "write_bytes",
    "write_from",
    "write_json",
]
_BUFFER_BYTES = 2**20


@dataclass(frozen=True, order=True)
class Entry:
    """A file that was listed: its URL, which every function here takes, and its size in bytes."""

    url: str
    size: int


def configure(options: StoreOptions) -> None:
    """Set how this process reaches the store; call it again to take up changed credentials."""
    learn_environment()
    connection.configure(options)
    creation.forget()


def join(url: str, *parts: str) -> str:
    """`url` with `parts` below it."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_read(url: str) -> BinaryIO:
    """Opens a file to be read on and from any position, in bounded memory whatever its size.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: (by a read) it was replaced meanwhile.
    """
    if not is_remote(url):
        return local.path_of(url).open("rb")
    ranges = open_ranges(url)
    return cast(BinaryIO, io.BufferedReader(_RangeFile(url, ranges.read, ranges.size), _BUFFER_BYTES))


@dataclass(frozen=True)
class Ranges:
    """A file of which parts are read in any order, by several threads at the same time."""

    size: int
    """Bytes."""
    version: str
    """Another one once the file was replaced: ETag, Last-Modified, or a local file's size and modification time.

    Empty where a server tells neither. Equal content may have several: machines and uploads differ."""
    read: Callable[[int, int], bytes]
    """The bytes from a start to an end. Raises IntegrityError if the file was replaced, `NoRanges` from a server that
    sends files only as a whole."""


def open_ranges(url: str) -> Ranges:
    """Open a file for reads of single parts; nothing more than that is fetched.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(url):
        status = local.path_of(url).stat()

        def read_local(start: int, end: int) -> bytes:
            with local.path_of(url).open("rb") as file:
                return os.pread(file.fileno(), end - start, start)

        return Ranges(status.st_size, f"{status.st_size} bytes of {status.st_mtime_ns}", read_local)
    if connection.protocol(url) == "s3":
        found = s3.head(url)
        version = found["ETag"]
        return Ranges(found["ContentLength"], version, lambda start, end: s3.get(url, version, start, end))
    filesystem = connection.filesystem(url)
    described = run("find", url, filesystem._info, url)
    total = described["size"]
    if total is None:
        raise sent_whole(url)
    remote = filesystem.open(url, size=total)

    async def fetch_range(start: int, end: int) -> bytes:
        return s3.whole(await remote.async_fetch_range(start, end), end - start)

    return Ranges(
        total,
        described.get("ETag") or described.get("Last-Modified") or "",
        lambda start, end: run("read", url, fetch_range, start, end),
    )


def read_bytes(url: str) -> bytes:
    """The whole content, in one request: for what is small.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is damaged in the store.
    """
    if not is_remote(url):
        return local.path_of(url).read_bytes()
    if connection.protocol(url) == "s3":
        return s3.get(url)
    return cast(bytes, run("read", url, connection.filesystem(url)._cat_file, url))


def read_record(url: str, kind: type[Record]) -> Record:
    """Read a JSON file as an instance of the dataclass `kind`, with every field's type checked.

    Keys that `kind` does not have are ignored: a newer version of the program may have written them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, nested too deeply, or a field is missing or of another type; one line says where.
    """
    try:
        return parse_record(read_bytes(url), kind)
    except IntegrityError as error:
        raise ValueError(str(error)) from None


def download_file(url: str, path: Path | str, size: int | None = None, sha256: str | None = None) -> None:
    """Copies `url` to the local `path`, which appears only when it is whole and verified.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: its size in bytes or its hexadecimal checksum is not the one expected, however often it is
            fetched: what was damaged on the way is whole the next time.
    """

    def download() -> None:
        digest, count = hashlib.sha256(), 0
        with open_read(url) as source, local.published(Path(path), os.replace) as target:
            while chunk := source.read(_BUFFER_BYTES):
                current.get().check("download", url)
                target.write(chunk)
                digest.update(chunk)
                count += len(chunk)
            if size not in (None, count):
                raise IntegrityError(f"download {url}: it has {count} bytes, {size} were expected")
            if sha256 not in (None, digest.hexdigest()):
                raise IntegrityError(f"download {url}: its sha256 is {digest.hexdigest()}, {sha256} was expected")

    for _ in range(s3.DOWNLOADS - 1):
        with suppress(IntegrityError):
            return download()
    return download()


def size(url: str) -> int:
    """Size in bytes. Raises FileNotFoundError."""
    if not is_remote(url):
        return local.path_of(url).stat().st_size
    if connection.protocol(url) == "s3":
        return int(s3.head(url)["ContentLength"])
    with open_read(url) as file:
        return file.seek(0, io.SEEK_END)


def exists(url: str) -> bool:
    """Whether the file is there now."""
    try:
        size(url)
    except FileNotFoundError:
        return False
    return True


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a local file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_bytes(url: str, data: bytes | bytearray) -> None:
    """Writes or replaces a file: a reader sees the old content or the new, never a part."""
    write_from(url, len(data), lambda start, end: memoryview(data)[start:end])


def write_from(url: str, size: int, read: Callable[[int, int], bytes | memoryview]) -> None:
    """Writes or replaces a file as `write_bytes` does, with what need not be in one piece, nor all in memory at a time.

    Args:
        url: where to.
        size: bytes in all.
        read: gives the bytes from a start to an end, one part of the file; several threads call it, in any order.
            What they are sending is copied, and nothing else.
    """
    if is_remote(url):
        s3.upload(url, size, read)
    else:
        local.write(url, size, lambda start, end: s3.exactly(url, read, start, end))


def write_json(url: str, value: Any) -> None:
    """Writes JSON in one form, without secrets: equal values give equal bytes."""
    text = json.dumps(redacted_tree(value), sort_keys=True, indent=1, ensure_ascii=False)
    write_bytes(url, f"{text}\n".encode())


def create_bytes(url: str, data: bytes) -> bool:
    """Write a file unless it is there: of all who try, exactly one is told True.

    The first creation in a place proves on throw-away files how the store is asked not to overwrite.

    Raises:
        UserError: there is no proven way, and `store.single_writer` does not say that nobody else writes there.
    """
    return creation.create(url, data)


def creation_way(url: str) -> str | None:
    """Return the name of the way in which `create_bytes` creates files beside `url`; None if none is proven."""
    way = creation.proven_way(url)
    return None if way is None else way.name


def upload_file(path: Path | str, url: str) -> None:
    """Copies a local file to `url`, where it appears whole or not at all."""
    with Path(path).open("rb") as source:
        descriptor = source.fileno()
        write_from(url, os.fstat(descriptor).st_size, lambda start, end: os.pread(descriptor, end - start, start))


# ── listing and deleting ─────────────────────────────────────────────────────────────────────────────────────────────


def list_files(url_prefix: str) -> list[Entry]:
    """List all files below a folder, at any depth, sorted by URL; none where there is no such folder."""
    return [entry for entry in _files_below(url_prefix) if not entry.url.endswith(local.PARTIAL)]


def _files_below(url_prefix: str) -> list[Entry]:
    if is_remote(url_prefix):
        return sorted(Entry(*found) for found in s3.objects(f"{url_prefix.removesuffix('/')}/"))
    found: list[Entry] = []
    for folder, _, names in os.walk(local.path_of(url_prefix)):
        for path in (Path(folder, name) for name in names):
            with suppress(FileNotFoundError):  # removed since the folder was read
                found.append(Entry(str(path), path.stat().st_size))
    return sorted(found)


def glob(pattern: str) -> list[Entry]:
    """List the files that match ``*``, ``**``, ``?`` and ``[…]``, by URL; a plain or ``https://`` name is itself."""
    is_plain = not any(character in pattern for character in "*?[")
    if is_remote(pattern) and (connection.protocol(pattern) != "s3" or is_plain):
        return [Entry(pattern, size(pattern))] if exists(pattern) else []
    if is_remote(pattern):
        files = [Entry(*found) for found in s3.matching(pattern)]
    else:
        files = []
        for path in map(Path, fsspec.filesystem("file").glob(str(local.path_of(pattern)))):
            with suppress(FileNotFoundError):  # removed since the folder was read
                if path.is_file():
                    files.append(Entry(str(path), path.stat().st_size))
    return sorted(entry for entry in files if not entry.url.endswith(local.PARTIAL))


def delete(urls: Iterable[str]) -> None:
    """Remove files; one that is not there is no error."""

    def remove(url: str) -> None:
        if is_remote(url):
            s3.delete(url)
        else:
            local.path_of(url).unlink(missing_ok=True)

    with s3.threads() as pool:
        list(pool.map(remove, urls))


def delete_tree(prefix: str) -> None:
    """Remove a folder and all in it, also what uploads that were killed have left in the store."""
    if not is_remote(prefix):
        shutil.rmtree(local.path_of(prefix), ignore_errors=True)
        return
    delete(entry.url for entry in _files_below(prefix))
    abort_uploads(prefix)


def abort_uploads(prefix: str, is_abandoned: Callable[[str], bool] = lambda url: True) -> None:
    """Remove what uploads to a folder that were killed have left in the store: no list of files shows it.

    A key that may not list uploads leaves them to the store's own rules.

    Args:
        prefix: the folder.
        is_abandoned: whether nobody uploads to this URL any more.
    """
    if not is_remote(prefix):
        return
    with suppress(NotImplementedError, UserError):
        for url, upload_id in s3.uploads(prefix):
            if is_abandoned(url):
                with suppress(FileNotFoundError):  # completed or aborted since
                    s3.abort(url, upload_id)


class _RangeFile(AbstractBufferedFile):
    """fsspec's seekable file with read-ahead, over ranges that are tried again one by one."""

    def __init__(self, url: str, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        super().__init__(None, url, block_size=s3.PART_BYTES - _BUFFER_BYTES, cache_type="readahead", size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return b"".join(self._fetch(at, min(at + s3.PART_BYTES, end)) for at in range(start, end, s3.PART_BYTES))
