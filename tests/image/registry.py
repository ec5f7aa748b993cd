"""A real, empty container registry (Debian's docker-registry) on this machine."""

import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType

from tests.image.stand_in import install

_START_SECONDS = 30
_MANIFESTS = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"


class Registry:
    """The server, running inside a `with` block on a free port."""

    def __init__(self, folder: Path) -> None:
        install("docker-registry")
        self._log = folder / "registry.log"
        settings = {
            "version": 0.1,
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
            "http": {"addr": "127.0.0.1:0"},
        }
        self._settings = folder / "registry.yml"
        self._settings.write_text(json.dumps(settings))

    def __enter__(self) -> "Registry":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", self._settings], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_SECONDS
        while (match := re.search(r"listening on (127\.0\.0\.1:\d+)", self._log.read_text())) is None:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._process.kill()
                raise RuntimeError(f"docker-registry did not start:\n{self._log.read_text()}")
            time.sleep(0.05)
        self.address = match[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def digest(self, name: str, tag: str) -> str:
        """Return the digest to which the registry resolves the tag."""
        url = f"http://{self.address}/v2/{name}/manifests/{tag}"
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD", headers={"Accept": _MANIFESTS})
        ) as answer:
            return answer.headers["Docker-Content-Digest"]
