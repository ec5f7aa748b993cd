"""Conditional creation: writes a file only if it does not exist yet.

This keeps two `prepare` commands (plan.json) and two attempts of a run (run.json, attempts/N.json) apart. Stores have
different methods for it, and some silently ignore them. The first creation in a bucket or folder therefore tests the
methods on temporary files, and the first one that works is used.
"""

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from job.errors import UserError
from job.storage import local, s3
from job.storage.connection import bucket_and_key, endpoint, is_remote, state
from job.storage.deadline import IntegrityError, StoreError
from job.storage.retry import Refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """A method to create a file only if it does not exist."""

    name: str
    create: Callable[[str, bytes], bool]
    """Function that returns True if it created the file; it raises NotImplementedError or `Refused` if the store does
    not support the method."""


_HEADERS = (
    ("If-None-Match", "*"),  # Amazon S3, MinIO, Ceph, SeaweedFS, Cloudflare R2
    ("x-oss-forbid-overwrite", "true"),  # Alibaba OSS
    ("x-cos-forbid-overwrite", "true"),  # Tencent COS
    ("x-obs-forbid-overwrite", "true"),  # Huawei OBS
    ("x-tos-forbid-overwrite", "true"),  # Volcengine TOS
)
_REMOTE = tuple(Method(f"{header[0]}: {header[1]}", partial(s3.create, header)) for header in _HEADERS)
_LOCAL = (
    Method("hard link", partial(local.create, local.link)),
    Method("exclusive rename", partial(local.create, local.rename_if_free)),
)

_methods: dict[str, Method | None] = {}
"""Method that works in each bucket and folder in which this process has created files; None: no method works."""


def forget() -> None:
    """Forget which methods work, because the store or the credentials may have changed."""
    _methods.clear()


def create(url: str, data: bytes) -> bool:
    """Write a file if it does not exist. Of all processes that try, exactly one gets True.

    Raises:
        UserError: no method works in this store, and `store.single_writer` is not set.
    """
    method = proven_method(url)
    if method is not None:
        return method.create(url, data)
    if not state.options.single_writer:
        raise _no_method_error(url)
    if _exists(url):
        return False
    _write(url, data)
    return True


def proven_method(url: str) -> Method | None:
    """Return the first method that works in the bucket or folder of `url`; None if no method does.

    The result is kept until `forget` is called.

    Raises:
        UserError, StoreError: nothing can be written there at all, or the store does not answer.
    """
    container = _container(url)
    if container not in _methods:
        methods = _REMOTE if is_remote(url) else _LOCAL
        method = next((method for method in methods if _works(method, url)), None)
        if method is None:
            _write_probe(url)  # If every write fails, this raises the true reason.
            if state.options.single_writer:
                message = "%s: conditional writes do not work there; relying on store.single_writer"
                logger.warning(message, container)
        _methods[container] = method
    return _methods[container]


def _works(method: Method, url: str) -> bool:
    """Return True if, on a temporary file, a second creation is refused and the first content stays."""
    probe = _probe(url)
    try:
        works = method.create(probe, b"first") and not method.create(probe, b"second") and _read(probe) == b"first"
    except (NotImplementedError, FileNotFoundError, IntegrityError, Refused):
        works = False
    except BaseException:
        _remove_at_once(probe)
        raise
    with suppress(UserError, StoreError):  # A key without the right to delete can still use the method.
        _remove(probe)
    return works


def _write_probe(url: str) -> None:
    probe = _probe(url)
    _write(probe, b"probe")
    with suppress(UserError, StoreError):
        _remove(probe)


def _no_method_error(url: str) -> UserError:
    methods = _REMOTE if is_remote(url) else _LOCAL
    tried = ", ".join(method.name for method in methods)
    where = f"{_container(url)} at {endpoint()[1] or 'Amazon S3'}" if is_remote(url) else _container(url)
    fault = f"{where} does not support conditional writes, which create a file only if it is absent (tried: {tried})"
    expected = f"{fault}; two commands that start at the same time would mix their files"
    better = (
        "a store with conditional writes"
        if is_remote(url)
        else "another folder, or the bucket as s3://... if one is mounted there"
    )
    remedy = f"use {better}, or set store.single_writer: true if nobody else writes there"
    return UserError("store.single_writer", None, expected, remedy)


def _container(url: str) -> str:
    """Return the bucket or the folder of `url`."""
    return f"s3://{bucket_and_key(url)['Bucket']}" if is_remote(url) else str(local.path_of(url).parent)


def _probe(url: str) -> str:
    """Return the URL of a temporary file beside `url` that no listing shows."""
    folder, _, name = url.rpartition("/")
    probe = f".{name}.{secrets.token_hex(8)}{local.PARTIAL}"
    return f"{folder}/{probe}" if folder else probe


def _exists(url: str) -> bool:
    if not is_remote(url):
        return local.path_of(url).exists()
    try:
        s3.head(url)
    except FileNotFoundError:
        return False
    return True


def _read(url: str) -> bytes:
    return s3.get(url) if is_remote(url) else local.path_of(url).read_bytes()


def _write(url: str, data: bytes) -> None:
    if is_remote(url):
        s3.put("write", url, data)
    else:
        local.write(url, len(data), lambda start, end: data[start:end])


def _remove(url: str) -> None:
    if is_remote(url):
        s3.delete(url)
    else:
        local.path_of(url).unlink(missing_ok=True)


def _remove_at_once(url: str) -> None:
    """Remove a temporary file after a failure, without waiting for the store."""
    if is_remote(url):
        s3.send_once(url, "delete_object", **bucket_and_key(url))
    else:
        local.path_of(url).unlink(missing_ok=True)
