"""Every byte that is not on this machine: read in ranges, written whole or not at all, tried again until a deadline.

A place is a path, ``file://…``, ``s3://bucket/key`` or, to read only, ``https://…``; the same functions serve them all.
Credentials come from the environment alone, as botocore finds them there: no setting holds a secret.
"""

import asyncio
import base64
import errno
import hashlib
import io
import json
import logging
import math
import os
import random
import secrets
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import aiohttp
import botocore.exceptions as boto
import fsspec
from botocore.parsers import ResponseParserError
from fsspec.spec import AbstractBufferedFile
from s3fs import S3FileSystem

from job.errors import UserError, one_line, without_passwords
from job.record import Record, parse_record

PART_BYTES = 8 * 2**20
"""What one request carries of a larger file: what is held in memory, and what is tried again."""
_BUFFER_BYTES = 2**20
_PARALLEL_REQUESTS = 4
_UNREACHABLE_SECONDS = 4.0
"""How long an endpoint that has never answered is tried before a person is told: the address may be wrong."""
_DOWNLOADS = 3
"""How often a file is fetched before it is called damaged."""
_NOTICE_SECONDS = 0.1
"""How soon an operation notices that it was cancelled."""
_LAST_REQUEST_SECONDS = 1.0
"""How long an operation that is given up waits for the store to clear away what it leaves."""
_PARTIAL = ".partial"
_TOKEN, _MD5 = "writer", "md5"
"""The metadata by which a writer knows its own object when the answer to its request is lost, and a reader knows that
an object came as it was sent."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreOptions:
    """How the object store is reached; holds no secret.

    `deadline_seconds` bounds an operation with all its retries; in a large transfer it bounds every `PART_BYTES`, so
    that a slow link is no error and a stalled one is.
    """

    endpoint_url: str | None = None
    region: str | None = None
    connect_timeout_seconds: float = 5
    read_timeout_seconds: float = 30
    deadline_seconds: float = 300


@dataclass(frozen=True, order=True)
class Entry:
    """A file that was listed: its URL, which every function here takes, and its size in bytes."""

    url: str
    size: int


class StoreError(OSError):
    """The store failed until the deadline; starting again later may help."""


class Cancelled(Exception):
    """The operation was given up because the event given to `limits` was set."""


class IntegrityError(StoreError):
    """What was read is not what was written: another size or checksum, or replaced while it was read."""


@dataclass
class _Process:
    options: StoreOptions = StoreOptions()
    filesystems: dict[tuple[int, str], Any] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    missed: set[str] = field(default_factory=set)


_process = _Process()


def configure(options: StoreOptions) -> None:
    """Sets how this process reaches the store; call it again to take up changed credentials."""
    _process.options = options
    _process.filesystems.clear()
    _process.answered.clear()
    _process.missed.clear()


@dataclass(frozen=True)
class _Limits:
    end: float = math.inf
    """On the clock of `time.monotonic`."""
    events: tuple[threading.Event, ...] = ()

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    @property
    def are_cancelled(self) -> bool:
        return any(event.is_set() for event in self.events)

    def check(self, operation: str, url: str, seconds: float = 0, reason: str = "there is no time left for it") -> None:
        """Raises Cancelled if an event is set, StoreError for the `reason` unless there are so many seconds left."""
        if self.are_cancelled:
            raise Cancelled(without_passwords(f"{operation} {url}: given up, as asked"))
        if self.seconds_left <= seconds:
            raise StoreError(without_passwords(one_line(f"{operation} {url}: {reason}")))

    def wait(self, seconds: float, task: Future[Any]) -> None:
        """Returns after so many seconds, or when the task is done or an event is set."""
        end = time.monotonic() + seconds
        while not task.done() and not self.are_cancelled and (left := end - time.monotonic()) > 0:
            wait([task], min(left, _NOTICE_SECONDS))


_UNLIMITED = _Limits()
_limits = ContextVar("limits", default=_UNLIMITED)


@contextmanager
def limits(deadline_seconds: float | None = None, cancelled: threading.Event | None = None) -> Iterator[None]:
    """Bounds all that this thread does with files inside the block, taken together; blocks inside blocks add up.

    What is given up in the middle is as if it was never begun or as if it was done: a file is never left in parts.

    Args:
        deadline_seconds: from now on; what is not done by then ends with a StoreError, what begins then at once.
        cancelled: once it is set, what is in work ends within a second, in the middle of a request too.

    Raises:
        StoreError: (by an operation inside) the time is over.
        Cancelled: (by an operation inside) the event is set.
    """
    outer = _limits.get()
    end = math.inf if deadline_seconds is None else time.monotonic() + deadline_seconds
    events = outer.events if cancelled is None else (*outer.events, cancelled)
    token = _limits.set(_Limits(min(outer.end, end), events))
    try:
        yield
    finally:
        _limits.reset(token)


def is_remote(url: str) -> bool:
    """Whether `url` has a protocol other than ``file``."""
    return "://" in url and not url.startswith("file://")


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
        return _local(url).open("rb")
    filesystem = _filesystem(url)
    if _protocol(url) == "s3":
        found = _head(url)
        total, version = found["ContentLength"], found["ETag"]

        def fetch(start: int, end: int) -> bytes:
            return _get(url, version, start, end)

    else:
        total = _run("find", url, filesystem._info, url)["size"]
        if total is None:
            raise _sent_whole(url)
        file = filesystem.open(url, size=total)

        async def fetch_range(start: int, end: int) -> bytes:
            return _whole(await file.async_fetch_range(start, end), end - start)

        def fetch(start: int, end: int) -> bytes:
            return _run("read", url, fetch_range, start, end)

    return cast(BinaryIO, io.BufferedReader(_RangeFile(url, fetch, total), _BUFFER_BYTES))


def read_bytes(url: str) -> bytes:
    """The whole content, in one request: for what is small.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is damaged in the store.
    """
    if not is_remote(url):
        return _local(url).read_bytes()
    if _protocol(url) == "s3":
        return _get(url)
    return cast(bytes, _run("read", url, _filesystem(url)._cat_file, url))


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


def read_json(url: str) -> Any:
    """The value in a JSON file. Raises FileNotFoundError, and ValueError where it is no JSON."""
    return json.loads(read_bytes(url))


def download_file(url: str, path: Path | str, size: int | None = None, sha256: str | None = None) -> None:
    """Copies `url` to the local `path`, which appears only when it is whole and verified.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: its size in bytes or its hexadecimal checksum is not the one expected, however often it is
            fetched: what was damaged on the way is whole the next time.
    """

    def download() -> None:
        digest, count = hashlib.sha256(), 0
        with open_read(url) as source, _published(Path(path), os.replace) as target:
            while chunk := source.read(_BUFFER_BYTES):
                _limits.get().check("download", url)
                target.write(chunk)
                digest.update(chunk)
                count += len(chunk)
            if size not in (None, count):
                raise IntegrityError(f"download {url}: it has {count} bytes, {size} were expected")
            if sha256 not in (None, digest.hexdigest()):
                raise IntegrityError(f"download {url}: its sha256 is {digest.hexdigest()}, {sha256} was expected")

    for _ in range(_DOWNLOADS - 1):
        with suppress(IntegrityError):
            return download()
    return download()


def size(url: str) -> int:
    """Size in bytes. Raises FileNotFoundError."""
    if not is_remote(url):
        return _local(url).stat().st_size
    if _protocol(url) == "s3":
        return int(_head(url)["ContentLength"])
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
        _upload(url, size, read)
    else:
        with _published(_local(url), os.replace) as target:
            for start in range(0, size, PART_BYTES):
                _limits.get().check("write", url)
                target.write(_part(url, read, start, min(start + PART_BYTES, size)))


def write_json(url: str, value: Any) -> None:
    """Writes JSON in one form: equal values give equal bytes."""
    write_bytes(url, (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode())


def create_bytes(url: str, data: bytes) -> bool:
    """Writes a file unless it is there: of all who try, exactly one is told True.

    On S3 that takes a store for which `supports_conditional_create` holds.
    """
    if not is_remote(url):
        try:
            with _published(_local(url), os.link) as target:
                target.write(data)
        except FileExistsError:
            return False
        return True
    token = secrets.token_hex(16)
    try:
        _put("create", url, data, {_TOKEN: token}, IfNoneMatch="*")
    except FileExistsError:
        return _is_from(token, url)
    return True


def supports_conditional_create(prefix: str) -> bool:
    """Whether the store refuses to create what is there already: tried with an object below `prefix`, and removed."""
    probe = join(prefix, f"probe-{secrets.token_hex(8)}")
    try:
        created = create_bytes(probe, b"first")
    except NotImplementedError:
        return False
    refused = not create_bytes(probe, b"second")
    delete([probe])
    return created and refused


def upload_file(path: Path | str, url: str) -> None:
    """Copies a local file to `url`, where it appears whole or not at all."""
    with Path(path).open("rb") as source:
        descriptor = source.fileno()
        write_from(url, os.fstat(descriptor).st_size, lambda start, end: os.pread(descriptor, end - start, start))


# ── listing and deleting ─────────────────────────────────────────────────────────────────────────────────────────────


def list_files(url_prefix: str) -> list[Entry]:
    """All files below a folder, at any depth, sorted by URL; none where there is no such folder."""
    found: list[Entry] = []
    if not is_remote(url_prefix):
        for folder, _, names in os.walk(_local(url_prefix)):
            for path in (Path(folder, name) for name in names if not name.endswith(_PARTIAL)):
                with suppress(FileNotFoundError):  # removed since the folder was read
                    found.append(Entry(str(path), path.stat().st_size))
        return sorted(found)
    place = _place(f"{url_prefix.removesuffix('/')}/")
    request = {"Bucket": place["Bucket"], "Prefix": place["Key"]}
    while True:
        page = _s3("list", url_prefix, "list_objects_v2", **request)
        objects = ((f"s3://{request['Bucket']}/{item['Key']}", item["Size"]) for item in page.get("Contents", []))
        found += [Entry(url, size) for url, size in objects if not url.endswith("/")]
        if not page.get("IsTruncated"):
            return sorted(found)
        request["ContinuationToken"] = page["NextContinuationToken"]


def glob(pattern: str) -> list[Entry]:
    """The files that match ``*``, ``**``, ``?`` and ``[…]``, sorted by URL; a plain or ``https://`` name is itself."""
    if is_remote(pattern) and (_protocol(pattern) != "s3" or not any(character in pattern for character in "*?[")):
        return [Entry(pattern, size(pattern))] if exists(pattern) else []
    if is_remote(pattern):
        _probe(f"s3://{_place(pattern)['Bucket']}")
        found = _run("list", pattern, _filesystem(pattern)._glob, pattern, detail=True)
        files = [Entry(f"s3://{name}", info["size"]) for name, info in found.items() if info["type"] == "file"]
    else:
        found = fsspec.filesystem("file").glob(str(_local(pattern)), detail=True)
        files = [Entry(name, info["size"]) for name, info in found.items() if info["type"] == "file"]
    return sorted(entry for entry in files if not entry.url.endswith(_PARTIAL))


