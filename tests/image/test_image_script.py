"""What the image is called, and when it is not built."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with the script, where everything is committed."""
    (tmp_path / "launch").mkdir()
    shutil.copy(REPOSITORY / "launch/image.sh", tmp_path / "launch")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=first")
    return tmp_path


def script(checkout: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    ours = ("REGISTRY", "IMAGE", "TAG", "ENGINE", "ALLOW_DIRTY", "REFERENCE")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
    return subprocess.run([checkout / "launch/image.sh", command], env=environment, capture_output=True, text=True)


def test_the_image_is_called_after_the_revision_it_is_built_from(checkout: Path) -> None:
    revision = git(checkout, "rev-parse", "HEAD")
    assert script(checkout, "print").stdout == f"registry.example.com/wikillm:{revision[:12]}\n"
    named = script(checkout, "print", REGISTRY="ghcr.io/us", IMAGE="lm", TAG="v1")
    assert named.stdout == "ghcr.io/us/lm:v1\n"


@pytest.mark.parametrize("command", ["print", "build", "push", "run", "sbom"])
@pytest.mark.parametrize("change", ["launch/image.sh", "job.py"])
def test_a_tree_with_changes_is_refused(checkout: Path, change: str, command: str) -> None:
    with (checkout / change).open("a") as file:
        file.write("# changed\n")
    refused = script(checkout, command, ENGINE="true")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "the tree has changes that are not committed: commit them, or say ALLOW_DIRTY=1\n"


def test_a_tree_with_changes_is_named_so_when_it_is_allowed(checkout: Path) -> None:
    (checkout / "new.py").touch()
    told = script(checkout, "print", ALLOW_DIRTY="1").stdout
    assert told == f"registry.example.com/wikillm:{git(checkout, 'rev-parse', 'HEAD')[:12]}-dirty\n"


def test_without_an_engine_or_a_revision_one_line_says_so(checkout: Path) -> None:
    refused = script(checkout, "build", ENGINE="false")
    assert (refused.returncode, refused.stderr) == (
        2,
        "no answer from false: is it installed, and does its daemon run?\n",
    )
    shutil.rmtree(checkout / ".git")
    refused = script(checkout, "print", GIT_CEILING_DIRECTORIES=str(checkout.parent))
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_a_build_argument_with_a_password_in_a_url_is_refused(checkout: Path) -> None:
    address = "https://bob:planted@example.com/simple"
    refused = script(checkout, "build", ENGINE="true", BUILD_ARGS=f"--no-cache --build-arg=INDEX_URL={address}")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert (
        refused.stderr.startswith("BUILD_ARGS: holds a user or password in a URL") and "planted" not in refused.stderr
    )
