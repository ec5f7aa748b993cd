"""The retry loop: what may pass is tried again until the deadline, what a person has to mend is one line at once."""

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
from job.storage.connection import addressing, endpoint, filesystem, place, process, protocol, service, wrong_endpoint
from job.storage.deadline import IntegrityError

UNREACHABLE_SECONDS = 4.0
"""How long an endpoint that has never answered is tried before a person is told: the address may be wrong."""
PROBE = "look into"
"""The operation that finds out why another one was refused."""

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
    *("InvalidPart", "InvalidPartOrder", "MalformedXML"),  # our XML is right when it is sent
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
    """The credentials are valid, and do not permit the operation."""


class Refused(UserError):
    """The store does not do what was asked, for a reason that only its own words tell."""


class NoRanges(UserError):
    """A server does not send parts of a file, or does not tell its size."""


class PathStyleRefused(Exception):
    """The store takes only requests that name the bucket as a part of the host."""


@dataclass(frozen=True)
class Answer:
    """An error that the store answered."""

    status: int
    code: str
    message: str

    @property
    def is_bare(self) -> bool:
        """Whether it has no reason in it: an answer to HEAD, or one of a service that is not S3."""
        return self.code.isdigit()


class Unexplained(Exception):
    """The store refused without a reason, or answered for an object that may be absent as for a forbidden one."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer)
        self.answer = answer


def run(
    operation: str, url: str, function: Callable[..., Coroutine[Any, Any, Result]], *args: Any, **kw: Any
) -> Result:
    """Await ``function(*args, **kw)`` again and again until it succeeds, cannot succeed, or the deadline has passed.

    Every try gets twice the time of the one before: a stalled one is soon replaced, and a slow one gets through.

    Raises:
        FileNotFoundError, FileExistsError, NotImplementedError: the store says so.
        Unexplained: the store gave no reason.
        UserError: a person has to mend it.
        StoreError: the deadline has passed.
        Cancelled: see `deadline.limits`.
    """
    started, tries = time.monotonic(), 0
    options = process.options
    with deadline.limits(options.deadline_seconds):
        ours = deadline.current.get()
        while True:
            ours.check(operation, url)
            style = addressing()
            result = _try(url, options.read_timeout_seconds * 2**tries, function, *args, **kw)
            if not isinstance(result, Exception):
                process.answered.add(service(url))
                return result
            tries += 1
            tried_seconds = time.monotonic() - started
            pause = random.uniform(0.5, 1) * min(0.1 * 2**tries, 15)
            try:
                _raise_if_permanent(result, operation, url, tried_seconds + pause)
            except PathStyleRefused as refusal:
                _turn_virtual(style, refusal, url)
                continue
            reason = f"{type(result).__name__} {result}; gave up after {tries} tries in {tried_seconds:.0f} s"
            ours.check(operation, url, pause, reason)
            ours.wait(pause, Future())


def _try(
    url: str, seconds: float, function: Callable[..., Coroutine[Any, Any, Result]], *args: Any, **kw: Any
) -> Result | Exception:
    """Return what ``function(*args, **kw)`` gives or raises within `seconds` and the limits.

    If it takes longer it is cancelled, which closes its connection: its answer cannot meet the next request.
    """

    async def outcome() -> Result | Exception:
        try:
            return await function(*args, **kw)
        except Exception as error:  # returned, because asyncio reports what is raised when nobody waits any more
            return error

    ours = deadline.current.get()
    seconds = max(0, min(seconds, ours.seconds_left))
    loop = filesystem(url).loop
    task = asyncio.run_coroutine_threadsafe(outcome(), loop)
    try:
        ours.wait(seconds, task)
        return task.result() if task.done() else TimeoutError(f"no answer in {seconds:.1f} s")
    finally:
        task.cancel()


def _turn_virtual(style: str, refusal: PathStyleRefused, url: str) -> None:
    """Use virtual-hosted addressing from now on; raise UserError where the settings or the address forbid it."""
    if process.options.addressing == "path":
        raise UserError("store.addressing", "path", str(refusal), "set store.addressing: virtual, or auto") from None
    if style == "virtual":
        fault = f"{refusal}, and the bucket in the host name did not help"
        raise UserError(*endpoint(), fault, "give the address of the bucket's region") from None
    process.path_is_refused = True
    logger.info("s3://%s is addressed as a host name: %s", place(url)["Bucket"], refusal)


def _raise_if_permanent(error: Exception, operation: str, url: str, next_try_seconds: float) -> None:
    """Raise what the caller or a person must know now; return where another try may help.

    Args:
        error: what the try raised.
        operation: what was tried.
        url: on what.
        next_try_seconds: when the next try would be, since the first.
    """
    if (cause := _cause(error, _UNREACHABLE)) is not None:
        _raise_if_wrong_address(cause, url, next_try_seconds)
    elif (cause := _cause(error, boto.ClientError)) is not None:
        found = cause.response.get("Error", {})
        status = int(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        _raise_if_refused(Answer(status, str(found.get("Code", status)), found.get("Message", "")), operation, url)
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
        raise (wrong_endpoint(url, "is no URL of a service") if protocol(url) == "s3" else sent_whole(url)) from None
    elif isinstance(error, IntegrityError) or not isinstance(error, _MAY_PASS):
        raise error


def _raise_if_wrong_address(cause: Exception, url: str, next_try_seconds: float) -> None:
    """Raise UserError if nobody seems to be at the address; report once if the service may only be away."""
    patience_seconds = min(UNREACHABLE_SECONDS, process.options.deadline_seconds)
    if next_try_seconds <= patience_seconds or service(url) in process.answered:
        return
    reason = getattr(cause, "kwargs", {}).get("error", cause)
    wrong = wrong_endpoint(url, f"cannot be reached: {reason}")
    if not _may_come_up(cause, reason):
        raise wrong from None
    if service(url) not in process.missed:
        process.missed.add(service(url))
        logger.warning("%s; trying for %.0f s", wrong, process.options.deadline_seconds)


def _may_come_up(cause: Exception, reason: object) -> bool:
    """Return whether the address may be right and the service away for now, as in an outage."""
    found = getattr(reason, "os_error", None)
    is_refused = found is not None and not isinstance(found, socket.gaierror | ssl.SSLError | ssl.CertificateError)
    return is_refused or isinstance(cause, boto.ConnectTimeoutError)


def _raise_if_refused(answer: Answer, operation: str, url: str) -> None:
    """Raise what an error of the store means; return if it may pass."""
    if not answer.is_bare:
        process.answered.add(service(url))
    if answer.code in _CODES_THAT_MAY_PASS or answer.status in (408, 425, 429):
        return
    if answer.status >= 500 and answer.status != 501:
        return
    is_ambiguous = answer.code == "AccessDenied" and operation in ("read", "find")
    if protocol(url) == "s3" and operation != PROBE and (answer.is_bare or is_ambiguous):
        raise Unexplained(answer)
    refuse(answer, operation, url)


def refuse(answer: Answer, operation: str, url: str, may_be_absent: bool = False) -> NoReturn:
    """Raise what an answer that no other try changes means.

    Args:
        answer: the store's.
        operation: what was asked.
        url: of what.
        may_be_absent: whether a 403 can also mean that there is no such object.
    """
    status = answer.status
    reason = f"the store refused to {operation} {url}: {answer.code}"
    if protocol(url) == "s3":
        # Huawei OBS answers NoSuchKey to an upload that has the bucket in its path.
        is_upload_without_key = answer.code == "NoSuchKey" and operation in ("write", "create")
        if answer.code in _PATH_STYLE_REFUSED or is_upload_without_key:
            raise PathStyleRefused(f"{reason}: it wants the bucket in the host name")
        _raise_if_mistaken(answer, operation, url, reason, may_be_absent)
    if status == 404:
        raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from None
    # 412 answers If-None-Match, 409 the headers by which others forbid to overwrite.
    if status == 412 or (status == 409 and operation == "create"):
        raise FileExistsError(errno.EEXIST, "there is such a file", url) from None
    if status == 416:
        raise IntegrityError(f"{operation} {url}: it was replaced while it was read") from None
    if status == 501:
        raise NotImplementedError(reason) from None
    raise Refused(url, None, f"{reason} {answer.message}", "correct the URL") from None


def _raise_if_mistaken(answer: Answer, operation: str, url: str, reason: str, may_be_absent: bool) -> None:
    """Raise UserError if the bucket, the clock, the credentials, the region or the service is not the right one."""
    bucket = f"s3://{place(url)['Bucket']}"
    if answer.code == "NoSuchBucket":
        raise UserError(bucket, None, "there is no such bucket", "create it, or correct the URL") from None
    if answer.code == "RequestTimeTooSkewed":
        wrong = f"{reason}: this machine's clock is too far from the store's"
        raise UserError(bucket, None, wrong, "set the clock") from None
    if answer.status in (401, 403) or answer.code in _CREDENTIALS_REFUSED:
        kind = AccessDenied if answer.code in ("AccessDenied", "403") else UserError
        if process.options.anonymous:
            remedy = "unset store.anonymous and give credentials: only what is public can be read without"
            raise kind("store.anonymous", True, reason, remedy) from None
        remedy = f"{_GIVE_CREDENTIALS}, of one who may use {bucket}"
        if may_be_absent:
            remedy += ", and may list: without that right an absent object is answered like a forbidden one"
        raise kind("AWS_ACCESS_KEY_ID", None, reason, remedy) from None
    if answer.code in _OTHER_REGION:
        raise UserError("store.region", process.options.region, reason, f"name the region of {bucket}") from None
    if operation == PROBE and answer.is_bare:
        raise wrong_endpoint(url, f"is no S3 service: {answer.message}") from None


def _cause(error: BaseException | None, kinds: Any) -> Any:
    """Return the first of `error` and its causes that is one of `kinds`: s3fs wraps what botocore raised."""
    while error is not None and not isinstance(error, kinds):
        error = error.__cause__
    return error


def sent_whole(url: str) -> NoRanges:
    """Return the error for a server that does not honour ranges."""
    return NoRanges(url, None, "its server sends files only as a whole", "download it and give its path")
