"""Fixtures for the SwanLab tests: a stand-in service on this machine, and the client's commands run in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import CommandResult, Launch
from service import API_KEY, BUCKET, SwanLab

from job.demo.server import S3Server
from launch.swanlab import cli, cos, resubmit, retry, service


@pytest.fixture(scope="session")
def code_store(s3_server: S3Server) -> Any:
    """An S3 client of the store behind the service, whose bucket exists."""
    s3_server.create_bucket(BUCKET)
    return s3_server.client()


@pytest.fixture
def swanlab(s3_server: S3Server, code_store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SwanLab]:
    """The running stand-in service, set in the environment. Its tasks complete at once."""
    with SwanLab(s3_server, code_store) as running:
        monkeypatch.setenv("SWANLAB_API_KEY", API_KEY)
        monkeypatch.setenv("SWANLAB_API_HOST", running.host)
        monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "nobody"))
        monkeypatch.setattr(cos, "ENDPOINT", s3_server.endpoint_url)
        monkeypatch.setattr(resubmit, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(retry, "PAUSE_SECONDS", 0.001)
        monkeypatch.setattr(service, "_LISTING_PAUSES_SECONDS", (0, 0.001))
        yield running


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str]) -> Launch:
    """A function that runs a command line of `python -m launch.swanlab` and checks that it prints no API key."""

    def run(*words: str) -> CommandResult:
        capsys.readouterr()
        code = cli.main(words)
        output = capsys.readouterr()
        assert API_KEY not in output.out + output.err
        return CommandResult(code, output.out, output.err)

    return run
