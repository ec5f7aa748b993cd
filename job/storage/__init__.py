"""Reads and writes files on this machine, in S3 stores and on web servers, with the same functions.

A URL is a path, ``file://…``, ``s3://bucket/key`` or, for reading only, ``https://…``. Files are read in ranges; a
write happens completely or not at all; failed requests are retried until a deadline. Credentials come only from
environment variables, where botocore finds them, so no setting holds a secret.

Each of these modules imports only those before it: deadline, connection, retry, s3 and local, creation.
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
from job.storage.retry import NoRanges, no_ranges_error, run_with_retries
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
    "creation_method",
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
    """A file in a listing."""

    url: str
    """URL or local path of the file, which every function of this module accepts."""
    size: int
    """Size in bytes."""


def configure(options: StoreOptions) -> None:
    """Set how this process reaches the store. Call it again after the credentials have changed."""
    learn_environment()
    connection.configure(options)
    creation.forget()


def join(url: str, *parts: str) -> str:
    """Return the URL of `parts` below `url`."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_read(url: str) -> BinaryIO:
    """Open a file for reading from any position. Memory does not grow with the size of the file.

    Raises:
        FileNotFoundError: the file does not exist.
        IntegrityError: the file was replaced since it was opened (raised by a read).
    """
    if not is_remote(url):
        return local.path_of(url).open("rb")
    ranges = open_ranges(url)
    return cast(BinaryIO, io.BufferedReader(_RangeFile(url, ranges.read, ranges.size), _BUFFER_BYTES))


@dataclass(frozen=True)
class Ranges:
    """A file whose parts can be read in any order, by several threads at the same time."""

    size: int
    """Size in bytes."""
    version: str
    """Version of the file, which changes when it is replaced: ETag, Last-Modified, or size and modification time of a
    local file. Empty if a web server sends neither. Two copies of the same content may have different versions."""
    read: Callable[[int, int], bytes]
    """Function that returns the bytes from a start to an end. It raises IntegrityError if the file was replaced, and
    `NoRanges` if the server sends files only as a whole."""


def open_ranges(url: str) -> Ranges:
    """Open a file for reading single parts. Only these parts are fetched.

    Raises:
        FileNotFoundError: the file does not exist.
    """
    if not is_remote(url):
        status = local.path_of(url).stat()

        def read_local(start: int, end: int) -> bytes:
            with local.path_of(url).open("rb") as file:
                return os.pread(file.fileno(), end - start, start)

        return Ranges(status.st_size, f"{status.st_size} bytes of {status.st_mtime_ns}", read_local)
    if connection.protocol(url) == "s3":
        head = s3.head(url)
        version = head["ETag"]
        return Ranges(head["ContentLength"], version, lambda start, end: s3.get(url, version, start, end))
    filesystem = connection.filesystem(url)
    info = run_with_retries("find", url, filesystem._info, url)
    total = info["size"]
    if total is None:
        raise no_ranges_error(url)
    remote = filesystem.open(url, size=total)

    async def fetch_range(start: int, end: int) -> bytes:
        return s3.checked_length(await remote.async_fetch_range(start, end), end - start)

    return Ranges(
        total,
        info.get("ETag") or info.get("Last-Modified") or "",
        lambda start, end: run_with_retries("read", url, fetch_range, start, end),
    )


def read_bytes(url: str) -> bytes:
    """Return the whole content of a small file, which is fetched in one request.

    Raises:
        FileNotFoundError: the file does not exist.
        IntegrityError: the file is damaged in the store.
    """
    if not is_remote(url):
        return local.path_of(url).read_bytes()
    if connection.protocol(url) == "s3":
        return s3.get(url)
    return cast(bytes, run_with_retries("read", url, connection.filesystem(url)._cat_file, url))


def read_record(url: str, kind: type[Record]) -> Record:
    """Read a JSON file as an instance of the dataclass `kind`, as `parse_record` does.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged. The message is one line that says where.
    """
    try:
        return parse_record(read_bytes(url), kind)
    except IntegrityError as error:
        raise ValueError(str(error)) from None


def download_file(url: str, path: Path | str, size: int | None = None, sha256: str | None = None) -> None:
    """Copy `url` to the local `path`, which appears only when the copy is complete and verified.

    Args:
        url: the file to copy.
        path: the local copy.
        size: expected size in bytes; None: any.
        sha256: expected checksum in hexadecimal digits; None: any.

    Raises:
        FileNotFoundError: the file does not exist.
        IntegrityError: size or checksum are wrong in each of several downloads. One wrong download may have been
            damaged on the way.
    """

    def download() -> None:
        digest, count = hashlib.sha256(), 0
        with open_read(url) as source, local.atomic_file(Path(path), os.replace) as target:
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
    """Return the size of a file in bytes. Raises FileNotFoundError."""
    if not is_remote(url):
        return local.path_of(url).stat().st_size
    if connection.protocol(url) == "s3":
        return int(s3.head(url)["ContentLength"])
    with open_read(url) as file:
        return file.seek(0, io.SEEK_END)


def exists(url: str) -> bool:
    """Return True if the file exists."""
    try:
        size(url)
    except FileNotFoundError:
        return False
    return True


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 checksum of a local file in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_bytes(url: str, data: bytes | bytearray) -> None:
    """Write or replace a file. A reader sees either the old or the new content, never a part."""
    write_from(url, len(data), lambda start, end: memoryview(data)[start:end])


