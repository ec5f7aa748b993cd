"""Tests of `make setup` and `make setup-dev`: the Python they take, what they say is missing, and the lock files."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from printed_commands import REPOSITORY

SCRIPT = REPOSITORY / "launch" / "setup.sh"
SHOWS_VERSION = 'case "$2" in *version_info*) echo {version};; *ensurepip*) exit {no_venv};; esac'
RECORDS = 'echo "$PIP_INDEX_URL $*" >>"$(dirname "$0")/../calls"; [ "$3" != install ] || exit {pip_code}'
MIRROR = "https://pypi.tuna.tsinghua.edu.cn/simple"


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder that is all of PATH: the tools of the script, openssl, and no Python."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sh", "cut", "date", "du", "dirname", "grep", "touch", "make", "env", "uname", "openssl"):
        (folder / name).symlink_to(shutil.which(name) or pytest.fail(f"{name} is not on PATH"))
    return folder


AddPython = Callable[..., None]


@pytest.fixture
def add_python(programs: Path) -> AddPython:
    """Function that adds a program which answers the script's questions as a Python would."""

    def add(name: str, version: str, has_venv: bool = True) -> None:
        write_program(programs / name, SHOWS_VERSION.format(version=version, no_venv=int(not has_venv)))

    return add


def setup(programs: Path, *words: str, **variables: str) -> tuple[int, str, str]:
    """Run the script; return its exit code and what it prints to both streams."""
    ended = subprocess.run(
        [SCRIPT, *words], env=variables | {"PATH": str(programs)}, capture_output=True, text=True, cwd=programs.parent
    )
    return ended.returncode, ended.stdout, ended.stderr


def test_first_working_python_of_the_candidates_is_taken(programs: Path, add_python: AddPython) -> None:
    add_python("python3", "3.12")
    assert setup(programs, "--find") == (0, "python3\n", "")
    add_python("python3.13", "3.13")
    assert setup(programs, "--find") == (0, "python3.13\n", "")
    write_program(programs / "python3.11", "echo 'pyenv: python3.11: command not found' >&2; exit 127")
    assert setup(programs, "--find") == (0, "python3.13\n", "")
    assert setup(programs, "--find", PYTHON="python3") == (0, "python3\n", "")


def test_missing_python_is_one_line_that_says_what_to_install(programs: Path, add_python: AddPython) -> None:
    add_python("python3", "3.10")
    code, out, said = setup(programs, "venv")
    assert (code, out, said.count("\n")) == (78, "", 1)
    assert said.startswith("make setup: none of python3.11 python3.12 python3.13 python3 is Python 3.11, 3.12 or 3.13")
    assert "apt install python3 python3-venv" in said and "make setup PYTHON=/path/to/python" in said


@pytest.mark.parametrize(("name", "found"), [("python3.14", "3.14"), ("nowhere/python", "no Python")])
def test_unsuitable_python_is_named_with_its_version(
    programs: Path, add_python: AddPython, name: str, found: str
) -> None:
    add_python("python3.14", "3.14")
    add_python("python3.12", "3.12")
    expected = f"make setup: PYTHON: '{name}' is {found}: expected Python 3.11, 3.12 or 3.13\n"
    assert setup(programs, "venv", PYTHON=name) == (78, "", expected)


def test_missing_venv_module_names_the_package(programs: Path, add_python: AddPython) -> None:
    add_python("python3.12", "3.12", has_venv=False)
    code, out, said = setup(programs, "venv")
    assert (code, out) == (78, "")
    assert said == "make setup: python3.12 has no module venv: on Debian and Ubuntu, apt install python3.12-venv\n"


def test_missing_openssl_is_said_before_the_download(programs: Path, add_python: AddPython) -> None:
    add_python("python3.12", "3.12")
    (programs / "openssl").unlink()
    code, out, said = setup(programs, "venv", "torch")
    assert (code, out, said.count("\n")) == (78, "", 1)
    assert "openssl is not on PATH" in said and "apt install openssl" in said
    assert not (programs.parent / "venv").exists()


def test_untried_system_is_named_once(programs: Path, add_python: AddPython) -> None:
    add_python("python3.12", "3.12")
    (programs / "uname").unlink()
    write_program(programs / "uname", "echo Darwin")
    code, _, said = setup(programs, "venv")
    assert (code, said.count("\n")) == (0, 1)
    assert said.startswith("make setup: Darwin is not tried; it goes on")


def test_other_python_than_that_of_the_environment_is_refused(programs: Path, add_python: AddPython) -> None:
    add_python("python3.12", "3.12")
    write_program(programs.parent / "venv" / "bin" / "python", SHOWS_VERSION.format(version="3.11", no_venv=0))
    assert setup(programs, "venv", PYTHON="python3.12") == (
        *(78, ""),
        "make setup: PYTHON: 'python3.12' is Python 3.12, but venv has 3.11: delete venv first (make clean)\n",
    )
    assert setup(programs, "venv") == (0, "", "")


