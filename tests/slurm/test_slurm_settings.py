"""Which file of settings launch/slurm.sh takes, with stand-ins for Slurm's programs."""

import os
import subprocess
from pathlib import Path

import pytest
from printed_commands import REPOSITORY

SRUN = '#!/bin/sh\nwhile case $1 in --*) true;; *) false;; esac; do shift; done\nexec "$@"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to submit from, with stand-ins in bin/."""
    (tmp_path / "bin").mkdir()
    for name, content in (("srun", SRUN), ("squeue", "#!/bin/sh\n"), ("scontrol", "#!/bin/sh\n")):
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("configs/wiki-123m.yaml", "other.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def taken(folder: Path, *words: str, **variables: str) -> str:
    """The command that the script runs on a node."""
    environment = {name: value for name, value in os.environ.items() if name != "JOB_CONFIG"} | variables
    environment |= {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHON": "/bin/echo", "HOME": str(folder)}
    environment |= {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SCRATCH": str(folder / "scratch")}
    command = ["bash", str(REPOSITORY / "launch" / "slurm.sh"), *words]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    _, _, name, _, config, *_ = ended.stdout.split()
    assert f": {name} {config}" in ended.stderr, "it says which file it takes"
    return ended.stdout.strip()


def test_the_script_takes_the_file_that_the_program_would(folder: Path) -> None:
    assert taken(folder) == "-m job train --config configs/wiki-123m.yaml"
    assert taken(folder, JOB_CONFIG="") == "-m job train --config configs/wiki-123m.yaml"
    (folder / "job.yaml").touch()
    assert taken(folder, "prepare") == "-m job prepare --config job.yaml"
    assert taken(folder, JOB_CONFIG="other.yaml") == "-m job train --config other.yaml"
    words = ("configs/wiki-123m.yaml", "--train.seed", "3")
    assert taken(folder, *words, JOB_CONFIG="other.yaml") == f"-m job train --config {' '.join(words)}"
