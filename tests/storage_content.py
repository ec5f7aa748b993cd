"""Content for tests of storage, and web servers that answer them."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from job import storage

LARGE = 3 * storage.PART_BYTES + 12_345
"""Size in bytes of a file that is transferred in several parts."""


def content(size: int, seed: int = 0) -> bytes:
    """Return this number of random bytes."""
    return random.Random(seed).randbytes(size)


@contextmanager
def http_service(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a web server on this machine, and yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
