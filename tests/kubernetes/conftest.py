"""Fixtures for the Kubernetes tests: every folder that can be applied, and the manifests that it renders to."""

from functools import cache, partial
from pathlib import Path

import cluster
import pytest
import yaml
from cluster import Manifest, Render


@cache
def _rendered(folder: str) -> str:
    return yaml.safe_dump_all(cluster.render(cluster.FOLDERS / folder))


@pytest.fixture(params=cluster.OVERLAYS)
def folder(request: pytest.FixtureRequest) -> str:
    """The name of a folder that can be applied; a test runs once for each folder."""
    return str(request.param)


@pytest.fixture
def manifests(folder: str) -> list[Manifest]:
    """The manifests that the folder renders to."""
    return list(yaml.safe_load_all(_rendered(folder)))


@pytest.fixture
def render_changed(tmp_path: Path) -> Render:
    """`cluster.render_changed` for a temporary folder."""
    return partial(cluster.render_changed, tmp_path / "own")
