"""What several tests of training look at: one data set, one whole run, and engines in every world there is."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from engine_worker import LAST_STEP, PYTHONPATH, RESUMES_FROM, SAVED_STEP, Case
from fault_proxy import FaultProxy
from small_run import REPOSITORY, STEPS, DataSet, FinishedRun, WriteSettings, prepare_sample, run, write_settings

from job.config import Config
from job.demo.server import S3Server
from job.launcher.device import ON_CPU
from job.launcher.supervisor import worker_environment


@pytest.fixture(scope="session")
def data_set(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return prepare_sample(s3_server, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def output(bucket: str) -> str:
    """Where a test's run lives."""
    return f"{bucket}/run"


@pytest.fixture
def settings(data_set: DataSet, output: str, tmp_path: Path) -> WriteSettings:
    """Writes settings of that run, with changes."""

    def write(**changes: Any) -> Path:
        return write_settings(tmp_path, data_set, output, **changes)

    return write


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def finished_run(data_set: DataSet, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    output = f"{s3_server.create_bucket('finished-run')}/run"
    path = write_settings(
        tmp_path_factory.mktemp("finished"), data_set, output, checkpoint={"every": STEPS // 2}, evaluate={"every": 30}
    )
    code, out, err = run("train", path)
    assert (code, err) == (0, ""), out + err
    return FinishedRun(output, path, out)


@pytest.fixture(scope="session")
def seen_in(
    data_set: DataSet, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], dict[str, Any]]:
    """By processes and strategy: losses and gradient norms of each case in `engine_worker`, launched once."""
    bucket = s3_server.create_bucket("engines")

    def output(world: tuple[int, str], case: str) -> str:
        return f"{bucket}/{world[0]}-{world[1]}-{case.replace(' ', '-')}"

    def resumed(world: tuple[int, str], source: tuple[int, str], precision: str) -> Case:
        name = f"{precision} resumed" if source == world else f"{precision} resumed from {source[0]} x {source[1]}"
        checkpoint = f"{output(source, precision)}/checkpoints/step-{SAVED_STEP:08d}-a1"
        return Case(name, precision, 1, SAVED_STEP, LAST_STEP, checkpoint, {LAST_STEP: output(world, name)})

    def cases(world: tuple[int, str]) -> Iterator[Case]:
        for precision in ("fp32", "bf16"):
            yield Case(precision, precision, saves=dict.fromkeys((SAVED_STEP, LAST_STEP), output(world, precision)))
            yield Case(f"{precision}, 4 accumulated", precision, accumulation_steps=4)
            yield resumed(world, world, precision)
        yield Case("fp32, compiled, 4 accumulated", "fp32", accumulation_steps=4, compiled=True)
        for documents in ("by a mask", "without a mask"):
            yield Case(f"documents apart {documents}", "bf16", documents=documents, last_step=SAVED_STEP)
        for source in RESUMES_FROM[world]:
            yield resumed(world, source, "fp32")

    @cache
    def launch(processes: int, strategy: str) -> dict[str, Any]:
        for source in RESUMES_FROM[processes, strategy]:
            launch(*source)
        folder = tmp_path_factory.mktemp("engines")
        orders = {
            "strategy": strategy,
            "shards": data_set.shards,
            "cases": [asdict(case) for case in cases((processes, strategy))],
        }
        (folder / "orders.json").write_text(json.dumps(orders))
        ended = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
                *(str(Path(__file__).with_name("engine_worker.py")), str(folder)),
            ],
            cwd=REPOSITORY,
            env=os.environ | worker_environment(ON_CPU, processes, Config()) | {"PYTHONPATH": PYTHONPATH},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        found: dict[str, Any] = json.loads((folder / "seen.json").read_text())
        return found

    return launch
