"""Storage: writes that happen completely or not at all, and conditional creation."""

import hashlib
import itertools
import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import SLOW_DOWN, Fault, FaultProxy
from storage_content import LARGE, content

from job import storage
from job.demo.server import S3Server
from job.storage import Entry, IntegrityError, StoreError, StoreOptions, s3

pytestmark = pytest.mark.usefixtures("default_store")


# ── atomic writes ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [10_000, storage.PART_BYTES + 1])
def test_reader_never_sees_a_partial_write(folder_url: str, size: int) -> None:
    url = storage.join(folder_url, "object")
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
            sizes = {entry.size for _ in range(5) for entry in storage.list_files(folder_url)}
        finally:
            stop.set()
        writing.result()
    assert seen <= set(versions)
    assert sizes == {size}
    assert len(storage.list_files(folder_url)) == 1


def test_unfinished_file_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Entry]] = []

    def look(_: int) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        seen.extend([storage.list_files(str(tmp_path)), storage.glob(f"{tmp_path}/*"), storage.glob(f"{tmp_path}/.*")])

    monkeypatch.setattr(os, "fsync", look)
    storage.write_bytes(f"{tmp_path}/object", b"x")
    assert seen == [[], [], []]


def test_failed_local_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_failed_upload_leaves_nothing(
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
def test_unexpected_download_is_refused_and_leaves_nothing(folder_url: str, tmp_path: Path, wrong: str) -> None:
    url, data = storage.join(folder_url, "object"), content(100_000)
    storage.write_bytes(url, b"corrupted" + data[9:] if wrong == "sha256" else data[:-1])
    copy = tmp_path / "copies" / "copy"
    with pytest.raises(IntegrityError, match=wrong if wrong == "sha256" else "99999 bytes, 100000 were expected"):
        storage.download_file(url, copy, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert list(copy.parent.iterdir()) == []


def test_file_replaced_during_reading_is_not_mixed(bucket: str) -> None:
    url = f"{bucket}/object"
    storage.write_bytes(url, b"a" * LARGE)
    with storage.open_read(url) as file:
        assert file.read(1) == b"a"
        storage.write_bytes(url, b"b" * LARGE)
        with pytest.raises(IntegrityError, match="replaced"):
            file.read()


# ── conditional creation ─────────────────────────────────────────────────────────────────────────────────────────────


def create_when_told(url: str, name: str, start: Any, created: Any) -> None:
    start.wait()
    created.put((name, storage.create_bytes(url, name.encode())))


def test_exactly_one_of_many_creators_succeeds(folder_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, created = spawn.Barrier(10), spawn.Queue()
    url = storage.join(folder_url, "object")
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
    assert len(storage.list_files(folder_url)) == 1


def test_exactly_one_creator_succeeds_with_equal_content(folder_url: str) -> None:
    url = storage.join(folder_url, "object")
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: storage.create_bytes(url, b"same"), range(8))) == 1


@pytest.mark.parametrize("lost", [[True], [False, True], [True, True, False]])
@pytest.mark.parametrize("is_proven", [True, False])
def test_creation_with_a_lost_answer_is_recognized(
    bucket: str, s3_server: S3Server, lost: list[bool], is_proven: bool
) -> None:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        storage.configure(StoreOptions(proxy.endpoint_url))
        if is_proven:  # Otherwise the faults hit the creation of the probe file.
            assert storage.creation_method(f"{bucket}/object") == "If-None-Match: *"
        for is_lost in lost:
            proxy.inject(Fault.RESET_ANSWER if is_lost else SLOW_DOWN, lambda request: request.method == "PUT")
        assert storage.create_bytes(f"{bucket}/object", b"mine")
        assert proxy.injected.total() == len(lost)
        assert not storage.create_bytes(f"{bucket}/object", b"mine")


@pytest.mark.parametrize("is_completed", [True, False])
def test_missing_upload_counts_only_if_it_was_completed(
    bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, is_completed: bool
) -> None:
    """Some stores forget a completed upload, so a repeated completion finds no upload."""
    url, old, new = f"{bucket}/object", content(LARGE, seed=1), content(LARGE, seed=2)
    storage.write_bytes(url, old)
    call = s3.call

    def meet_no_upload(operation: str, url: str, method: str, **request: Any) -> Any:
        if method == "complete_multipart_upload":
            if is_completed:
                call(operation, url, method, **request)
            target = {name: request[name] for name in ("Bucket", "Key", "UploadId")}
            s3_server.client().abort_multipart_upload(**target)
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
