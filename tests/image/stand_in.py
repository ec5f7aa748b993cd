"""Start a container engine and build the image on a bare Debian machine that reaches no registry.

A Debian made by debootstrap replaces the base image, and the torch build that this machine's pip finds replaces the
CUDA build if it differs. Everything else is real: the Dockerfile, `make build` and the locked hashes. All results are
kept in one folder, so that the next start takes seconds.

    python -m tests.image.stand_in image          build the image and print its name
    python -m tests.image.stand_in rootfs DIR     write the image's files into a folder, for runs without an engine
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
"""Line in the certificate bundle that a build gets as a secret."""
_REFERENCE = {"REGISTRY": "stand-in.invalid", "IMAGE": "wikillm", "TAG": "local"}
_WHEELS = "stand-in.invalid/wheels"
_START_SECONDS = 60
_STOP_SECONDS = 30


class Engine:
    """The Docker client for our own daemon. Calling it runs a docker command, which must succeed unless check=False."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = f"unix://{folder / 'docker.sock'}"
        self.command = ["/usr/bin/docker", "--host", self.host]
        # Another Docker client on this machine may lack BuildKit.
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
        """Run a command of launch/image.sh on this engine and return its standard output."""
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
    """Give a Docker daemon with its own folder. All users of the folder share it, and the last one stops it."""
    install("docker.io", "debootstrap")
    folder.mkdir(parents=True, exist_ok=True)
    docker = Engine(folder)
    with (folder / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        try:
            with _locked(folder / "start"):
                if docker("version", check=False).returncode:
                    _start(docker)
            yield docker
        finally:
            with _locked(folder / "start"):
                try:
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    pass
                else:
                    _stop(folder)


def build_image(docker: Engine, **variables: str) -> str:
    """Build the image as `make build` does and return its name. Without changes this takes seconds.

    Args:
        variables: variables of launch/image.sh.
    """
    base = import_base(docker)
    with _locked(docker.folder / "build"):
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
    """Create the stand-in for the base image if needed, and return the base's name."""
    with _locked(docker.folder / "build"):
        base, _, _ = _build_argument("BASE_IMAGE").partition("@")
        if docker("image", "inspect", base, check=False).returncode:
            _import_base(docker, base)
    return base


def export_rootfs(folder: Path) -> Path:
    """Write the image's files into a folder, unless it has the files of this image already; return the folder."""
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
    """Install missing Debian packages without starting their services."""
    with _locked(Path("/var/lock/wikillm-apt")):  # apt's own lock timeout does not cover `update`.
        _install(*packages)


def _install(*packages: str) -> None:
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
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _start(docker: Engine) -> None:
    folder = docker.folder
    command = ["/usr/sbin/dockerd", f"--host={docker.host}", f"--pidfile={folder / 'dockerd.pid'}"]
    command += [f"--data-root={folder / 'data'}", f"--exec-root={folder / 'exec'}", "--storage-driver=overlay2"]
    # The daemon does not change the machine's network, so containers use the machine's network.
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
    """Stop the daemon by its process id, with containerd and all containers, and unmount everything in the folder."""
    if not (folder / "dockerd.pid").exists():
        return
    pid = int((folder / "dockerd.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_SECONDS
    while (folder / "dockerd.pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    # If the daemon is a child of this process, collect its exit status. Otherwise its parent does.
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for path in mounted[::-1]:
        if path.startswith(f"{folder}/"):
            subprocess.run(["umount", path], check=True)


def _build_argument(name: str) -> str:
    match = re.search(rf"^ARG {name}=(\S+)$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    assert match is not None, f"the Dockerfile has no ARG {name} with a default"
    return match[1]


def _import_base(docker: Engine, name: str) -> None:
    """Import a minimal Debian of this machine's release, from the mirror that its apt uses."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    targets = ["apt-get", "indextargets", "--format=$(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    lines = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.splitlines()
    codename = release["VERSION_CODENAME"].strip('"')
    mirror = next(line.split()[2] for line in lines if line.startswith(f"{codename} main "))
    root = docker.folder / "base"
    shutil.rmtree(root, ignore_errors=True)
    words = ["--variant=minbase", "--include=ca-certificates", codename, str(root), mirror]
    subprocess.run(["debootstrap", *words], stdout=subprocess.DEVNULL, check=True)
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        package.unlink()
    _import(docker, root, name)
    shutil.rmtree(root)


def _import_wheels(docker: Engine) -> str:
    """Create an image with the lock file for this machine's torch build, and its wheel if no index has it."""
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
    """Return the torch wheel that pip finds here for the locked version: the CUDA build or a CPU build."""
    version = re.search(r"^torch==(\S+)", lock, re.MULTILINE)
    assert version is not None
    pattern = f"torch-{version[1]}[+-]*.whl"
    if not list(folder.glob(pattern)):
        download = ["-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), f"torch=={version[1]}"]
        subprocess.run([sys.executable, *download], check=True)
    return next(folder.glob(pattern))


def _for_cpu(lock: str, wheel: Path) -> str:
    """Return the lock file without the CUDA packages, and with only this wheel's hash for torch."""
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
    """Write this machine's certificates with the line SECRET, by which the tests recognize the bundle."""
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