def delete(urls: Iterable[str]) -> None:
    """Removes files; one that is not there is no error."""

    def remove(url: str) -> None:
        if is_remote(url):
            _s3("delete", url, "delete_object", **_place(url))
        else:
            _local(url).unlink(missing_ok=True)

    with _threads() as pool:
        list(pool.map(remove, urls))


def delete_tree(prefix: str) -> None:
    """Removes a folder and all in it, and what uploads to it that were killed have left in the store."""
    if not is_remote(prefix):
        shutil.rmtree(_local(prefix), ignore_errors=True)
        return
    delete(entry.url for entry in list_files(prefix))
    abort_uploads(prefix)


def abort_uploads(prefix: str, is_abandoned: Callable[[str], bool] = lambda url: True) -> None:
    """Removes what uploads to a folder that were killed have left in the store: no list of files shows it.

    Who may not see it leaves it to the store's own rules.

    Args:
        prefix: the folder.
        is_abandoned: whether nobody uploads to this URL any more.
    """
    if not is_remote(prefix):
        return
    place = _place(f"{prefix.removesuffix('/')}/")
    with suppress(NotImplementedError, UserError):
        found = _s3("list", prefix, "list_multipart_uploads", Bucket=place["Bucket"], Prefix=place["Key"])
        for upload in found.get("Uploads", []):
            request = {"Bucket": place["Bucket"], "Key": upload["Key"], "UploadId": upload["UploadId"]}
            if is_abandoned(f"s3://{place['Bucket']}/{upload['Key']}"):
                with suppress(FileNotFoundError):  # completed or aborted since
                    _s3("delete", prefix, "abort_multipart_upload", **request)


