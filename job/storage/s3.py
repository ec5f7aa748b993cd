"""Objects in an S3 store: reading ranges, writing at once or in parts, listing a prefix. Each request is retried.

No request asks about the root of a bucket, so credentials that are limited to one prefix are enough.
"""

import asyncio
import base64
import errno
import hashlib
import re
import secrets
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, cast

from fsspec.utils import glob_translate

from job.errors import UserError
from job.storage import deadline
from job.storage.connection import addressing, bucket_and_key, filesystem, state
from job.storage.deadline import IntegrityError, StoreError
from job.storage.retry import PROBE, AccessDenied, Answer, Unexplained, raise_refusal, run_with_retries

PART_BYTES = 8 * 2**20
"""Bytes of a large file in one request; this much is kept in memory, and sent again after a fault."""
DOWNLOADS = 3
"""Number of times a file is fetched before it counts as damaged in the store."""
_READS = 6
"""Number of times an object that is read into memory is fetched; such objects are small, so more tries cost little."""
_PARALLEL_REQUESTS = 4
_LAST_REQUEST_SECONDS = 1.0
"""Longest wait of a cancelled operation for the store to remove what it has left there."""
_TOKEN, _MD5 = "writer", "md5"
"""Metadata of an object. The token lets a writer recognize its own object if the answer to its request was lost; the
MD5 sum lets a reader check that the object arrived unchanged."""

_header: ContextVar[tuple[str, str] | None] = ContextVar("header", default=None)
"""A header, unknown to botocore, that the uploads of this task carry."""


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def call(operation: str, url: str, method: str, **request: Any) -> Any:
    """Send a request, with retries, and return the answer. Raises the errors of `_explained`."""
    return _explained(operation, url, lambda: _send(url, method, request))


