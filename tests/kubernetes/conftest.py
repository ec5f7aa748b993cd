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
    """The name of each folder that can be applied, in turn."""
    return str(request.param)


@pytest.fixture
def manifests(folder: str) -> list[Manifest]:
    """What that folder renders to."""
    return list(yaml.safe_load_all(_rendered(folder)))


@pytest.fixture
def render_changed(tmp_path: Path) -> Render:
    """`cluster.render_changed` in a folder of the test's own."""
    return partial(cluster.render_changed, tmp_path / "own")
