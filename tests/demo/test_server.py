"""The demonstration's S3 server: its own credentials and ports, data that outlives it, nothing left running."""

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
        with pytest.raises(UserError, match="does another server run"):
            S3Server(tmp_path).start()
    with S3Server(tmp_path) as second:
        assert second.environment == first.environment
        answer = second.client().get_object(Bucket="bucket", Key="object")
        assert answer["Body"].read() == b"x" * 1_000_000


# Another user of the machine, who has no keys: what each port and socket answers to all that can be tried.
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

asked = json.load(sys.stdin)
answers = []
for port in asked["ports"]:
    rest = "HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"
    messages = [f"{request} {rest}".encode() for request in asked["requests"]]
    messages.append(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)[:3] + b"\x04" + bytes(5))  # gRPC is HTTP/2
    for message in messages:
        for tls in (False, True):
            answers.append((port, message.split(b" HTTP")[0].decode(), tls, send(port, message, tls)))
for path in asked["sockets"]:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        answers.append((path, "", False, "connected"))
    except OSError as error:
        answers.append((path, "", False, f"error {error!r}"))
try:
    answers.append(("files", "", False, open(asked["file"]).read()))
except OSError as error:
    answers.append(("files", "", False, f"error {error!r}"))
json.dump(answers, sys.stdout)
"""


@pytest.fixture(scope="module")
def answers(s3_server: S3Server) -> list[tuple[Any, str, bool, str]]:
    """What a stranger gets: where, the request, over TLS or not, and the answer."""
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
    asked = {
        "ports": listening_ports(s3_server),
        "requests": requests,
        "sockets": [str(path) for port in s3_server.ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")],
        "file": str(s3_server.folder / "server.json"),
    }
    somebody = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable  # the tests' own may be hidden from others
    asking = subprocess.run(
        [python, "-c", STRANGER], input=json.dumps(asked), capture_output=True, text=True, cwd="/", **somebody
    )
    assert asking.returncode == 0, asking.stderr
    assert s3_server.client().get_object(Bucket=bucket, Key="object")["Body"].read() == b"a secret" * 10
    return [tuple(answer) for answer in json.loads(asking.stdout)]


def test_every_port_is_bound_to_this_machine_and_known(s3_server: S3Server) -> None:
    wait_for_all_ports(s3_server)
    assert sorted(listening_ports(s3_server)) == sorted(s3_server.ports)


def test_no_port_but_s3_answers_a_stranger(s3_server: S3Server, answers: list[tuple[Any, str, bool, str]]) -> None:
    s3 = int(s3_server.endpoint_url.rpartition(":")[2])
    refusals = ("error ", "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server")
    taken = [one for one in answers if one[0] not in (s3, "files") and one[3] and not one[3].startswith(refusals)]
    assert [one for one in taken if not is_tls_alert(one[3])] == []
    assert len({one[0] for one in answers if isinstance(one[0], int)}) == len(s3_server.ports)


def test_s3_refuses_everything_without_credentials(
    s3_server: S3Server, answers: list[tuple[Any, str, bool, str]]
) -> None:
    s3 = int(s3_server.endpoint_url.rpartition(":")[2])
    plain = [(request, answer) for place, request, tls, answer in answers if place == s3 and not tls]
    answered = {request: answer.partition("\r\n")[0] for request, answer in plain if answer}
    codes = {int(one.split()[1]) for request, one in answered.items() if request != "GET /status"}  # which is empty
    assert codes <= {400, 403, 404, 405}, answered
    assert answered["GET /private/object"] == answered["PUT /private/object"] == "HTTP/1.1 403 Forbidden"
    assert answered["DELETE /private/object"] == answered["GET /private"] == "HTTP/1.1 403 Forbidden"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can try as another user")
def test_another_user_reaches_neither_its_sockets_nor_its_files(answers: list[tuple[Any, str, bool, str]]) -> None:
    local = {str(place): answer for place, _, _, answer in answers if not isinstance(place, int)}
    assert len(local) > 5
    assert [place for place, answer in local.items() if "Permission denied" not in answer] == []


def test_a_damaged_server_json_is_one_line(tmp_path: Path) -> None:
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
    found = [one.laddr for one in psutil.Process(server.pid).net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert {address.ip for address in found} == {"127.0.0.1"}
    return [address.port for address in found]


def wait_for_all_ports(server: S3Server) -> None:
    deadline = time.monotonic() + 60
    while len(listening_ports(server)) < len(server.ports):  # the admin's are opened after S3 answers
        assert time.monotonic() < deadline, listening_ports(server)
        time.sleep(0.1)


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