def _explained(operation: str, url: str, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Await `function` with retries. If the store refuses without a reason, list the object to find the reason.

    Answers to HEAD have no body, and many stores answer 403 for a missing object if the credentials may not list it. A
    listing of that one key tells these cases apart.

    Raises:
        FileNotFoundError, FileExistsError, NotImplementedError, UserError, StoreError, Cancelled: see
            `retry.run_with_retries`.
    """
    bucket = bucket_and_key(url)["Bucket"]
    while True:
        style = addressing()
        try:
            result = run_with_retries(operation, url, function)
        except Unexplained as refusal:
            answer = refusal.answer
            if answer.status == 404 and bucket in state.buckets:
                is_listed: bool | None = False
            else:
                is_listed = _is_listed(url)
            if addressing() != style:  # The listing has found the style of addressing that the store accepts.
                continue
            is_reading = operation in ("read", "find")
            if is_reading and is_listed is False and answer.status in (403, 404):
                raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
            if answer.is_bare and answer.status == 403:
                answer = Answer(403, "AccessDenied", answer.message)
            raise_refusal(answer, operation, url, may_be_absent=is_reading and is_listed is None)
        state.buckets.add(bucket)
        return result


async def _send(url: str, method: str, request: dict[str, Any]) -> Any:
    return await filesystem(url)._call_s3(method, **request)


def _is_listed(url: str) -> bool | None:
    """Return True if a listing shows the object; None if the credentials do not permit the listing.

    Raises:
        UserError: the bucket, the credentials, the clock or the address is wrong.
    """
    bucket, key = bucket_and_key(url).values()
    for prefix in (key, f"{key}/"):
        request = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": 1}
        try:
            page = run_with_retries(PROBE, url, _send, url, "list_objects_v2", request)
        except AccessDenied:
            continue  # Credentials limited to folder/* may not list `folder`, but may list `folder/`.
        return any(item["Key"] == key for item in page.get("Contents", []))
    return None


def send_once(url: str, method: str, **request: Any) -> None:
    """Send a request that cleans up after a failure or a cancellation. It is not retried, and waits only briefly."""
    if deadline.current.get().seconds_left > 0:
        loop = filesystem(url).loop
        wait([asyncio.run_coroutine_threadsafe(_send(url, method, request), loop)], _LAST_REQUEST_SECONDS)


def thread_pool() -> ThreadPoolExecutor:
    """Return a pool of threads for parallel requests, with the deadline and cancellation of this thread."""
    return ThreadPoolExecutor(_PARALLEL_REQUESTS, initializer=deadline.current.set, initargs=(deadline.current.get(),))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def head(url: str) -> dict[str, Any]:
    """Return the size, version and metadata of an object. Raises FileNotFoundError."""
    return cast(dict[str, Any], call("find", url, "head_object", **bucket_and_key(url)))


def get(url: str, version: str | None = None, start: int = 0, end: int | None = None) -> bytes:
    """Return the bytes of an object from `start` to `end`, or all of them.

    A whole object is checked with the MD5 sum that was stored with it.

    Raises:
        FileNotFoundError: the object does not exist.
        IntegrityError: the object does not have this `version`, or each fetch differs from the bytes written.
    """
    request = bucket_and_key(url)
    if end is not None:
        request["Range"] = f"bytes={start}-{end - 1}"
    fetched = 0

    async def read() -> bytes:
        nonlocal fetched
        answer = await _send(url, "get_object", request)
        async with answer["Body"] as body:
            if version and version != answer["ETag"]:
                raise IntegrityError(f"read {url}: it was replaced while it was read")
            data = checked_length(await body.read(), answer["ContentLength"] if end is None else end - start)
        written = answer.get("Metadata", {}).get(_MD5)
        if end is None and written and written != _md5(data).hex():
            fetched += 1
            kind = ConnectionError if fetched < _READS else IntegrityError
            raise kind(f"read {url}: the bytes received differ from the bytes written")
        return data

    return cast(bytes, _explained("read", url, read))


def checked_length(data: bytes, size: int) -> bytes:
    """Return `data` if it has `size` bytes. Raises ConnectionError, which is retried: some proxies cut answers off."""
    if len(data) != size:
        raise ConnectionError(f"received {len(data)} of {size} bytes")
    return data


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def put(operation: str, url: str, data: bytes, token: str = "", header: tuple[str, str] | None = None) -> None:
    """Write an object in one request.

    Args:
        operation: verb for messages.
        url: the object.
        data: the content.
        token: name of the writer, stored in the object's metadata.
        header: name and value of an additional header, which is signed too.
    """
    metadata = {_MD5: _md5(data).hex()} | ({_TOKEN: token} if token else {})
    request = {**bucket_and_key(url), **_body(data), "Metadata": metadata}

    async def send() -> None:
        if header is not None:
            client = await filesystem(url).set_session()
            client.meta.events.register("before-sign.s3.PutObject", _add_header, unique_id="job-header")
            _header.set(header)  # Each try is a task of its own with its own context variables.
        await _send(url, "put_object", request)

    _explained(operation, url, send)


def _add_header(request: Any, **_: Any) -> None:
    if (header := _header.get()) is not None:
        request.headers[header[0]] = header[1]


def create(header: tuple[str, str], url: str, data: bytes) -> bool:
    """Write an object with a header that forbids overwriting. Returns True if this call created the object.

    The object is looked up afterwards, because the answer to a creation may be lost, and because one store is reported
    to answer two simultaneous creations with success and to keep only the later one.
    """
    token = secrets.token_hex(16)
    with suppress(FileExistsError):
        put("create", url, data, token, header)
    return _is_from(token, url)


def _is_from(token: str, url: str) -> bool:
    try:
        return head(url).get("Metadata", {}).get(_TOKEN) == token
    except FileNotFoundError:
        return False


def upload(url: str, total: int, read: Callable[[int, int], bytes | memoryview]) -> None:
    """Write ``read(0, total)`` to `url`. A large object is written in parts, and each part is retried alone."""
    if total <= PART_BYTES:
        put("write", url, read_exactly(url, read, 0, total))
        return
    target = bucket_and_key(url)
    token = secrets.token_hex(16)
    part_bytes = max(PART_BYTES, -(-total // 10_000))  # S3 allows at most 10,000 parts.
    target["UploadId"] = call("write", url, "create_multipart_upload", Metadata={_TOKEN: token}, **target)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        body = _body(read_exactly(url, read, (number - 1) * part_bytes, min(number * part_bytes, total)))
        answer = call("write", url, "upload_part", PartNumber=number, **body, **target)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        with thread_pool() as pool:
            parts = list(pool.map(send, range(1, -(-total // part_bytes) + 1)))
        call("write", url, "complete_multipart_upload", MultipartUpload={"Parts": parts}, **target)
    except FileNotFoundError:
        # The upload no longer exists: it was completed but the answer was lost, or another process aborted it.
        if not _is_from(token, url):
            raise StoreError(f"write {url}: the upload was aborted") from None
    except BaseException:
        send_once(url, "abort_multipart_upload", **target)
        raise


def read_exactly(url: str, read: Callable[[int, int], bytes | memoryview], start: int, end: int) -> bytes:
    """Return ``read(start, end)``. Raises IntegrityError if the number of bytes is not ``end - start``."""
    data = bytes(read(start, end))
    if len(data) != end - start:
        raise IntegrityError(f"write {url}: from byte {start}: got {len(data)} bytes, {end - start} were expected")
    return data


def _body(data: bytes) -> dict[str, Any]:
    """Return body and checksum of a request. Without checksum, some stores keep an empty object of a killed writer."""
    return {"Body": data, "ContentMD5": base64.b64encode(_md5(data)).decode()}


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


# ── listing and deleting ─────────────────────────────────────────────────────────────────────────────────────────────


def objects(url: str, delimiter: str = "") -> Iterator[tuple[str, int]]:
    """Yield the URL and the size in bytes of every object whose URL starts with `url`.

    Args:
        url: the prefix.
        delimiter: skip objects that have this text after the prefix; empty: skip none.
    """
    bucket, prefix = bucket_and_key(url).values()
    request = {"Bucket": bucket, "Prefix": prefix} | ({"Delimiter": delimiter} if delimiter else {})
    method = "list_objects_v2"
    while True:
        page = call("list", url, method, **request)
        contents = page.get("Contents", [])
        for item in contents:
            if not item["Key"].endswith("/"):
                yield f"s3://{bucket}/{item['Key']}", item["Size"]
        if not page.get("IsTruncated"):
            return
        if "NextContinuationToken" in page:
            request["ContinuationToken"] = page["NextContinuationToken"]
        else:  # The store supports only the older form of listing.
            method = "list_objects"
            prefixes = [item["Prefix"] for item in page.get("CommonPrefixes", [])]
            request["Marker"] = page.get("NextMarker") or max([item["Key"] for item in contents] + prefixes)


def matching(pattern: str) -> Iterator[tuple[str, int]]:
    """Yield the URL and the size in bytes of the objects that match a glob. Lists only its literal prefix."""
    literal = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    if "/" not in literal.removeprefix("s3://"):
        raise UserError(
            pattern, None, "has a wildcard in the name of the bucket", "write the name in full: s3://bucket/..."
        )
    is_flat = "/" not in pattern[len(literal) :] and "**" not in pattern
    matches = re.compile(glob_translate(pattern.removeprefix("s3://"))).match
    for url, size in objects(literal, "/" if is_flat else ""):
        if matches(url.removeprefix("s3://")):
            yield url, size


def delete(url: str) -> None:
    """Remove an object. A missing object is not an error."""
    call("delete", url, "delete_object", **bucket_and_key(url))


def uploads(prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the URL and the id of each unfinished upload below a folder."""
    bucket, key = bucket_and_key(f"{prefix.removesuffix('/')}/").values()
    page = call("list", prefix, "list_multipart_uploads", Bucket=bucket, Prefix=key)
    for item in page.get("Uploads", []):
        yield f"s3://{bucket}/{item['Key']}", item["UploadId"]


def abort(url: str, upload_id: str) -> None:
    """Remove the parts of an unfinished upload. Raises FileNotFoundError if it was completed or aborted."""
    call("delete", url, "abort_multipart_upload", UploadId=upload_id, **bucket_and_key(url))
