"""A real launch of `engine_worker`: several processes under torchrun, which train the engines of a test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from engine_worker import ENGINE_WORKER, PYTHONPATH
from small_run import REPOSITORY

from job.config import Config
from job.launcher.device import ON_CPU
from job.launcher.supervisor import worker_environment


def launch_engines(folder: Path, processes: int, orders: dict[str, Any]) -> dict[str, Any]:
    """Return what the processes saw in each case of `orders`; `folder` receives the files of the launch."""
    (folder / "orders.json").write_text(json.dumps(orders))
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *(str(ENGINE_WORKER), str(folder)),
        ],
        cwd=REPOSITORY,
        env=os.environ | worker_environment(ON_CPU, processes, Config()) | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_text())
    return seen
