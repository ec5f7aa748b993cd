"""Storage: whole or not at all, exactly one creator, bounded memory and time, and errors a person can act on."""

import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import SLOW_DOWN, Fault, FaultProxy

from job import storage
from job.demo.server import S3Server
from job.errors import UserError
from job.storage import Entry, IntegrityError, StoreError, StoreOptions, retry, s3

LARGE = 3 * storage.PART_BYTES + 12_345


@pytest.fixture(autouse=True)
def fresh_connection() -> Iterator[None]:
    storage.configure(StoreOptions())
    yield
    storage.configure(StoreOptions())


@pytest.fixture(params=["folder", "file_url", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to write to: on this machine or in the store."""
    if request.param == "s3":
        return storage.join(request.getfixturevalue("bucket"), "some/prefix")
    return str(tmp_path / "data") if request.param == "folder" else f"file://{tmp_path}/data"


@contextmanager
def http_service(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


# ── reading and writing ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, storage.PART_BYTES, storage.PART_BYTES + 1, LARGE])
def test_what_is_written_is_read_back(place: str, size: int) -> None:
    url, data = storage.join(place, "object"), content(size)
    storage.write_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert storage.size(url) == size
    with storage.open_read(url) as file:
        assert file.read() == data


def test_a_file_is_uploaded_and_downloaded_whole(place: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "new" / "copy"
    source.write_bytes(content(LARGE))
    url = storage.join(place, "object")
    storage.upload_file(source, url)
    storage.download_file(url, copy, size=LARGE, sha256=storage.sha256_file(source))
    assert copy.read_bytes() == source.read_bytes()
    assert storage.sha256_file(copy) == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [0, 1, storage.PART_BYTES, LARGE])
def test_what_lies_in_memory_is_written_without_a_file(place: str, size: int) -> None:
    url, data = storage.join(place, "object"), content(size)
    storage.write_from(url, size, lambda start, end: memoryview(data)[start:end])
    assert storage.read_bytes(url) == data


@pytest.mark.parametrize("wrong", [-1, 1])
def test_what_gives_another_number_of_bytes_than_it_said_is_refused(place: str, wrong: int) -> None:
    url = storage.join(place, "object")
    storage.write_bytes(url, b"old")
    for size in (1000, LARGE):
        data = content(size + wrong)
        with pytest.raises(IntegrityError, match=f"{url}: from byte .* were expected"):
            storage.write_from(url, size, lambda start, end, of=data: of[start : end + wrong])
    assert storage.read_bytes(url) == b"old"
    assert len(storage.list_files(place)) == 1


def test_any_range_is_read_from_any_position(bucket: str) -> None:
    url, data, draw = f"{bucket}/object", content(LARGE), random.Random(1)
    storage.write_bytes(url, data)
    with storage.open_read(url) as file:
        assert file.seekable()
        for _ in range(20):
            start = draw.randrange(LARGE)
            count = draw.choice([1, 100, 10_000, 2 * storage.PART_BYTES])
            assert file.seek(start) == start
            assert file.read(count) == data[start : start + count]
        file.seek(-10, os.SEEK_END)
        assert file.read() == data[-10:]
        file.seek(0)
        assert b"".join(iter(lambda: file.read(1_000_003), b"")) == data


def test_equal_values_give_equal_json_bytes(place: str) -> None:
    first, second = storage.join(place, "1.json"), storage.join(place, "2.json")
    storage.write_json(first, {"b": [1, 2.5], "a": "中文"})
    storage.write_json(second, {"a": "中文", "b": [1, 2.5]})
    assert (
        storage.read_bytes(first)
        == storage.read_bytes(second)
        == '{\n "a": "中文",\n "b": [\n  1,\n  2.5\n ]\n}\n'.encode()
    )
    assert json.loads(storage.read_bytes(first)) == {"a": "中文", "b": [1, 2.5]}


@dataclass(frozen=True)
class Note:
    step: int
    name: str | None
    files: dict[str, int] = field(default_factory=dict)


def test_a_record_is_read_with_the_types_of_its_fields(place: str) -> None:
    url = storage.join(place, "note.json")
    storage.write_json(url, {"step": 3, "name": None, "files": {"a": 1}, "of a newer version": [1]})
    assert storage.read_record(url, Note) == Note(3, None, {"a": 1})


@pytest.mark.parametrize(
    "damaged",
    [
        *(b"", b"null", b"[]", b'{"step": 1}', b'{"step": 1, "name": "a"', b"\xff\xfe{}"),
        *(b'{"step": "1", "name": "a"}', b'{"step": 1.5, "name": "a"}', b'{"step": true, "name": "a"}'),
        *(b'{"step": 1, "name": "a", "files": {"b": {}}}', b"[" * 100_000, b'{"name":' * 100_000),
    ],
)
def test_a_damaged_record_is_one_line(place: str, damaged: bytes) -> None:
    url = storage.join(place, "note.json")
    storage.write_bytes(url, damaged)
    with pytest.raises(ValueError) as caught:
        storage.read_record(url, Note)
    assert 10 < len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_what_is_not_there_is_not_found(place: str) -> None:
    url = storage.join(place, "none")
    for read in (storage.read_bytes, storage.open_read, storage.size, partial(storage.read_record, kind=Note)):
        with pytest.raises(FileNotFoundError):
            read(url)
    assert not storage.exists(url)
    assert storage.list_files(url) == storage.glob(url) == storage.glob(f"{url}/*") == []
    storage.delete([url])
    storage.delete_tree(url)


def test_files_below_a_folder_are_listed_at_any_depth_in_order(place: str) -> None:
    names = ["b", "a/2", "a/10", "a/deep/er/file", "with space & 中文"]
    for name in names:
        storage.write_bytes(storage.join(place, name), name.encode())
    storage.write_bytes(f"{place}-beside/c", b"not below")
    local = place.removeprefix("file://")
    expected = sorted(Entry(storage.join(local, name), len(name.encode())) for name in names)
    assert storage.list_files(place) == storage.list_files(f"{place}/") == expected
    assert [storage.read_bytes(entry.url).decode() for entry in expected] == sorted(names)
    assert storage.glob(storage.join(place, "a/*")) == [
        entry for entry in expected if entry.url.endswith(("/2", "/10"))
    ]
    assert storage.glob(storage.join(place, "**/f*e")) == [entry for entry in expected if "deep" in entry.url]
    assert storage.glob(storage.join(place, "b")) == [Entry(storage.join(local, "b"), 1)]


def test_a_listing_longer_than_a_page_is_complete(bucket: str) -> None:
    urls = [f"{bucket}/many/{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda url: storage.write_bytes(url, b""), urls))
    assert [entry.url for entry in storage.list_files(f"{bucket}/many")] == urls


def test_a_listing_sees_at_once_what_another_client_wrote(bucket: str, s3_server: S3Server) -> None:
    client, name = s3_server.client(), bucket.removeprefix("s3://")
    for count in range(1, 4):
        assert not storage.exists(f"{bucket}/folder/{count}")
        client.put_object(Bucket=name, Key=f"folder/{count}", Body=b"x")
        assert storage.exists(f"{bucket}/folder/{count}")
        assert len(storage.list_files(f"{bucket}/folder")) == len(storage.glob(f"{bucket}/folder/*")) == count


def test_a_tree_is_deleted_with_what_killed_uploads_left_and_nothing_else(bucket: str, s3_server: S3Server) -> None:
    client, name = s3_server.client(), bucket.removeprefix("s3://")
    for key in ("tree/a", "tree/b/c", "tree-beside/d"):
        storage.write_bytes(f"{bucket}/{key}", b"x")
        client.create_multipart_upload(Bucket=name, Key=key)
    storage.delete_tree(f"{bucket}/tree")
    assert [entry.url for entry in storage.list_files(bucket)] == [f"{bucket}/tree-beside/d"]
    uploads = client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["tree-beside/d"]


class RangeHandler(SimpleHTTPRequestHandler):
    """Python's server of files, made to honour ranges."""

    data = content(2 * storage.PART_BYTES)

    def do_GET(self) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if self.path != "/object.bin":
            self.send_error(404)
            return
        start, end = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (0, len(self.data))
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.data[start:end])

    do_HEAD = do_GET


def test_files_are_read_over_http(tmp_path: Path) -> None:
    with http_service(RangeHandler) as service:
        url, data = f"{service}/object.bin", RangeHandler.data
        assert storage.is_remote(url)
        assert storage.exists(url)
        assert not storage.exists(f"{service}/none")
        assert storage.glob(url) == [Entry(url, len(data))]
        assert storage.read_bytes(url) == data
        storage.download_file(url, tmp_path / "copy", sha256=hashlib.sha256(data).hexdigest())
        with storage.open_read(url) as file:
            file.seek(-10, os.SEEK_END)
            assert file.read() == data[-10:]
        with pytest.raises(UserError, match="neither written nor listed"):
            storage.write_bytes(url, b"")


# ── whole or not at all ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [10_000, storage.PART_BYTES + 1])
def test_a_reader_never_sees_a_part_of_a_write(place: str, size: int) -> None:
    url = storage.join(place, "object")
    versions = [bytes([letter]) * size for letter in b"ab"]
    storage.write_bytes(url, versions[0])
    stop = threading.Event()

    def write() -> None:
        for version in itertools.cycle(versions):
            if stop.is_set():
                return
            storage.write_bytes(url, version)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            seen = {storage.read_bytes(url) for _ in range(25)}
            sizes = {entry.size for _ in range(5) for entry in storage.list_files(place)}
        finally:
            stop.set()
        writing.result()
    assert seen <= set(versions)
    assert sizes == {size}
    assert len(storage.list_files(place)) == 1


def test_a_file_that_is_being_written_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Entry]] = []

    def look(_: int) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        seen.extend([storage.list_files(str(tmp_path)), storage.glob(f"{tmp_path}/*"), storage.glob(f"{tmp_path}/.*")])

    monkeypatch.setattr(os, "fsync", look)
    storage.write_bytes(f"{tmp_path}/object", b"x")
    assert seen == [[], [], []]


