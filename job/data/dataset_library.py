"""Use the `datasets` library silently, with its caches in the scratch folder and its files opened by `job.storage`.

The library is imported only when a corpus needs it, because the import takes seconds. It opens every file through a
file system named ``wikillm``, so that retries, deadlines, addresses and credentials are the same as everywhere else.
This file system also decompresses: the library itself cannot read compressed files from S3, and it accepts a truncated
Zstandard file as complete.
"""

import io
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem

from job import storage
from job.data.documents import CONVERT_GBK
from job.data.file_forms import compression_by_name
from job.data.json_stream import ByteStream
from job.errors import UserError, one_line
from job.local_dirs import VARIABLE, private_folder, scratch_folder

_PROTOCOL = "wikillm"
_MAX_REASON_CHARACTERS = 300
_LIBRARY_URL = re.compile(rf"{_PROTOCOL}://[^\s/]+/file\.\w+")
"""Matches what `library_url` returns. It must not be shown: a signature in the quoted URL would escape redaction."""


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="datasets-", dir=private_folder(scratch_folder()[0], VARIABLE))


def cache_dir() -> str:
    """Return this process's folder for the lock files that the library creates for every file that it reads."""
    return _folder().name


@cache
def library() -> ModuleType:
    """Import `datasets` such that it prints nothing and does not count downloads."""
    before = os.environ.get("HF_DATASETS_CACHE")
    os.environ["HF_DATASETS_CACHE"] = cache_dir()
    try:
        import datasets
    finally:
        # The variable is restored, because child processes have cache folders of their own.
        del os.environ["HF_DATASETS_CACHE"]
        if before is not None:
            os.environ["HF_DATASETS_CACHE"] = before
    # This is set here and not by a variable, because the library may have been imported earlier.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    # Otherwise a stream of rows would import torch, which takes seconds.
    datasets.config.TORCH_AVAILABLE = False
    datasets.disable_progress_bars()
    # The library logs each error that it raises.
    datasets.logging.set_verbosity(logging.CRITICAL)
    fsspec.register_implementation(_PROTOCOL, _Files, clobber=True)
    return datasets


def library_url(url: str, suffix: str) -> str:
    """Return the URL by which the library opens the file at a path or URL.

    Args:
        url: a path, a URL that `storage.open_read` takes, or a URL of the hub (``hf://``).
        suffix: suffix of the returned URL, which tells the library that there is nothing to decompress.
    """
    return f"{_PROTOCOL}://{quote(url, safe='')}/file{suffix}"


def open_content(url: str) -> BinaryIO:
    """Open the decompressed content of a file of `job.storage` or of Hugging Face's hub."""
    source = _open_on_hub(url) if url.startswith("hf://") else storage.open_read(url)
    if (compression := compression_by_name(url)) is not None:
        return cast(BinaryIO, io.BufferedReader(_Decompressed(source, compression)))
    return source


class _Files(AbstractFileSystem):
    """A read-only file system over `job.storage` and Hugging Face's hub that decompresses what is read."""

    protocol = _PROTOCOL
    cachable = False

    def __init__(self, encoding: str | None = None, errors: str | None = None, **options: Any) -> None:
        # The library passes the arguments of `open` to the file system instead.
        super().__init__(**options)
        self._encoding, self._errors = encoding, errors

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": None, "type": "file"}

    def open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        source = open_content(unquote(self._strip_protocol(path).rpartition("/")[0]))
        return source if "b" in mode else io.TextIOWrapper(source, self._encoding or "utf-8", self._errors)


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, with all of its members; raises ValueError if it is damaged or truncated."""

    def __init__(self, source: BinaryIO, compression: str) -> None:
        self._source, self._stream = source, ByteStream(source, compression)
        self._chunks: Iterator[bytes] = iter(self._stream)
        self._remaining = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._remaining:
            self._remaining = memoryview(next(self._chunks, b""))
            if not self._remaining and self._stream.fault:
                raise ValueError(self._stream.fault)
        count = min(len(buffer), len(self._remaining))
        buffer[:count], self._remaining = self._remaining[:count], self._remaining[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def _open_on_hub(url: str) -> BinaryIO:
    from huggingface_hub import constants

    return cast(BinaryIO, fsspec.filesystem("hf", endpoint=constants.ENDPOINT).open(url, "rb"))


def describe_error(error: Exception, operation: str, url: str) -> str:
    """Return in one line what the library reports about a file or a description of a data set.

    Args:
        error: what the library raised.
        operation: verb for the message of a StoreError, such as ``read``.
        url: the file or data set.

    Raises:
        UserError, storage.StoreError, storage.Cancelled: `job.storage` raised it, or the hub fails or refuses.
        OSError, MemoryError: it is a fault of this machine.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # The base class belongs to the HTTP client that this version of huggingface_hub uses.
    http_error = HfHubHTTPError.__bases__[0]
    for cause in _chain(error, with_suppressed=True):
        if isinstance(cause, UserError | storage.StoreError | storage.Cancelled):
            raise cause
    for cause in _chain(error):
        if isinstance(cause, http_error | ConnectionError | TimeoutError):
            _raise_hub_error(cause, operation, url)
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None):
            raise cause
    if any(isinstance(cause, UnicodeDecodeError) for cause in _chain(error)):
        return f"not UTF-8; {CONVERT_GBK}"
    reason = _LIBRARY_URL.sub("the file", str(error)) or type(error).__name__
    return one_line(reason)[:_MAX_REASON_CHARACTERS]


def _chain(error: BaseException | None, with_suppressed: bool = False) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error is not None:
        yield error
        is_context_hidden = error.__suppress_context__ and not with_suppressed
        error = error.__cause__ or (None if is_context_hidden else error.__context__)


def _raise_hub_error(error: BaseException, operation: str, url: str) -> None:
    reason = one_line(f"{type(error).__name__}: {error}")[:_MAX_REASON_CHARACTERS]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        raise UserError("data.source", url, f"the hub refuses access ({reason})", "set HF_TOKEN if it is private")
    raise storage.StoreError(f"{operation} {url}: {reason}") from None
