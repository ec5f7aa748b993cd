"""How this process reaches a store: options, endpoint, style of addressing, and clients."""

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
"""Domains of services that refuse path-style addressing (docs/object-stores.md links to their documentation)."""


@dataclass(frozen=True)
class StoreOptions:
    """The settings of section `store`, without any secret.

    `deadline_seconds` limits one operation with all its retries. In a large transfer it limits each part, so a slow
    link is not an error, but a stalled one is.
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
class _State:
    """What this process knows about the store."""

    options: StoreOptions = StoreOptions()
    filesystems: dict[tuple[int, str, str], Any] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    """Services that have answered at least once."""
    missed: set[str] = field(default_factory=set)
    """Services that were already reported as unreachable."""
    buckets: set[str] = field(default_factory=set)
    """Buckets that are known to exist."""
    path_is_refused: bool = False
    """True if the service has refused path-style addressing."""


state = _State()


def configure(options: StoreOptions) -> None:
    """Set how this process reaches the store. Call it again after the credentials have changed."""
    state.options = options
    state.filesystems.clear()
    state.answered.clear()
    state.missed.clear()
    state.buckets.clear()
    state.path_is_refused = False


def is_remote(url: str) -> bool:
    """Return True if `url` has a protocol other than ``file``."""
    return "://" in url and not url.startswith("file://")


def is_web(url: str) -> bool:
    """Return True if `url` is an HTTP or HTTPS address, which can be read but not listed."""
    return url.startswith(("http://", "https://"))


def url_path(url: str) -> str:
    """Return a path or URL without its query: the query of a web address may be a signature."""
    return urlsplit(url).path if is_web(url) else url


def protocol(url: str) -> str:
    """Return the protocol of a remote URL. Raises UserError for an unsupported protocol."""
    name = url.partition("://")[0]
    if name not in ("s3", "http", "https"):
        remedy = "give a path, file://, s3:// or, to read only, https:// or http://"
        raise UserError(url, None, f"{name}:// is not supported", remedy)
    return name


def service(url: str) -> str:
    """Return the name of the service that answers for `url`: ``s3``, or the host of a web address."""
    return "s3" if protocol(url) == "s3" else url.split("/")[2]


def bucket_and_key(url: str) -> dict[str, Any]:
    """Return bucket and key of an s3:// URL, as parameters of a request.

    Raises:
        UserError: `url` is not an s3:// URL, or the endpoint contains the name of the bucket.
    """
    if protocol(url) != "s3":
        raise UserError(url, None, "can be read, but neither written nor listed", "give a path or an s3:// URL")
    bucket, _, key = url.removeprefix("s3://").partition("/")
    setting, address = endpoint()
    if bucket and (urlsplit(address or "").hostname or "").startswith(f"{bucket}."):
        expected = f"contains the bucket {bucket}, which s3://{bucket}/... names already"
        raise UserError(setting, address, expected, "give the address of the region, without the bucket")
    return {"Bucket": bucket, "Key": key}


def endpoint() -> tuple[str, str | None]:
    """Return the setting or variable with the address of the S3 service, and the address; None: no address is set."""
    if state.options.endpoint_url:
        return "store.endpoint_url", state.options.endpoint_url
    name = "AWS_ENDPOINT_URL_S3" if "AWS_ENDPOINT_URL_S3" in os.environ else "AWS_ENDPOINT_URL"
    return name, os.environ.get(name)


def wrong_endpoint(url: str, fault: str) -> UserError:
    """Return the error for an address at which no service, or no S3 service, answers."""
    if protocol(url) != "s3":
        return UserError(url, None, fault, "correct the URL")
    remedy = "set it to the URL of an S3 service"
    if addressing() == "virtual":
        remedy += "; if the service does not accept bucket names in host names, set store.addressing: path"
    return UserError(*endpoint(), fault, remedy)


def addressing() -> Literal["auto", "virtual", "path"]:
    """Return how requests name a bucket: ``virtual`` as bucket.host/key, ``path`` as host/bucket/key.

    The result is ``auto`` for Amazon S3, where botocore chooses by the name of the bucket.
    """
    if state.options.addressing != "auto":
        return state.options.addressing
    host = urlsplit(endpoint()[1] or "").hostname
    if state.path_is_refused or (host and host.endswith(_VIRTUAL_HOSTED)):
        return "virtual"
    return "path" if host else "auto"


def filesystem(url: str) -> Any:
    """Return this process's client for `url`. A forked process makes its own: a client of its parent would fail."""
    key = (os.getpid(), protocol(url), addressing())
    if key not in state.filesystems:
        state.filesystems[key] = _connect(key[1])
    return state.filesystems[key]


def _connect(name: str) -> Any:
    options = state.options
    fresh = {"skip_instance_cache": True, "use_listings_cache": False}
    if name != "s3":
        limits = aiohttp.ClientTimeout(
            sock_connect=options.connect_timeout_seconds, sock_read=options.read_timeout_seconds
        )
        return fsspec.filesystem(name, client_kwargs={"timeout": limits, "trust_env": True}, **fresh)
    if "@" in (endpoint()[1] or ""):
        fault = "contains a user name or password: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
        raise wrong_endpoint("s3://", fault)
    made = S3FileSystem(
        anon=options.anonymous,
        endpoint_url=options.endpoint_url,
        client_kwargs={"region_name": options.region} if options.region else {},
        config_kwargs={
            "connect_timeout": options.connect_timeout_seconds,
            "read_timeout": options.read_timeout_seconds,
            "retries": {"total_max_attempts": 1},  # All retries are made by `retry.run_with_retries`.
            "max_pool_connections": 32,
            "s3": {"addressing_style": addressing()},
            # The newer checksums need the encoding aws-chunked, which Alibaba OSS, Huawei OBS and older servers refuse.
            # Content-MD5, which every store supports, protects uploads instead.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        },
        **fresh,
    )
    made.retries = 1
    return made
