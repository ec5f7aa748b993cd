"""Functions that plant one mistake each in a workspace."""

import dataclasses
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from preflight_workspace import Workspace

from job import storage
from job.data.manifest import shard_size
from job.runs.attempts import Attempts
from job.runs.run_status import RunStatus

Plant = Callable[[Workspace], object]


def options(**values: object) -> Plant:
    """Set settings; `__` in a name stands for the dot."""
    return lambda workspace: workspace.set(**values)


def environment(**variables: str | None) -> Plant:
    """Set environment variables; None unsets one."""
    return lambda workspace: workspace.environment(**variables)


def edit(file: str, pattern: str, replacement: str) -> Plant:
    """Change a file of launch/."""
    return lambda workspace: workspace.edit(file, pattern, replacement)


def both(*plants: Plant) -> Plant:
    """Plant several mistakes."""
    return lambda workspace: [plant(workspace) for plant in plants]


def damaged(name: str, change: Callable[[bytes], bytes | None]) -> Plant:
    """Change one file of the data set; None deletes it."""

    def plant(workspace: Workspace) -> None:
        url = next(entry.url for entry in storage.list_files(workspace.copy_shards()) if re.search(name, entry.url))
        content = change(storage.read_bytes(url))
        storage.write_bytes(url, content) if content is not None else storage.delete([url])

    return plant


def with_large_shard(manifest: bytes) -> bytes:
    """Return the manifest with a first shard of a million tokens."""
    content = json.loads(manifest)
    shard = content["train"][0]
    shard |= {"tokens": 10**6, "size": shard_size(10**6, shard["documents"], content["dtype"])}
    return json.dumps(content).encode()


def store_clock_off_by(seconds: float) -> Plant:
    """Use a store whose clock is behind by so many seconds."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET = do_PUT = answer

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() - seconds)

        def log_message(self, *_: object) -> None: ...

    def plant(workspace: Workspace) -> None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        workspace.clean_ups += [server.shutdown, server.server_close]
        workspace.set(store__endpoint_url=f"http://127.0.0.1:{server.server_port}")

    return plant


def output_below_a_file(workspace: Workspace) -> None:
    (workspace.folder / "file").touch()
    workspace.set(run__output=str(workspace.folder / "file" / "run"))


def existing_stop_file(workspace: Workspace) -> None:
    storage.write_bytes(f"{workspace.bucket}/stop", b"")
    workspace.set(train__stop_file=f"{workspace.bucket}/stop")


def run_with_another_tokenizer(workspace: Workspace) -> None:
    workspace.begin_run()
    url = f"{workspace.config.run.output}/tokenizer/tokenizer.json"
    storage.write_bytes(url, storage.read_bytes(url).replace(b'"dropout":', b'"dropout" :'))


def damaged_checkpoints(workspace: Workspace) -> None:
    storage.write_bytes(f"{workspace.begin_run()}/state.json", b"{}")


def checkpoints_without_run_record(workspace: Workspace) -> None:
    workspace.begin_run()
    storage.delete([f"{workspace.config.run.output}/run.json"])


def attempts_without_progress(workspace: Workspace) -> None:
    workspace.begin_run()
    attempts = Attempts(workspace.config.run.output)
    newest = attempts.newest()
    assert newest is not None
    for _ in range(3):
        attempt = attempts.claim(newest.run_id, secrets.token_hex(4), None, "auto")
        attempts.update(dataclasses.replace(attempt, from_step=10, ended=RunStatus.FAILED, error="out of memory"))


def gpus(*lines: str, code: int = 0) -> Plant:
    """Let nvidia-smi print these lines and exit with `code`."""
    return lambda workspace: workspace.nvidia_smi("\n".join(lines), code)


def kubernetes_job(pattern: str, replacement: str) -> Plant:
    """Change base/job.yaml."""
    return edit("kubernetes/base/job.yaml", pattern, replacement)


def wiring(pattern: str, replacement: str) -> Plant:
    """Change the replacements that copy one value to several fields, so that these fields no longer agree."""
    return edit("kubernetes/wiring/replacements.yaml", pattern, replacement)


def target_of(kind: str, field: str) -> str:
    """Return a pattern for one target of a replacement."""
    return rf"      - select:\n          kind: {kind}\n        fieldPaths:\n          - {field}\n"


def spec(pattern: str, replacement: str) -> Plant:
    """Change SwanLab's spec."""
    return edit("swanlab.yaml", pattern, replacement)
