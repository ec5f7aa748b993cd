"""Tests of launch/image.sh without an engine: names of images, and builds that are refused."""

import os
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from launch.set_image import IMAGE_PATTERNS

REPOSITORY = Path(__file__).parent.parent.parent
SPECS = tuple(IMAGE_PATTERNS)


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository with the script and some inputs of the image. Everything is committed."""
    copied = (
        "launch/image.sh",
        "launch/set_image.py",
        "launch/__init__.py",
        *SPECS,
        ".dockerignore",
        "job/__init__.py",
    )
    for name in copied:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    for name in ("job/cli.py", "job/data/order.py", "configs/demo.yaml", "README.md", "Dockerfile", "LICENSE"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=first")
    return tmp_path


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for a container engine that builds nothing and records the arguments of `build` and `run`."""
    program = tmp_path_factory.mktemp("engine") / "docker"
    program.write_text("""#!/bin/sh
        [ "$1" != build ] || printf '%s\\n' "$@" >"$0.words"
        [ "$1" != run ] || printf '%s\\n' "$@" >"$0.words"
        [ "$1" != image ] || echo 1000000000
    """)
    program.chmod(0o755)
    return program


def recorded_words(engine: Path) -> list[str]:
    return engine.with_name("docker.words").read_text().splitlines()


