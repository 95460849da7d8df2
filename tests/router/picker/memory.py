"""The picker's side of a connection in memory: bytes in, and what becomes of the calls in them."""

from __future__ import annotations

import asyncio
from typing import Any

import h2.config
import h2.connection

from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.message import Request
from eldr.router.picker.conversation import Conversation
from eldr.router.picker.grpc import Call, open_call
from eldr.router.picker.http2 import Headers, Http2Connection, Receiver, Stream
from eldr.router.picker.replies import Destination
from eldr.router.picker.server import PROCESS
from tests.router.memory import LIMITS, MemoryTransport

MOST_STREAMS = 20


def _call_of_a_gateway() -> bytes:
    """The bytes with which a client of h2's opens a connection and a call."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    fields = {":method": "POST", ":scheme": "http", ":path": PROCESS.decode(), ":authority": "x"}
    client.send_headers(1, [*fields.items(), ("content-type", "application/grpc"), ("te", "trailers")])
    return client.data_to_send()


CALL_OF_A_GATEWAY = _call_of_a_gateway()
DESTINATION = Destination(("10.0.0.1:8000", "10.0.0.2:8000"))


class Chosen:
    """The choice for one request, made at once. told: what it hears, in order."""

    def __init__(self, request: Request) -> None:
        self.body = request.body
        self.told: list[str] = []

    def answered(self, status: int, endpoint: str, reached: bool) -> None:
        self.told.append("answered")

    def ended(self) -> None:
        self.told.append("ended")


class Choosing:
    """A service that names the same workers to every request, in the next turn of the event loop."""

    def __init__(self) -> None:
        self.connections: set[Any] = set()
        self.closing = False
        self.memory = BodyMemory(LIMITS)
        self.choices: list[Chosen] = []
        self.refusals: list[int] = []

    def open(self, stream: Stream, headers: Headers) -> Receiver:
        return open_call(stream, headers, {PROCESS: self._process}, LIMITS.max_body_bytes + 1000)

    def _process(self, call: Call) -> Conversation:
        return Conversation(call, self._choose, self._refused, LIMITS.max_body_bytes, self.memory)

    def _refused(self, path: bytes, status: int) -> None:
        self.refusals.append(status)

    def _choose(self, conversation: Conversation, request: Request, subset: frozenset[str] | None) -> Chosen:
        chosen = Chosen(request)
        self.choices.append(chosen)
        asyncio.get_running_loop().call_soon(conversation.picked, DESTINATION)
        return chosen


async def converse(pieces: list[bytes]) -> tuple[Choosing, bytes]:
    """Feed a connection, then lose it. Returns what was chosen, and what was written."""
    service = Choosing()
    connection, transport = Http2Connection(service, LIMITS, MOST_STREAMS, service.memory), MemoryTransport()
    connection.connection_made(transport)
    for piece in pieces:
        connection.data_received(piece)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    connection.connection_lost(None)
    await asyncio.sleep(0)
    return service, transport.written
