"""Objects in an S3 store: read in ranges, written whole or in parts, listed below a prefix, each by the retry loop.

No request asks about a bucket's root, so that a key which may only use its own prefix is enough.
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
from job.storage.connection import addressing, filesystem, place, process
from job.storage.deadline import IntegrityError, StoreError
from job.storage.retry import PROBE, AccessDenied, Answer, Unexplained, refuse, run

PART_BYTES = 8 * 2**20
"""Bytes of a larger file that one request carries: this much is held in memory and sent again after a fault."""
DOWNLOADS = 3
"""How often a file is fetched before it is called damaged."""
_READS = 6
"""The same for what is read into memory, which is small and costs little to fetch again."""
_PARALLEL_REQUESTS = 4
_LAST_REQUEST_SECONDS = 1.0
"""How long an operation that is given up waits for the store to remove what it leaves."""
_TOKEN, _MD5 = "writer", "md5"
"""Metadata of an object: by the first a writer knows its own object when the answer to its request is lost, by the
second a reader knows that the object arrived as it was sent."""

_header: ContextVar[tuple[str, str] | None] = ContextVar("header", default=None)
"""A header that the uploads of this task carry, beyond those that botocore knows."""


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def call(operation: str, url: str, method: str, **request: Any) -> Any:
    """Send a request until it is answered. Raises what `_explained` does."""
    return _explained(operation, url, lambda: _send(url, method, request))


def _explained(operation: str, url: str, function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Await `function` by the retry loop; where the store refuses without a reason, find the reason by a listing.

    HEAD answers have no body, and to a key that may not list, many stores answer 403 for an object that is absent. A
    listing of that one key tells these cases apart.

    Raises:
        FileNotFoundError, FileExistsError, NotImplementedError, UserError, StoreError, Cancelled: see `retry.run`.
    """
    bucket = place(url)["Bucket"]
    while True:
        style = addressing()
        try:
            result = run(operation, url, function)
        except Unexplained as refusal:
            answer = refusal.answer
            if answer.status == 404 and bucket in process.buckets:
                is_listed: bool | None = False
            else:
                is_listed = _is_listed(url)
            if addressing() != style:  # the listing found out how the store wants to be asked
                continue
            looks = operation in ("read", "find")
            if looks and is_listed is False and answer.status in (403, 404):
                raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
            if answer.is_bare and answer.status == 403:
                answer = Answer(403, "AccessDenied", answer.message)
            refuse(answer, operation, url, may_be_absent=looks and is_listed is None)
        process.buckets.add(bucket)
        return result


async def _send(url: str, method: str, request: dict[str, Any]) -> Any:
    return await filesystem(url)._call_s3(method, **request)


def _is_listed(url: str) -> bool | None:
    """Return whether a listing shows the object; None if the credentials may not list it.

    Raises:
        UserError: the bucket, the credentials, the clock or the address is wrong.
    """
    found = place(url)
    for prefix in (found["Key"], f"{found['Key']}/"):
        request = {"Bucket": found["Bucket"], "Prefix": prefix, "MaxKeys": 1}
        try:
            page = run(PROBE, url, _send, url, "list_objects_v2", request)
        except AccessDenied:
            continue  # a key for folder/* may not list `folder`, and `folder` is no object that it could read
        return any(item["Key"] == found["Key"] for item in page.get("Contents", []))
    return None


def ask_once(url: str, method: str, **request: Any) -> None:
    """Send a request after a failure or a cancellation, without waiting long for it: it only tidies up."""
    if deadline.current.get().seconds_left > 0:
        loop = filesystem(url).loop
        wait([asyncio.run_coroutine_threadsafe(_send(url, method, request), loop)], _LAST_REQUEST_SECONDS)


def threads() -> ThreadPoolExecutor:
    """Return a few threads for simultaneous requests, under the limits of this thread."""
    return ThreadPoolExecutor(_PARALLEL_REQUESTS, initializer=deadline.current.set, initargs=(deadline.current.get(),))


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def head(url: str) -> dict[str, Any]:
    """Return size, version and metadata of an object. Raises FileNotFoundError."""
    return cast(dict[str, Any], call("find", url, "head_object", **place(url)))


def get(url: str, version: str | None = None, start: int = 0, end: int | None = None) -> bytes:
    """Return an object's bytes from `start` to `end`, or all of them, compared to the checksum they were written with.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: it is not of this `version`, or differs from what was written however often it is fetched.
    """
    request = place(url)
    if end is not None:
        request["Range"] = f"bytes={start}-{end - 1}"
    fetched = 0

    async def read() -> bytes:
        nonlocal fetched
        answer = await _send(url, "get_object", request)
        async with answer["Body"] as body:
            if version and version != answer["ETag"]:
                raise IntegrityError(f"read {url}: it was replaced while it was read")
            data = whole(await body.read(), answer["ContentLength"] if end is None else end - start)
        written = answer.get("Metadata", {}).get(_MD5)
        if end is None and written and written != _md5(data).hex():
            fetched += 1
            kind = ConnectionError if fetched < _READS else IntegrityError
            raise kind(f"read {url}: other bytes came than were written")
        return data

    return cast(bytes, _explained("read", url, read))


