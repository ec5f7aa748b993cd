"""Stand-in for a package mirror: an HTTP server on this machine that records the requested paths."""

import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit


class Mirror:
    """The server, running inside a `with` block on a free port.

    Args:
        archive: address to which requests are redirected, such as ``http://deb.debian.org``; None: answer with 404.
    """

    def __init__(self, archive: str | None) -> None:
        self.requested: list[str] = []
        """Paths of the requests so far."""
        requested = self.requested

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requested.append(self.path)
                self.send_response(404 if archive is None else 302)
                if archive is not None:
                    self.send_header("Location", f"{archive}{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @staticmethod
    def of_debian() -> "Mirror":
        """Return a mirror that redirects to the archive which this machine's apt uses."""
        targets = ["apt-get", "indextargets", "--format=$(REPO_URI)", "Created-By: Packages", "Component: main"]
        lines = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.splitlines()
        archive = urlsplit(next(line for line in lines if line.rstrip("/").endswith("/debian")))
        return Mirror(f"{archive.scheme}://{archive.netloc}")

    def __enter__(self) -> "Mirror":
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
