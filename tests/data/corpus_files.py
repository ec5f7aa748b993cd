"""The same documents in every form a corpus may have, and a small hub to fetch them from."""

import gzip
import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Fields = dict[str, Any]


def json_lines(records: Sequence[Fields], line_end: str = "\n", ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(one, ensure_ascii=ascii_only) + line_end for one in records).encode()


def json_array(records: Sequence[Fields], indent: int | None = None, ascii_only: bool = False) -> bytes:
    return json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode()


def parquet(records: Sequence[Fields], rows_per_group: int = 100, **columns: pa.DataType) -> bytes:
    names = dict.fromkeys(name for one in records for name in one)
    arrays = {name: pa.array([one.get(name) for one in records], columns.get(name)) for name in names}
    file = io.BytesIO()
    pq.write_table(pa.table(arrays), file, row_group_size=rows_per_group)
    return file.getvalue()


def compressed(data: bytes, ending: str, members: int = 1) -> bytes:
    """`data` as `members` gzip members or Zstandard frames in a row."""
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress, "": bytes}[ending]
    size = max(1, -(-len(data) // members))
    return b"".join(compress(data[start : start + size]) for start in range(0, len(data), size))


COMMIT = "c0ffee" + "0" * 34


@contextmanager
def local_hub(data_set: str, files: dict[str, bytes], gated: bool = False) -> Iterator[str]:
    """The URL of a local HTTP server with the four requests of Hugging Face's hub that a download makes.

    Resolving a revision, listing the tree of a commit, a file's metadata (HEAD), and a file's bytes.
    """

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            name = re.escape(data_set)
            if not re.match(f"(/api)?/datasets/{name}/", path):
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            elif revision := re.fullmatch(f"/api/datasets/{name}/revision/(.*)", path):
                if revision[1] in ("main", COMMIT):
                    self.answer(200, json.dumps({"id": data_set, "sha": COMMIT, "siblings": []}).encode())
                else:
                    self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            elif path == f"/api/datasets/{data_set}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                ]
                self.answer(200, json.dumps(tree).encode())
            elif gated:
                self.answer(403, b"", X_Error_Code="GatedRepo")
            elif (resolved := re.fullmatch(f"/datasets/{name}/resolve/{COMMIT}/(.*)", path)) and resolved[1] in files:
                data = files[resolved[1]]
                self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
            else:
                self.answer(404, b"", X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
