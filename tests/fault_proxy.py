"""A proxy of the real S3 server that injects the faults of networks and stores, at random with a seed, or by rules."""

import asyncio
import math
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Any, TypeVar

_PIECE_BYTES = 2**16
_LINGER_SECONDS = 1.0
Result = TypeVar("Result")


class Fault(Enum):
    """A fault of a request or of its answer."""

    RESET_REQUEST = "connection reset in the middle of a request with a body"
    RESET_ANSWER = "connection reset in the middle of an answer, after the store has executed the request"
    TRUNCATE_ANSWER = "connection closed in the middle of an answer's body"
    SHORT_ANSWER = "half of the requested content, with a Content-Length of half the size"
    FLIP_REQUEST = "one bit of a request's body is flipped"
    FLIP_ANSWER = "one bit of an object's content is flipped"
    STALL = "no answer for `stall_seconds`, then the connection is closed; the store never sees the request"
    THROTTLE = "bodies are sent with at most `bytes_per_second`"


@dataclass(frozen=True)
class Refusal:
    """An error answer of S3 that the proxy sends itself; the store never sees the request."""

    status: int
    code: str


SLOW_DOWN = Refusal(503, "SlowDown")
STORM: Mapping[Fault | Refusal, float] = {
    SLOW_DOWN: 0.08,
    Fault.RESET_REQUEST: 0.04,
    Fault.RESET_ANSWER: 0.04,
    Fault.TRUNCATE_ANSWER: 0.04,
    Fault.SHORT_ANSWER: 0.04,
    Fault.FLIP_REQUEST: 0.04,
    Fault.STALL: 0.02,
    Fault.THROTTLE: 0.04,
}
"""Probabilities of all faults that a retry corrects. FLIP_ANSWER is missing, because not every read has a checksum."""


@dataclass
class Request:
    """A request that the proxy received, and the fault that it injects."""

    method: str
    path: str
    """Path and query, as they were sent."""
    fault: Fault | Refusal | None = None


Predicate = Callable[[Request], bool]


@dataclass
class _Rule:
    fault: Fault | Refusal
    when: Predicate
    skip: int
    times: float

    def applies(self, request: Request) -> bool:
        if self.times <= 0 or not self.when(request):
            return False
        self.skip -= 1
        if self.skip >= 0:
            return False
        self.times -= 1
        return True


