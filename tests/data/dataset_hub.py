"""A local HTTP server that answers like Hugging Face's hub, and can be told to fail.

It knows the requests that `huggingface_hub` makes to download a data set and that `datasets` makes to stream its files:
resolve a revision, list the tree of a commit, describe paths, and send the metadata and the bytes of a file.
"""

import hashlib
import json
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class DatasetHub:
    """Data sets, each with its revisions ``main`` and `COMMIT`."""

    data_sets: dict[str, dict[str, bytes]]
    """Files by path, for each data set. A data set without files is gated: every request is refused."""
    gated: Collection[str] = ()
    """Data sets whose files are listed, but refused when they are requested."""
    cut_off: int = 0
    """Number of answers with a CSV file that still break off in the middle."""
    url: str = ""
    requests: list[str] = field(default_factory=list)
    """Method and path of each request."""


def entry(files: dict[str, bytes], path: str) -> dict[str, Any]:
    """Return the hub's description of a file."""
    data = files[path]
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def tree(files: dict[str, bytes], folder: str, is_recursive: bool) -> list[dict[str, Any]]:
    """Return the hub's descriptions of the files and folders below a folder."""
    prefix = f"{folder}/" if folder else ""
    below = sorted(path for path in files if path.startswith(prefix))
    folders = {
        "/".join(path.split("/")[:depth])
        for path in below
        for depth in range(1, path.count("/") + 1)
        if len("/".join(path.split("/")[:depth])) > len(folder)
    }
    listed = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)]
    listed += [entry(files, path) for path in below]
    return [item for item in listed if is_recursive or "/" not in item["path"].removeprefix(prefix)]


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

        def send_file(self, path: str, data: bytes) -> None:
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
            path, query = unquote(address.path), parse_qs(address.query)
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            named = re.match("(?:/api)?/datasets/([^/]+/[^/]+)(?=/|$)", path)
            name = named[1] if named else ""
            files = hub.data_sets.get(name)
            name = re.escape(name)
            if files is None:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            elif not files:
                self.answer(403, b"{}", X_Error_Code="GatedRepo")
            elif (resolved := re.fullmatch(f"/datasets/{name}/resolve/([^/]+)/(.*)", path)) is not None:
                if resolved[1] not in ("main", COMMIT):
                    self.answer(404, b"", X_Error_Code="RevisionNotFound")
                elif named and named[1] in hub.gated:
                    self.answer(403, b"", X_Error_Code="GatedRepo")
                elif resolved[2] in files:
                    self.send_file(resolved[2], files[resolved[2]])
                else:
                    self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            elif (asked := re.fullmatch(f"/api/datasets/{name}(?:/revision/(.*))?", path)) is not None:
                if asked[1] in (None, "main", COMMIT):
                    self.answer(200, json.dumps({"id": named and named[1], "sha": COMMIT, "siblings": []}).encode())
                else:
                    self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            elif (asked := re.fullmatch(f"/api/datasets/{name}/tree/{COMMIT}(?:/(.*))?", path)) is not None:
                listed = tree(files, asked[1] or "", query.get("recursive", [""])[0].lower() in ("true", "1"))
                if listed:
                    self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
                else:
                    self.answer(404, b"{}", X_Error_Code="EntryNotFound")
            elif re.fullmatch(f"/api/datasets/{name}/paths-info/{COMMIT}", path):
                form = json.loads(sent) if sent.startswith(b"{") else parse_qs(sent.decode())
                wanted = form["paths"] if isinstance(form["paths"], list) else [form["paths"]]
                found = [entry(files, one) for one in wanted if one in files]
                found += [
                    {"type": "directory", "path": one, "oid": "0" * 40}
                    for one in wanted
                    if one not in files and tree(files, one, True)
                ]
                self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
            else:
                self.answer(404, b"", X_Error_Code="EntryNotFound")

        def do_CONNECT(self) -> None:
            # The tests set this server as the proxy, so requests to any other host are recorded here.
            hub.requests.append(f"CONNECT {self.path}")
            self.answer(502)

        do_HEAD = do_POST = do_GET

    return Handler


@contextmanager
def dataset_hub(data_sets: dict[str, dict[str, bytes]], gated: Collection[str] = ()) -> Iterator[DatasetHub]:
    """Run a hub with these data sets."""
    hub = DatasetHub(data_sets, gated)
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
