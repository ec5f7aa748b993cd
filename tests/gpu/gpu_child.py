"""Child processes of the tests on a GPU: a fault of the GPU in one of them does not break the tests that follow."""

import os
import socket
import subprocess
import sys
from pathlib import Path

GPU_TESTS = Path(__file__).parent
REPOSITORY = GPU_TESTS.parent.parent
_LIMIT_SECONDS = 240


def run_python(*words: object, path: tuple[Path, ...] = (), **environment: str) -> str:
    """Run Python with these arguments as the only rank of a run, and return its standard output.

    Args:
        words: arguments of Python.
        path: folders that come first in PYTHONPATH.
        environment: more variables.
    """
    folders = [*path, REPOSITORY, GPU_TESTS.parent, GPU_TESTS]
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    ended = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=REPOSITORY,
        env=inherited | {"PYTHONPATH": os.pathsep.join(map(str, folders))} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_LIMIT_SECONDS,
    )
    assert ended.returncode == 0, f"ended with {ended.returncode}:\n{ended.stdout[-4000:]}\n{ended.stderr[-8000:]}"
    return ended.stdout


def become_only_rank() -> None:
    """Give this process the environment in which torchrun starts the only rank of a run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
