"""The demonstration's S3 server: own credentials and ports, data that is kept, and nothing left running."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from botocore.exceptions import ClientError

from job import storage
from job.demo.server import S3Server
from job.errors import UserError


@pytest.fixture(autouse=True)
def restore_test_server(s3_server: S3Server) -> Iterator[None]:
    yield
    s3_server.take_over_environment()
    storage.configure(storage.StoreOptions())


def test_server_accepts_only_its_own_credentials(
    s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_restarted_server_keeps_data_address_and_credentials(tmp_path: Path) -> None:
    with S3Server(tmp_path) as first:
        for _ in range(2):
            first.create_bucket("bucket")
        first.client().put_object(Bucket="bucket", Key="object", Body=b"x" * 1_000_000)
        with pytest.raises(UserError, match="does another server run"):
            S3Server(tmp_path).start()
    with S3Server(tmp_path) as second:
        assert second.environment == first.environment
        answer = second.client().get_object(Bucket="bucket", Key="object")
        assert answer["Body"].read() == b"x" * 1_000_000


# Another user of the machine without credentials sends all kinds of requests to each port and socket.
STRANGER = r"""
import json, socket, ssl, sys

def send(port, message, tls):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
            if tls:
                context = ssl._create_unverified_context()
                context.set_alpn_protocols(["h2" if message.startswith(b"PRI") else "http/1.1"])
                link = context.wrap_socket(link)
            link.sendall(message)
            return link.recv(65536).decode("latin-1")
    except (OSError, EOFError) as error:
        return f"error {error!r}"

request = json.load(sys.stdin)
answers = []
for port in request["ports"]:
    rest = "HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
    messages = [f"{line} {rest}".encode() for line in request["requests"]]
    messages.append(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)[:3] + b"\x04" + bytes(5))  # gRPC is HTTP/2
    for message in messages:
        for tls in (False, True):
            answers.append((port, message.split(b" HTTP")[0].decode(), tls, send(port, message, tls)))
for path in request["sockets"]:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        answers.append((path, "", False, "connected"))
    except OSError as error:
        answers.append((path, "", False, f"error {error!r}"))
try:
    answers.append(("files", "", False, open(request["file"]).read()))
except OSError as error:
    answers.append(("files", "", False, f"error {error!r}"))
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(s3_server: S3Server) -> list[tuple[Any, str, bool, str]]:
    """Return what a stranger gets: port or path, request, True for TLS, and the answer."""
    bucket = s3_server.create_bucket("private").removeprefix("s3://")
    s3_server.client().put_object(Bucket=bucket, Key="object", Body=b"a secret" * 10)
    wait_for_all_ports(s3_server)
    requests = [
        *(f"GET {path}" for path in ("/", f"/{bucket}", f"/{bucket}/object", f"/buckets/{bucket}/object", "/1,01")),
        *(
            f"{verb} {path}"
            for verb in ("PUT", "POST", "DELETE")
            for path in (f"/{bucket}/object", f"/buckets/{bucket}/o")
        ),
        *("GET /dir/status", "GET /dir/assign", "GET /vol/status", "POST /submit", "GET /?pretty=y", "GET /status"),
        *("GET /api/volumes", "GET /maintenance", "POST /?Action=ListUsers&Version=2010-05-08", "GET /metrics"),
    ]
    request = {
        "ports": listening_ports(s3_server),
        "requests": requests,
        "sockets": [str(path) for port in s3_server.ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")],
        "file": str(s3_server.folder / "server.json"),
    }
    other_user = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    # Another user may have no permission to run the tests' own Python.
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    done = subprocess.run(
        [python, "-c", STRANGER], input=json.dumps(request), capture_output=True, text=True, cwd="/", **other_user
    )
    assert done.returncode == 0, done.stderr
    assert s3_server.client().get_object(Bucket=bucket, Key="object")["Body"].read() == b"a secret" * 10
    return [tuple(answer) for answer in json.loads(done.stdout)]


def test_server_listens_only_on_known_ports_of_127_0_0_1(s3_server: S3Server) -> None:
    wait_for_all_ports(s3_server)
    assert sorted(listening_ports(s3_server)) == sorted(s3_server.ports)


def test_only_the_s3_port_answers_a_stranger(s3_server: S3Server, answers: list[tuple[Any, str, bool, str]]) -> None:
    s3 = int(s3_server.endpoint_url.rpartition(":")[2])
    refusals = ("error ", "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server")
    accepted = [
        (place, request, answer)
        for place, request, _, answer in answers
        if place not in (s3, "files") and answer and not answer.startswith(refusals)
    ]
    assert [one for one in accepted if not is_tls_alert(one[2])] == []
    assert len({place for place, *_ in answers if isinstance(place, int)}) == len(s3_server.ports)


def test_s3_refuses_everything_without_credentials(
    s3_server: S3Server, answers: list[tuple[Any, str, bool, str]]
) -> None:
    s3 = int(s3_server.endpoint_url.rpartition(":")[2])
    plain = [(request, answer) for place, request, tls, answer in answers if place == s3 and not tls]
    status_lines = {request: answer.partition("\r\n")[0] for request, answer in plain if answer}
    # GET /status is allowed: its answer is empty.
    codes = {int(line.split()[1]) for request, line in status_lines.items() if request != "GET /status"}
    assert codes <= {400, 403, 404, 405}, status_lines
    assert status_lines["GET /private/object"] == status_lines["PUT /private/object"] == "HTTP/1.1 403 Forbidden"
    assert status_lines["DELETE /private/object"] == status_lines["GET /private"] == "HTTP/1.1 403 Forbidden"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")
def test_another_user_can_open_neither_sockets_nor_files(answers: list[tuple[Any, str, bool, str]]) -> None:
    local = {str(place): answer for place, _, _, answer in answers if not isinstance(place, int)}
    assert len(local) > 5
    assert [place for place, answer in local.items() if "Permission denied" not in answer] == []


def test_damaged_server_json_is_refused(tmp_path: Path) -> None:
    for content in (
        b"",
        b"[]",
        b'{"access_key": 1}',
        b"[" * 100_000,
        b"\xff",
        b'{"access_key":"a","secret_key":"b","ports":{}}',
    ):
        (tmp_path / "server.json").write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            S3Server(tmp_path)


def is_tls_alert(answer: str) -> bool:
    return answer.startswith("\x15\x03")


def listening_ports(server: S3Server) -> list[int]:
    connections = psutil.Process(server.pid).net_connections("tcp")
    addresses = [connection.laddr for connection in connections if connection.status == psutil.CONN_LISTEN]
    assert {address.ip for address in addresses} == {"127.0.0.1"}
    return [address.port for address in addresses]


def wait_for_all_ports(server: S3Server) -> None:
    deadline = time.monotonic() + 60
    # The admin service opens its ports after the S3 port answers.
    while len(listening_ports(server)) < len(server.ports):
        assert time.monotonic() < deadline, listening_ports(server)
        time.sleep(0.1)


def test_other_users_cannot_read_the_credentials(s3_server: S3Server) -> None:
    secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"]
    files = [path for path in s3_server.folder.glob("*.*") if secret in path.read_text(errors="replace")]
    assert sorted(path.name for path in files) == ["s3.json", "server.json"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)


def test_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    server = S3Server(tmp_path)
    (tmp_path / "data").rmdir()
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(RuntimeError, match=r"did not start [\s\S]* its log ends with:\n.*data"):
        server.start()
    server.stop()


def test_stopped_server_leaves_nothing_behind() -> None:
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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
def test_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_running(pid)
        owner.kill()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    S3Server(tmp_path).stop()  # removes the sockets that the killed server left behind


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
