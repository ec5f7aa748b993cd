"""Tests of the packages that an image build installs from the distribution's archive, its mirrors, and Amazon (EFA)."""

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.image.mirror import Mirror
from tests.image.stand_in import REPOSITORY, engine, import_base

MIRROR = "http://mirrors.tuna.tsinghua.edu.cn"
UBUNTU = """\
# See https://help.ubuntu.com/community/UpgradeNotes: http://archive.ubuntu.com/ubuntu is the default.
Types: deb
URIs: {archive}
Suites: noble noble-updates noble-backports
Components: main universe restricted multiverse
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg

Types: deb
URIs: {security}
Suites: noble-security
Components: main universe restricted multiverse
Signed-By: /usr/share/keyrings/ubuntu-archive-keyring.gpg
"""
CUDA = "deb [signed-by=/usr/share/keyrings/cuda.gpg] https://developer.download.nvidia.com/compute/cuda/repos/ /\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with apt's sources, and a stand-in for apt-get that always fails."""
    (tmp_path / "apt/sources.list.d").mkdir(parents=True)
    (tmp_path / "apt/sources.list.d/cuda-ubuntu2404-x86_64.list").write_text(CUDA)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/apt-get").write_text("#!/bin/sh\necho apt-get \"$@\"\necho 'E: nothing answers' >&2\nexit 100\n")
    (tmp_path / "bin/apt-get").chmod(0o755)
    return tmp_path / "apt"


