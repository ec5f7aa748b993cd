"""A small hub over HTTP with the requests that `datasets` makes of Hugging Face's to stream files, faults included."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class DatasetHub:
    """One data set, its revisions ``main`` and `COMMIT`; its files can change while it is served."""

    name: str
    files: dict[str, bytes]
    is_gated: bool = False
    """Only requests with a token are answered."""
    cut_off: int = 0
    """So many answers with a CSV file's bytes break off in the middle."""
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def tree(self, folder: str, is_recursive: bool) -> list[dict[str, Any]]:
        prefix = f"{folder}/" if folder else ""
        below = sorted(path for path in self.files if path.startswith(prefix))
        folders = {
            "/".join(path.split("/")[:depth])
            for path in below
            for depth in range(1, path.count("/") + 1)
            if len("/".join(path.split("/")[:depth])) > len(folder)
        }
        listed = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        listed += [self.entry(path) for path in below]
        return [one for one in listed if is_recursive or "/" not in one["path"].removeprefix(prefix)]


def _handler(hub: DatasetHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send_file(self, path: str) -> None:
            data = hub.files[path]
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if wanted:
                start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
                headers["Content_Range"] = f"bytes {start}-{end}/{len(data)}"
                data = data[start : end + 1]
            if self.command == "GET" and hub.cut_off > 0 and path.endswith(".csv"):
                hub.cut_off -= 1
                self.send_response(206 if wanted else 200)
                for name, value in {"Content_Length": str(len(data)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            self.answer(206 if wanted else 200, data, **headers)

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            address = urlsplit(self.path)
            path, query, name = unquote(address.path), parse_qs(address.query), re.escape(hub.name)
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not re.match(f"(/api)?/datasets/{name}(/|$)", path):
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            elif hub.is_gated and not self.headers.get("Authorization"):
                self.answer(401, b"{}", X_Error_Code="GatedRepo")
            elif (resolved := re.fullmatch(f"/datasets/{name}/resolve/([^/]+)/(.*)", path)) is not None:
                if resolved[1] not in ("main", COMMIT):
                    self.answer(404, b"", X_Error_Code="RevisionNotFound")
                elif resolved[2] in hub.files:
                    self.send_file(resolved[2])
                else:
                    self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            elif (asked := re.fullmatch(f"/api/datasets/{name}(?:/revision/(.*))?", path)) is not None:
                if asked[1] in (None, "main", COMMIT):
                    self.answer(200, json.dumps({"id": hub.name, "sha": COMMIT, "siblings": []}).encode())
                else:
                    self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            elif (asked := re.fullmatch(f"/api/datasets/{name}/tree/{COMMIT}(?:/(.*))?", path)) is not None:
                tree = hub.tree(asked[1] or "", query.get("recursive", [""])[0].lower() in ("true", "1"))
                if tree:
                    self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
                else:
                    self.answer(404, b"{}", X_Error_Code="EntryNotFound")
            elif path == f"/api/datasets/{hub.name}/paths-info/{COMMIT}":
                form = json.loads(sent) if sent.startswith(b"{") else parse_qs(sent.decode())
                wanted = form["paths"] if isinstance(form["paths"], list) else [form["paths"]]
                found = [hub.entry(one) for one in wanted if one in hub.files]
                found += [
                    {"type": "directory", "path": one, "oid": "0" * 40}
                    for one in wanted
                    if one not in hub.files and hub.tree(one, True)
                ]
                self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
            else:
                self.answer(404, b"", X_Error_Code="EntryNotFound")

        do_HEAD = do_POST = do_GET

    return Handler


@contextmanager
def dataset_hub(name: str, files: dict[str, bytes]) -> Iterator[DatasetHub]:
    """A running hub with this data set."""
    hub = DatasetHub(name, files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
