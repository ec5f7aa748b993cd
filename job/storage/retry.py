"""The retry loop: repeats a request that may succeed later until the deadline, and raises all other errors at once."""

import asyncio
import errno
import logging
import random
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import aiohttp
import botocore.exceptions as boto
from botocore.parsers import ResponseParserError

from job.errors import UserError
from job.storage import deadline
from job.storage.connection import (
    addressing,
    bucket_and_key,
    endpoint,
    filesystem,
    protocol,
    service,
    state,
    wrong_endpoint,
)
from job.storage.deadline import IntegrityError

UNREACHABLE_SECONDS = 4.0
"""How long to try an endpoint that has never answered before reporting it: its address is probably wrong."""
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 15
PROBE = "look into"
"""Name of the operation that finds out why another one was refused."""

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
    # The XML we send is correct, so these errors mean that it was damaged on the way.
    *("InvalidPart", "InvalidPartOrder", "MalformedXML"),
}
_OTHER_REGION = {"301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_PATH_STYLE_REFUSED = {
    "SecondLevelDomainForbidden",  # Alibaba OSS
    "PathStyleDomainForbidden",  # Tencent COS
    "VirtualHostDomainRequired",  # Huawei OBS
    "InvalidPathAccess",  # Volcengine TOS
}
_GIVE_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN if temporary), or AWS_PROFILE"

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class AccessDenied(UserError):
    """The credentials are valid, but do not permit the operation."""


class Refused(UserError):
    """The store refused a request for a reason that is not known here; the error shows the store's own message."""


class NoRanges(UserError):
    """A web server does not send parts of a file, or does not tell its size."""


class PathStyleRefused(Exception):
    """The store accepts only virtual-hosted addressing, which names the bucket as a part of the host."""


@dataclass(frozen=True)
class Answer:
    """An error answer of the store."""

    status: int
    """HTTP status."""
    code: str
    """Error code of S3, such as ``NoSuchKey``; the HTTP status as text if the answer has no error code."""
    message: str

    @property
    def is_bare(self) -> bool:
        """True if the answer has no error code, as an answer to HEAD or one of a service other than S3."""
        return self.code.isdigit()


