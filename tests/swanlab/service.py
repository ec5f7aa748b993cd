"""A stand-in for SwanLab's service and its GPU machines: its protocol over HTTP, and tasks that really run.

Faithful in what is known of the protocol: paths, bodies, the session cookie, states, which statuses refuse what. In
place of Tencent COS there is a real S3 server; its keys are not temporary, so there is no session token. What nobody
has told: how a task gets the API key (here as SWANLAB_API_KEY), the state of a task that its time limit ends (CRASHED).
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
A_WEB_PAGE = 299
"""To be planted as a status: an answer of 200 that is HTML."""


@dataclass
class Task:
    """A task that was submitted."""

    cuid: str
    body: dict[str, Any]
    """As POST /task had it."""
    bundle: bytes
    volumes: list[dict[str, bytes]]
    """The files of its data sets."""
    status: str = "QUEUING"
    message: str = ""
    times: dict[str, str] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def shown(self) -> dict[str, Any]:
        body = {name: self.body[name] for name in ("name", "python", "index")} | {"combo": self.body.get("combo")}
        known = {"cuid": self.cuid, "status": self.status, "msg": self.message or None, **self.times, **body}
        if self.status in ("RUNNING", "COMPLETED"):
            known |= {"pName": "WikiLLM", "eId": f"run-of-{self.cuid}"}
        return known


Run = Callable[[Task], tuple[str, str]]
"""Runs a task; returns the state it ends in, and the service's message."""


def completed(task: Task) -> tuple[str, str]:
    return "COMPLETED", ""


class SwanLab:
    """The service on 127.0.0.1, inside the block.

    Attributes:
        run: what becomes of a task.
        requests: method and path of every call.
        planted: statuses that calls get instead of an answer, by method and path; an int, or a list used up one by one.
        lost: calls whose work is done, and whose answer is a 503.
        data_sets: by id: name and status.
    """

    def __init__(self, store: S3Server, client: Any, run: Run = completed) -> None:
        self._client, self._keys, self.run = client, store.environment, run
        self.prefix = f"codes/{secrets.token_hex(6)}"
        self.tasks: list[Task] = []
        self.data_sets: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.planted: dict[tuple[str, str], int | list[int]] = {}
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
        """What is in the user's part of the store, by path."""
        found = self._client.list_objects_v2(Bucket=BUCKET, Prefix=f"{self.prefix}/{prefix}").get("Contents", [])
        return {item["Key"].removeprefix(f"{self.prefix}/"): self._read(item["Key"]) for item in found}

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
                planted = self.planted.get((handler.command, path))
                if isinstance(planted, list):
                    planted = planted.pop(0) if planted else None
                if planted:
                    raise _Answer(planted)
                body = self._answer(handler.command, path, query, json.loads(raw) if raw else {}, handler)
                status = 503 if (handler.command, path) in self.lost else 200
            except _Answer as refused:
                status, body = refused.status, {"message": f"no {API_KEY}"}
        content = b"<html>" if status == A_WEB_PAGE else json.dumps(body).encode()
        handler.send_response(200 if status == A_WEB_PAGE else status)
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
                return self._begin(body)
            case "GET", ["task", "queuing"]:
                return {"sum": sum(task.status == "QUEUING" for task in self.tasks)}
            case "GET", ["task", "datasets"]:
                return [
                    {"cuid": cuid, "name": one["name"], "createdAt": _now()} for cuid, one in self.data_sets.items()
                ]
            case "GET", ["task"]:
                return [task.shown for task in reversed(self.tasks)][: int(query.removeprefix("num="))]
            case "GET", ["task", cuid]:
                return self._task(cuid).shown
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
        found = [task for task in self.tasks if task.cuid == cuid]
        if not found:
            raise _Answer(404)
        return found[0]

    def _begin(self, body: dict[str, Any]) -> dict[str, Any]:
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
        thread = threading.Thread(target=self._work, args=(task,), daemon=True)
        self._threads.append(thread)
        thread.start()
        return {}

    def _work(self, task: Task) -> None:
        task.status, task.times = "RUNNING", task.times | {"startedAt": _now()}
        status, message = self.run(task)
        with self._lock:
            if task.status != "STOPPED":
                task.status, task.message = status, message
            task.times = task.times | {"finishedAt": _now()}


