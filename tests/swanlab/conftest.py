"""A service on this machine, and commands given to it as a user does, but in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import Launch, Said
from service import API_KEY, BUCKET, SwanLab

from job.demo.server import S3Server
from launch.swanlab import cli, cos, rounds, service


@pytest.fixture(scope="session")
def code_store(s3_server: S3Server) -> Any:
    """A client of the store behind the service, with its bucket."""
    s3_server.create_bucket(BUCKET)
    return s3_server.client()


@pytest.fixture
def swanlab(s3_server: S3Server, code_store: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SwanLab]:
    """The service, found by the environment; its tasks complete at once."""
    with SwanLab(s3_server, code_store) as running:
        monkeypatch.setenv("SWANLAB_API_KEY", API_KEY)
        monkeypatch.setenv("SWANLAB_API_HOST", running.host)
        monkeypatch.setenv("SWANLAB_ROOT", str(tmp_path / "nobody"))
        monkeypatch.setattr(cos, "ENDPOINT", s3_server.endpoint_url)
        monkeypatch.setattr(rounds, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(service, "_PAUSE_SECONDS", 0.001)
        monkeypatch.setattr(service, "_LISTED_SECONDS", (0, 0.001))
        monkeypatch.setattr(cos, "_PAUSE_SECONDS", 0.001)
        yield running


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str]) -> Launch:
    """Runs a command line of `python -m launch.swanlab`."""

    def run(*words: str) -> Said:
        capsys.readouterr()
        code = cli.main(words)
        said = capsys.readouterr()
        assert API_KEY not in said.out + said.err
        return Said(code, said.out, said.err)

    return run
