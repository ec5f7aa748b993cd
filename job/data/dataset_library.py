"""The `datasets` library as this program uses it: silent, with its caches in the scratch folder, over our storage.

It is imported when a corpus needs it and not before: that takes seconds. Every file is opened by `job.storage`, so that
retries, deadlines, addresses and credentials are the same as everywhere; for the library it is a file system named
``wikillm``. That also decompresses: the library itself cannot read compressed files from S3, and takes a Zstandard file
that is cut off for a whole one.
"""

import io
import logging
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem

from job import storage
from job.data.json_stream import COMPRESSIONS, ByteStream
from job.errors import UserError, one_line
from job.local_dirs import VARIABLE, private_folder, scratch_folder

_PROTOCOL = "wikillm"
_LONGEST_REASON = 300
_ADDRESS = re.compile(rf"{_PROTOCOL}://[^\s/]+/file\.\w+")
"""As `address` makes it; a URL in it may hold a signature, and is spelled so that no redaction would know it."""
NOT_UTF_8 = "not UTF-8; if it is GBK, convert it: iconv -f GB18030 -t UTF-8"


@cache
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="datasets-", dir=private_folder(scratch_folder()[0], VARIABLE))


def cache_dir() -> str:
    """Return a folder for this process in which the library leaves a lock for every file that it reads."""
    return _folder().name


@cache
def library() -> ModuleType:
    """Import `datasets`, so that it prints nothing and counts no downloads."""
    before = os.environ.get("HF_DATASETS_CACHE")
    os.environ["HF_DATASETS_CACHE"] = cache_dir()
    try:
        import datasets
    finally:  # child processes have folders of their own
        del os.environ["HF_DATASETS_CACHE"]
        if before is not None:
            os.environ["HF_DATASETS_CACHE"] = before
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it may have been imported before
    datasets.config.TORCH_AVAILABLE = False  # a stream of rows would import torch, which takes seconds
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs errors and raises them as well
    fsspec.register_implementation(_PROTOCOL, _Files, clobber=True)
    return datasets


def address(url: str, suffix: str) -> str:
    """Return the name under which the library opens the file at a path or URL.

    Args:
        url: a path, or a URL that `storage.open_read` takes, or one of the hub's (``hf://``).
        suffix: how the name ends, from which the library tells that there is nothing to decompress.
    """
    return f"{_PROTOCOL}://{quote(url, safe='')}/file{suffix}"


def open_content(url: str) -> BinaryIO:
    """Open the decompressed content of a file of `job.storage` or of Hugging Face's hub."""
    source = _open_on_hub(url) if url.startswith("hf://") else storage.open_read(url)
    suffix = Path(storage.url_path(url)).suffix
    if (compression := COMPRESSIONS.get(suffix.removeprefix(".").lower())) is not None:
        return cast(BinaryIO, io.BufferedReader(_Decompressed(source, compression)))
    return source


class _Files(AbstractFileSystem):
    """The files of `job.storage` and of Hugging Face's hub, read only and decompressed."""

    protocol = _PROTOCOL
    cachable = False

    def __init__(self, encoding: str | None = None, errors: str | None = None, **options: Any) -> None:
        # The library gives the file system what belongs to `open`.
        super().__init__(**options)
        self._encoding, self._errors = encoding, errors

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": None, "type": "file"}

    def open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        source = open_content(unquote(self._strip_protocol(path).rpartition("/")[0]))
        return source if "b" in mode else io.TextIOWrapper(source, self._encoding or "utf-8", self._errors)


class _Decompressed(io.RawIOBase):
    """The content of a compressed file, all of its members in a row; ValueError where it is damaged or cut off."""

    def __init__(self, source: BinaryIO, compression: str) -> None:
        self._source, self._stream = source, ByteStream(source, compression)
        self._chunks: Iterator[bytes] = iter(self._stream)
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            self._left = memoryview(next(self._chunks, b""))
            if not self._left and self._stream.fault:
                raise ValueError(self._stream.fault)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def _open_on_hub(url: str) -> BinaryIO:
    from huggingface_hub import constants

    return cast(BinaryIO, fsspec.filesystem("hf", endpoint=constants.ENDPOINT).open(url, "rb"))


def fault(error: Exception, operation: str, url: str) -> str:
    """Return in one line what the library says is wrong with a file or a description.

    Raises:
        UserError, storage.StoreError, storage.Cancelled: what `job.storage` raised, or a hub that fails or refuses.
        OSError: another fault of this machine.
    """
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__bases__[0]  # of the HTTP client on which this version of the hub's library is built
    for one in _chain(error, with_suppressed=True):
        if isinstance(one, UserError | storage.StoreError | storage.Cancelled):
            raise one
    for one in _chain(error):
        if isinstance(one, http_error | ConnectionError | TimeoutError):
            _raise_of_hub(one, operation, url)
        if isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno is not None):
            raise one
    if any(isinstance(one, UnicodeDecodeError) for one in _chain(error)):
        return NOT_UTF_8
    reason = _ADDRESS.sub("the file", str(error)) or type(error).__name__
    return one_line(reason)[:_LONGEST_REASON]


def _chain(error: BaseException | None, with_suppressed: bool = False) -> Iterator[BaseException]:
    while error is not None:
        yield error
        hides = error.__suppress_context__ and not with_suppressed
        error = error.__cause__ or (None if hides else error.__context__)


def _raise_of_hub(error: BaseException, operation: str, url: str) -> None:
    reason = one_line(f"{type(error).__name__}: {error}")[:_LONGEST_REASON]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        raise UserError("data.source", url, f"the hub refuses it ({reason})", "is it private? then set HF_TOKEN")
    raise storage.StoreError(f"{operation} {url}: {reason}") from None
