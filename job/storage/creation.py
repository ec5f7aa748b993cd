"""Conditional creation: a file is written only if it is absent, by the first way that the store is proven to honour.

The fences of a data set (plan.json) and of a run (run.json, attempts/N.json) rest on it. Stores differ in how they are
asked for it, and some ignore what they are asked, so the first creation in a place tries the ways on throw-away files.
"""

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from job.errors import UserError
from job.storage import local, s3
from job.storage.connection import endpoint, is_remote, place, process
from job.storage.deadline import IntegrityError, StoreError
from job.storage.retry import Refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """A way to create a file only if it is absent."""

    name: str
    create: Callable[[str, bytes], bool]
    """Returns whether it created the file; raises NotImplementedError or `Refused` where it does not exist."""


_HEADERS = (
    ("If-None-Match", "*"),  # Amazon S3, MinIO, Ceph, SeaweedFS, Cloudflare R2
    ("x-oss-forbid-overwrite", "true"),  # Alibaba OSS
    ("x-cos-forbid-overwrite", "true"),  # Tencent COS
    ("x-obs-forbid-overwrite", "true"),  # Huawei OBS
    ("x-tos-forbid-overwrite", "true"),  # Volcengine TOS
)
_REMOTE = tuple(Way(f"{header[0]}: {header[1]}", partial(s3.create, header)) for header in _HEADERS)
_LOCAL = (
    Way("hard link", partial(local.create, local.link)),
    Way("exclusive rename", partial(local.create, local.rename_if_free)),
)

_ways: dict[str, Way | None] = {}
"""The proven way of every bucket and folder that this process has created files in."""


def forget() -> None:
    """Prove the ways anew: the store or the credentials may have changed."""
    _ways.clear()


def create(url: str, data: bytes) -> bool:
    """Write a file unless it is there; of all who try, exactly one is told True.

    Raises:
        UserError: the store has no proven way, and `store.single_writer` does not say that nobody else writes there.
    """
    way = proven_way(url)
    if way is not None:
        return way.create(url, data)
    if not process.options.single_writer:
        raise _no_way(url)
    if _exists(url):
        return False
    _write(url, data)
    return True


def proven_way(url: str) -> Way | None:
    """Return the first way that holds where `url` is, or None; the answer is kept for the process.

    Raises:
        UserError, StoreError: nothing can be written there at all, or the store does not answer.
    """
    where = _where(url)
    if where not in _ways:
        ways = _REMOTE if is_remote(url) else _LOCAL
        way = next((way for way in ways if _holds(way, url)), None)
        if way is None:
            _write_throw_away(url)  # raises what stands against any write, which would be the true reason
            if process.options.single_writer:
                logger.warning("%s: nothing there forbids to overwrite; store.single_writer is trusted", where)
        _ways[where] = way
    return _ways[where]


def _holds(way: Way, url: str) -> bool:
    """Try a way on a throw-away file: it holds if a second creation is refused and the first content is intact."""
    probe = _throw_away(url)
    try:
        holds = way.create(probe, b"first") and not way.create(probe, b"second") and _read(probe) == b"first"
    except (NotImplementedError, FileNotFoundError, IntegrityError, Refused):
        holds = False
    except BaseException:
        _remove_at_once(probe)
        raise
    with suppress(UserError, StoreError):  # a key that may not delete is no reason against the way
        _remove(probe)
    return holds


def _write_throw_away(url: str) -> None:
    probe = _throw_away(url)
    _write(probe, b"probe")
    with suppress(UserError, StoreError):
        _remove(probe)


def _no_way(url: str) -> UserError:
    ways = _REMOTE if is_remote(url) else _LOCAL
    tried = ", ".join(way.name for way in ways)
    where = f"{_where(url)} at {endpoint()[1] or 'Amazon S3'}" if is_remote(url) else _where(url)
    found = f"{where} has no proven way to create a file only if it is absent (tried: {tried})"
    expected = f"{found}, so that two commands which start together would mix their files"
    better = (
        "a store that has one"
        if is_remote(url)
        else "another folder, or the bucket as s3://... if one is mounted there"
    )
    remedy = f"use {better}, or set store.single_writer: true if nobody else writes there"
    return UserError("store.single_writer", None, expected, remedy)


def _where(url: str) -> str:
    """Return the bucket or the folder in which `url` is."""
    return f"s3://{place(url)['Bucket']}" if is_remote(url) else str(local.path_of(url).parent)


def _throw_away(url: str) -> str:
    """Return the URL of a file beside `url` that no list shows."""
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
    """Remove a throw-away file after a failure, without another wait."""
    if is_remote(url):
        s3.ask_once(url, "delete_object", **place(url))
    else:
        local.path_of(url).unlink(missing_ok=True)
