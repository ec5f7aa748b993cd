"""Storage: deadlines, and errors that no retry can correct, in one line that names the setting."""

import os
import pickle
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler

import pytest
from fault_proxy import SLOW_DOWN, FaultProxy
from storage_content import LARGE, http_service

from job import storage
from job.demo.server import S3Server
from job.errors import UserError
from job.storage import StoreError, StoreOptions, retry

pytestmark = pytest.mark.usefixtures("default_store")


# ── the deadline (temporary faults are in test_store_faults) ─────────────────────────────────────────────────────────


def test_deadline_holds_for_a_very_slow_answer(bucket: str) -> None:
    class Dripping(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with suppress(BrokenPipeError):  # The reader may close the connection first.
                for _ in range(1000):
                    self.wfile.write(b"x")
                    time.sleep(0.1)

        def log_message(self, *_: object) -> None:
            pass

    with http_service(Dripping) as endpoint_url:
        storage.configure(StoreOptions(endpoint_url, read_timeout_seconds=1, deadline_seconds=2))
        started = time.monotonic()
        with pytest.raises(StoreError, match="gave up after"):
            storage.read_bytes(f"{bucket}/object")
        assert 1 < time.monotonic() - started < 3


# ── errors that no retry can correct ─────────────────────────────────────────────────────────────────────────────────


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def fault(request: pytest.FixtureRequest, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make one thing wrong, and return the setting that the error must name."""
    name = request.param
    if name == "wrong secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secrets.token_hex(20))
    elif name == "unknown key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", secrets.token_hex(10))
    elif name == "no credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    elif name == "unknown profile":
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        yield "AWS_PROFILE"
        return
    elif name == "unresolvable":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://no-such-host.invalid")
        yield "AWS_ENDPOINT_URL"
        return
    else:
        with http_service(QuietFiles) as other_service:
            settings = {
                "https to http": s3_server.endpoint_url.replace("http:", "https:"),
                "no url": "the store",
                "password in url": "https://user:sesame@127.0.0.1",
                "other service": other_service,
            }
            storage.configure(StoreOptions(endpoint_url=settings[name]))
            yield "store.endpoint_url"
        return
    yield "AWS_ACCESS_KEY_ID"


class QuietFiles(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


OPERATIONS: list[Callable[[str], object]] = [
    storage.open_read,
    storage.read_bytes,
    storage.exists,
    storage.list_files,
    storage.delete_tree,
    storage.creation_method,
    lambda url: storage.glob(f"{url}/*"),
    lambda url: storage.write_bytes(url, b"x"),
    lambda url: storage.write_bytes(url, bytes(LARGE)),
    lambda url: storage.create_bytes(url, b"x"),
    lambda url: storage.delete([url]),
]

AT_ONCE = [
    "wrong secret",
    "unknown key",
    "no credentials",
    "unknown profile",
    "no url",
    "password in url",
    "other service",
]
IN_SECONDS = ["unresolvable", "https to http"]


@pytest.mark.parametrize("fault", [*AT_ONCE, *IN_SECONDS], indirect=True)
def test_connection_mistake_gives_one_line_naming_the_setting(
    fault: str, bucket: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_slow = request.node.callspec.params["fault"] in IN_SECONDS
    if fault == "store.endpoint_url":  # Only the unresolvable AWS_ENDPOINT_URL waits for the full time.
        monkeypatch.setattr(retry, "UNREACHABLE_SECONDS", 0.5)
    for operation in OPERATIONS[:1] if is_slow else OPERATIONS:
        started = time.monotonic()
        with pytest.raises(UserError) as caught:
            operation(f"{bucket}/object")
        assert time.monotonic() - started < (8 if is_slow else 3)
        assert caught.value.setting == fault
        assert "\n" not in str(caught.value)
        told = "".join([*traceback.format_exception(caught.value), repr(caught.value), repr(vars(caught.value))])
        told += repr(pickle.dumps(caught.value))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert os.environ.get(name, "no such value") not in told
        assert "sesame" not in str(caught.value)


def test_unreachable_service_is_reported_and_waited_for(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "UNREACHABLE_SECONDS", 0.3)
    address = closed_port()
    storage.configure(StoreOptions(endpoint_url=address, deadline_seconds=2))
    for _ in range(2):  # A job that starts during an outage must be started again, so this is a StoreError.
        with pytest.raises(StoreError, match=r"gave up after \d+ tries"):
            storage.read_bytes(f"{bucket}/object")
    (told,) = caplog.messages
    assert told.startswith(f"store.endpoint_url: '{address}': cannot be reached: ")
    assert told.endswith("; trying for 2 s")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_missing_bucket_error_names_the_bucket(s3_server: S3Server, operation: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match="no such bucket") as caught:
        operation("s3://no-such-bucket/object")
    assert caught.value.setting == "s3://no-such-bucket"


@pytest.mark.parametrize("url", ["gs://bucket/object", "hf://datasets/a/b", "S3://bucket/object", "ftp://host/file"])
def test_unknown_protocol_error_lists_the_known_ones(url: str) -> None:
    for operation in OPERATIONS:
        with pytest.raises(UserError, match=r"not supported; .*s3://") as caught:
            operation(url)
        assert caught.value.setting.startswith(url)


@pytest.mark.parametrize("url", ["s3://", "s3://bucket", "s3://bucket/", "s3://not a bucket/object"])
def test_url_without_an_object_is_refused(s3_server: S3Server, url: str) -> None:
    for operation in (storage.read_bytes, lambda url: storage.write_bytes(url, b"")):
        with pytest.raises(UserError, match="expected s3://bucket/key"):
            operation(url)


def test_store_error_and_options_hold_no_secret(bucket: str, s3_server: S3Server) -> None:
    with FaultProxy(s3_server.endpoint_url, chances={SLOW_DOWN: 1}) as proxy:
        options = StoreOptions(proxy.endpoint_url, deadline_seconds=0.5)
        storage.configure(options)
        with pytest.raises(StoreError) as caught:
            storage.write_bytes(f"{bucket}/object", b"x")
    told = "".join([*traceback.format_exception(caught.value), repr(caught.value), repr(pickle.dumps(options))])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in told