class Machine:
    """Runs tasks as one of SwanLab's machines does.

    Each gets a clean folder with what was sent, Python with what its requirements.txt asks for, its data set below
    /data/, an environment that holds nothing but the service's own, and processes that end together. This repository
    is out of its sight.

    Args:
        folder: for the tasks.
        is_time_up: whether the task's four hours are over; they pass faster here.
    """

    def __init__(self, folder: Path, is_time_up: Callable[[Task], bool] = lambda task: False) -> None:
        self._folder, self._is_time_up = folder, is_time_up

    def log(self, task: Task) -> str:
        """What the task has printed."""
        return (self._folder / task.cuid / "log").read_text(errors="replace")

    def __call__(self, task: Task) -> tuple[str, str]:
        """A `Run`."""
        place = self._folder / task.cuid
        code, home, volume, root = (place / name for name in ("code", "home", "volume", "root"))
        for folder in (code, home, volume, root):
            folder.mkdir(parents=True)
        zipfile.ZipFile(io.BytesIO(task.bundle)).extractall(code)
        for path, content in [item for files in task.volumes for item in files.items()]:
            (volume / path).parent.mkdir(parents=True, exist_ok=True)
            (volume / path).write_bytes(content)
        assert task.body["python"] == "python{}.{}".format(*sys.version_info)
        programs = self.environment((code / "requirements.txt").read_bytes()) / "bin"
        given = {
            "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "SWANLAB_RUNTIME": "task",
            "SWANLAB_API_KEY": task.body["conf"]["key"],
        }
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *("unshare", *([] if os.getuid() == 0 else ["--map-root-user"])),
                    *("--mount", "--pid", "--fork", "--kill-child", "sh", "-c", _ENTER, "sh"),
                    *map(str, (root, REPOSITORY, volume, code)),
                    *(f"{name}={value}" for name, value in given.items()),
                    *("python", task.body["index"]),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while True:
            with suppress(subprocess.TimeoutExpired):
                code_of_exit = process.wait(0.02)
                return ("COMPLETED", "") if code_of_exit == 0 else ("CRASHED", f"exit code {code_of_exit}")
            if task.stop.is_set() or self._is_time_up(task):
                process.kill()
                process.wait()
                return "CRASHED", "the task's time is up"

    def environment(self, requirements: bytes) -> Path:
        """A fresh virtual environment; one for all tasks with equal requirements."""
        folder = self._folder / f"python-{hashlib.sha256(requirements).hexdigest()[:12]}"
        if not folder.exists():
            listed = self._folder / "requirements.txt"
            listed.write_bytes(requirements)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "-r", str(listed)]
            subprocess.run(install, check=True)
        return folder


_ENTER = """
set -eu
root=$1 hidden=$2 volume=$3 code=$4
shift 4
mount -t tmpfs task "$root"
for one in /*; do
    if [ -L "$one" ]; then cp -P "$one" "$root"
    elif [ -d "$one" ] && [ "$one" != /proc ] && [ "$one" != /data ]; then
        mkdir "$root$one"
        mount --rbind "$one" "$root$one"
    fi
done
mkdir "$root/proc" "$root/data"
mount -t proc proc "$root/proc"
mount -t tmpfs hidden "$root$hidden"
mount --bind "$volume" "$root/data"
mount -o remount,bind,ro "$root/data"
chroot "$root" env -i -C "$code" "$@"
"""
"""A machine of its own, by mount and process namespaces: the same files, but /data is the volume and one is hidden."""


class _Answer(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


def _cuid() -> str:
    return secrets.token_hex(3)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
