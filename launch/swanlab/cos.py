"""The object store behind the service: Tencent COS by its S3 interface, with keys that last for minutes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions as boto
from s3fs import S3FileSystem

from job.errors import one_line

ENDPOINT = "https://cos.{region}.myqcloud.com"
PART_BYTES = 16 * 2**20
"""What one request carries of a larger file."""
_FRESH_SECONDS = 600
"""How long keys are used; they last longer."""
_TRIES = 4
_PAUSE_SECONDS = 0.25
"""Times 4, 16, 64: between the tries."""

Result = TypeVar("Result")


class UploadFailed(OSError):
    """The store did not take it, however often it was tried."""


class CodeStore:
    """This user's part of the service's bucket; paths are relative to it.

    Args:
        fetch_keys: asks the service for keys.
    """

    def __init__(self, fetch_keys: Callable[[], dict[str, Any]]) -> None:
        self._fetch_keys = fetch_keys
        self._renew()

    def key(self, path: str) -> str:
        """The object's key in the bucket."""
        return f"{self._prefix}/{path}"

    def write(self, path: str, data: bytes) -> None:
        """Writes an object. Raises UploadFailed."""
        self._do(f"upload {path}", lambda store, url: store.pipe_file(url, data), path)

    def upload(self, file: Path, path: str) -> None:
        """Copies a file, in parts if it is large. Raises UploadFailed."""
        self._do(
            f"upload {file}",
            lambda store, url: store.put_file(str(file), url, chunksize=PART_BYTES, max_concurrency=4),
            path,
        )

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each object below `folder` by its path; none where that cannot be asked."""
        try:
            found = self._do(f"list {folder}", lambda store, url: store.find(url, detail=True), folder)
        except UploadFailed:
            return {}
        start = f"{self._bucket}/{self._prefix}/"
        return {name.removeprefix(start): int(info["size"]) for name, info in found.items()}

    def delete(self, path: str) -> None:
        """Removes an object. Raises UploadFailed."""
        self._do(f"delete {path}", lambda store, url: store.rm_file(url), path)

    def _renew(self) -> None:
        found = self._fetch_keys()
        credentials = found["credentials"]
        self._bucket, self._prefix = found["bucket"], found["prefix"].strip("/")
        self._made_at = time.monotonic()
        self._store = S3FileSystem(
            key=credentials["tmpSecretId"],
            secret=credentials["tmpSecretKey"],
            token=credentials["sessionToken"] or None,
            endpoint_url=ENDPOINT.format(region=found["region"]),
            client_kwargs={"region_name": found["region"]},
            config_kwargs={
                "s3": {"addressing_style": "virtual"},
                "connect_timeout": 10,
                "read_timeout": 60,
                "retries": {"mode": "standard", "max_attempts": 3},
                "request_checksum_calculation": "when_required",  # COS does not know the newer checksums
                "response_checksum_validation": "when_required",
            },
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def _do(self, what: str, act: Callable[[Any, str], Result], path: str) -> Result:
        """What `act` returns for the store and the object's URL; tried again, with new keys."""
        if time.monotonic() - self._made_at > _FRESH_SECONDS:
            self._renew()
        for number in range(1, _TRIES + 1):
            try:
                return act(self._store, f"{self._bucket}/{self._prefix}/{path}")
            except (TimeoutError, OSError, boto.BotoCoreError, boto.ClientError, aiohttp.ClientError) as error:
                if number == _TRIES:
                    reason = f"{type(error).__name__} {one_line(str(error))}"[:300]
                    raise UploadFailed(f"cannot {what} in {self._bucket} after {number} tries: {reason}") from None
                time.sleep(_PAUSE_SECONDS * 4**number)
                self._renew()
        raise AssertionError
