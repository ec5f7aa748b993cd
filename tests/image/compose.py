"""Run launch/compose.yaml with the real Docker Compose on the stand-in engine, each time as a separate project.

A local image replaces SeaweedFS's image: it contains the same release of the program from the package index, busybox
(which Alpine, the base of the real image, also has), and the used branch of the real entrypoint. No Docker network is
created: the store has only its loopback device, which the job shares as in the real setup.
"""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from tests.image.stand_in import REPOSITORY, Engine

SPEC = REPOSITORY / "launch" / "compose.yaml"
COMPOSE = Path(os.environ.get("DOCKER_COMPOSE", REPOSITORY / ".venv-compose" / "bin" / "docker-compose"))
_SECONDS = 300
_APPLETS = ("sh", "wget")


def header() -> dict[str, str]:
    """Return the commands in the header of launch/compose.yaml by their label, such as Apply."""
    text = re.sub(r"\\\n# +", " ", SPEC.read_text(encoding="utf-8"))
    return dict(re.findall(r"^#   (\w[\w ]*?)  +(\S.*?)(?:   .*)?$", text, re.MULTILINE))


class Project:
    """A copy of launch/compose.yaml with its own configs/ folder and a unique project name."""

    def __init__(self, folder: Path, docker: Engine, image: str) -> None:
        self.folder, self.docker = folder, docker
        self.name = f"wikillm-{secrets.token_hex(4)}"
        # Each project has its own image name: Compose recreates containers when their image name means another image.
        self._image = f"{self.name}:tried"
        docker("tag", image, self._image)
        self.configs = folder / "configs"
        self.configs.mkdir(mode=0o755)
        (folder / "launch").mkdir()
        shutil.copy(SPEC, folder / "launch" / "compose.yaml")
        store = yaml.safe_load(SPEC.read_text(encoding="utf-8"))["services"]["store"]["image"]
        if docker("image", "inspect", store, check=False).returncode:
            _import_store(docker, folder / "store", store)
        changes = {
            "store": "network_mode: none",
            "prepare": f"image: {self._image}",
            # This machine has no GPU.
            "train": f"image: {self._image}\n    deploy: !reset null",
        }
        services = "".join(f"  {service}:\n    {change}\n" for service, change in changes.items())
        (folder / "launch" / "here.yaml").write_text(f"services:\n{services}", encoding="utf-8")
        files = ["--file=launch/compose.yaml", "--file=launch/here.yaml", f"--project-name={self.name}"]
        # A shell function that replaces the words `docker compose -f launch/compose.yaml`.
        self._docker = f'docker() {{ shift 3; command {shlex.join([str(COMPOSE), *files])} "$@"; }}'

    def remove(self) -> None:
        """Remove all containers, volumes and images of the project."""
        if (self.folder / "launch" / ".env").exists():  # Without this file nothing was started.
            self("down", "--volumes", "--timeout=0")
        self.docker("image", "rm", self._image)

    def __call__(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` with both files."""
        return self.shell(shlex.join(["docker", "compose", "-f", "launch/compose.yaml", *words]), check)

    def shell(self, command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command of the header unchanged, but for this project and with the changes for this machine."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{self._docker}\n{command}"],
            cwd=self.folder,
            env=os.environ | self.docker.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        if check and done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    @contextmanager
    def following(self, command: str) -> Iterator[IO[str]]:
        """Start a command of the header and give its output; the command is killed at the end of the block."""
        with subprocess.Popen(
            ["bash", "-euc", f"{self._docker.replace('command', 'exec')}\n{command}"],
            cwd=self.folder,
            env=os.environ | self.docker.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
            finally:
                process.kill()

    def state(self, service: str) -> dict[str, Any]:
        """Return the engine's description of a service's container."""
        container = self("ps", "--all", "--quiet", service).stdout.strip()
        state: dict[str, Any] = json.loads(self.docker("inspect", container).stdout)[0]
        return state


def _import_store(docker: Engine, root: Path, name: str) -> None:
    weed = shutil.which("weed", path=f"{REPOSITORY / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert weed is not None
    for folder in ("bin", "usr/bin", "data", "tmp", "etc"):
        (root / folder).mkdir(parents=True)
    shutil.copy(weed, root / "usr/bin/weed")
    subprocess.run(["apt-get", "-qq", "download", "busybox-static"], cwd=root, check=True)
    [package] = root.glob("busybox-static*.deb")
    subprocess.run(["dpkg-deb", "--extract", package, root / "busybox"], check=True)
    shutil.copy(root / "busybox/bin/busybox", root / "bin/busybox")
    shutil.rmtree(root / "busybox")
    package.unlink()
    for applet in _APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "entrypoint.sh").write_text("#!/bin/sh\nexec /usr/bin/weed $@\n")
    (root / "entrypoint.sh").chmod(0o755)
    changes = ('ENTRYPOINT ["/entrypoint.sh"]', "VOLUME /data", "WORKDIR /data", "ENV PATH=/usr/bin:/bin")
    with subprocess.Popen(["tar", "-c", "-C", root, "."], stdout=subprocess.PIPE) as files:
        docker("import", *(f"--change={change}" for change in changes), "-", name, stdin=files.stdout)
    assert files.returncode == 0
