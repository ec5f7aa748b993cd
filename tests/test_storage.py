"""Storage: reading, writing, listing and deleting files, from several processes and in bounded memory."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from storage_content import LARGE, content, http_service

from job import storage
from job.demo.server import S3Server
from job.errors import UserError
from job.storage import Entry, IntegrityError

pytestmark = pytest.mark.usefixtures("default_store")


# ── reading and writing ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0, 1, storage.PART_BYTES, storage.PART_BYTES + 1, LARGE])
def test_written_bytes_are_read_back(folder_url: str, size: int) -> None:
    url, data = storage.join(folder_url, "object"), content(size)
    storage.write_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert storage.size(url) == size
    with storage.open_read(url) as file:
        assert file.read() == data


def test_file_is_uploaded_and_downloaded(folder_url: str, tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "new" / "copy"
    source.write_bytes(content(LARGE))
    url = storage.join(folder_url, "object")
    storage.upload_file(source, url)
    storage.download_file(url, copy, size=LARGE, sha256=storage.sha256_file(source))
    assert copy.read_bytes() == source.read_bytes()
    assert storage.sha256_file(copy) == hashlib.sha256(source.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [0, 1, storage.PART_BYTES, LARGE])
def test_memory_is_written_without_a_file(folder_url: str, size: int) -> None:
    url, data = storage.join(folder_url, "object"), content(size)
    storage.write_from(url, size, lambda start, end: memoryview(data)[start:end])
    assert storage.read_bytes(url) == data


@pytest.mark.parametrize("wrong", [-1, 1])
def test_write_with_a_wrong_number_of_bytes_is_refused(folder_url: str, wrong: int) -> None:
    url = storage.join(folder_url, "object")
    storage.write_bytes(url, b"old")
    for size in (1000, LARGE):
        data = content(size + wrong)
        with pytest.raises(IntegrityError, match=f"{url}: from byte .* were expected"):
            storage.write_from(url, size, lambda start, end, of=data: of[start : end + wrong])
    assert storage.read_bytes(url) == b"old"
    assert len(storage.list_files(folder_url)) == 1


def test_any_range_can_be_read(bucket: str) -> None:
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


def test_equal_values_give_equal_json_bytes(folder_url: str) -> None:
    first, second = storage.join(folder_url, "1.json"), storage.join(folder_url, "2.json")
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


def test_record_is_read_with_the_types_of_its_fields(folder_url: str) -> None:
    url = storage.join(folder_url, "note.json")
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
def test_damaged_record_gives_one_line(folder_url: str, damaged: bytes) -> None:
    url = storage.join(folder_url, "note.json")
    storage.write_bytes(url, damaged)
    with pytest.raises(ValueError) as caught:
        storage.read_record(url, Note)
    assert 10 < len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_missing_file_is_not_found(folder_url: str) -> None:
    url = storage.join(folder_url, "none")
    for read in (storage.read_bytes, storage.open_read, storage.size, partial(storage.read_record, kind=Note)):
        with pytest.raises(FileNotFoundError):
            read(url)
    assert not storage.exists(url)
    assert storage.list_files(url) == storage.glob(url) == storage.glob(f"{url}/*") == []
    storage.delete([url])
    storage.delete_tree(url)


def test_files_are_listed_sorted_at_any_depth(folder_url: str) -> None:
    names = ["b", "a/2", "a/10", "a/deep/er/file", "with space & 中文"]
    for name in names:
        storage.write_bytes(storage.join(folder_url, name), name.encode())
    storage.write_bytes(f"{folder_url}-beside/c", b"not below")
    local = folder_url.removeprefix("file://")
    expected = sorted(Entry(storage.join(local, name), len(name.encode())) for name in names)
    assert storage.list_files(folder_url) == storage.list_files(f"{folder_url}/") == expected
    assert [storage.read_bytes(entry.url).decode() for entry in expected] == sorted(names)
    assert storage.glob(storage.join(folder_url, "a/*")) == [
        entry for entry in expected if entry.url.endswith(("/2", "/10"))
    ]
    assert storage.glob(storage.join(folder_url, "**/f*e")) == [entry for entry in expected if "deep" in entry.url]
    assert storage.glob(storage.join(folder_url, "b")) == [Entry(storage.join(local, "b"), 1)]


def test_listing_longer_than_a_page_is_complete(bucket: str) -> None:
    urls = [f"{bucket}/many/{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda url: storage.write_bytes(url, b""), urls))
    assert [entry.url for entry in storage.list_files(f"{bucket}/many")] == urls


def test_listing_shows_another_clients_files_at_once(bucket: str, s3_server: S3Server) -> None:
    client, name = s3_server.client(), bucket.removeprefix("s3://")
    for count in range(1, 4):
        assert not storage.exists(f"{bucket}/folder/{count}")
        client.put_object(Bucket=name, Key=f"folder/{count}", Body=b"x")
        assert storage.exists(f"{bucket}/folder/{count}")
        assert len(storage.list_files(f"{bucket}/folder")) == len(storage.glob(f"{bucket}/folder/*")) == count


def test_delete_tree_removes_also_parts_of_killed_uploads(bucket: str, s3_server: S3Server) -> None:
    client, name = s3_server.client(), bucket.removeprefix("s3://")
    for key in ("tree/a", "tree/b/c", "tree-beside/d"):
        storage.write_bytes(f"{bucket}/{key}", b"x")
        client.create_multipart_upload(Bucket=name, Key=key)
    storage.delete_tree(f"{bucket}/tree")
    assert [entry.url for entry in storage.list_files(bucket)] == [f"{bucket}/tree-beside/d"]
    uploads = client.list_multipart_uploads(Bucket=name)["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["tree-beside/d"]


class RangeHandler(SimpleHTTPRequestHandler):
    """A web server with one file that supports ranges."""

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


# ── processes and memory ─────────────────────────────────────────────────────────────────────────────────────────────


def read_in_child(url: str, answers: Any) -> None:
    answers.put(storage.read_bytes(url))


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_child_process_can_read_after_its_parent(bucket: str, method: str) -> None:
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

def peak_mebibytes():  # getrusage would count the memory before exec too.
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


def test_large_file_is_transferred_in_bounded_memory(bucket: str, tmp_path: Path) -> None:
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
        time.sleep(5)  # Longer than the deadline.
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate("go on\n", timeout=120)
    assert (process.returncode, error) == (0, "")
    assert (tmp_path / "file").read_bytes() == b"done"