# ── S3 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


class _RangeFile(AbstractBufferedFile):
    """fsspec's seekable file with read-ahead, over ranges that are tried again one by one."""

    def __init__(self, url: str, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        super().__init__(None, url, block_size=PART_BYTES - _BUFFER_BYTES, cache_type="readahead", size=size)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return b"".join(self._fetch(at, min(at + PART_BYTES, end)) for at in range(start, end, PART_BYTES))


def _get(url: str, version: str | None = None, start: int = 0, end: int | None = None) -> bytes:
    """An object's bytes from `start` to `end`; without these the whole, compared to the checksum it was written with.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is not of this `version`, or other than it was written, however often it is fetched.
    """
    filesystem, request = _filesystem(url), _place(url)
    if end is not None:
        request["Range"] = f"bytes={start}-{end - 1}"
    fetched = 0

    async def get() -> bytes:
        nonlocal fetched
        answer = await filesystem._call_s3("get_object", **request)
        async with answer["Body"] as body:
            if version and version != answer["ETag"]:
                raise IntegrityError(f"read {url}: it was replaced while it was read")
            data = _whole(await body.read(), answer["ContentLength"] if end is None else end - start)
        written = answer.get("Metadata", {}).get(_MD5)
        if end is None and written and written != _md5(data).hex():
            fetched += 1
            kind = ConnectionError if fetched < _DOWNLOADS else IntegrityError
            raise kind(f"read {url}: other bytes came than were written")
        return data

    return _run("read", url, get)


def _whole(data: bytes, size: int) -> bytes:
    """`data`; raises, so that it is read again, what some servers and proxies take no notice of."""
    if len(data) != size:
        raise ConnectionError(f"{len(data)} of {size} bytes came")
    return data


def _head(url: str) -> dict[str, Any]:
    return cast(dict[str, Any], _s3("find", url, "head_object", **_place(url)))


def _is_from(token: str, url: str) -> bool:
    try:
        return _head(url).get("Metadata", {}).get(_TOKEN) == token
    except FileNotFoundError:
        return False


def _upload(url: str, total: int, read: Callable[[int, int], bytes | memoryview]) -> None:
    """Puts ``read(0, total)`` at `url`, in parts that are tried again one by one if it is large."""
    if total <= PART_BYTES:
        _put("write", url, _part(url, read, 0, total), {})
        return
    place = _place(url)
    token = secrets.token_hex(16)
    part_bytes = max(PART_BYTES, -(-total // 10_000))  # S3 takes no more than 10,000 parts
    place["UploadId"] = _s3("write", url, "create_multipart_upload", Metadata={_TOKEN: token}, **place)["UploadId"]

    def put(number: int) -> dict[str, Any]:
        body = _body(_part(url, read, (number - 1) * part_bytes, min(number * part_bytes, total)))
        answer = _s3("write", url, "upload_part", PartNumber=number, **body, **place)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        with _threads() as pool:
            parts = list(pool.map(put, range(1, -(-total // part_bytes) + 1)))
        _s3("write", url, "complete_multipart_upload", MultipartUpload={"Parts": parts}, **place)
    except FileNotFoundError:  # no such upload: completed by a request whose answer was lost, or aborted by another
        if not _is_from(token, url):
            raise StoreError(f"write {url}: the upload was aborted") from None
    except BaseException:
        _abort(url, place)
        raise


def _put(operation: str, url: str, data: bytes, metadata: dict[str, str], **request: str) -> None:
    metadata = metadata | {_MD5: _md5(data).hex()}
    _s3(operation, url, "put_object", **_place(url), **_body(data), Metadata=metadata, **request)


def _body(data: bytes) -> dict[str, Any]:
    """What is sent, with its checksum: some stores keep an empty object of a writer that was killed, unless told."""
    return {"Body": data, "ContentMD5": base64.b64encode(_md5(data)).decode()}


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _part(url: str, read: Callable[[int, int], bytes | memoryview], start: int, end: int) -> bytes:
    data = bytes(read(start, end))
    if len(data) != end - start:
        raise IntegrityError(f"write {url}: from byte {start} there are {len(data)}, {end - start} were expected")
    return data


def _threads() -> ThreadPoolExecutor:
    """A few threads for requests at the same time, under the limits of this one."""
    return ThreadPoolExecutor(_PARALLEL_REQUESTS, initializer=_limits.set, initargs=(_limits.get(),))


def _abort(url: str, upload: dict[str, Any]) -> None:
    """Asks once, after a failure: what it leaves takes space only, until `delete_tree` or the store removes it."""
    filesystem = _filesystem(url)
    request = filesystem._call_s3("abort_multipart_upload", **upload)
    wait([asyncio.run_coroutine_threadsafe(request, filesystem.loop)], _LAST_REQUEST_SECONDS)


def _probe(url: str) -> None:
    """Raises UserError unless there is an S3 service that takes the credentials and has the bucket."""
    _s3(_PROBE, url, "list_objects_v2", Bucket=_place(url)["Bucket"], MaxKeys=1)


def _s3(operation: str, url: str, method: str, **request: Any) -> Any:
    return _run(operation, url, _filesystem(url)._call_s3, method, **request)


def _place(url: str) -> dict[str, Any]:
    if _protocol(url) != "s3":
        raise UserError(url, None, "can be read, but neither written nor listed", "give a path or an s3:// URL")
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


# ── retries, and what no retry mends ─────────────────────────────────────────────────────────────────────────────────

_PROBE = "look into"
_CREDENTIALS_MISSING = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound, boto.SSOError)
_CREDENTIALS_REFUSED = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_UNREACHABLE = (
    *(boto.EndpointConnectionError, boto.ConnectTimeoutError, boto.SSLError, boto.ProxyConnectionError),
    *(ResponseParserError, aiohttp.ClientConnectorError),
)
_MAY_PASS = (OSError, boto.BotoCoreError, ResponseParserError, aiohttp.ClientError)
_CODES_THAT_MAY_PASS = {
    *("BadDigest", "ConditionalRequestConflict", "IncompleteBody", "InternalError", "OperationAborted"),
    *("RequestTimeout", "ServiceUnavailable", "SlowDown", "XAmzContentSHA256Mismatch"),
    *("InvalidPart", "InvalidPartOrder", "MalformedXML"),  # the XML is ours, and right when it is sent
}
_OTHER_REGION = {"301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_GIVE_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN if temporary), or AWS_PROFILE"


def _run(
    operation: str, url: str, function: Callable[..., Coroutine[Any, Any, Result]], *args: Any, **kw: Any
) -> Result:
    """Awaits ``function(*args, **kw)``, again and again until it succeeds, cannot succeed, or the deadline has passed.

    Every try gets twice the time of the one before: one that stalls is soon replaced, one that is slow gets through.

    Raises:
        FileNotFoundError, FileExistsError, NotImplementedError: the store says so.
        UserError: a person has to mend it.
        StoreError: the deadline has passed.
        Cancelled: see `limits`.
    """
    started, tries = time.monotonic(), 0
    options = _process.options
    with limits(options.deadline_seconds):
        ours = _limits.get()
        while True:
            ours.check(operation, url)
            result = _try(url, options.read_timeout_seconds * 2**tries, function, *args, **kw)
            if not isinstance(result, Exception):
                _process.answered.add(_service(url))
                return result
            tries += 1
            tried_seconds = time.monotonic() - started
            pause = random.uniform(0.5, 1) * min(0.1 * 2**tries, 15)
            _raise_if_permanent(result, operation, url, tried_seconds + pause)
            reason = f"{type(result).__name__} {result}; gave up after {tries} tries in {tried_seconds:.0f} s"
            ours.check(operation, url, pause, reason)
            ours.wait(pause, Future())


def _try(
    url: str, seconds: float, function: Callable[..., Coroutine[Any, Any, Result]], *args: Any, **kw: Any
) -> Result | Exception:
    """What ``function(*args, **kw)`` gives or raises within so many seconds and the limits.

    Given up, it is cancelled, which closes its connection: its answer cannot meet the next request.
    """

    async def outcome() -> Result | Exception:
        try:
            return await function(*args, **kw)
        except Exception as error:  # returned, for asyncio reports what was raised too late for anybody
            return error

    ours = _limits.get()
    seconds = max(0, min(seconds, ours.seconds_left))
    task = asyncio.run_coroutine_threadsafe(outcome(), _filesystem(url).loop)
    try:
        ours.wait(seconds, task)
        return task.result() if task.done() else TimeoutError(f"no answer in {seconds:.1f} s")
    finally:
        task.cancel()


def _raise_if_permanent(error: Exception, operation: str, url: str, next_try_seconds: float) -> None:
    """Raises what the caller or a person must know now; returns where another try may help.

    Args:
        next_try_seconds: when the next try would be, since the first.
    """
    if (cause := _cause(error, _UNREACHABLE)) is not None:
        patience_seconds = min(_UNREACHABLE_SECONDS, _process.options.deadline_seconds)
        if next_try_seconds > patience_seconds and _service(url) not in _process.answered:
            reason = getattr(cause, "kwargs", {}).get("error", cause)
            wrong = _wrong_endpoint(url, f"cannot be reached: {reason}")
            if not _may_come_up(cause, reason):
                raise wrong from None
            if _service(url) not in _process.missed:
                _process.missed.add(_service(url))
                logger.warning("%s; trying for %.0f s", wrong, _process.options.deadline_seconds)
    elif (cause := _cause(error, boto.ClientError)) is not None:
        answer = cause.response.get("Error", {})
        status = int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        _raise_if_refused(status, str(answer.get("Code", status)), answer.get("Message", ""), operation, url)
    elif (cause := _cause(error, aiohttp.ClientResponseError)) is not None:
        _raise_if_refused(cause.status, str(cause.status), cause.message, operation, url)
    elif isinstance(error, FileNotFoundError) and error.__cause__ is None:
        raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
    elif (cause := _cause(error, _CREDENTIALS_MISSING)) is not None:
        setting = "AWS_PROFILE" if isinstance(cause, boto.ProfileNotFound) else "AWS_ACCESS_KEY_ID"
        raise UserError(setting, None, f"no credentials to {operation} {url}: {cause}", _GIVE_CREDENTIALS) from None
    elif isinstance(error, boto.ParamValidationError):
        raise UserError(url, None, "names no object", "expected s3://bucket/key") from None
    elif isinstance(error, ValueError):
        raise (_wrong_endpoint(url, "is no URL of a service") if _protocol(url) == "s3" else _sent_whole(url)) from None
    elif isinstance(error, IntegrityError) or not isinstance(error, _MAY_PASS):
        raise error


def _may_come_up(cause: Exception, reason: object) -> bool:
    """Whether the address may be right, and the service away for now: all one sees of an outage."""
    found = getattr(reason, "os_error", None)
    is_refused = found is not None and not isinstance(found, socket.gaierror | ssl.SSLError | ssl.CertificateError)
    return is_refused or isinstance(cause, boto.ConnectTimeoutError)


def _raise_if_refused(status: int, code: str, message: str, operation: str, url: str) -> None:
    """The store has answered with an error: raises unless it may pass."""
    on_s3, is_bare = _protocol(url) == "s3", code.isdigit()
    if not is_bare:
        _process.answered.add(_service(url))
    if code in _CODES_THAT_MAY_PASS or status in (408, 425, 429) or (status >= 500 and status != 501):
        return
    if on_s3 and is_bare and operation != _PROBE:
        _probe(url)  # for the reason: an answer to HEAD has none in it, and a service that is not S3 gives none
    place = f"s3://{_place(url)['Bucket']}" if on_s3 else url
    reason = f"the store refused to {operation} {url}: {code}"
    if code == "NoSuchBucket":
        raise UserError(place, None, "there is no such bucket", "create it, or correct the URL") from None
    if code == "RequestTimeTooSkewed":
        wrong = f"{reason}: this machine's clock is too far from the store's"
        raise UserError(place, None, wrong, "set the clock") from None
    if on_s3 and (status in (401, 403) or code in _CREDENTIALS_REFUSED):
        raise UserError("AWS_ACCESS_KEY_ID", None, reason, f"{_GIVE_CREDENTIALS}, of one who may use {place}") from None
    if on_s3 and code in _OTHER_REGION:
        raise UserError("store.region", _process.options.region, reason, f"name the region of {place}") from None
    if operation == _PROBE and is_bare:
        raise _wrong_endpoint(url, f"is no S3 service: {message}") from None
    if status == 404:
        raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
    if status == 412:
        raise FileExistsError(errno.EEXIST, "there is such a file", url) from None
    if status == 416:
        raise IntegrityError(f"{operation} {url}: it was replaced while it was read") from None
    if status == 501:
        raise NotImplementedError(reason) from None
    raise UserError(url, None, f"{reason} {message}", "correct the URL") from None


def _cause(error: BaseException | None, kinds: Any) -> Any:
    """The first of `error` and its causes that is one of `kinds`: s3fs wraps what botocore raised."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error


def _wrong_endpoint(url: str, fault: str) -> UserError:
    if _protocol(url) != "s3":
        return UserError(url, None, fault, "correct the URL")
    return UserError(*_endpoint(), fault, "give the URL of an S3 service")


def _endpoint() -> tuple[str, str | None]:
    """Where the address of the S3 service is set, and the address."""
    if _process.options.endpoint_url:
        return "store.endpoint_url", _process.options.endpoint_url
    name = "AWS_ENDPOINT_URL_S3" if "AWS_ENDPOINT_URL_S3" in os.environ else "AWS_ENDPOINT_URL"
    return name, os.environ.get(name)


def _sent_whole(url: str) -> UserError:
    return UserError(url, None, "its server sends files only as a whole", "download it and give its path")


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _protocol(url: str) -> str:
    protocol = url.partition("://")[0]
    if protocol not in ("s3", "http", "https"):
        remedy = "give a path, file://, s3:// or, to read only, https:// or http://"
        raise UserError(url, None, f"{protocol}:// is not supported", remedy)
    return protocol


def _service(url: str) -> str:
    """Who answers for `url`: the one S3 service, or a host."""
    return "s3" if _protocol(url) == "s3" else url.split("/")[2]


def _local(url: str) -> Path:
    return Path(url.removeprefix("file://")).expanduser()


def _filesystem(url: str) -> Any:
    """This process's connection: one that was made before a fork fails in the child."""
    key = (os.getpid(), _protocol(url))
    if key not in _process.filesystems:
        _process.filesystems[key] = _connect(*key)
    return _process.filesystems[key]


def _connect(_: int, protocol: str) -> Any:
    options = _process.options
    fresh = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol != "s3":
        limits = aiohttp.ClientTimeout(
            sock_connect=options.connect_timeout_seconds, sock_read=options.read_timeout_seconds
        )
        return fsspec.filesystem(protocol, client_kwargs={"timeout": limits, "trust_env": True}, **fresh)
    if "@" in (_endpoint()[1] or ""):
        raise _wrong_endpoint("s3://", "holds a user name or password: those are given as AWS_ACCESS_KEY_ID and so on")
    filesystem = S3FileSystem(
        endpoint_url=options.endpoint_url,
        client_kwargs={"region_name": options.region} if options.region else {},
        config_kwargs={
            "connect_timeout": options.connect_timeout_seconds,
            "read_timeout": options.read_timeout_seconds,
            "retries": {"total_max_attempts": 1},  # `_run` alone tries again
            "max_pool_connections": 32,
            "request_checksum_calculation": "when_required",  # many stores do not know the newer checksums
            "response_checksum_validation": "when_required",
        },
        **fresh,
    )
    filesystem.retries = 1
    return filesystem


@contextmanager
def _published(path: Path, publish: Callable[[Path, Path], None]) -> Iterator[BinaryIO]:
    """A temporary file beside `path`, which `publish` puts in place, safe on the disk, if nothing was raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(str(path), None, "no space left on the disk", "make room, or name another place") from None
        raise
    finally:
        partial.unlink(missing_ok=True)
