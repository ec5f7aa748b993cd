"""What every test may rely on: a real S3 server, a bucket of its own, and no accelerator or network."""

import os
import secrets
import signal
from collections.abc import Iterator
from typing import Any

os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "JOB_CONFIG": "",  # no file of settings but those that a test names
}

import pytest

from job.demo.server import S3Server

_REPEAT_SECONDS = 60


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Fail a test that is not done in time, and again if it then hangs in its cleaning up."""

    def fail(number: int, frame: object) -> None:
        pytest.fail(f"not done after {settings.timeout:.0f} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, _REPEAT_SECONDS)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    item.cancel_timeout = cancel  # type: ignore[attr-defined]
    return True


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
