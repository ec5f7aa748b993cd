"""The demonstration's S3 server: its own credentials and ports, data that outlives it, nothing left running."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from job import storage
from job.demo.server import S3Server


@pytest.fixture(autouse=True)
def the_tests_own_server_again_afterwards(s3_server: S3Server) -> Iterator[None]:
    yield
    s3_server.take_over_environment()
    storage.configure(storage.StoreOptions())


def test_only_its_own_credentials_open_it(s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server() as other:
        assert other.endpoint_url != s3_server.endpoint_url
        with pytest.raises(ClientError, match="NoSuchBucket"):
            other.client().list_objects_v2(Bucket=bucket.removeprefix("s3://"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert s3_server.environment[name] != other.environment[name]
            monkeypatch.setenv(name, other.environment[name])
        storage.configure(storage.StoreOptions(endpoint_url=s3_server.endpoint_url))
        with pytest.raises(storage.UserError, match="InvalidAccessKeyId"):
            storage.list_files(bucket)


def test_started_again_on_its_folder_it_has_the_same_data_address_and_credentials(tmp_path: Path) -> None:
    with S3Server(tmp_path) as first:
        for _ in range(2):
            first.create_bucket("bucket")
        first.client().put_object(Bucket="bucket", Key="object", Body=b"x" * 1_000_000)
        with pytest.raises(RuntimeError, match="does another server run"):
            S3Server(tmp_path).start()
    with S3Server(tmp_path) as second:
        assert second.environment == first.environment
        answer = second.client().get_object(Bucket="bucket", Key="object")
        assert answer["Body"].read() == b"x" * 1_000_000


def test_nobody_else_can_read_its_credentials(s3_server: S3Server) -> None:
    secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"]
    holders = [path for path in s3_server.folder.glob("*.*") if secret in path.read_text(errors="replace")]
    assert sorted(path.name for path in holders) == ["s3.json", "server.json"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in holders)


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = S3Server(tmp_path)
    (tmp_path / "data").rmdir()
    (tmp_path / "data").write_text("no folder")
    with pytest.raises(RuntimeError, match=r"did not start [\s\S]* its log ends with:\n.*data"):
        server.start()
    server.stop()


def test_a_stopped_server_leaves_nothing_behind() -> None:
    with S3Server() as server:
        pid, ports = server.pid, server.ports
        assert pid is not None
        assert Path(f"/proc/{pid}").exists()
        assert "-master.telemetry=false" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    assert not Path(f"/proc/{pid}").exists()
    assert not server.folder.exists()
    assert not [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*{port}.sock")]


OWNER = """
import sys, time
from job.demo.server import S3Server
server = S3Server(sys.argv[1]).start()
print(server.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_running(pid)
        owner.kill()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    S3Server(tmp_path).stop()  # removes the sockets that it left


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
