"""What a build takes from elsewhere than the package index: the distribution's archive, its mirrors, and EFA."""

import os
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
    """A folder of apt's sources, and an apt-get that gets nothing."""
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
def test_the_sources_of_ubuntu_name_the_mirror_alone(folder: Path, mirror: str) -> None:
    sources = folder / "sources.list.d/ubuntu.sources"
    archives = {"archive": "http://archive.ubuntu.com/ubuntu/", "security": "http://security.ubuntu.com/ubuntu/"}
    sources.write_text(UBUNTU.format(**archives))
    run_apt(folder, mirror)
    address = mirror.removesuffix("/")
    assert sources.read_text() == UBUNTU.format(archive=address, security=address)
    assert not (folder / "sources.list.d/cuda-ubuntu2404-x86_64.list").exists()
    run_apt(folder, mirror)  # the second stage does it again
    assert sources.read_text() == UBUNTU.format(archive=address, security=address)


def test_the_sources_of_debian_name_the_mirror_alone(folder: Path) -> None:
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


def test_without_a_mirror_the_sources_stay(folder: Path) -> None:
    (folder / "sources.list").write_text("deb http://deb.debian.org/debian bookworm main\n")
    for mirror in (None, ""):
        refused = run_apt(folder, mirror)
        assert (folder / "sources.list").read_text() == "deb http://deb.debian.org/debian bookworm main\n"
        assert refused.returncode == 1
        assert "the archive of the base does not give its lists of packages" in refused.stderr.splitlines()[-1]


def test_a_source_that_is_no_archive_of_the_distribution_is_named(folder: Path) -> None:
    (folder / "sources.list.d/other.list").write_text("deb https://packages.example.com/tools stable main\n")
    refused = run_apt(folder, f"{MIRROR}/ubuntu")
    assert refused.returncode == 1
    assert "other.list names https://packages.example.com/tools, which is no archive" in refused.stderr


@pytest.mark.parametrize(
    "mirror", ["mirrors.tuna.tsinghua.edu.cn/ubuntu", "ftp://x/ubuntu", "https://bob:planted@x/ubuntu", "http://x/a b"]
)
def test_what_is_no_address_of_a_mirror_is_refused(folder: Path, mirror: str) -> None:
    refused = run_apt(folder, mirror)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert refused.stderr.startswith("APT_MIRROR: ") and "planted" not in refused.stderr


def test_efa_is_left_out_unless_it_is_asked_for() -> None:
    done = subprocess.run(["sh", REPOSITORY / "launch/efa.sh", ""], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_installer_of_efa_that_cannot_be_fetched_ends_the_build_with_one_line() -> None:
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


# ---- In a build ----


@pytest.mark.image
@pytest.mark.timeout(900)
def test_both_stages_take_their_packages_from_the_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_BUILDKIT", "1")
    context, image = tmp_path / "context", "stand-in.invalid/packages"
    with engine() as docker, Mirror.of_debian() as mirror:
        base = import_base(docker)
        for name in (".dockerignore", "Dockerfile", "LICENSE", "requirements-image.lock", "launch", "configs", "job"):
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            copy(REPOSITORY / name, context / name)
        # The builder ends where its packages are there; the index is no matter of this test.
        dockerfile = (context / "Dockerfile").read_text()
        [above, _] = dockerfile.split("# A certificate bundle and index credentials")
        (context / "Dockerfile").write_text(above)
        words = ["build", "--network=host", "--no-cache", "--progress=plain", f"--build-arg=BASE_IMAGE={base}"]
        through = [f"--build-arg=APT_MIRROR={mirror.address}/debian", f"--tag={image}", str(context)]
        built = docker(*words, *through, timeout=600)
        asked = [path for path in mirror.asked if path.endswith(".deb")]
        assert any("/python3-venv_" in path for path in asked), built.stderr
        assert any("/libibverbs1_" in path for path in asked), built.stderr
        shown = docker("run", "--rm", "--network=host", image, "grep", "-rhE", "^(deb|URIs)", "/etc/apt").stdout
        docker("image", "rm", image)
        assert all(f"{mirror.address}/debian" in line for line in shown.splitlines()) and shown
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))  # and nobody answers there
            address = f"http://127.0.0.1:{listener.getsockname()[1]}/debian"
            failed = docker(*words, f"--build-arg=APT_MIRROR={address}", str(context), check=False, timeout=600)
    assert failed.returncode != 0
    assert f"apt: {address} does not give its lists of packages" in failed.stderr
