"""What every test may rely on: a real S3 server, a bucket of its own, and no accelerator or network."""

import os
import secrets
from collections.abc import Iterator

os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "JOB_CONFIG": "",  # no file of settings but those that a test names
}

import pytest

from job.demo.server import S3Server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running server that this process, and all it starts, reaches through the environment."""
    with S3Server() as server:
        server.take_over_environment()
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """The URL of an empty bucket that no other test uses."""
    return s3_server.create_bucket(f"test-{secrets.token_hex(6)}")