def run_apt(folder: Path, mirror: str | None) -> subprocess.CompletedProcess[str]:
    variables = {"APT_FOLDER": str(folder), "PATH": f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    if mirror is not None:
        variables["APT_MIRROR"] = mirror
    script = ["sh", REPOSITORY / "launch/apt.sh", "gcc"]
    return subprocess.run(script, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.parametrize("mirror", [f"{MIRROR}/ubuntu", f"{MIRROR}/ubuntu/", "https://mirror.internal:8443/ubuntu"])
def test_ubuntu_sources_use_only_the_mirror(folder: Path, mirror: str) -> None:
    sources = folder / "sources.list.d/ubuntu.sources"
    archives = {"archive": "http://archive.ubuntu.com/ubuntu/", "security": "http://security.ubuntu.com/ubuntu/"}
    sources.write_text(UBUNTU.format(**archives))
    run_apt(folder, mirror)
    address = mirror.removesuffix("/")
    assert sources.read_text() == UBUNTU.format(archive=address, security=address)
    assert not (folder / "sources.list.d/cuda-ubuntu2404-x86_64.list").exists()
    run_apt(folder, mirror)  # The second build stage runs the script again.
    assert sources.read_text() == UBUNTU.format(archive=address, security=address)


def test_debian_sources_use_only_the_mirror(folder: Path) -> None:
    (folder / "sources.list").write_text(
        "deb http://deb.debian.org/debian bookworm main\n"
        "deb [arch=amd64] https://deb.debian.org/debian/ bookworm-updates main\n"
        "deb http://security.debian.org/debian-security bookworm-security main\n"
    )
    run_apt(folder, f"{MIRROR}/debian")
    assert (folder / "sources.list").read_text() == (
        f"deb {MIRROR}/debian bookworm main\n"
        f"deb [arch=amd64] {MIRROR}/debian bookworm-updates main\n"
        f"deb {MIRROR}/debian-security bookworm-security main\n"
    )


def test_sources_do_not_change_without_a_mirror(folder: Path) -> None:
    (folder / "sources.list").write_text("deb http://deb.debian.org/debian bookworm main\n")
    for mirror in (None, ""):
        refused = run_apt(folder, mirror)
        assert (folder / "sources.list").read_text() == "deb http://deb.debian.org/debian bookworm main\n"
        assert refused.returncode == 1
        assert "cannot read the package lists of the archive of the base image" in refused.stderr.splitlines()[-1]


def test_source_that_is_not_of_the_distribution_is_named(folder: Path) -> None:
    (folder / "sources.list.d/other.list").write_text("deb https://packages.example.com/tools stable main\n")
    refused = run_apt(folder, f"{MIRROR}/ubuntu")
    assert refused.returncode == 1
    assert "other.list also uses https://packages.example.com/tools, which is not an archive" in refused.stderr


@pytest.mark.parametrize(
    "mirror", ["mirrors.tuna.tsinghua.edu.cn/ubuntu", "ftp://x/ubuntu", "https://bob:planted@x/ubuntu", "http://x/a b"]
)
def test_invalid_mirror_address_is_refused(folder: Path, mirror: str) -> None:
    refused = run_apt(folder, mirror)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("APT_MIRROR: ") and "planted" not in refused.stderr


def test_efa_is_installed_only_on_request() -> None:
    done = subprocess.run(["sh", REPOSITORY / "launch/efa.sh", ""], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_unreachable_efa_installer_is_one_line() -> None:
    with Mirror(None) as mirror:
        for address in (mirror.address, "http://127.0.0.1:1"):
            done = subprocess.run(
                ["sh", REPOSITORY / "launch/efa.sh", "1.2.3"],
                env=os.environ | {"EFA_FROM": address},
                capture_output=True,
                text=True,
            )
            assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
            assert done.stderr.startswith(f"EFA_VERSION: {address}/aws-efa-installer-1.2.3.tar.gz cannot be fetched (")


# ---- Python packages ----


@pytest.fixture
def uv(tmp_path: Path) -> Path:
    """A stand-in for uv that records its arguments, and the lock that it is given."""
    program = tmp_path / "uv"
    program.write_text("""#!/bin/sh
        echo "$@" >>"$0.calls"
        while [ $# -gt 0 ]; do [ "$1" != -r ] || cp "$2" "$0.lock"; shift; done
    """)
    program.chmod(0o755)
    return program


def run_install(uv: Path, lock: Path, *words: str) -> subprocess.CompletedProcess[str]:
    script = ["sh", REPOSITORY / "launch/install.sh", lock, *words]
    environment = os.environ | {"UV": str(uv), "INDEX_URL": "https://index/simple"}
    return subprocess.run(script, env=environment, capture_output=True, text=True)


def test_packages_of_the_lock_need_their_hashes(uv: Path) -> None:
    lock = REPOSITORY / "requirements-image.lock"
    assert run_install(uv, lock, "", "").returncode == 0
    install, check = uv.with_name("uv.calls").read_text().splitlines()
    assert "--no-deps --require-hashes" in install and "--index-url https://index/simple" in install
    assert check.startswith("pip check ")
    assert uv.with_name("uv.lock").read_text() == lock.read_text()


def test_another_torch_replaces_only_torch_and_its_cuda_packages(uv: Path) -> None:
    lock = REPOSITORY / "requirements-image.lock"
    assert run_install(uv, lock, "torch==2.13.0+cu126", "https://torch/cu126").returncode == 0
    of_lock, of_torch, _check = uv.with_name("uv.calls").read_text().splitlines()
    assert "--require-hashes" in of_lock
    assert "--index-url https://torch/cu126" in of_torch and of_torch.endswith(" torch==2.13.0+cu126")
    assert "--no-deps" not in of_torch
    before, after = (names_in(path) for path in (lock, uv.with_name("uv.lock")))
    assert after < before
    assert {"torch", "triton", "cuda-toolkit", "nvidia-cublas", "nvidia-nccl-cu13"} <= before - after
    assert all(name in ("torch", "triton") or name.startswith(("cuda-", "nvidia-")) for name in before - after)
    assert {"nvidia-ml-py", "deepspeed", "numpy"} <= after
    assert uv.with_name("uv.lock").read_text().count("--hash=") > len(after)


def names_in(lock: Path) -> set[str]:
    return set(re.findall(r"^([\w.-]+)==", lock.read_text(), re.MULTILINE))


def test_another_torch_needs_its_index(uv: Path) -> None:
    refused = run_install(uv, REPOSITORY / "requirements-image.lock", "torch==2.13.0+cu126", "")
    assert refused.returncode == 1
    expected = "TORCH_INDEX: not set, but TORCH is: give the package index that has torch==2.13.0+cu126\n"
    assert refused.stderr == expected
    assert not uv.with_name("uv.calls").exists()


# ---- In a real build ----


@pytest.mark.image
@pytest.mark.timeout(900)
def test_both_build_stages_use_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_BUILDKIT", "1")
    context, image = tmp_path / "context", "stand-in.invalid/packages"
    with engine() as docker, Mirror.of_debian() as mirror:
        base = import_base(docker)
        for name in (".dockerignore", "Dockerfile", "LICENSE", "requirements-image.lock", "launch", "configs", "job"):
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            copy(REPOSITORY / name, context / name)
        # Cut the builder stage after its system packages, because the package index does not matter for this test.
        dockerfile = (context / "Dockerfile").read_text()
        [above, _] = dockerfile.split("# A certificate bundle and index credentials")
        (context / "Dockerfile").write_text(above)
        words = ["build", "--network=host", "--no-cache", "--progress=plain", f"--build-arg=BASE_IMAGE={base}"]
        through = [f"--build-arg=APT_MIRROR={mirror.address}/debian", f"--tag={image}", str(context)]
        built = docker(*words, *through, timeout=600)
        packages = [path for path in mirror.requested if path.endswith(".deb")]
        assert any("/python3-venv_" in path for path in packages), built.stderr
        assert any("/libibverbs1_" in path for path in packages), built.stderr
        sources = docker("run", "--rm", "--network=host", image, "grep", "-rhE", "^(deb|URIs)", "/etc/apt").stdout
        docker("image", "rm", image)
        assert all(f"{mirror.address}/debian" in line for line in sources.splitlines()) and sources
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))  # The port is reserved, but nothing listens on it.
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/debian"
            failed = docker(*words, f"--build-arg=APT_MIRROR={address}", str(context), check=False, timeout=600)
    assert failed.returncode != 0
    assert f"apt: cannot read the package lists of {address}" in failed.stderr
