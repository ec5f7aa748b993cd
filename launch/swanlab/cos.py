"""Object store behind SwanLab's service: Tencent COS, accessed as S3 with temporary keys."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions as boto
from s3fs import S3FileSystem

from job.errors import one_line
from launch.swanlab.retry import TRIES, retry

ENDPOINT = "https://cos.{region}.myqcloud.com"
PART_BYTES = 16 * 2**20
"""Size of the parts in which a larger file is uploaded."""
_FRESH_SECONDS = 600
"""Age at which the temporary keys are renewed. They are valid for longer."""

Result = TypeVar("Result")


class UploadFailed(OSError):
    """An operation on the store failed after all tries."""


class CodeStore:
    """This user's prefix in the service's bucket. All paths are relative to the prefix.

    Args:
        fetch_keys: function that requests temporary keys from the service.
    """

    def __init__(self, fetch_keys: Callable[[], dict[str, Any]]) -> None:
        self._fetch_keys = fetch_keys
        self._renew()

    def key(self, path: str) -> str:
        """Return the key of the object at `path` in the bucket."""
        return f"{self._prefix}/{path}"

    def write(self, path: str, data: bytes) -> None:
        """Write an object. Raises UploadFailed."""
        self._retry(f"upload {path}", lambda store, url: store.pipe_file(url, data), path)

    def upload(self, file: Path, path: str) -> None:
        """Upload a file, in parts if it is large. Raises UploadFailed."""
        self._retry(
            f"upload {file}",
            lambda store, url: store.put_file(str(file), url, chunksize=PART_BYTES, max_concurrency=4),
            path,
        )

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of each object below `folder` by path; empty if the store refuses to list them."""
        try:
            objects = self._retry(f"list {folder}", lambda store, url: store.find(url, detail=True), folder)
        except UploadFailed:
            return {}
        start = f"{self._bucket}/{self._prefix}/"
        return {name.removeprefix(start): int(info["size"]) for name, info in objects.items()}

    def delete(self, path: str) -> None:
        """Delete an object. Raises UploadFailed."""
        self._retry(f"delete {path}", lambda store, url: store.rm_file(url), path)

    def _renew(self) -> None:
        keys = self._fetch_keys()
        credentials = keys["credentials"]
        self._bucket, self._prefix = keys["bucket"], keys["prefix"].strip("/")
        self._made_at = time.monotonic()
        self._store = S3FileSystem(
            key=credentials["tmpSecretId"],
            secret=credentials["tmpSecretKey"],
            token=credentials["sessionToken"] or None,
            endpoint_url=ENDPOINT.format(region=keys["region"]),
            client_kwargs={"region_name": keys["region"]},
            config_kwargs={
                "s3": {"addressing_style": "virtual"},
                "connect_timeout": 10,
                "read_timeout": 60,
                "retries": {"mode": "standard", "max_attempts": 3},
                "request_checksum_calculation": "when_required",  # COS does not support the newer checksums.
                "response_checksum_validation": "when_required",
            },
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def _retry(self, action: str, operation: Callable[[Any, str], Result], path: str) -> Result:
        """Return what `operation` returns for the store and the object's URL; renew the keys before each retry.

        `action` describes the operation in the error message. Raises UploadFailed.
        """
        if time.monotonic() - self._made_at > _FRESH_SECONDS:
            self._renew()
        temporary = (OSError, boto.BotoCoreError, boto.ClientError, aiohttp.ClientError)
        try:
            return retry(
                lambda: operation(self._store, f"{self._bucket}/{self._prefix}/{path}"),
                temporary,
                before_retry=self._renew,
            )
        except temporary as error:
            reason = f"{type(error).__name__} {one_line(str(error))}"[:300]
            raise UploadFailed(f"cannot {action} in {self._bucket} after {TRIES} tries: {reason}") from None