class FaultProxy:
    """A proxy that listens on a free port of 127.0.0.1 inside the block. Requests without a fault pass unchanged.

    Any process may use it. The random choice of requests, and of positions in their bytes, depends only on `seed` and
    on the order of the requests.

    Args:
        target_url: address of the S3 server, ``http://host:port``.
        seed: seed of the random generator.
        chances: probability of each fault for requests to which no rule applies; may be changed at any time.
        stall_seconds: see `Fault.STALL`.
        bytes_per_second: see `Fault.THROTTLE`; each request has this rate.
    """

    def __init__(
        self,
        target_url: str,
        seed: int = 0,
        chances: Mapping[Fault | Refusal, float] | None = None,
        stall_seconds: float = 30,
        bytes_per_second: float = 8 * 2**20,
    ) -> None:
        host, _, port = target_url.removeprefix("http://").rstrip("/").partition(":")
        self._target = (host, int(port))
        self._random = Random(seed)
        self.chances = dict(chances or {})
        self.stall_seconds = stall_seconds
        self.bytes_per_second = bytes_per_second
        self.injected: Counter[Fault | Refusal | str] = Counter()
        """Number of injected faults of each kind, ``"outage"`` included. A fault that could not be applied is not
        counted."""
        self.requests: list[Request] = []
        self._received = threading.Condition()
        self._rules: list[_Rule] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        # This socket keeps the port reserved during an outage. It never listens.
        self._port = socket.socket()
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._port.bind(("127.0.0.1", 0))
        self.endpoint_url = f"http://127.0.0.1:{self._port.getsockname()[1]}"

    def __enter__(self) -> "FaultProxy":
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._hang_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._port.close()

    @property
    def open_connections(self) -> int:
        """Number of open connections of clients, idle ones included."""
        return len(self._connections)

    def inject(
        self,
        fault: Fault | Refusal,
        when: Predicate = lambda _: True,
        *,
        skip: int = 0,
        times: float = 1,
    ) -> None:
        """Inject a fault into the next `times` requests for which `when` holds, after skipping `skip` of them."""
        self._rules.append(_Rule(fault, when, skip, times))

    def wait_for(self, when: Predicate, timeout_seconds: float = 30) -> Request:
        """Return the first request for which `when` holds; wait for it if it has not been received yet.

        Raises:
            TimeoutError: no such request was received in time.
        """
        with self._received:
            request = self._received.wait_for(lambda: next(filter(when, self.requests), None), timeout_seconds)
        if request is None:
            raise TimeoutError(f"no such request in {timeout_seconds} s")
        return request

    def start_outage(self) -> None:
        """Refuse new connections from now on, and reset the open ones."""
        self.injected["outage"] += 1
        self._do(self._hang_up())

    def end_outage(self) -> None:
        """Accept connections again, at the same address."""
        self._do(self._listen())

    def _do(self, what: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result()

    # ---- In the thread's loop ----

    async def _listen(self) -> None:
        host, port = self._port.getsockname()
        self._server = await asyncio.start_server(self._accept, host, port, reuse_port=True, backlog=1000)

    async def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = self._loop.create_task(self._serve(_Peer(reader, writer)))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        if self._server is None:  # The outage has started meanwhile.
            connection.cancel()

    async def _serve(self, client: "_Peer") -> None:
        """Exchange requests and answers until the client, the store or a fault ends the connection."""
        store: _Peer | None = None
        try:
            is_kept = True
            while is_kept:
                message = await _Message.read(client.reader)
                if store is None or store.reader.at_eof():
                    store = _Peer(*await asyncio.open_connection(*self._target))
                is_kept = await self._exchange(message, client, store)
            await client.close()
        except (asyncio.CancelledError, _Reset):
            client.reset()
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError):  # The peer has gone, or it is not HTTP.
            client.writer.transport.abort()
        finally:
            if store is not None:
                store.reset()

    async def _exchange(self, message: "_Message", client: "_Peer", store: "_Peer") -> bool:
        """Pass on a request and its answer, or inject a fault. Returns True if the connection stays open."""
        method, path, _ = message.start.split(" ")
        request = Request(method, path)
        fault = request.fault = self._choose(request)
        with self._received:
            self.requests.append(request)
            self._received.notify_all()
        if isinstance(fault, Refusal) or fault in (Fault.STALL, Fault.THROTTLE):
            self.injected[fault] += 1
        if isinstance(fault, Refusal):
            return await self._refuse(fault, message, request, client)
        if fault is Fault.STALL:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.stall_seconds):
                    while await client.reader.read(_PIECE_BYTES):
                        pass
            return False
        # Both directions run at the same time, because a store may answer before it has read the whole request.
        ways = [
            self._loop.create_task(self._pass(message, client, store, fault, _ON_REQUESTS)),
            self._loop.create_task(self._pass_answer(message, request, client, store, fault)),
        ]
        try:
            return all(await asyncio.gather(*ways))
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def _choose(self, request: Request) -> Fault | Refusal | None:
        for rule in self._rules:
            if rule.applies(request):
                return rule.fault
        roll = self._random.random()
        for fault, chance in self.chances.items():
            roll -= chance
            if roll < 0:
                return fault
        return None

    async def _refuse(self, refusal: Refusal, message: "_Message", request: Request, client: "_Peer") -> bool:
        if is_kept := "expect" not in message.headers:
            async for _ in message.pieces(client.reader):
                pass
        text = f"<Error><Code>{refusal.code}</Code><Message>as the proxy chose</Message></Error>"
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'
        head = f"HTTP/1.1 {refusal.status} {refusal.code}\r\nContent-Type: application/xml\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: {'keep-alive' if is_kept else 'close'}\r\n\r\n"
        await client.send((head if request.method == "HEAD" else head + body).encode())
        return is_kept

    async def _pass_answer(
        self, message: "_Message", request: Request, client: "_Peer", store: "_Peer", fault: Fault | None
    ) -> bool:
        while (answer := await _Message.read(store.reader, request.method)).status < 200:
            await client.send(answer.head)
        is_object = answer.status < 300 and "xml" not in answer.headers.get("content-type", "")
        if fault is Fault.SHORT_ANSWER and is_object and answer.length:
            self.injected[fault] += 1
            answer = answer.halved()
        faults = _ON_ANSWERS | {Fault.FLIP_ANSWER} if is_object else _ON_ANSWERS
        is_whole = await self._pass(answer, store, client, fault, faults)
        return is_whole and not (message.is_last or answer.is_last)

    async def _pass(
        self, message: "_Message", source: "_Peer", target: "_Peer", fault: Fault | None, faults: frozenset[Fault]
    ) -> bool:
        """Pass a message on, with the fault if it is one of `faults`. Returns False if it was not completed."""
        first = 0 if fault is Fault.RESET_ANSWER else len(message.head)
        end = len(message.head) + (message.length or 0)
        spot = self._random.randrange(first, end) if fault in faults and first < end else -1
        async for piece in message.pieces(source.reader, with_head=True):
            data = bytearray(piece)
            if fault is not None and 0 <= spot < len(data):
                self.injected[fault] += 1
                if fault in (Fault.FLIP_REQUEST, Fault.FLIP_ANSWER):
                    data[spot] ^= 1 << self._random.randrange(8)
                else:
                    await target.send(data[:spot])
                    if fault is Fault.TRUNCATE_ANSWER:
                        return False
                    raise _Reset
            spot -= len(piece)
            try:
                await target.send(data)
            except OSError:  # The target reads no more. The other direction shows if it has answered.
                return False
            if fault is Fault.THROTTLE:
                await asyncio.sleep(len(data) / self.bytes_per_second)
        return True