def whole(data: bytes, size: int) -> bytes:
    """Return `data`; raise, so that it is read again, if it is shorter than promised: some proxies cut answers off."""
    if len(data) != size:
        raise ConnectionError(f"{len(data)} of {size} bytes came")
    return data


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def put(operation: str, url: str, data: bytes, token: str = "", header: tuple[str, str] | None = None) -> None:
    """Write an object in one request.

    Args:
        operation: how messages call it.
        url: where to.
        data: the content.
        token: names the writer, in the object's metadata.
        header: one more header, which is signed too.
    """
    metadata = {_MD5: _md5(data).hex()} | ({_TOKEN: token} if token else {})
    request = {**place(url), **_body(data), "Metadata": metadata}

    async def send() -> None:
        if header is not None:
            client = await filesystem(url).set_session()
            client.meta.events.register("before-sign.s3.PutObject", _add_header, unique_id="job-header")
            _header.set(header)  # every try is a task of its own, and has variables of its own
        await _send(url, "put_object", request)

    _explained(operation, url, send)


def _add_header(request: Any, **_: Any) -> None:
    if (header := _header.get()) is not None:
        request.headers[header[0]] = header[1]


def create(header: tuple[str, str], url: str, data: bytes) -> bool:
    """Write an object with a header that forbids to overwrite; return whether this call created it.

    The object is looked at afterwards: the answer to a creation may have been lost, and one store is reported to let
    two simultaneous creations succeed, of which the later one stays.
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
    """Write ``read(0, total)`` to `url`, in parts that are tried again one by one if it is large."""
    if total <= PART_BYTES:
        put("write", url, exactly(url, read, 0, total))
        return
    target = place(url)
    token = secrets.token_hex(16)
    part_bytes = max(PART_BYTES, -(-total // 10_000))  # S3 takes no more than 10,000 parts
    target["UploadId"] = call("write", url, "create_multipart_upload", Metadata={_TOKEN: token}, **target)["UploadId"]

    def send(number: int) -> dict[str, Any]:
        body = _body(exactly(url, read, (number - 1) * part_bytes, min(number * part_bytes, total)))
        answer = call("write", url, "upload_part", PartNumber=number, **body, **target)
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        with threads() as pool:
            parts = list(pool.map(send, range(1, -(-total // part_bytes) + 1)))
        call("write", url, "complete_multipart_upload", MultipartUpload={"Parts": parts}, **target)
    except FileNotFoundError:  # no such upload: completed by a request whose answer was lost, or aborted by another
        if not _is_from(token, url):
            raise StoreError(f"write {url}: the upload was aborted") from None
    except BaseException:
        ask_once(url, "abort_multipart_upload", **target)
        raise


def exactly(url: str, read: Callable[[int, int], bytes | memoryview], start: int, end: int) -> bytes:
    """Return what `read` gives for these bytes of the file at `url`; raise IntegrityError if it is not as many."""
    data = bytes(read(start, end))
    if len(data) != end - start:
        raise IntegrityError(f"write {url}: from byte {start} there are {len(data)}, {end - start} were expected")
    return data


def _body(data: bytes) -> dict[str, Any]:
    """Return a request's body and its checksum: without it some stores keep an empty object of a killed writer."""
    return {"Body": data, "ContentMD5": base64.b64encode(_md5(data)).decode()}


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


# ── listing and deleting ─────────────────────────────────────────────────────────────────────────────────────────────


def objects(url: str, delimiter: str = "") -> Iterator[tuple[str, int]]:
    """Yield URL and size of every object whose URL begins with `url`; with a delimiter, of those without it after."""
    found = place(url)
    request = {"Bucket": found["Bucket"], "Prefix": found["Key"]} | ({"Delimiter": delimiter} if delimiter else {})
    method = "list_objects_v2"
    while True:
        page = call("list", url, method, **request)
        contents = page.get("Contents", [])
        for item in contents:
            if not item["Key"].endswith("/"):
                yield f"s3://{found['Bucket']}/{item['Key']}", item["Size"]
        if not page.get("IsTruncated"):
            return
        if "NextContinuationToken" in page:
            request["ContinuationToken"] = page["NextContinuationToken"]
        else:  # the store knows only the older form of listing
            method = "list_objects"
            prefixes = [item["Prefix"] for item in page.get("CommonPrefixes", [])]
            request["Marker"] = page.get("NextMarker") or max([item["Key"] for item in contents] + prefixes)


def matching(pattern: str) -> Iterator[tuple[str, int]]:
    """Yield URL and size of the objects that match a pattern; only what begins like it is listed."""
    literal = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    if "/" not in literal.removeprefix("s3://"):
        raise UserError(pattern, None, "has a pattern in the name of the bucket", "name the bucket: s3://bucket/...")
    is_flat = "/" not in pattern[len(literal) :] and "**" not in pattern
    matches = re.compile(glob_translate(pattern.removeprefix("s3://"))).match
    for url, size in objects(literal, "/" if is_flat else ""):
        if matches(url.removeprefix("s3://")):
            yield url, size


def delete(url: str) -> None:
    """Remove an object. One that is absent is no error."""
    call("delete", url, "delete_object", **place(url))


def uploads(prefix: str) -> Iterator[tuple[str, str]]:
    """Yield URL and id of the uploads below a folder that are not complete."""
    found = place(f"{prefix.removesuffix('/')}/")
    page = call("list", prefix, "list_multipart_uploads", Bucket=found["Bucket"], Prefix=found["Key"])
    for item in page.get("Uploads", []):
        yield f"s3://{found['Bucket']}/{item['Key']}", item["UploadId"]


def abort(url: str, upload_id: str) -> None:
    """Remove the parts of an upload; raises FileNotFoundError if it was completed or aborted."""
    call("delete", url, "abort_multipart_upload", UploadId=upload_id, **place(url))