def script(checkout: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    ours = ("CUDA", "REGISTRY", "IMAGE", "TAG", "ENGINE", "ALLOW_DIRTY", "REFERENCE", "REVISION", "BUILD_ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
    return subprocess.run([checkout / "launch/image.sh", command], env=environment, capture_output=True, text=True)


def test_image_is_named_after_its_git_revision(checkout: Path) -> None:
    revision = git(checkout, "rev-parse", "HEAD")
    assert script(checkout, "print").stdout == f"registry.example.com/wikillm:{revision[:12]}\n"
    named = script(checkout, "print", REGISTRY="ghcr.io/us", IMAGE="lm", TAG="v1")
    assert named.stdout == "ghcr.io/us/lm:v1\n"


@pytest.mark.parametrize("command", ["print", "build", "push", "run", "sbom"])
@pytest.mark.parametrize(
    "change",
    [
        *("launch/image.sh", "Dockerfile", ".dockerignore", "LICENSE", "configs/demo.yaml", "job/cli.py"),
        *("job/new.py", "job/a/b/new.py", "job/单.py", "job/ignored.py"),
    ],
)
def test_uncommitted_change_in_the_image_is_refused_and_named(checkout: Path, change: str, command: str) -> None:
    (checkout / ".git/info/exclude").write_text("ignored.py\n")
    (checkout / change).parent.mkdir(parents=True, exist_ok=True)
    with (checkout / change).open("a") as file:
        file.write("# changed\n")
    refused = script(checkout, command, ENGINE="true")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == f"not committed, but part of the image: {change}: commit them, or set ALLOW_DIRTY=1\n"


def test_uncommitted_settings_listed_in_dockerignore_are_refused(checkout: Path) -> None:
    with (checkout / ".dockerignore").open("a") as file:
        file.write("!configs/mine.yaml\n")
    git(checkout, "commit", "--quiet", "--all", "--message=mine")
    (checkout / "configs/mine.yaml").touch()
    assert "part of the image: configs/mine.yaml: commit" in script(checkout, "print").stderr


def test_nested_repository_below_job_is_refused(checkout: Path) -> None:
    (checkout / "job/other").mkdir()
    (checkout / "job/other/code.py").touch()
    git(checkout / "job/other", "init", "--quiet")
    assert "part of the image: job/other/: commit" in script(checkout, "print").stderr


def test_only_three_of_many_changes_are_named(checkout: Path) -> None:
    for number in range(5):
        (checkout / f"job/new{number}.py").touch()
    error = script(checkout, "print").stderr
    assert "the image: job/new0.py job/new1.py job/new2.py and 2 more: commit" in error


def test_change_outside_the_image_does_not_stop_a_build(checkout: Path, engine: Path) -> None:
    (checkout / "README.md").write_text("changed\n")
    for name in ("notes.txt", "job/.ipynb_checkpoints/cli.py", "job/__pycache__/cli.py", "job/notes.txt", "data/x.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    built = script(checkout, "build", ENGINE=str(engine))
    assert (built.returncode, built.stderr) == (0, "")
    assert f"REVISION={git(checkout, 'rev-parse', 'HEAD')}" in recorded_words(engine)


def test_own_settings_do_not_stop_a_build_and_are_reported(checkout: Path, engine: Path) -> None:
    for name in ("mine", "ours"):
        (checkout / f"configs/{name}.yaml").write_text("run: {}\n")
    git(checkout, "add", "configs/ours.yaml")
    git(checkout, "commit", "--quiet", "--message=ours")
    built = script(checkout, "build", ENGINE=str(engine))
    assert built.returncode == 0
    assert built.stderr == (
        "not in the image: configs/mine.yaml configs/ours.yaml: .dockerignore does not list them; "
        "they are mounted when it runs\n"
    )
    assert f"REVISION={git(checkout, 'rev-parse', 'HEAD')}" in recorded_words(engine)
    script(checkout, "run", ENGINE=str(engine))
    assert f"{checkout}/configs:/app/configs:ro,z" in recorded_words(engine)


# ---- CUDA 12 ----


def commit_lock(checkout: Path, content: str) -> None:
    (checkout / "requirements-image.lock").write_text(content)
    git(checkout, "add", "requirements-image.lock")
    git(checkout, "commit", "--quiet", "--message=lock")


@pytest.mark.parametrize("cuda", [None, "13"])
def test_cuda_13_is_what_the_dockerfile_says(checkout: Path, engine: Path, cuda: str | None) -> None:
    assert script(checkout, "build", ENGINE=str(engine), **({"CUDA": cuda} if cuda else {})).returncode == 0
    assert not [word for word in recorded_words(engine) if word.startswith(("BASE_IMAGE=", "TORCH"))]


def test_cuda_12_takes_another_base_and_build_of_torch(checkout: Path, engine: Path) -> None:
    commit_lock(checkout, "# made\ntorch==9.8.7 \\\n    --hash=sha256:0\ntorchx==1\n")
    built = script(
        checkout, "build", ENGINE=str(engine), CUDA="12", BUILD_ARGS="--build-arg=TORCH_INDEX=https://mirror/"
    )
    assert (built.returncode, built.stderr) == (0, "")
    words = recorded_words(engine)
    assert "BASE_IMAGE=nvidia/cuda:12.6.3-base-ubuntu24.04" in words
    assert "TORCH=torch==9.8.7+cu126" in words
    default = words.index("TORCH_INDEX=https://download.pytorch.org/whl/cu126")
    assert default < words.index("--build-arg=TORCH_INDEX=https://mirror/"), "the last one counts"


def test_image_of_cuda_12_has_a_name_of_its_own(checkout: Path) -> None:
    revision = git(checkout, "rev-parse", "HEAD")
    assert script(checkout, "print", CUDA="12").stdout == f"registry.example.com/wikillm:{revision[:12]}-cu126\n"
    assert script(checkout, "print", CUDA="12", TAG="v1").stdout == "registry.example.com/wikillm:v1\n"


def test_cuda_12_without_a_torch_in_the_lock_is_refused(checkout: Path, engine: Path) -> None:
    commit_lock(checkout, "numpy==2.5.2\n")
    refused = script(checkout, "build", ENGINE=str(engine), CUDA="12")
    assert (refused.returncode, refused.stderr) == (2, "requirements-image.lock: has no line torch==...\n")


@pytest.mark.parametrize("cuda", ["11", "12.6", "twelve"])
def test_unknown_cuda_is_refused(checkout: Path, cuda: str) -> None:
    refused = script(checkout, "print", CUDA=cuda)
    expected = f"CUDA: '{cuda}': expected 13, or 12 for drivers below 580 and for V100\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", expected)


def test_presets_in_the_image_are_those_in_git() -> None:
    named = [
        line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!configs")
    ]
    assert named == git(REPOSITORY, "ls-files", "configs").splitlines()


def test_set_image_does_not_stop_the_next_build(checkout: Path, engine: Path) -> None:
    image = f"registry.internal/wikillm@sha256:{'ab' * 32}"
    subprocess.run([sys.executable, "-m", "launch.set_image", image], cwd=checkout, check=True, capture_output=True)
    changed = git(checkout, "status", "--porcelain", "--untracked-files=no").splitlines()
    assert len(changed) == len(SPECS), "all specs have changed"
    built = script(checkout, "build", ENGINE=str(engine))
    assert (built.returncode, built.stderr) == (0, "")
    revision = git(checkout, "rev-parse", "HEAD")
    words = recorded_words(engine)
    assert f"REVISION={revision}" in words and f"registry.example.com/wikillm:{revision[:12]}" in words


def test_allowed_uncommitted_changes_show_in_the_tag(checkout: Path) -> None:
    (checkout / "job/new.py").touch()
    name = script(checkout, "print", ALLOW_DIRTY="1").stdout
    assert name == f"registry.example.com/wikillm:{git(checkout, 'rev-parse', 'HEAD')[:12]}-dirty\n"


def test_missing_engine_is_one_line(checkout: Path) -> None:
    refused = script(checkout, "build", ENGINE="false")
    assert (refused.returncode, refused.stderr) == (
        2,
        "ENGINE: no answer from false: check that it is installed and that its daemon runs\n",
    )


# ---- Sources without git, such as an unpacked zip file ----


@pytest.fixture
def source(checkout: Path) -> Path:
    """A source that is unpacked inside another git repository, whose revision must not be used."""
    folder = checkout / "unpacked"
    for name in ("launch/image.sh", ".dockerignore", "job/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, folder / name)
    return folder


@pytest.mark.parametrize(("command", "target"), [("build", "build"), ("print", "print-image"), ("push", "push")])
def test_source_without_git_requires_a_revision(source: Path, command: str, target: str) -> None:
    refused = script(source, command, ENGINE="true")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.endswith(f"REVISION=v1.0 make {target}\n")


@pytest.mark.parametrize(
    ("revision", "tag"), [("v1.0", "v1.0"), ("release-2026-11-28", "release-2026-11-28"), ("0f" * 20, "0f" * 6)]
)
def test_source_without_git_is_built_with_the_given_revision(
    source: Path, engine: Path, revision: str, tag: str
) -> None:
    built = script(source, "build", ENGINE=str(engine), REVISION=revision)
    assert (built.returncode, built.stderr) == (0, "")
    words = recorded_words(engine)
    assert f"REVISION={revision}" in words and f"registry.example.com/wikillm:{tag}" in words
    assert "SOURCE=unpublished" in words
    [created] = [word for word in words if word.startswith("CREATED=")]
    assert datetime.fromisoformat(created.removeprefix("CREATED=")).tzinfo is not None


@pytest.mark.parametrize("revision", ["a tag", "a/b", "-x", "x" * 129])
def test_revision_that_is_not_a_valid_tag_is_refused(source: Path, revision: str) -> None:
    refused = script(source, "print", REVISION=revision)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith(f"REVISION: '{revision}': expected ")


def test_revision_that_is_not_checked_out_is_refused(checkout: Path) -> None:
    refused = script(checkout, "print", REVISION="v1.0")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    assert refused.stderr.startswith("REVISION: v1.0 is not the commit checked out here")
    assert script(checkout, "print", REVISION="HEAD").returncode == 0


def test_build_argument_with_a_password_is_refused(checkout: Path) -> None:
    address = "https://bob:planted@example.com/simple"
    refused = script(checkout, "build", ENGINE="true", BUILD_ARGS=f"--no-cache --build-arg=INDEX_URL={address}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert (
        refused.stderr.startswith("BUILD_ARGS: contains a user or password in a URL")
        and "planted" not in refused.stderr
    )
