"""Requirements of a task: the pins of requirements.lock without the packages for tests, tools and the demo."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from job.errors import UserError
from launch.locked_versions import locked_versions
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
"""Values for the environment markers of requirements: those of the task's machine, not of this one."""


def task_requirements(repository: Path) -> str:
    """Return the task's requirements.txt: all dependencies of the project, as requirements.lock pins them.

    The dependencies of a package are read from the package installed here. Packages that the lock does not list are
    left to pip: setuptools, and the CUDA libraries, which torch pins itself.

    Raises:
        UserError: a package is not installed here, or in another version than the lock's.
    """
    pins = locked_versions(repository)
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted: set[str] = set()
    queue = [Requirement(text) for text in project["dependencies"]]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in pins:
            continue
        wanted.add(name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            queue += _required_by(name, pins[name], extra)
    lines = [f"{name}=={pins[name]}" for name in sorted(wanted)]
    return "\n".join(["# Made by launch/swanlab from requirements.lock.", *lines]) + "\n"


def _required_by(name: str, version: str, extra: str) -> list[Requirement]:
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        raise UserError("requirements.lock", f"{name}=={version}", "is not installed here", "run make setup") from None
    if Version(installed.version).public != version:
        problem = f"version {installed.version} is installed here"
        raise UserError("requirements.lock", f"{name}=={version}", problem, "run make setup")
    required = [Requirement(text) for text in installed.requires or []]
    return [item for item in required if item.marker is None or item.marker.evaluate(_TASK | {"extra": extra})]
