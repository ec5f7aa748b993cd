"""Simulate a slow network link in front of a server, with a latency and a maximum rate."""

import asyncio
import math
import threading
from typing import Self

_PIECE_BYTES = 2**16


class LongLine:
    """A simulated link to a server, with a latency and a maximum rate; a context manager.

    Inside its ``with`` block it listens on a free port and forwards all bytes to the server and back.

    Args:
        target_url: ``http://host:port`` of the S3 server.
        latency_seconds: Delay of each answer and of each new connection.
        bytes_per_second: Maximum rate of all answers together.
    """

    def __init__(self, target_url: str, latency_seconds: float, bytes_per_second: float) -> None:
        host, _, port = target_url.removeprefix("http://").partition(":")
        self._target = (host, int(port))
        self._latency_seconds, self._bytes_per_second = latency_seconds, bytes_per_second
        self._free_at = 0.0
        self.carried_bytes = 0
        """Bytes of all answers so far."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="long-line", daemon=True)
        self.endpoint_url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1"), self._loop).result()
        self.endpoint_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _hang_up(self) -> None:
        """Close all connections."""
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self._latency_seconds)
        from_store, to_store = await asyncio.open_connection(*self._target)
        await asyncio.gather(self._ask(reader, to_store), self._answer(from_store, writer), return_exceptions=True)

    async def _ask(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while piece := await source.read(_PIECE_BYTES):
            target.write(piece)
            await target.drain()
        target.close()

    async def _answer(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        sent_at = 0.0
        while piece := await source.read(_PIECE_BYTES):
            # All connections share the link, which carries one piece at a time. The next piece of this connection
            # waits until this one is sent.
            self._free_at = max(self._free_at, self._loop.time()) + len(piece) / self._bytes_per_second
            sent_at = self._free_at
            self._loop.call_at(sent_at + self._latency_seconds, target.write, piece)
            self.carried_bytes += len(piece)
            await asyncio.sleep(sent_at - self._loop.time())
        # The loop may run two calls for the same time in any order, so this one must be strictly later.
        self._loop.call_at(math.nextafter(sent_at + self._latency_seconds, math.inf), target.close)
