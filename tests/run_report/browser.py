"""A real browser without a window, driven through its DevTools protocol, which tells each request of a page."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--lang=en-US"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0"),
)
_DEADLINE_SECONDS = 120


class Tab:
    """A page in the browser; see https://chromedevtools.github.io/devtools-protocol for the methods."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.requests: list[str] = []
        """URLs that the pages have asked for."""
        self.is_loaded = False

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    async def open(self, path: Path, width: int, scheme: str) -> None:
        """Load a file into a window of this width, in the colour scheme ``light`` or ``dark``."""
        mobile = width < 500
        await self.call("Page.enable")
        await self.call("Network.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile
        )
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.is_loaded = False
        await self.call("Page.navigate", url=path.as_uri())
        while not self.is_loaded:
            await self._receive()

    async def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(await self._socket.receive_str(timeout=_DEADLINE_SECONDS))
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self.is_loaded |= message.get("method") == "Page.loadEventFired"
        return message


@asynccontextmanager
async def browser_tab() -> AsyncIterator[Tab]:
    """Start a browser, and yield its tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            str(BROWSER), *_FLAGS, f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [page for page in await answer.json() if page["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Tab(socket)
        finally:
            process.kill()
            await process.wait()


async def _port(path: Path) -> int:
    """Return the port that the browser has written to a file, once it has."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not (path.exists() and path.read_text().count("\n")):
        assert time.monotonic() < deadline, "the browser did not start"
        await asyncio.sleep(0.1)
    return int(path.read_text().splitlines()[0])
