"""Test that .dockerignore gives a build only code and presets, whatever else is in the working tree."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.image.stand_in import REPOSITORY, engine

pytestmark = [pytest.mark.image, pytest.mark.timeout(600)]

STRAY = (
    *(".env", "id_rsa", ".git/config", "data/wiki.jsonl", "configs/.env", "configs/secret.env", "configs/mine.yaml"),
    *("job/.env", "job/credentials.json", "job/data/notes.txt", "job/.ipynb_checkpoints/cli.py", "job/a/b.ipynb"),
)


def test_build_context_contains_only_code_and_presets(tmp_path: Path) -> None:
    context, image = tmp_path / "context", "stand-in.invalid/context"
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for name in [*listed.splitlines(), *STRAY]:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_bytes(b"stray" if name in STRAY else (REPOSITORY / name).read_bytes())
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /context/\n")
    with engine() as docker:
        docker("build", "--tag", image, "--file", str(tmp_path / "Dockerfile"), str(context))
        container = docker("create", image, "none").stdout.strip()
        docker("export", "--output", str(tmp_path / "files.tar"), container)
        docker("rm", container)
        docker("image", "rm", image)
    with tarfile.open(tmp_path / "files.tar") as files:
        names = [member.name for member in files if member.isfile()]
    context_files = {name.removeprefix("context/") for name in names if name.startswith("context/")}
    scripts = {"launch/apt.sh", "launch/efa.sh", "launch/install.sh", "launch/smoke.sh"}
    others = {"LICENSE", "requirements-image.lock", "launch/image-tools.lock"} | scripts
    assert context_files == others | {name for name in listed.splitlines() if name.startswith(("job/", "configs/"))}
