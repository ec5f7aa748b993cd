"""Starting the program with an interpreter that cannot run it, or in a locale that cannot encode file names."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from printed_commands import REPOSITORY, checkout

from job import installed
from job.errors import EXIT_REFUSED, UserError, disk_error
from job.installed import PACKAGES

IMPORTED_AS = {"Jinja2": "jinja2", "PyYAML": "yaml"}
"""Import name of each package whose import name differs from its own."""


def test_required_packages_and_python_match_pyproject() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = [Requirement(one).name for one in project["dependencies"]]
    assert sorted(IMPORTED_AS.get(name, name) for name in names) == sorted(installed.PACKAGES)
    assert project["requires-python"] == ">={}.{}".format(*installed.OLDEST_PYTHON)
    assert installed.problem() == ""


@pytest.fixture
def bare_python(tmp_path: Path) -> Path:
    """A Python interpreter without any package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    return tmp_path / "bare" / "bin" / "python"


def test_bare_interpreter_error_names_the_right_interpreter(bare_python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    folder.mkdir()
    checkout(folder)
    words = [str(bare_python), "-m", "job", "train", "--data.source", "https://me:hunter2@example.org/x"]
    packages = f"accelerate, datasets, deepspeed and {len(PACKAGES) - 3} more packages"
    lacks = f"python: '{bare_python}': does not have {packages}; "
    ended = subprocess.run(words, cwd=folder, env={}, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (EXIT_REFUSED, "")
    assert ended.stderr == f"{lacks}use .venv/bin/python -m job, which `make setup` has created\n"
    (folder / ".venv").unlink()
    ended = subprocess.run(words, cwd=folder, env={}, capture_output=True, text=True)
    assert ended.stderr == f"{lacks}run `make setup` in {folder}, then use .venv/bin/python -m job\n"


def test_old_python_is_refused_before_unreadable_syntax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 1))
    assert "is Python 3.8, and 3.11 or later is needed" in installed.problem()
    for name in ("__init__", "__main__", "installed"):
        ast.parse((REPOSITORY / "job" / f"{name}.py").read_text(), feature_version=(3, 7))


def test_python_for_windows_is_sent_to_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert installed.problem().endswith("is a Python for Windows, and Linux or macOS is needed; use it inside WSL 2")


# ---- File names ----


def job_in_ascii(*words: str, cwd: Path) -> tuple[int, str]:
    variables = os.environ | {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": str(REPOSITORY)
    }  # fmt: skip
    ended = subprocess.run([sys.executable, "-m", "job", *words], cwd=cwd, env=variables, capture_output=True)
    return ended.returncode, ended.stderr.decode("ascii")


def test_path_the_locale_cannot_encode_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {shards: 数据/shards}", encoding="utf-8")
    code, said = job_in_ascii("train", "--config", "mine.yaml", cwd=tmp_path)
    assert (code, said.count("\n"), "Traceback" in said) == (EXIT_REFUSED, 1, False)
    assert said.startswith("data.shards: '??/shards") and said.endswith("set LC_ALL=C.UTF-8\n")
    assert "ascii, the encoding of file names here (LANG, LC_ALL)" in said


def test_other_encoding_error_is_not_a_disk_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = UnicodeEncodeError("ascii", "数据", 0, 1, "ordinal not in range(128)")
    assert disk_error(error) is None, "file names are encoded in UTF-8 here"
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert isinstance(disk_error(error), UserError)
    assert disk_error(UnicodeEncodeError("gbk", "ñ", 0, 1, "illegal multibyte sequence")) is None
