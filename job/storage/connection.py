"""The connection of this process to a store: settings, address, style of addressing, and clients."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import fsspec
from s3fs import S3FileSystem

from job.errors import UserError

_VIRTUAL_HOSTED = (
    *(".aliyuncs.com", ".aliyuncs-internal.com"),  # Alibaba OSS
    *(".myqcloud.com", ".tencentcos.cn"),  # Tencent COS
    *(".myhuaweicloud.com", ".myhuaweicloud.cn", ".myhuaweicloud.eu"),  # Huawei OBS
    *(".volces.com", ".ivolces.com", ".bytepluses.com", ".ibytepluses.com"),  # Volcengine TOS
)
"""Domains of the services that refuse path-style addressing (docs/object-stores.md has their pages)."""


@dataclass(frozen=True)
class StoreOptions:
    """How the object store is reached; holds no secret.

    `deadline_seconds` bounds an operation with all its retries; in a large transfer it bounds every part, so that a
    slow link is no error and a stalled one is.
    """

    endpoint_url: str | None = None
    region: str | None = None
    connect_timeout_seconds: float = 5
    read_timeout_seconds: float = 30
    deadline_seconds: float = 300
    addressing: Literal["auto", "virtual", "path"] = "auto"
    single_writer: bool = False
    anonymous: bool = False


@dataclass
class _Process:
    options: StoreOptions = StoreOptions()
    filesystems: dict[tuple[int, str, str], Any] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    """The services that have answered anything."""
    missed: set[str] = field(default_factory=set)
    """The services whose absence was reported."""
    buckets: set[str] = field(default_factory=set)
    """The buckets that are known to exist."""
    path_is_refused: bool = False
    """Whether the service has refused path-style addressing."""


process = _Process()


def configure(options: StoreOptions) -> None:
    """Set how this process reaches the store; call it again to take up changed credentials."""
    process.options = options
    process.filesystems.clear()
    process.answered.clear()
    process.missed.clear()
    process.buckets.clear()
    process.path_is_refused = False


def is_remote(url: str) -> bool:
    """Return whether `url` has a protocol other than ``file``."""
    return "://" in url and not url.startswith("file://")


def is_web(url: str) -> bool:
    """Return whether `url` is an address of the web, which can be read and not listed."""
    return url.startswith(("http://", "https://"))


def url_path(url: str) -> str:
    """Return the part of a path or URL that names the file: the query of a web address may hold a signature."""
    return urlsplit(url).path if is_web(url) else url


def protocol(url: str) -> str:
    """Return the protocol of a remote URL; refuse the ones that nothing here speaks."""
    found = url.partition("://")[0]
    if found not in ("s3", "http", "https"):
        remedy = "give a path, file://, s3:// or, to read only, https:// or http://"
        raise UserError(url, None, f"{found}:// is not supported", remedy)
    return found


def service(url: str) -> str:
    """Return who answers for `url`: the one S3 service, or a host."""
    return "s3" if protocol(url) == "s3" else url.split("/")[2]


def place(url: str) -> dict[str, Any]:
    """Return the bucket and the key that an s3:// URL names, as parameters of a request."""
    if protocol(url) != "s3":
        raise UserError(url, None, "can be read, but neither written nor listed", "give a path or an s3:// URL")
    bucket, _, key = url.removeprefix("s3://").partition("/")
    setting, address = endpoint()
    if bucket and (urlsplit(address or "").hostname or "").startswith(f"{bucket}."):
        expected = f"holds the name of the bucket {bucket}, which s3://{bucket}/... names already"
        raise UserError(setting, address, expected, "give the address of the region, without the bucket")
    return {"Bucket": bucket, "Key": key}


def endpoint() -> tuple[str, str | None]:
    """Return the setting that holds the address of the S3 service, and the address."""
    if process.options.endpoint_url:
        return "store.endpoint_url", process.options.endpoint_url
    name = "AWS_ENDPOINT_URL_S3" if "AWS_ENDPOINT_URL_S3" in os.environ else "AWS_ENDPOINT_URL"
    return name, os.environ.get(name)


def wrong_endpoint(url: str, fault: str) -> UserError:
    """Return the error for an address at which there is no such service."""
    if protocol(url) != "s3":
        return UserError(url, None, fault, "correct the URL")
    remedy = "give the URL of an S3 service"
    if addressing() == "virtual":
        remedy += ", or set store.addressing: path if it does not know buckets as host names"
    return UserError(*endpoint(), fault, remedy)


def addressing() -> Literal["auto", "virtual", "path"]:
    """Return how requests name a bucket: ``virtual`` as bucket.host/key, ``path`` as host/bucket/key.

    ``auto`` is left where the address is the cloud's own: then botocore chooses by the name of the bucket.
    """
    if process.options.addressing != "auto":
        return process.options.addressing
    host = urlsplit(endpoint()[1] or "").hostname
    if process.path_is_refused or (host and host.endswith(_VIRTUAL_HOSTED)):
        return "virtual"
    return "path" if host else "auto"


def filesystem(url: str) -> Any:
    """Return this process's client for `url`. A client that was made before a fork would fail in the child."""
    key = (os.getpid(), protocol(url), addressing())
    if key not in process.filesystems:
        process.filesystems[key] = _connect(key[1])
    return process.filesystems[key]


def _connect(name: str) -> Any:
    options = process.options
    fresh = {"skip_instance_cache": True, "use_listings_cache": False}
    if name != "s3":
        limits = aiohttp.ClientTimeout(
            sock_connect=options.connect_timeout_seconds, sock_read=options.read_timeout_seconds
        )
        return fsspec.filesystem(name, client_kwargs={"timeout": limits, "trust_env": True}, **fresh)
    if "@" in (endpoint()[1] or ""):
        raise wrong_endpoint("s3://", "holds a user name or password: those are given as AWS_ACCESS_KEY_ID and so on")
    made = S3FileSystem(
        anon=options.anonymous,
        endpoint_url=options.endpoint_url,
        client_kwargs={"region_name": options.region} if options.region else {},
        config_kwargs={
            "connect_timeout": options.connect_timeout_seconds,
            "read_timeout": options.read_timeout_seconds,
            "retries": {"total_max_attempts": 1},  # only `retry.run` tries again
            "max_pool_connections": 32,
            "s3": {"addressing_style": addressing()},
            # The newer checksums come with the encoding aws-chunked, which Alibaba OSS, Huawei OBS and older servers
            # refuse. Content-MD5, which every store knows, protects what is sent.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
        **fresh,
    )
    made.retries = 1
    return made
