"""The version of the program, with the revision of the image or of the checkout."""

import subprocess
from pathlib import Path

import pytest

from job import __version__
from job.cli import main
from job.version import VARIABLE, code_version


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def without_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def test_checkout_version_has_revision_and_dirty_flag(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is no revision")
    revision = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert code_version(tmp_path) == f"{__version__}+{revision}"
    (tmp_path / "file").write_text("two")
    assert code_version(tmp_path) == f"{__version__}+{revision}-dirty"


def test_version_without_a_repository_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert code_version(tmp_path / "empty") == __version__
    (tmp_path / ".git").mkdir()  # This is no repository of git.
    assert code_version(tmp_path) == __version__


def test_revision_of_the_image_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1f2e3d4c5b6a")
    assert code_version(tmp_path) == f"{__version__}+1f2e3d4c5b6a"


def test_command_line_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"wikillm {code_version()}\n"