def write_from(url: str, size: int, read: Callable[[int, int], bytes | memoryview]) -> None:
    """Write or replace a file as `write_bytes` does, with content that need not be in memory at once.

    Args:
        url: the file.
        size: size of the file in bytes.
        read: `read(start, end)` returns the bytes from offset `start` up to `end`. Several threads call it, in any
            order. Only the parts that are being sent are in memory.
    """
    if is_remote(url):
        s3.upload(url, size, read)
    else:
        local.write(url, size, lambda start, end: s3.read_exactly(url, read, start, end))


def write_json(url: str, value: Any) -> None:
    """Write a value as JSON, without secrets. Equal values give equal bytes."""
    text = json.dumps(redacted_tree(value), sort_keys=True, indent=1, ensure_ascii=False)
    write_bytes(url, f"{text}\n".encode())


def create_bytes(url: str, data: bytes) -> bool:
    """Write a file if it does not exist. Of all processes that try, exactly one gets True.

    The first creation in a bucket or folder tests on temporary files which method of conditional writes works.

    Raises:
        UserError: no method works, and `store.single_writer` is not set.
    """
    return creation.create(url, data)


def creation_method(url: str) -> str | None:
    """Return the name of the method by which `create_bytes` creates files beside `url`; None if no method works."""
    method = creation.proven_method(url)
    return None if method is None else method.name


def upload_file(path: Path | str, url: str) -> None:
    """Copy a local file to `url`. A reader never sees a part of it."""
    with Path(path).open("rb") as source:
        descriptor = source.fileno()
        write_from(url, os.fstat(descriptor).st_size, lambda start, end: os.pread(descriptor, end - start, start))


# ── listing and deleting ─────────────────────────────────────────────────────────────────────────────────────────────


def list_files(url_prefix: str) -> list[Entry]:
    """Return all files below a folder, at any depth, sorted by URL. The list is empty if the folder does not exist."""
    return [entry for entry in _files_below(url_prefix) if not entry.url.endswith(local.PARTIAL)]


def _files_below(url_prefix: str) -> list[Entry]:
    if is_remote(url_prefix):
        return sorted(Entry(url, size) for url, size in s3.objects(f"{url_prefix.removesuffix('/')}/"))
    entries: list[Entry] = []
    for folder, _, names in os.walk(local.path_of(url_prefix)):
        for path in (Path(folder, name) for name in names):
            with suppress(FileNotFoundError):  # The file was removed after the folder was read.
                entries.append(Entry(str(path), path.stat().st_size))
    return sorted(entries)


def glob(pattern: str) -> list[Entry]:
    """Return the files that match a pattern of ``*``, ``**``, ``?`` and ``[…]``, sorted by URL.

    A name without these characters, or a web address, matches only itself.
    """
    is_plain = not any(character in pattern for character in "*?[")
    if is_remote(pattern) and (connection.protocol(pattern) != "s3" or is_plain):
        return [Entry(pattern, size(pattern))] if exists(pattern) else []
    if is_remote(pattern):
        files = [Entry(url, size) for url, size in s3.matching(pattern)]
    else:
        files = []
        for path in map(Path, fsspec.filesystem("file").glob(str(local.path_of(pattern)))):
            with suppress(FileNotFoundError):  # The file was removed after the folder was read.
                if path.is_file():
                    files.append(Entry(str(path), path.stat().st_size))
    return sorted(entry for entry in files if not entry.url.endswith(local.PARTIAL))


def delete(urls: Iterable[str]) -> None:
    """Remove files. A missing file is not an error."""

    def remove(url: str) -> None:
        if is_remote(url):
            s3.delete(url)
        else:
            local.path_of(url).unlink(missing_ok=True)

    with s3.thread_pool() as pool:
        list(pool.map(remove, urls))


def delete_tree(prefix: str) -> None:
    """Remove a folder with everything in it, and the parts that unfinished uploads have left in the store."""
    if not is_remote(prefix):
        shutil.rmtree(local.path_of(prefix), ignore_errors=True)
        return
    delete(entry.url for entry in _files_below(prefix))
    abort_uploads(prefix)


def abort_uploads(prefix: str, is_abandoned: Callable[[str], bool] = lambda url: True) -> None:
    """Remove the parts of unfinished uploads to a folder. Killed uploads leave such parts, which no listing shows.

    If the credentials do not permit listing uploads, nothing is removed.

    Args:
        prefix: the folder.
        is_abandoned: function that returns True if no process uploads to this URL any more.
    """
    if not is_remote(prefix):
        return
    with suppress(NotImplementedError, UserError):
        for url, upload_id in s3.uploads(prefix):
            if is_abandoned(url):
                with suppress(FileNotFoundError):  # The upload was completed or aborted after the listing.
                    s3.abort(url, upload_id)


class _RangeFile(AbstractBufferedFile):
    """A seekable file with read-ahead, whose ranges are fetched and retried one by one."""

    def __init__(self, url: str, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        super().__init__(None, url, block_size=s3.PART_BYTES - _BUFFER_BYTES, cache_type="readahead", size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return b"".join(self._fetch(at, min(at + s3.PART_BYTES, end)) for at in range(start, end, s3.PART_BYTES))
