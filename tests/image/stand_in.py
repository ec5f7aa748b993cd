"""A container engine and the image, on a bare Debian that reaches no registry.

A Debian made by debootstrap stands under the name of the image's base, and the build of torch that this machine's pip
finds stands for CUDA's, if it is another one. All else is real: the Dockerfile, `make build`, the locked hashes.
What has been made is kept in one folder, and the next start takes seconds.

    python -m tests.image.stand_in image          builds, and prints the image's name
    python -m tests.image.stand_in rootfs DIR     puts the image's files into a folder, for what runs without an engine
"""

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

REPOSITORY = Path(__file__).parent.parent.parent
FOLDER = Path(os.environ.get("WIKILLM_STAND_IN", "/var/tmp/wikillm-stand-in"))
SECRET = "this line reaches no layer of the image"
"""Stands in the certificate bundle that a build gets as a secret."""
_REFERENCE = {"REGISTRY": "stand-in.invalid", "IMAGE": "wikillm", "TAG": "local"}
_WHEELS = "stand-in.invalid/wheels"
_START_SECONDS = 60
_STOP_SECONDS = 30


class Engine:
    """The Docker command on a daemon of ours; called with words, it runs them and must succeed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = f"unix://{folder / 'docker.sock'}"
        self.command = ["/usr/bin/docker", "--host", self.host]
        # The machine's own Docker client, if any, may be one without BuildKit.
        self.environment = {"DOCKER_HOST": self.host, "ENGINE": self.command[0]}

    def __call__(
        self, *words: str, check: bool = True, timeout: float = 300, stdin: IO[bytes] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.command, *words], stdin=stdin or subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode:
            raise RuntimeError(f"docker {' '.join(words)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def make(self, target: str, **variables: str) -> str:
        """What a target of the image's prints on standard output, on this engine."""
        return subprocess.run(
            [REPOSITORY / "launch/image.sh", target],
            env=os.environ | self.environment | {"ALLOW_DIRTY": "1"} | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout


@contextmanager
def engine(folder: Path = FOLDER) -> Iterator[Engine]:
    """A Docker daemon on a folder of its own, shared by all who hold it; the last one stops it."""
    install("docker.io", "debootstrap")
    folder.mkdir(parents=True, exist_ok=True)
    docker = Engine(folder)
    with (folder / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            with _alone(folder / "start"):
                if docker("version", check=False).returncode:
                    _start(docker)
            yield docker
        finally:
            with _alone(folder / "start"):
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass
                else:
                    _stop(folder)


def build_image(docker: Engine, **variables: str) -> str:
    """Builds the image as `make build` does, and returns its name; without a change that takes seconds.

    Args:
        variables: those of launch/image.sh.
    """
    base = import_base(docker)
    with _alone(docker.folder / "build"):
        wheels = _import_wheels(docker)
        bundle = _certificates(docker.folder / "certificates.pem")
        variables = {
            **_REFERENCE,
            "CA_BUNDLE": str(bundle),
            "BUILD_ARGS": f"--network=host --build-arg=BASE_IMAGE={base} --build-arg=WHEELS={wheels}"
            " --build-arg=LOCK=/wheels/requirements.lock",
            **variables,
        }
        print(docker.make("build", **variables), end="", file=sys.stderr)
    return docker.make("print", **variables).strip()


def import_base(docker: Engine) -> str:
    """The name of the image's base, under which a Debian stands from now on."""
    with _alone(docker.folder / "build"):
        base, _, _ = _build_argument("BASE_IMAGE").partition("@")
        if docker("image", "inspect", base, check=False).returncode:
            _import_base(docker, base)
    return base


def export_rootfs(folder: Path) -> Path:
    """The image's files in a folder, which is made, or made anew if it holds those of another image."""
    written = folder.with_name(f"{folder.name}.image-id")
    with engine() as docker:
        image = build_image(docker)
        number = docker("image", "inspect", "--format={{.Id}}", image).stdout.strip()
        if not (written.exists() and written.read_text() == number):
            written.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            container = docker("create", image).stdout.strip()
            try:
                with subprocess.Popen([*docker.command, "export", container], stdout=subprocess.PIPE) as files:
                    subprocess.run(["tar", "-x", "-C", folder], stdin=files.stdout, check=True)
                if files.returncode:
                    raise RuntimeError(f"docker export ended with {files.returncode}")
            finally:
                docker("rm", "--volumes", container)
            written.write_text(number)
    return folder


def install(*packages: str) -> None:
    """Debian's packages, those that are missing; none of their services is started."""
    query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n", *packages]
    present = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    missing = [package for package in packages if f"{package} installed" not in present]
    if not missing:
        return
    policy = Path("/usr/sbin/policy-rc.d")
    with ExitStack() as after:
        if not policy.exists():
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
            after.callback(policy.unlink)
        get = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0"]
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*get, "update"], env=quiet, stdout=subprocess.DEVNULL, check=True)
        command = [*get, "install", "--yes", "--no-install-recommends", *missing]
        subprocess.run(command, env=quiet, stdout=subprocess.DEVNULL, check=True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(docker: Engine) -> None:
    folder = docker.folder
    command = ["/usr/sbin/dockerd", f"--host={docker.host}", f"--pidfile={folder / 'dockerd.pid'}"]
    command += [f"--data-root={folder / 'data'}", f"--exec-root={folder / 'exec'}", "--storage-driver=overlay2"]
    # It changes nothing of the machine's network, so containers use that of the machine.
    command += ["--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false", "--bridge=none"]
    (folder / "dockerd.pid").unlink(missing_ok=True)
    with (folder / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    deadline = time.monotonic() + _START_SECONDS
    while docker("version", check=False).returncode:
        if daemon.poll() is not None or time.monotonic() > deadline:
            daemon.kill()
            raise RuntimeError(f"dockerd did not start:\n{(folder / 'dockerd.log').read_text()[-2000:]}")
        time.sleep(0.1)


def _stop(folder: Path) -> None:
    """Ends the daemon by its id, and with it containerd and what containers there are; nothing stays mounted."""
    if not (folder / "dockerd.pid").exists():
        return
    pid = int((folder / "dockerd.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while (folder / "dockerd.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    # A child of this process stays until it is collected; of another process, it does not concern us.
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in mounted[::-1]:
        if path.startswith(f"{folder}/"):
            subprocess.run(["umount", path], check=True)


def _build_argument(name: str) -> str:
    found = re.search(rf"^ARG {name}=(\S+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None, f"the Dockerfile has no ARG {name} with a default"
    return found[1]


def _import_base(docker: Engine, name: str) -> None:
    """A minimal Debian of this machine's release, from the mirror that its apt uses."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    targets = ["apt-get", "indextargets", "--format=$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    lines = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.splitlines()
    codename = release["VERSION_CODENAME"].strip('"')
    mirror = next(line.split()[2] for line in lines if line.startswith(f"{codename} main "))
    root = docker.folder / "base"
    shutil.rmtree(root, ignore_errors=True)
    words = ["--variant=minbase", "--include=ca-certificates", codename, str(root), mirror]
    subprocess.run(["debootstrap", *words], stdout=subprocess.DEVNULL, check=True)
    for needless in (root / "var/cache/apt/archives").glob("*.deb"):
        needless.unlink()
    _import(docker, root, name)
    shutil.rmtree(root)


def _import_wheels(docker: Engine) -> str:
    """An image that holds the lock for this machine's build of torch, and that wheel where no index has it."""
    lock = (REPOSITORY / "requirements-image.lock").read_text()
    wheel = _torch_wheel(docker.folder / "wheels", lock)
    root = docker.folder / "wheels-root"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    if "+cpu" in wheel.name:
        os.link(wheel, root / wheel.name)
        lock = _for_cpu(lock, wheel)
    (root / "requirements.lock").write_text(lock)
    name = f"{_WHEELS}:{hashlib.sha256((wheel.name + lock).encode()).hexdigest()[:16]}"
    if docker("image", "inspect", name, check=False).returncode:
        _import(docker, root, name)
    shutil.rmtree(root)
    return name


def _torch_wheel(folder: Path, lock: str) -> Path:
    """The wheel of torch that pip finds here for the locked version: CUDA's from the index, or one for CPUs."""
    version = re.search(r"^torch==(\S+)", lock, re.MULTILINE)
    assert version is not None
    beginning = f"torch-{version[1]}[+-]*.whl"
    if not list(folder.glob(beginning)):
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), f"torch=={version[1]}"]
        subprocess.run([sys.executable, *download], check=True)
    return next(folder.glob(beginning))


def _for_cpu(lock: str, wheel: Path) -> str:
    """The lock without CUDA's packages and with the one hash of this wheel; every other line stays."""
    kept = []
    for block in re.findall(r"^\S.*\n(?:[ \t]+.*\n)*", lock, re.MULTILINE):
        if block.startswith("torch=="):
            version, digest = wheel.name.split("-")[1], hashlib.sha256(wheel.read_bytes()).hexdigest()
            kept.append(f"torch=={version} --hash=sha256:{digest}\n")
        elif not block.startswith(("nvidia-", "cuda-", "triton==")) or block.startswith("nvidia-ml-py"):
            kept.append(block)
    return "".join(kept)


def _import(docker: Engine, root: Path, name: str) -> None:
    with subprocess.Popen(["tar", "-c", "--sort=name", "-C", root, "."], stdout=subprocess.PIPE) as files:
        docker("import", "-", name, stdin=files.stdout)
    assert files.returncode == 0


def _certificates(path: Path) -> Path:
    """What this machine trusts, with a line by which the bundle is known wherever it turns up."""
    own = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    path.write_text(f"{own.read_text()}\n# {SECRET}\n")
    return path


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["image"]:
            with engine() as started:
                print(build_image(started))
        case ["rootfs", target]:
            print(export_rootfs(Path(target).absolute()))
        case _:
            sys.exit(__doc__)
