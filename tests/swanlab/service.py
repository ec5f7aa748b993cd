"""Stand-in for SwanLab's service and its GPU machines: it speaks the service's HTTP protocol and really runs tasks.

It follows the known protocol: paths, bodies, the session cookie, states, and the statuses of refusals. A real S3 server
replaces Tencent COS. Its keys are permanent, so there is no session token. Two points are not documented and assumed
here: a task gets the API key as SWANLAB_API_KEY, and a task that reaches its time limit has the state CRASHED.
"""

import hashlib
import io
import json
import os
import secrets
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from small_run import REPOSITORY

from job.demo.server import S3Server

REGION, BUCKET, USER = "ap-beijing", "swanlab-code", "somebody"
COMBOS = ("RTX3090-1", "H800-1")
API_KEY = "key-that-nobody-may-see"
HTML_PAGE = 299
"""Pseudo status for `injected`: an answer with status 200 whose body is HTML."""


@dataclass
class Task:
    """A task that was submitted."""

    cuid: str
    body: dict[str, Any]
    """Body of `POST /task`."""
    bundle: bytes
    volumes: list[dict[str, bytes]]
    """Contents by path for each of its data sets."""
    status: str = "QUEUING"
    message: str = ""
    times: dict[str, str] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def as_json(self) -> dict[str, Any]:
        """The task as the service returns it."""
        body = {name: self.body[name] for name in ("name", "python", "index")} | {"combo": self.body.get("combo")}
        known = {"cuid": self.cuid, "status": self.status, "msg": self.message or None, **self.times, **body}
        if self.status in ("RUNNING", "COMPLETED"):
            known |= {"pName": "WikiLLM", "eId": f"run-of-{self.cuid}"}
        return known


Run = Callable[[Task], tuple[str, str]]
"""Function that runs a task and returns its final state and the service's message."""


def complete_at_once(task: Task) -> tuple[str, str]:
    return "COMPLETED", ""


