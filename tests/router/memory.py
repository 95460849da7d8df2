"""Connections of either side in memory: bytes in, what was understood out."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import Any

from eldr.router.config.groups import ClientLimits
from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.client import ExchangeError, WorkerConnection
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from eldr.router.http.pool import WorkerPool
from eldr.router.http.server import ClientConnection, State
from eldr.router.http.turns import Turns

LIMITS = ClientLimits(
    max_body_bytes=10_000,
    max_bodies_bytes=1_000_000,
    max_connections=10,
    head_timeout_s=5.0,
    body_timeout_s=10.0,
    idle_timeout_s=20.0,
    stall_timeout_s=30.0,
)
# One event loop for all: the fuzzer starts a connection many thousand times a second.
RUNNER = asyncio.Runner()


# A request: method, path, headers, body.
Said = tuple[bytes, bytes, dict[bytes, bytes], bytes]


class Recorder:
    """A handler that keeps requests and answers each at once."""

    def __init__(self) -> None:
        self.connections: set[ClientConnection] = set()
        self.closing = False
        self.requests: list[Said] = []
        self.errors: list[int] = []

    def answer_lines(self, headers: dict[bytes, bytes]) -> bytes:
        return b""

    def permit(self, method: bytes, path: bytes, headers: dict[bytes, bytes]) -> str:
        return ""

    def handle(self, request: Request, exchange: ClientExchange) -> None:
        self.requests.append((request.method, request.path, request.headers, request.body))
        exchange.respond(200, b"%d" % len(self.requests))

    def refused(self, error: ApiError) -> None:
        self.errors.append(error.status)


class Holding(Recorder):
    """A handler that keeps requests and answers none. held: the exchanges that wait for an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[ClientExchange] = []

    def handle(self, request: Request, exchange: ClientExchange) -> None:
        self.requests.append((request.method, request.path, request.headers, request.body))
        self.held.append(exchange)


class MemoryTransport(asyncio.Transport):
    """protocol: hears when the peer stops reading. stalls: numbers of the writes behind which it does so for a turn
    of the event loop."""

    protocol: ClientConnection

    def __init__(self, stalls: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.written = b""
        self.closed = False
        self.reading = True
        self._stalls = stalls
        self._writes = 0

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.written += data
        self._writes += 1
        if self._writes in self._stalls:
            self.protocol.pause_writing()
            asyncio.get_running_loop().call_soon(self.protocol.resume_writing)

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def can_write_eof(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def abort(self) -> None:
        self.closed = True


class UnreadTransport(MemoryTransport):
    """To a peer that reads nothing but in `take`. unsent: bytes that wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent = 0
        self._high = 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = high or 0

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        super().write(data)
        above = self.unsent > self._high
        self.unsent += len(data)
        if self.unsent > self._high and not above:
            self.protocol.pause_writing()

    def take(self) -> None:
        above, self.unsent = self.unsent > self._high, 0
        if above:
            self.protocol.resume_writing()


class OpenChannel:
    """The connection of a client that reads and stays."""

    stalled = False
    stopping = False

    def finish(self, keep_alive: bool) -> None: ...

    def close(self) -> None: ...


def feed(pieces: list[bytes], stalls: frozenset[int] = frozenset()) -> tuple[list[Said], list[int], list[bytes]]:
    """The requests, refusals and answers' status lines that these bytes of a client lead to.

    stalls: numbers of the router's writes behind which the client does not read for a while.
    """

    async def run() -> tuple[list[Said], list[int], list[bytes]]:
        handler, transport = Recorder(), MemoryTransport(stalls)
        connection = transport.protocol = ClientConnection(handler, LIMITS, BodyMemory(LIMITS), Turns())
        connection.connection_made(transport)
        for piece in pieces:
            if not transport.closed:
                connection.data_received(piece)
            while not (transport.reading or transport.closed):
                await asyncio.sleep(0)
        while connection.state is State.ANSWERING:  # a compressed body is decoded
            await asyncio.sleep(0)
        if stalls:
            await asyncio.sleep(0)  # behind the last write
        statuses = re.findall(rb"HTTP/1\.1 \d{3} [A-Z]+", transport.written)
        return handler.requests, handler.errors, statuses

    return RUNNER.run(run())


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges) if a < b]


class Heard:
    begun = False

    def __init__(self) -> None:
        self.memory: BodyMemory | None = None
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.framed = 0
        self.ended: list[str] = []

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.status, self.headers = status, headers

    def on_body(self, data: bytes, framed: bytes | None = None) -> None:
        assert framed is None or framed == b"%x\r\n%b\r\n" % (len(data), data)
        self.body += data
        self.framed += framed is not None

    def on_done(self) -> None:
        self.ended.append("done")

    def on_failed(self, error: ExchangeError) -> None:
        self.ended.append("failed")


class Wire(asyncio.Transport):
    """Takes what is written and remembers whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True


def hear(pieces: list[bytes], lost: bool = False) -> tuple[Heard, bool]:
    """What an exchange hears of these bytes, and whether its connection could be used again."""
    pool = WorkerPool("http://w:1", connect_timeout_s=1.0, memory=BodyMemory(LIMITS))
    connection, wire, heard = WorkerConnection(pool), Wire(), Heard()
    connection.connection_made(wire)
    connection.start(heard, b"request", 60.0)
    for piece in pieces:
        if not wire.closed:
            connection.data_received(piece)
    kept = not wire.closed and not pool.active
    if lost:
        connection.connection_lost(None)
    return heard, kept