def test_a_failed_write_on_this_machine_leaves_the_old_content_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, source = tmp_path / "folder" / "object", tmp_path / "source"
    source.write_bytes(b"new")
    storage.write_bytes(str(target), b"old")

    def disk_is_full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", disk_is_full)
    for write in (storage.write_bytes, storage.create_bytes):
        with pytest.raises(OSError, match="no space"):
            write(str(target), b"new")
    with pytest.raises(OSError, match="no space"):
        storage.upload_file(source, str(target))
    assert list(target.parent.iterdir()) == [target]
    assert target.read_bytes() == b"old"


def test_a_failed_upload_leaves_nothing(
    bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(content(LARGE))

    def bad_sector(*_: int) -> bytes:
        raise OSError("bad sector")

    monkeypatch.setattr(os, "pread", bad_sector)
    with pytest.raises(OSError, match="bad sector"):
        storage.upload_file(source, f"{bucket}/object")
    assert storage.list_files(bucket) == []
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))


@pytest.mark.parametrize("wrong", ["size", "sha256"])
def test_a_download_that_is_not_what_was_expected_is_refused_and_leaves_nothing(
    place: str, tmp_path: Path, wrong: str
) -> None:
    url, data = storage.join(place, "object"), content(100_000)
    storage.write_bytes(url, b"corrupted" + data[9:] if wrong == "sha256" else data[:-1])
    copy = tmp_path / "copies" / "copy"
    with pytest.raises(IntegrityError, match=wrong if wrong == "sha256" else "99999 bytes, 100000 were expected"):
        storage.download_file(url, copy, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert list(copy.parent.iterdir()) == []


def test_a_file_that_is_replaced_while_it_is_read_is_not_mixed(bucket: str) -> None:
    url = f"{bucket}/object"
    storage.write_bytes(url, b"a" * LARGE)
    with storage.open_read(url) as file:
        assert file.read(1) == b"a"
        storage.write_bytes(url, b"b" * LARGE)
        with pytest.raises(IntegrityError, match="replaced"):
            file.read()


# ── exactly one creator ──────────────────────────────────────────────────────────────────────────────────────────────


def create_when_told(url: str, name: str, start: Any, created: Any) -> None:
    start.wait()
    created.put((name, storage.create_bytes(url, name.encode())))


def test_of_all_who_create_a_file_exactly_one_is_told_so(place: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, created = spawn.Barrier(10), spawn.Queue()
    url = storage.join(place, "object")
    workers = [
        *(threading.Thread(target=create_when_told, args=(url, f"thread {i}", start, created)) for i in range(8)),
        *(spawn.Process(target=create_when_told, args=(url, f"process {i}", start, created)) for i in range(2)),
    ]
    for worker in workers:
        worker.start()
    answers = dict(created.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    winners = [name for name, was_created in answers.items() if was_created]
    assert len(answers) == 10
    assert len(winners) == 1
    assert storage.read_bytes(url).decode() == winners[0]
    assert len(storage.list_files(place)) == 1


def test_exactly_one_creates_a_file_even_if_all_write_the_same(place: str) -> None:
    url = storage.join(place, "object")
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: storage.create_bytes(url, b"same"), range(8))) == 1


@pytest.mark.parametrize("lost", [[True], [False, True], [True, True, False]])
@pytest.mark.parametrize("is_proven", [True, False])
def test_a_creation_whose_answer_was_lost_is_known_as_ones_own(
    bucket: str, s3_server: S3Server, lost: list[bool], is_proven: bool
) -> None:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        storage.configure(StoreOptions(proxy.endpoint_url))
        if is_proven:  # otherwise the faults hit the creation of the throw-away file
            assert storage.creation_way(f"{bucket}/object") == "If-None-Match: *"
        for is_lost in lost:
            proxy.inject(Fault.RESET_ANSWER if is_lost else SLOW_DOWN, lambda request: request.method == "PUT")
        assert storage.create_bytes(f"{bucket}/object", b"mine")
        assert proxy.injected.total() == len(lost)
        assert not storage.create_bytes(f"{bucket}/object", b"mine")


@pytest.mark.parametrize("is_completed", [True, False])
def test_an_upload_that_is_gone_counts_only_if_it_was_completed(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, is_completed: bool
) -> None:
    """Some stores forget an upload that is complete, so that a completion tried again meets none."""
    url, old, new = f"{bucket}/object", content(LARGE, seed=1), content(LARGE, seed=2)
    storage.write_bytes(url, old)
    call = s3.call

    def meet_no_upload(operation: str, url: str, method: str, **request: Any) -> Any:
        if method == "complete_multipart_upload":
            if is_completed:
                call(operation, url, method, **request)
            place = {name: request[name] for name in ("Bucket", "Key", "UploadId")}
            s3_server.client().abort_multipart_upload(**place)
            raise FileNotFoundError(url)
        return call(operation, url, method, **request)

    with monkeypatch.context() as patch:
        patch.setattr(s3, "call", meet_no_upload)
        if is_completed:
            storage.write_bytes(url, new)
        else:
            with pytest.raises(StoreError, match="aborted"):
                storage.write_bytes(url, new)
    assert storage.read_bytes(url) == (new if is_completed else old)


# ── until the deadline (what passes before it is in test_store_faults) ───────────────────────────────────────────────


def test_the_deadline_holds_for_a_store_that_only_drips(bucket: str) -> None:
    class Dripping(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with suppress(BrokenPipeError):  # when the reader has given up
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


# ── what no retry mends is said at once, in one line ─────────────────────────────────────────────────────────────────


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def fault(request: pytest.FixtureRequest, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Makes one thing wrong; gives the setting that the error must name."""
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
    storage.creation_way,
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
def test_a_mistake_in_the_connection_is_one_line_that_names_the_setting(
    fault: str, bucket: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_slow = request.node.callspec.params["fault"] in IN_SECONDS
    if fault == "store.endpoint_url":  # the unresolvable one's is AWS_ENDPOINT_URL: one of the two takes its full time
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


def test_a_service_that_does_not_answer_at_all_is_told_of_and_waited_for(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(retry, "UNREACHABLE_SECONDS", 0.3)
    address = closed_port()
    storage.configure(StoreOptions(endpoint_url=address, deadline_seconds=2))
    for _ in range(2):  # a program that is started in an outage is to be started again, not to be given up
        with pytest.raises(StoreError, match=r"gave up after \d+ tries"):
            storage.read_bytes(f"{bucket}/object")
    (told,) = caplog.messages
    assert told.startswith(f"store.endpoint_url: '{address}': cannot be reached: ")
    assert told.endswith("; trying for 2 s")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_missing_bucket_is_named(s3_server: S3Server, operation: Callable[[str], object]) -> None:
    with pytest.raises(UserError, match="no such bucket") as caught:
        operation("s3://no-such-bucket/object")
    assert caught.value.setting == "s3://no-such-bucket"


@pytest.mark.parametrize("url", ["gs://bucket/object", "hf://datasets/a/b", "S3://bucket/object", "ftp://host/file"])
def test_an_unknown_protocol_is_refused_with_those_that_are_known(url: str) -> None:
    for operation in OPERATIONS:
        with pytest.raises(UserError, match=r"not supported; .*s3://") as caught:
            operation(url)
        assert caught.value.setting.startswith(url)


@pytest.mark.parametrize("url", ["s3://", "s3://bucket", "s3://bucket/", "s3://not a bucket/object"])
def test_a_url_that_names_no_object_is_refused(s3_server: S3Server, url: str) -> None:
    for operation in (storage.read_bytes, lambda url: storage.write_bytes(url, b"")):
        with pytest.raises(UserError, match="expected s3://bucket/key"):
            operation(url)


def test_no_secret_is_in_a_store_error_or_in_the_options(bucket: str, s3_server: S3Server) -> None:
    with FaultProxy(s3_server.endpoint_url, chances={SLOW_DOWN: 1}) as proxy:
        options = StoreOptions(proxy.endpoint_url, deadline_seconds=0.5)
        storage.configure(options)
        with pytest.raises(StoreError) as caught:
            storage.write_bytes(f"{bucket}/object", b"x")
    told = "".join([*traceback.format_exception(caught.value), repr(caught.value), repr(pickle.dumps(options))])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert os.environ[name] not in told


# ── processes and memory ─────────────────────────────────────────────────────────────────────────────────────────────


def read_in_child(url: str, answers: Any) -> None:
    answers.put(storage.read_bytes(url))


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_a_child_process_reads_after_its_parent_did(bucket: str, method: str) -> None:
    url = f"{bucket}/object"
    storage.write_bytes(url, b"content")
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=read_in_child, args=(url, answers))
    child.start()
    assert answers.get(timeout=30) == b"content"
    child.join()
    assert child.exitcode == 0
    assert storage.read_bytes(url) == b"content"


PEAK_MEMORY = r"""
import re, sys
from job import storage

def peak_mebibytes():  # not getrusage's, which counts the process before exec too
    return int(re.search(r"VmHWM:\s*(\d+) kB", open("/proc/self/status").read())[1]) // 1024

name, source, target = sys.argv[1:]
storage.exists(target)
content = memoryview(open(source, "rb").read()) if name == "write_from" else b""
before = peak_mebibytes()
if name == "write_from":
    storage.write_from(target, len(content), lambda start, end: content[start:end])
else:
    getattr(storage, name)(source, target)
print(peak_mebibytes() - before)
"""


def test_a_large_file_is_moved_in_bounded_memory(bucket: str, tmp_path: Path) -> None:
    source, copy, url = tmp_path / "source", tmp_path / "copy", f"{bucket}/object"
    with source.open("wb") as file:
        for seed in range(100):
            file.write(content(2**20, seed))
    calls = (("upload_file", source, url, 96), ("write_from", source, url, 96), ("download_file", url, copy, 80))
    for *call, most_mebibytes in calls:
        command = [sys.executable, "-c", PEAK_MEMORY, *map(str, call)]
        grown_mebibytes = int(subprocess.run(command, check=True, capture_output=True).stdout)
        assert grown_mebibytes < most_mebibytes
    assert storage.sha256_file(copy) == storage.sha256_file(source)


@pytest.mark.recovery
def test_pause_does_not_count_against_a_deadline(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom job import storage\n"
        "with storage.limits(3.0):\n"
        "    print('begun', flush=True)\n    sys.stdin.readline()\n    storage.write_bytes(sys.argv[1], b'done')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "file")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(5)  # the pause itself
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate("go on\n", timeout=120)
    assert (process.returncode, error) == (0, "")
    assert (tmp_path / "file").read_bytes() == b"done"
