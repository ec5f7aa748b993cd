"""What a task installs: the pins of requirements.lock, without those of tests, tools and the demonstration."""

import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from job.errors import UserError
from launch.swanlab.spec import PYTHON

_TASK = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "python_full_version": f"{PYTHON}.0",
    "python_version": PYTHON,
    "sys_platform": "linux",
}
"""What a requirement's marker asks of the machine: the task's, whatever this one is."""


def requirements(repository: Path) -> str:
    """requirements.txt of the task: what pyproject.toml requires and what that requires, as requirements.lock pins it.

    Which package requires which is asked of those installed here. What the lock does not hold is left to pip: the CUDA
    libraries, which torch pins itself, and setuptools.

    Raises:
        UserError: a package is not installed here in the version of the lock.
    """
    pins = dict(_pins(repository / "requirements.lock"))
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted: set[str] = set()
    left = [Requirement(text) for text in project["dependencies"]]
    seen: set[tuple[str, str]] = set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins:
            continue
        wanted.add(name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            left += _required_by(name, pins[name], extra)
    lines = [f"{name}=={pins[name]}" for name in sorted(wanted)]
    return "\n".join(["# Made by launch/swanlab from requirements.lock.", *lines]) + "\n"


def _pins(lock: Path) -> Iterator[tuple[str, str]]:
    for line in lock.read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.partition("==")
        if pinned and not line.startswith("#"):
            yield canonicalize_name(name), version.strip()


def _required_by(name: str, version: str, extra: str) -> list[Requirement]:
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        raise UserError("requirements.lock", f"{name}=={version}", "is not installed here", "run make setup") from None
    if Version(installed.version).public != version:
        wrong = f"{installed.version} is installed here"
        raise UserError("requirements.lock", f"{name}=={version}", wrong, "run make setup")
    found = [Requirement(text) for text in installed.requires or []]
    return [one for one in found if one.marker is None or one.marker.evaluate(_TASK | {"extra": extra})]