def test_failed_download_names_the_variable_for_a_mirror(programs: Path) -> None:
    write_program(programs.parent / "venv" / "bin" / "python", RECORDS.format(pip_code=1))
    code, _, said = setup(programs, "venv", "torch")
    assert (code, said.count("\n")) == (78, 1)
    assert f"make setup PIP_INDEX_URL={MIRROR}" in said


def test_new_environment_is_made_by_the_found_python(programs: Path, add_python: AddPython) -> None:
    add_python("python3.12", "3.12")
    python = programs / "python3.12"
    python.write_text(python.read_text() + 'if [ "$2" = venv ]; then mkdir -p "$3"; echo "made by python3.12"; fi\n')
    (programs / "mkdir").symlink_to(shutil.which("mkdir") or "")
    expected = f"venv: a new environment with Python 3.12 ({python})\nmade by python3.12\n"
    assert setup(programs, "venv") == (0, expected, "")
    assert (programs.parent / "venv").is_dir()


# ---- The targets ----


def make(programs: Path, *words: str) -> str:
    folder = programs.parent
    for name in ("Makefile", "launch", "requirements.lock", "requirements-dev.lock"):
        if not (folder / name).exists():
            (folder / name).symlink_to(REPOSITORY / name)
    environment = {"PATH": str(programs)}
    ended = subprocess.run([programs / "make", *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_setup_installs_torch_first_and_dev_packages_only_when_asked(programs: Path) -> None:
    write_program(programs.parent / "venv" / "bin" / "python", RECORDS.format(pip_code=0))
    calls = programs.parent / "venv" / "calls"
    said = make(programs, "setup", "VENV=venv", f"PIP_INDEX_URL={MIRROR}")
    assert "1 of 2: torch" in said and "2 of 2: the other" in said
    torch = next(line for line in (REPOSITORY / "requirements.lock").read_text().split() if line.startswith("torch=="))
    install = f"{MIRROR} -m pip install --disable-pip-version-check"
    installed = [line for line in calls.read_text().splitlines() if " install " in line]
    assert installed == [f"{install} {torch} -c requirements.lock", f"{install} -r requirements.lock"]
    calls.unlink()
    make(programs, "setup", "VENV=venv")
    assert not calls.exists(), "a second call installs nothing"
    make(programs, "setup-dev", "VENV=venv")
    assert calls.read_text().splitlines()[-1].endswith("-r requirements-dev.lock")


def test_only_targets_with_test_tools_need_the_dev_packages() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    rules = re.findall(r"^([a-z-]+):([^#\n]*)## .*\n((?:\t.*\n)+)", text, re.M)
    with_tools = {name for name, _, recipe in rules if re.search(r"\$\(RUN\) -m (pytest|ruff|mypy)", recipe)}
    without = {name for name, _, recipe in rules if "$(RUN) -m " in recipe} - with_tools
    assert {"test", "lint", "chaos"} <= with_tools and {"demo", "speedrun", "bench"} <= without
    needs = {name: needed.split() for name, needed, _ in rules}
    assert [name for name in with_tools if "setup-dev" not in needs[name]] == []
    assert [name for name in without if needs[name] != ["setup"]] == []


# ---- The lock files ----


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (REPOSITORY / name).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}


def requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    groups = [project["optional-dependencies"][extra] for extra in extras]
    return [Requirement(text) for group in (project["dependencies"], *groups) for text in group]


def reachable(roots: list[Requirement], known: dict[str, str]) -> Iterator[str]:
    """Yield the pinned packages that these requirements need on Python 3.11, directly or through others."""
    seen: set[tuple[str, str]] = set()
    queue = list(roots)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in known:
            continue  # CUDA's packages and setuptools, which the lock leaves to pip.
        yield name
        for extra in {"", *requirement.extras} - {extra for other, extra in seen if other == name}:
            seen.add((name, extra))
            values = {"extra": extra, "python_version": "3.11", "python_full_version": "3.11.0"}
            needed = map(Requirement, distribution(name).requires or [])
            queue += [one for one in needed if one.marker is None or one.marker.evaluate(values)]


def test_lock_has_what_demo_and_speedrun_need_and_nothing_more() -> None:
    runtime, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    assert not runtime.keys() & dev.keys()
    assert set(reachable(requirements("demo", "speedrun"), runtime | dev)) == runtime.keys()


def test_every_pin_is_in_the_range_of_pyproject() -> None:
    known = pins("requirements.lock") | pins("requirements-dev.lock")
    for one in requirements("demo", "speedrun", "tensorboard", "dev"):
        if one.name != "wikillm":
            assert one.specifier.contains(known[canonicalize_name(one.name)]), one
