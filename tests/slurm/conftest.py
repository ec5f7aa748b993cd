"""Fixture for the Slurm tests: one cluster for each test file."""

from collections.abc import Iterator

import pytest
from slurm_cluster import SlurmCluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with SlurmCluster() as cluster:
        yield cluster