_ON_REQUESTS = frozenset({Fault.RESET_REQUEST, Fault.FLIP_REQUEST})
_ON_ANSWERS = frozenset({Fault.RESET_ANSWER, Fault.TRUNCATE_ANSWER})


class _Reset(Exception):
    """Raised to reset both connections of an exchange."""


@dataclass
class _Peer:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes | bytearray) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def close(self) -> None:
        """Close gracefully. Closing while the peer still sends would reset the connection and lose the answer."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                self.writer.write_eof()
                while await self.reader.read(_PIECE_BYTES):
                    pass
        self.writer.close()

    def reset(self) -> None:
        with suppress(OSError):
            linger = struct.pack("ii", 1, 0)  # Closing then discards unsent bytes and sends RST.
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


@dataclass
class _Message:
    """A request, or the answer to a request with `method`. Only its head has been read."""

    head: bytes
    method: str | None

    def __post_init__(self) -> None:
        self.start, *lines = self.head.decode("latin-1").rstrip().split("\r\n")
        self.headers = {name.strip().lower(): value.strip() for name, _, value in (ln.partition(":") for ln in lines)}

    @classmethod
    async def read(cls, reader: asyncio.StreamReader, method: str | None = None) -> "_Message":
        return cls(await reader.readuntil(b"\r\n\r\n"), method)

    def halved(self) -> "_Message":
        """Return this message with half the Content-Length, and a header that closes the connection."""
        lines = self.head.decode("latin-1").rstrip().split("\r\n")
        lines = [line for line in lines if not line.lower().startswith(("content-length:", "connection:"))]
        lines += [f"Content-Length: {(self.length or 0) // 2}", "Connection: close"]
        return _Message("\r\n".join([*lines, "", ""]).encode("latin-1"), self.method)

    @property
    def status(self) -> int:
        return int(self.start.split(" ")[1])

    @property
    def is_chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def length(self) -> int | None:
        """Length of the body in bytes; None if only the end of the body shows it."""
        if self.method == "HEAD" or (self.method and (self.status < 200 or self.status in (204, 304))):
            return 0
        if self.is_chunked:
            return None
        stated = self.headers.get("content-length", None if self.method else "0")
        return None if stated is None else int(stated)

    @property
    def is_last(self) -> bool:
        """True if the connection ends after this message."""
        return self.headers.get("connection", "").lower() == "close" or (self.length is None and not self.is_chunked)

    async def pieces(self, reader: asyncio.StreamReader, with_head: bool = False) -> AsyncIterator[bytes]:
        """Yield the bytes of the body, as they were sent."""
        if with_head:
            yield self.head
        if self.length is None and self.is_chunked:
            line = await reader.readuntil(b"\r\n")
            while (size := int(line.split(b";")[0], 16)) > 0:
                yield line + await reader.readexactly(size + 2)
                line = await reader.readuntil(b"\r\n")
            yield line
            while line != b"\r\n":  # These are the trailers after the last chunk.
                yield (line := await reader.readuntil(b"\r\n"))
            return
        left = math.inf if self.length is None else self.length
        while left > 0 and (piece := await reader.read(int(min(left, _PIECE_BYTES)))):
            yield piece
            left -= len(piece)
        if 0 < left < math.inf:
            raise EOFError("the body ended early")