class Unexplained(Exception):
    """The store refused without a reason, or its answer may mean either that the object is absent or forbidden."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.answer = answer


def run_with_retries(
    operation: str, url: str, function: Callable[..., Coroutine[Any, Any, Result]], *args: Any, **kw: Any
) -> Result:
    """Await ``function(*args, **kw)`` repeatedly until it succeeds, cannot succeed, or the deadline has passed.

    Each try may take twice as long as the one before: a stalled try is soon repeated, and a slow one succeeds in the
    end.

    Args:
        operation: verb for messages, such as ``read``.
        url: what the operation is about.
        function: coroutine function that makes one try.

    Raises:
        FileNotFoundError, FileExistsError, NotImplementedError: the store says so.
        Unexplained: the store gave no reason.
        UserError: the user has to correct something.
        StoreError: the deadline has passed.
        Cancelled: the operation was cancelled, see `deadline.limits`.
    """
    started, tries = time.monotonic(), 0
    options = state.options
    with deadline.limits(options.deadline_seconds):
        limits = deadline.current.get()
        while True:
            limits.check(operation, url)
            style = addressing()
            result = _try(url, options.read_timeout_seconds * 2**tries, function, *args, **kw)
            if not isinstance(result, Exception):
                state.answered.add(service(url))
                return result
            tries += 1
            tried_seconds = time.monotonic() - started
            pause = random.uniform(0.5, 1) * min(_SHORTEST_PAUSE_SECONDS * 2**tries, _LONGEST_PAUSE_SECONDS)
            try:
                _raise_if_permanent(result, operation, url, tried_seconds + pause)
            except PathStyleRefused as refusal:
                _turn_virtual(style, refusal, url)
                continue
            reason = f"{type(result).__name__} {result}; gave up after {tries} tries in {tried_seconds:.0f} s"
            limits.check(operation, url, pause, reason)
            limits.wait(pause, Future())


def _try(
    url: str, seconds: float, function: Callable[..., Coroutine[Any, Any, Result]], *args: Any, **kw: Any
) -> Result | Exception:
    """Return the result of ``function(*args, **kw)``, or the exception that it raises.

    A try that takes longer than `seconds` or the limits allow is cancelled, and the result is a TimeoutError.
    Cancelling closes the connection, so that a late answer cannot be taken for the answer to the next request.
    """

    async def outcome() -> Result | Exception:
        try:
            return await function(*args, **kw)
        except Exception as error:  # Returned, because asyncio logs exceptions of tasks that nobody waits for.
            return error

    limits = deadline.current.get()
    seconds = max(0, min(seconds, limits.seconds_left))
    loop = filesystem(url).loop
    task = asyncio.run_coroutine_threadsafe(outcome(), loop)
    try:
        limits.wait(seconds, task)
        return task.result() if task.done() else TimeoutError(f"no answer in {seconds:.1f} s")
    finally:
        task.cancel()


def _turn_virtual(style: str, refusal: PathStyleRefused, url: str) -> None:
    """Use virtual-hosted addressing from now on. Raises UserError if a setting forbids it, or if it was in use."""
    if state.options.addressing == "path":
        raise UserError("store.addressing", "path", str(refusal), "set store.addressing: virtual, or auto") from None
    if style == "virtual":
        fault = f"{refusal}, but the bucket was in the host name already"
        raise UserError(
            *endpoint(), fault, "the bucket may be in another region: set the address of its region"
        ) from None
    state.path_is_refused = True
    logger.info("s3://%s: using virtual-hosted addressing: %s", bucket_and_key(url)["Bucket"], refusal)


def _raise_if_permanent(error: Exception, operation: str, url: str, next_try_seconds: float) -> None:
    """Raise the error to report if another try cannot help; return if it may help.

    Args:
        error: exception that the try raised.
        operation: verb for messages.
        url: what the operation is about.
        next_try_seconds: time of the next try, in seconds since the first one.
    """
    if (cause := _cause(error, _UNREACHABLE)) is not None:
        _raise_if_wrong_address(cause, url, next_try_seconds)
    elif (cause := _cause(error, boto.ClientError)) is not None:
        details = cause.response.get("Error", {})
        status = int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        _raise_if_refused(Answer(status, str(details.get("Code", status)), details.get("Message", "")), operation, url)
    elif (cause := _cause(error, aiohttp.ClientResponseError)) is not None:
        _raise_if_refused(Answer(cause.status, str(cause.status), cause.message), operation, url)
    elif isinstance(error, FileNotFoundError) and error.__cause__ is None:
        raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
    elif (cause := _cause(error, _CREDENTIALS_MISSING)) is not None:
        setting = "AWS_PROFILE" if isinstance(cause, boto.ProfileNotFound) else "AWS_ACCESS_KEY_ID"
        remedy = f"{_GIVE_CREDENTIALS}, or store.anonymous: true to read a public bucket"
        raise UserError(setting, None, f"no credentials to {operation} {url}: {cause}", remedy) from None
    elif isinstance(error, boto.ParamValidationError):
        raise UserError(url, None, "names no object", "expected s3://bucket/key") from None
    elif isinstance(error, ValueError):
        is_s3 = protocol(url) == "s3"
        raise (wrong_endpoint(url, "is not the URL of a service") if is_s3 else no_ranges_error(url)) from None
    elif isinstance(error, IntegrityError) or not isinstance(error, _MAY_PASS):
        raise error


def _raise_if_wrong_address(cause: Exception, url: str, next_try_seconds: float) -> None:
    """Raise UserError if the address seems to be wrong; log a warning once if the service may only be down."""
    patience_seconds = min(UNREACHABLE_SECONDS, state.options.deadline_seconds)
    if next_try_seconds <= patience_seconds or service(url) in state.answered:
        return
    reason = getattr(cause, "kwargs", {}).get("error", cause)
    wrong = wrong_endpoint(url, f"cannot be reached: {reason}")
    if not _may_come_up(cause, reason):
        raise wrong from None
    if service(url) not in state.missed:
        state.missed.add(service(url))
        logger.warning("%s; trying for %.0f s", wrong, state.options.deadline_seconds)


def _may_come_up(cause: Exception, reason: object) -> bool:
    """Return True if the address may be right and the service only down for now."""
    os_error = getattr(reason, "os_error", None)
    wrong_address = socket.gaierror | ssl.SSLError | ssl.CertificateError
    is_refused = os_error is not None and not isinstance(os_error, wrong_address)
    return is_refused or isinstance(cause, boto.ConnectTimeoutError)


def _raise_if_refused(answer: Answer, operation: str, url: str) -> None:
    """Raise the exception that an error answer stands for; return if another try may succeed."""
    if not answer.is_bare:
        state.answered.add(service(url))
    if answer.code in _CODES_THAT_MAY_PASS or answer.status in (408, 425, 429):
        return
    if answer.status >= 500 and answer.status != 501:
        return
    is_ambiguous = answer.code == "AccessDenied" and operation in ("read", "find")
    if protocol(url) == "s3" and operation != PROBE and (answer.is_bare or is_ambiguous):
        raise Unexplained(answer)
    raise_refusal(answer, operation, url)


def raise_refusal(answer: Answer, operation: str, url: str, may_be_absent: bool = False) -> NoReturn:
    """Raise the exception that a final error answer stands for.

    Args:
        answer: the answer of the store.
        operation: verb for messages.
        url: what the operation is about.
        may_be_absent: True if a 403 can also mean that the object does not exist.
    """
    status = answer.status
    reason = f"the store refused to {operation} {url}: {answer.code}"
    if protocol(url) == "s3":
        # Huawei OBS answers NoSuchKey to an upload with path-style addressing.
        is_upload_without_key = answer.code == "NoSuchKey" and operation in ("write", "create")
        if answer.code in _PATH_STYLE_REFUSED or is_upload_without_key:
            raise PathStyleRefused(f"{reason}: it wants the bucket in the host name")
        _raise_if_mistaken(answer, operation, url, reason, may_be_absent)
    if status == 404:
        raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
    # 412 is the answer to If-None-Match, 409 the answer to the forbid-overwrite headers of other vendors.
    if status == 412 or (status == 409 and operation == "create"):
        raise FileExistsError(errno.EEXIST, "there is such a file", url) from None
    if status == 416:
        raise IntegrityError(f"{operation} {url}: it was replaced while it was read") from None
    if status == 501:
        raise NotImplementedError(reason) from None
    raise Refused(url, None, f"{reason} {answer.message}", "correct the URL") from None


def _raise_if_mistaken(answer: Answer, operation: str, url: str, reason: str, may_be_absent: bool) -> None:
    """Raise UserError if the bucket, the clock, the credentials, the region or the service is wrong."""
    bucket = f"s3://{bucket_and_key(url)['Bucket']}"
    if answer.code == "NoSuchBucket":
        raise UserError(bucket, None, "there is no such bucket", "create it, or correct the URL") from None
    if answer.code == "RequestTimeTooSkewed":
        wrong = f"{reason}: this machine's clock is too far from the store's"
        raise UserError(bucket, None, wrong, "set the clock") from None
    if answer.status in (401, 403) or answer.code in _CREDENTIALS_REFUSED:
        kind = AccessDenied if answer.code in ("AccessDenied", "403") else UserError
        if state.options.anonymous:
            remedy = "unset store.anonymous and give credentials: without them only public buckets can be read"
            raise kind("store.anonymous", True, reason, remedy) from None
        remedy = f"{_GIVE_CREDENTIALS}, with the right to use {bucket}"
        if may_be_absent:
            remedy += " and to list it: without that right the store answers as if a missing object were forbidden"
        raise kind("AWS_ACCESS_KEY_ID", None, reason, remedy) from None
    if answer.code in _OTHER_REGION:
        raise UserError("store.region", state.options.region, reason, f"name the region of {bucket}") from None
    if operation == PROBE and answer.is_bare:
        raise wrong_endpoint(url, f"is not an S3 service: {answer.message}") from None


def _cause(error: BaseException | None, kinds: Any) -> Any:
    """Return the first of `error` and its causes that is one of `kinds`, because s3fs wraps errors of botocore."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error


def no_ranges_error(url: str) -> NoRanges:
    """Return the error for a web server that does not send parts of files."""
    return NoRanges(url, None, "its server sends files only as a whole", "download the file and give its path")
