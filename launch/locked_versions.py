"""The exact versions that requirements.lock pins, which the clients of notebooks and of SwanLab install elsewhere."""

from pathlib import Path

from packaging.utils import canonicalize_name


def locked_versions(repository: Path) -> dict[str, str]:
    """Return the version of each package in requirements.lock, by the package's normalized name."""
    versions: dict[str, str] = {}
    for line in (repository / "requirements.lock").read_text(encoding="utf-8").splitlines():
        name, pinned, version = line.partition("==")
        if pinned and not line.startswith("#"):
            versions[canonicalize_name(name)] = version.strip()
    return versions
