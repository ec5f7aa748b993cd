"""Fixtures for all tests: a real S3 server, an empty bucket, a data set, a run. Tests need no GPU and no network.

This file imports only pytest at the top, and everything else inside its fixtures, because the tests in `gpu/` also run
where few packages are installed.
"""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "JOB_CONFIG": "",  # Commands read only the settings files that a test names.
}

import pytest

if TYPE_CHECKING:
    from fault_proxy import FaultProxy
    from small_run import DataSet, FinishedRun, WriteSettings

    from job.demo.server import S3Server

_REPEAT_SECONDS = 60
_TESTS = Path(__file__).parent
_GPU_TESTS = _TESTS / "gpu"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m gpu``, read only `gpu/`: other tests import packages that a machine with a GPU may lack."""
    is_other = collection_path.is_relative_to(_TESTS) and not collection_path.is_relative_to(_GPU_TESTS)
    return True if config.option.markexpr == "gpu" and is_other and collection_path != _TESTS else None


@pytest.hookimpl(tryfirst=True, optionalhook=True)  # The tests in gpu/ also run without pytest-timeout.
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """Fail a test that is not done in time, and fail it again if its clean-up hangs."""

    def fail(number: int, frame: object) -> None:
        pytest.fail(f"not done after {settings.timeout:.0f} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, _REPEAT_SECONDS)

    def cancel() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

    item.cancel_timeout = cancel  # type: ignore[attr-defined]
    return True


@pytest.fixture(autouse=True)
def signal_mask() -> Iterator[None]:
    """Unblock the signals that a command blocked in this process, so that later tests can send them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A running S3 server, which this process and its child processes reach through environment variables."""
    from job.demo.server import S3Server

    with S3Server() as server:
        server.take_over_environment()
        yield server


@pytest.fixture
def bucket(s3_server: S3Server) -> str:
    """URL of an empty bucket that no other test uses."""
    return s3_server.create_bucket(f"test-{secrets.token_hex(6)}")


@pytest.fixture
def default_store() -> Iterator[None]:
    """Use storage with its default options, and restore them after the test."""
    from job import storage

    storage.configure(storage.StoreOptions())
    yield
    storage.configure(storage.StoreOptions())


@pytest.fixture(params=["folder", "file_url", "s3"])
def folder_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder on this machine, as a path and as a file:// URL, or in the store."""
    from job import storage

    if request.param == "s3":
        return storage.join(request.getfixturevalue("bucket"), "some/prefix")
    return str(tmp_path / "data") if request.param == "folder" else f"file://{tmp_path}/data"


@pytest.fixture(scope="session")
def data_set(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """The bundled sample as token shards in the S3 server."""
    from small_run import prepare_sample

    return prepare_sample(s3_server, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def output(bucket: str) -> str:
    """URL for the output of a run."""
    return f"{bucket}/run"


@pytest.fixture
def settings(data_set: DataSet, output: str, tmp_path: Path) -> WriteSettings:
    """Function that writes a settings file of a run with that data set and output; its arguments are changes."""
    from small_run import write_settings

    def write(**changes: Any) -> Path:
        return write_settings(tmp_path, data_set, output, **changes)

    return write


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy of the S3 server that can inject faults."""
    from fault_proxy import FaultProxy

    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def finished_run(data_set: DataSet, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run that has done all its steps."""
    from small_run import STEPS, FinishedRun, run, write_settings

    output = f"{s3_server.create_bucket('finished-run')}/run"
    path = write_settings(
        tmp_path_factory.mktemp("finished"), data_set, output, checkpoint={"every": STEPS // 2}, evaluate={"every": 30}
    )
    code, out, err = run("train", path)
    assert (code, err) == (0, ""), out + err
    return FinishedRun(output, path, out)
