"""Storage with a failing store: temporary faults are retried, final errors are raised at once, deadlines are kept."""

import datetime
import hashlib
import json
import math
import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import botocore.auth
import pytest
from fault_proxy import SLOW_DOWN, STORM, Fault, FaultProxy, Refusal, Request
from storage_content import content

from job import storage
from job.demo.server import S3Server
from job.errors import UserError
from job.storage import Cancelled, Entry, IntegrityError, StoreError, StoreOptions, connection, s3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the smallest parts that S3 accepts."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    yield
    storage.configure(StoreOptions())


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy without faults, until a test injects some. Storage is configured to use it."""
    with FaultProxy(s3_server.endpoint_url) as proxy:
        go_through(proxy)
        yield proxy


def go_through(proxy: FaultProxy, **options: float) -> None:
    storage.configure(
        StoreOptions(proxy.endpoint_url, **{"read_timeout_seconds": 10, "deadline_seconds": 60} | options)
    )


def connect(proxy: FaultProxy, **options: float) -> None:
    """Connect before something is timed, because botocore loads its data for seconds on a busy machine."""
    go_through(proxy, **options)
    connection.filesystem("s3://").connect()


@pytest.fixture(scope="module")
def shared_bucket(s3_server: S3Server) -> str:
    return s3_server.create_bucket(f"test-{secrets.token_hex(6)}")


@pytest.fixture
def folder(shared_bucket: str) -> str:
    """An empty folder in a shared bucket, because the first object of a new bucket takes the server a second."""
    return storage.join(shared_bucket, secrets.token_hex(6))


SEVERAL_PARTS = content(2 * 5 * 2**20 + 12_345)


def spell(faults: Any) -> str:
    """Return the names of faults, for the id of a test."""
    one_or_more = faults if isinstance(faults, tuple) else (faults,)
    return " ".join(fault.code if isinstance(fault, Refusal) else fault.name for fault in one_or_more)


def is_part(request: Request) -> bool:
    return "partNumber=" in request.path


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def uploads(server: S3Server, folder: str) -> list[Any]:
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    return server.client().list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", [])


# ── temporary faults ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", [1, 2])
def test_all_faults_together_change_no_byte(folder: str, s3_server: S3Server, tmp_path: Path, seed: int) -> None:
    small, large = content(1000, seed), SEVERAL_PARTS
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(large)
    with FaultProxy(s3_server.endpoint_url, seed, STORM) as proxy:
        go_through(proxy, read_timeout_seconds=1)
        for place in (f"{folder}/{number}" for number in range(2)):
            proxy.inject(Fault.FLIP_ANSWER, lambda request: request.method == "GET", skip=2)
            storage.write_bytes(f"{place}/small", small)
            assert storage.create_bytes(f"{place}/created", small)
            assert not storage.create_bytes(f"{place}/created", b"other")
            storage.write_from(f"{place}/large", len(large), lambda start, end: memoryview(large)[start:end])
            storage.upload_file(source, f"{place}/file")
            assert storage.read_bytes(f"{place}/small") == storage.read_bytes(f"{place}/created") == small
            for name in ("large", "file"):
                storage.download_file(f"{place}/{name}", copy, len(large), hashlib.sha256(large).hexdigest())
                assert copy.read_bytes() == large
            expected = {"created": small, "file": large, "large": large, "small": small}
            assert storage.list_files(place) == [Entry(f"{place}/{name}", len(expected[name])) for name in expected]
            storage.delete([f"{place}/file"])
            assert not storage.exists(f"{place}/file")
        assert proxy.injected.total() > 5


REFUSED = (SLOW_DOWN, Refusal(429, "TooManyRequests"), Refusal(502, "BadGateway"))
STEPS: dict[str, Callable[[Request], bool]] = {
    "whole object": lambda request: request.method == "PUT" and not is_part(request),
    "part": is_part,
    "completion": lambda request: request.method == "POST" and "uploadId=" in request.path,
    "begin": lambda request: request.path.endswith("?uploads"),
}


@pytest.mark.parametrize(
    "faults",
    [REFUSED, (Fault.STALL,), (Fault.RESET_ANSWER,) * 2, (Fault.RESET_REQUEST,) * 2, (Fault.FLIP_REQUEST,)],
    ids=spell,
)
def test_upload_survives_faults_at_each_step(
    proxy: FaultProxy, folder: str, faults: tuple[Fault | Refusal, ...]
) -> None:
    go_through(proxy, read_timeout_seconds=0.5)
    need_body = {Fault.RESET_REQUEST, Fault.FLIP_REQUEST}.issuperset(faults)
    steps = [step for name, step in STEPS.items() if name != "begin" or not need_body]
    for step in steps:
        for fault in faults:
            proxy.inject(fault, step)
    for name, data in (("small", SEVERAL_PARTS[:1000]), ("large", SEVERAL_PARTS)):
        storage.write_bytes(f"{folder}/{name}", data)
        assert storage.read_bytes(f"{folder}/{name}") == data
    assert proxy.injected == Counter(len(steps) * faults)


@pytest.mark.parametrize(
    "faults",
    [REFUSED, (Fault.STALL,), (Fault.RESET_ANSWER,) * 2, (Fault.TRUNCATE_ANSWER,) * 2, (Fault.SHORT_ANSWER,) * 2],
    ids=spell,
)
def test_download_survives_faults(proxy: FaultProxy, folder: str, faults: tuple[Fault | Refusal, ...]) -> None:
    go_through(proxy, read_timeout_seconds=0.5)
    small, large = SEVERAL_PARTS[:1000], SEVERAL_PARTS
    storage.write_bytes(f"{folder}/small", small)
    storage.write_bytes(f"{folder}/large", large)
    for read in (
        lambda: storage.read_bytes(f"{folder}/small") == small,
        lambda: storage.open_read(f"{folder}/large").read() == large,
    ):
        for fault in faults:
            proxy.inject(fault, lambda request: request.method == "GET")
        assert read()
    assert proxy.injected == Counter(2 * faults)


def test_stalled_try_is_repeated_with_twice_the_time(proxy: FaultProxy, folder: str) -> None:
    connect(proxy, read_timeout_seconds=0.3)
    proxy.inject(Fault.STALL, times=3)
    started = time.monotonic()
    storage.write_bytes(f"{folder}/object", b"content")
    assert 2.7 < time.monotonic() - started < 6  # The tries take 0.3 + 0.6 + 1.2 s, the pauses 0.7 to 1.4 s.
    assert [request.fault for request in proxy.requests] == [*3 * [Fault.STALL], None]


def test_slow_link_is_not_an_error(proxy: FaultProxy, folder: str, tmp_path: Path) -> None:
    """All parts together take longer than the deadline of one part."""
    connect(proxy, read_timeout_seconds=5, deadline_seconds=2.5)
    storage.write_bytes(f"{folder}/object", SEVERAL_PARTS)
    proxy.chances, proxy.bytes_per_second = {Fault.THROTTLE: 1}, 4 * 2**20
    started = time.monotonic()
    storage.download_file(f"{folder}/object", tmp_path / "copy", size=len(SEVERAL_PARTS))
    assert time.monotonic() - started > 2.5


def test_outage_shorter_than_the_deadline_is_survived(proxy: FaultProxy, folder: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(storage.write_bytes, f"{folder}/object", SEVERAL_PARTS)
        proxy.wait_for(is_part)
        proxy.start_outage()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(proxy.endpoint_url.rpartition(":")[2])))
        with pytest.raises(TimeoutError):
            writing.result(1)
        proxy.end_outage()
        writing.result()
    assert storage.read_bytes(f"{folder}/object") == SEVERAL_PARTS


def test_outage_longer_than_the_deadline_fails_at_the_deadline(proxy: FaultProxy, folder: str) -> None:
    connect(proxy, deadline_seconds=1)
    storage.write_bytes(f"{folder}/object", b"content")
    proxy.start_outage()
    for operation in ("read", "list", "upload"):
        started = time.monotonic()
        with pytest.raises(StoreError, match=r"gave up after \d+ tries in \d s|no time left"):
            OPERATIONS[operation](f"{folder}/object")
        assert time.monotonic() - started < 5


# ── wrong bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_damaged_download_is_repeated(proxy: FaultProxy, folder: str, tmp_path: Path) -> None:
    url, copy = f"{folder}/object", tmp_path / "copy"
    storage.write_bytes(url, SEVERAL_PARTS)
    proxy.inject(Fault.FLIP_ANSWER, lambda request: request.method == "GET", skip=2)
    storage.download_file(url, copy, sha256=hashlib.sha256(SEVERAL_PARTS).hexdigest())
    assert proxy.injected == {Fault.FLIP_ANSWER: 1}
    assert copy.read_bytes() == SEVERAL_PARTS


def test_download_that_is_always_damaged_is_refused(proxy: FaultProxy, folder: str, tmp_path: Path) -> None:
    url, copy = f"{folder}/object", tmp_path / "copy"
    storage.write_bytes(url, SEVERAL_PARTS)
    proxy.chances = {Fault.FLIP_ANSWER: 1}
    with pytest.raises(IntegrityError, match="sha256"):
        storage.download_file(url, copy, sha256=hashlib.sha256(SEVERAL_PARTS).hexdigest())
    assert list(tmp_path.iterdir()) == []


def test_damaged_small_object_is_read_again(proxy: FaultProxy, folder: str) -> None:
    """Objects written in one request have a checksum; without it, a wrong digit in a JSON file would not be noticed."""
    storage.write_json(f"{folder}/object", {"step": 500})
    assert storage.create_bytes(f"{folder}/created", b"500")
    proxy.inject(Fault.FLIP_ANSWER, lambda request: request.method == "GET", times=2)
    assert json.loads(storage.read_bytes(f"{folder}/object")) == {"step": 500}
    proxy.inject(Fault.FLIP_ANSWER, lambda request: request.method == "GET")
    assert storage.read_bytes(f"{folder}/created") == b"500"
    assert proxy.injected == {Fault.FLIP_ANSWER: 3}


@pytest.mark.parametrize("size", [1000, len(SEVERAL_PARTS)])
def test_upload_that_arrives_damaged_is_sent_again(proxy: FaultProxy, folder: str, size: int) -> None:
    proxy.inject(Fault.FLIP_REQUEST, lambda request: request.method == "PUT", times=3)
    storage.write_bytes(f"{folder}/object", SEVERAL_PARTS[:size])
    assert storage.read_bytes(f"{folder}/object") == SEVERAL_PARTS[:size]
    puts = [request for request in proxy.requests if request.method == "PUT"]
    assert proxy.injected[Fault.FLIP_REQUEST] == len([request for request in puts if request.fault]) == 3
    assert len(puts) == 3 + -(-size // s3.PART_BYTES)


# ── final errors ─────────────────────────────────────────────────────────────────────────────────────────────────────

OPERATIONS: dict[str, Callable[[str], object]] = {
    "read": storage.read_bytes,
    "open": storage.open_read,
    "find": storage.exists,
    "list": storage.list_files,
    "write": lambda url: storage.write_bytes(url, b"x"),
    "upload": lambda url: storage.write_bytes(url, SEVERAL_PARTS),
    "create": lambda url: storage.create_bytes(url, b"x"),
    "delete": lambda url: storage.delete([url]),
}
REFUSALS = {
    Refusal(
        403, "AccessDenied"
    ): r"AWS_ACCESS_KEY_ID: the store refused to .*: AccessDenied; set .* right to use s3://",
    Refusal(403, "InvalidAccessKeyId"): r"AWS_ACCESS_KEY_ID: the store refused to .*: InvalidAccessKeyId; set ",
    Refusal(400, "ExpiredToken"): r"AWS_ACCESS_KEY_ID: the store refused to .*: ExpiredToken; set ",
    Refusal(404, "NoSuchBucket"): r"s3://[^/]+: there is no such bucket; create it, or correct the URL",
    Refusal(403, "RequestTimeTooSkewed"): r"s3://[^/]+: the store refused to .*this machine's clock .*; set the clock",
}


@pytest.mark.parametrize("refusal", REFUSALS, ids=spell)
def test_refusal_fails_at_once_with_one_line(proxy: FaultProxy, folder: str, refusal: Refusal) -> None:
    proxy.chances = {refusal: 1}
    for operation in OPERATIONS.values():
        proxy.requests.clear()
        with pytest.raises(UserError, match=REFUSALS[refusal]) as caught:
            operation(f"{folder}/object")
        assert "\n" not in str(caught.value)
        assert len(proxy.requests) <= 3  # An answer to HEAD has no reason, so up to two listings look for it.


def test_missing_object_is_not_requested_again(proxy: FaultProxy, folder: str) -> None:
    for operation in ("read", "open"):
        proxy.requests.clear()
        with pytest.raises(FileNotFoundError):
            OPERATIONS[operation](f"{folder}/object")
        assert len(proxy.requests) <= 2


@pytest.mark.parametrize("minutes", [20, -20])
def test_wrong_clock_is_named(proxy: FaultProxy, folder: str, monkeypatch: pytest.MonkeyPatch, minutes: int) -> None:
    """The real server refuses the request, because its clock is right."""
    now = botocore.auth.get_current_datetime
    wrong = datetime.timedelta(minutes=minutes)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *args, **kw: now(*args, **kw) + wrong)
    for operation in OPERATIONS.values():
        proxy.requests.clear()
        with pytest.raises(UserError, match="RequestTimeTooSkewed: this machine's clock is too far"):
            operation(f"{folder}/object")
        assert len(proxy.requests) <= 2


# ── deadlines and cancellation ───────────────────────────────────────────────────────────────────────────────────────


def test_deadline_holds_for_a_store_that_never_answers(proxy: FaultProxy, folder: str) -> None:
    connect(proxy, read_timeout_seconds=0.2, deadline_seconds=1)
    proxy.chances = {Fault.STALL: 1}
    for operation in ("read", "find", "upload"):
        started = time.monotonic()
        with pytest.raises(StoreError, match=rf"{folder}/object: .*gave up after [2-9] tries in [01] s"):
            OPERATIONS[operation](f"{folder}/object")
        assert 0.5 < time.monotonic() - started < 2


def test_deadline_bounds_all_operations_of_a_block_together(proxy: FaultProxy, folder: str, tmp_path: Path) -> None:
    connect(proxy)
    url = f"{folder}/object"
    proxy.inject(Fault.STALL, lambda request: request.method == "HEAD", times=math.inf)
    started = time.monotonic()
    with storage.limits(deadline_seconds=2):
        storage.write_bytes(url, b"content")
        with pytest.raises(StoreError, match=r"gave up after \d tries"):
            storage.exists(url)
        assert 1 < time.monotonic() - started < 2.5
        time.sleep(max(0, started + 2 - time.monotonic()))
        requests = len(proxy.requests)
        for operation in OPERATIONS.values():
            with pytest.raises(StoreError, match="no time left"):
                operation(url)
        with pytest.raises(StoreError, match="no time left"):
            storage.write_bytes(str(tmp_path / "object"), b"content")
    assert len(proxy.requests) == requests
    assert list(tmp_path.iterdir()) == []
    assert storage.read_bytes(url) == b"content"


def test_narrower_of_two_limits_holds(proxy: FaultProxy, folder: str) -> None:
    proxy.chances = {Fault.STALL: 1}
    for outer, inner in ((0.5, 60), (60, 0.5)):
        started = time.monotonic()
        with storage.limits(outer), storage.limits(inner), pytest.raises(StoreError, match="gave up"):
            storage.exists(f"{folder}/object")
        assert time.monotonic() - started < 1.5
    stop = threading.Event()
    stop.set()
    with storage.limits(cancelled=stop), storage.limits(60), pytest.raises(Cancelled):
        storage.exists(f"{folder}/object")


@pytest.mark.parametrize("standstill", ["slow", "stalled", "refused", "down", "dead"])
def test_upload_is_cancelled_within_a_second(
    proxy: FaultProxy, folder: str, s3_server: S3Server, standstill: str
) -> None:
    connect(proxy, read_timeout_seconds=30)
    fault = {"stalled": Fault.STALL, "refused": SLOW_DOWN}.get(standstill, Fault.THROTTLE)
    proxy.inject(fault, is_part, times=math.inf)
    proxy.bytes_per_second = 2**14
    cancelled = threading.Event()

    def upload() -> None:
        with storage.limits(cancelled=cancelled):
            storage.write_bytes(f"{folder}/object", SEVERAL_PARTS)

    with ThreadPoolExecutor(1) as pool:
        uploading = pool.submit(upload)
        proxy.wait_for(is_part)
        if standstill == "down":
            proxy.start_outage()
        if standstill == "dead":
            proxy.chances = {Fault.STALL: 1}
        with pytest.raises(TimeoutError):
            uploading.result(1)
        cancelled.set()
        started = time.monotonic()
        with pytest.raises(Cancelled):
            uploading.result()
        is_reached = standstill not in ("down", "dead")
        assert time.monotonic() - started < (1 if is_reached else 2)
    assert not is_reached or uploads(s3_server, folder) == []
    storage.configure(StoreOptions())
    assert storage.list_files(folder) == []


@pytest.mark.parametrize("fault", [Fault.STALL, Fault.THROTTLE])
def test_cancelled_request_closes_its_connection(proxy: FaultProxy, folder: str, fault: Fault) -> None:
    connect(proxy, read_timeout_seconds=30)
    storage.write_bytes(f"{folder}/large", SEVERAL_PARTS)
    storage.write_bytes(f"{folder}/small", b"content")
    connections = proxy.open_connections
    proxy.inject(fault, lambda request: request.method == "GET")
    proxy.bytes_per_second = 2**18
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as pool, storage.limits(cancelled=cancelled):
        pool.submit(lambda: (proxy.wait_for(lambda request: request.fault is fault), cancelled.set()))
        with pytest.raises(Cancelled):
            storage.read_bytes(f"{folder}/large")
    until(lambda: proxy.open_connections == connections - 1)
    assert storage.read_bytes(f"{folder}/small") == b"content"


# ── the proxy itself ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_proxy_survives_lost_clients_and_leaves_no_thread(folder: str, s3_server: S3Server) -> None:
    threads, draw = threading.active_count(), random.Random(0)
    with FaultProxy(s3_server.endpoint_url, 3, STORM, stall_seconds=60) as proxy:
        address = ("127.0.0.1", int(proxy.endpoint_url.rpartition(":")[2]))
        path = folder.removeprefix("s3:/")
        request = f"PUT {path}/object HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n".encode() + bytes(500_000)
        for _ in range(200):
            with socket.create_connection(address) as client, suppress(OSError):
                client.sendall(request[: int(len(request) ** draw.random())])
        until(lambda: proxy.open_connections == 0)
        proxy.start_outage()
        proxy.chances = {}
        proxy.end_outage()
        connect(proxy)
        storage.write_bytes(f"{folder}/object", b"content")
        assert storage.read_bytes(f"{folder}/object") == b"content"
        # The three are the threads of the proxy, of fsspec's event loop and of aiohttp's resolver.
        assert threading.active_count() <= threads + 3
    storage.configure(StoreOptions())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    assert not [thread for thread in threading.enumerate() if thread.name == "fault-proxy"]