class SwanLab:
    """The service on 127.0.0.1, running inside a `with` block.

    Attributes:
        run: runs each task.
        requests: method and path of every call.
        headers: headers of every call.
        injected: error statuses by method and path: one status for all calls, or a list with one status per call.
        lost: calls (method and path) that are executed but answered with status 503.
        data_sets: name and status by id.
    """

    def __init__(self, store: S3Server, client: Any, run: Run = complete_at_once) -> None:
        self._client, self._keys, self.run = client, store.environment, run
        self.prefix = f"codes/{secrets.token_hex(6)}"
        self.tasks: list[Task] = []
        self.data_sets: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.injected: dict[tuple[str, str], int | list[int]] = {}
        self.lost: set[tuple[str, str]] = set()
        self.sessions: set[str] = set()
        self.store_keys_given = 0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def handle_one(self) -> None:
                service._serve(self)

            do_GET = do_POST = do_PATCH = handle_one

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "SwanLab":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for task in self.tasks:
            task.stop.set()
        for thread in self._threads:
            thread.join()
        self._server.shutdown()
        self._server.server_close()

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return the contents of the objects below the user's prefix by path."""
        listed = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/{prefix}").get("Contents", [])
        return {item["Key"].removeprefix(f"{self.prefix}/"): self._read(item["Key"]) for item in listed}

    def _read(self, key: str) -> bytes:
        content: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.removeprefix("/api").partition("?")
        raw = handler.rfile.read(int(handler.headers.get("content-length") or 0))
        with self._lock:
            self.requests.append((handler.command, handler.path))
            self.headers.append(dict(handler.headers))
            try:
                injected = self.injected.get((handler.command, path))
                if isinstance(injected, list):
                    injected = injected.pop(0) if injected else None
                if injected:
                    raise _Answer(injected)
                body = self._answer(handler.command, path, query, json.loads(raw) if raw else {}, handler)
                status = 503 if (handler.command, path) in self.lost else 200
            except _Answer as refused:
                status, body = refused.status, {"message": f"no {API_KEY}"}
        content = b"<html>" if status == HTML_PAGE else json.dumps(body).encode()
        handler.send_response(200 if status == HTML_PAGE else status)
        if 300 <= status < 400:
            handler.send_header("location", f"{self.host}/elsewhere")
        handler.send_header("content-length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _answer(self, method: str, path: str, query: str, body: Any, handler: BaseHTTPRequestHandler) -> Any:
        if (method, path) == ("POST", "/login/api_key"):
            if handler.headers.get("authorization") != API_KEY:
                raise _Answer(401)
            self.sessions.add(sid := secrets.token_hex(8))
            return {"sid": sid, "expiredAt": "2099-01-01T00:00:00.000Z", "userInfo": {"username": USER}}
        if (handler.headers.get("cookie") or "").removeprefix("sid=") not in self.sessions:
            raise _Answer(401)
        match method, path.strip("/").split("/"):
            case "GET", ["user", "codes", "sts"]:
                return self._store_keys()
            case "POST", ["task"]:
                return self._start_task(body)
            case "GET", ["task", "queuing"]:
                return {"sum": sum(task.status == "QUEUING" for task in self.tasks)}
            case "GET", ["task", "datasets"]:
                return [
                    {"cuid": cuid, "name": data_set["name"], "createdAt": _now()}
                    for cuid, data_set in self.data_sets.items()
                ]
            case "GET", ["task"]:
                return [task.as_json for task in reversed(self.tasks)][: int(query.removeprefix("num="))]
            case "GET", ["task", cuid]:
                return self._task(cuid).as_json
            case "PATCH", ["task", "status"]:
                task = self._task(body["cuid"])
                task.status, task.message = body["status"], body["msg"]
                task.stop.set()
                return {}
            case "POST", ["task", "dataset"]:
                cuid = _cuid()
                self.data_sets[cuid] = {"name": body["name"], "status": "UPLOADING"}
                return {"cuid": cuid}
            case "PATCH", ["task", "dataset", "status"]:
                self.data_sets[body["cuid"]]["status"] = body["status"]
                return {}
        raise _Answer(404)

    def _store_keys(self) -> dict[str, Any]:
        self.store_keys_given += 1
        keys = self._keys
        credentials = {"tmpSecretId": keys["AWS_ACCESS_KEY_ID"], "tmpSecretKey": keys["AWS_SECRET_ACCESS_KEY"]}
        where = {"region": REGION, "bucket": BUCKET, "prefix": self.prefix, "expiredTime": int(time.time()) + 1800}
        return where | {"credentials": credentials | {"sessionToken": ""}}

    def _task(self, cuid: str) -> Task:
        matching = [task for task in self.tasks if task.cuid == cuid]
        if not matching:
            raise _Answer(404)
        return matching[0]

    def _start_task(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body.keys() <= {"src", "index", "python", "conf", "name", "desc", "combo", "datasets"}
        assert body["conf"] == {"key": API_KEY}
        if body.get("combo", COMBOS[0]) not in COMBOS:
            raise _Answer(401)
        if any(cuid not in self.data_sets for cuid in body.get("datasets", [])):
            raise _Answer(404)
        volumes = []
        for cuid in body.get("datasets", []):
            folder = f"datasets/{cuid}/"
            volumes.append({path.removeprefix(folder): data for path, data in self.objects(folder).items()})
        task = Task(_cuid(), body, self._read(body["src"]), volumes, times={"createdAt": _now()})
        self.tasks.append(task)
        thread = threading.Thread(target=self._run_task, args=(task,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return {}

    def _run_task(self, task: Task) -> None:
        task.status, task.times = "RUNNING", task.times | {"startedAt": _now()}
        status, message = self.run(task)
        with self._lock:
            if task.status != "STOPPED":
                task.status, task.message = status, message
            task.times = task.times | {"finishedAt": _now()}


class Machine:
    """Runs tasks as SwanLab's machines do.

    Each task gets a clean folder with the bundle, a Python with the packages of its requirements.txt, its data set
    below /data/, and an environment with the service's own variables only. All its processes end together. It does not
    see this repository.

    Args:
        folder: parent of the tasks' folders.
        is_time_up: returns True when the task has reached its time limit.
    """

    def __init__(self, folder: Path, is_time_up: Callable[[Task], bool] = lambda task: False) -> None:
        self._folder, self._is_time_up = folder, is_time_up

    def log(self, task: Task) -> str:
        """Return the output of the task."""
        return (self._folder / task.cuid / "log").read_text(errors="replace")

    def __call__(self, task: Task) -> tuple[str, str]:
        """Run a task; this makes the object a `Run`."""
        task_folder = self._folder / task.cuid
        code, home, volume, root = (task_folder / name for name in ("code", "home", "volume", "root"))
        for folder in (code, home, volume, root):
            folder.mkdir(parents=True)
        zipfile.ZipFile(io.BytesIO(task.bundle)).extractall(code)
        for path, content in [item for files in task.volumes for item in files.items()]:
            (volume / path).parent.mkdir(parents=True, exist_ok=True)
            (volume / path).write_bytes(content)
        assert task.body["python"] == "python{}.{}".format(*sys.version_info)
        programs = self.environment((code / "requirements.txt").read_bytes()) / "bin"
        variables = {
            "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "SWANLAB_RUNTIME": "task",
            "SWANLAB_API_KEY": task.body["conf"]["key"],
        }
        with (task_folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *("unshare", *([] if os.getuid() == 0 else ["--map-root-user"])),
                    *("--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _ENTER_NAMESPACES, "sh"),
                    *map(str, (root, REPOSITORY, volume, code)),
                    *(f"{name}={value}" for name, value in variables.items()),
                    *("python", task.body["index"]),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while True:
            with suppress(subprocess.TimeoutExpired):
                exit_code = process.wait(0.02)
                return ("COMPLETED", "") if exit_code == 0 else ("CRASHED", f"exit code {exit_code}")
            if task.stop.is_set() or self._is_time_up(task):
                process.kill()
                process.wait()
                return "CRASHED", "the task's time is up"

    def environment(self, requirements: bytes) -> Path:
        """Return a new virtual environment with these requirements; tasks with equal requirements share it."""
        folder = self._folder / f"python-{hashlib.sha256(requirements).hexdigest()[:12]}"
        if not folder.exists():
            requirements_file = self._folder / "requirements.txt"
            requirements_file.write_bytes(requirements)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(requirements_file)]
            subprocess.run(install, check=True)
        return folder


_ENTER_NAMESPACES = """
set -eu
root=$1 hidden=$2 volume=$3 code=$4
shift 4
mount -t tmpfs task "$root"
for entry in /*; do
    if [ -L "$entry" ]; then cp -P "$entry" "$root"
    elif [ -d "$entry" ] && [ "$entry" != /proc ] && [ "$entry" != /data ]; then
        mkdir "$root$entry"
        mount --rbind "$entry" "$root$entry"
    fi
done
mkdir "$root/proc" "$root/data"
mount -t proc proc "$root/proc"
mount -t tmpfs hidden "$root$hidden"
mount --bind "$volume" "$root/data"
mount -o remount,bind,ro "$root/data"
chroot "$root" env -i -C "$code" "$@"
"""
"""Script that runs a task in its own mount and process namespaces: its volume is at /data, and one folder is hidden."""


class _Answer(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


def _cuid() -> str:
    return secrets.token_hex(3)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
