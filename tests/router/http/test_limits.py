"""What a client may take up: time, connections, bytes of framing."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.limits import ConnectionWatch
from eldr.router.http.server import ClientConnection, State
from eldr.router.http.turns import Turns
from tests.router.fake_worker import FakeWorker, Seen, begin_stream, chunk
from tests.router.harness import ASK, on_uvloop, running, until
from tests.router.memory import LIMITS, Holding, MemoryTransport, Recorder
from tests.router.wire import exchange, post, status_of

# Time limits: the clock is an argument, so that nothing waits.


class Connected:
    """A connection in memory whose clock can be set forward."""

    def __init__(self, handler: Recorder | None = None, transport: MemoryTransport | None = None) -> None:
        self.handler, self.transport = handler or Recorder(), transport or MemoryTransport()
        self.connection = ClientConnection(self.handler, LIMITS, BodyMemory(LIMITS), Turns())
        self.connection.connection_made(self.transport)

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)

    def after(self, seconds: float) -> bytes:
        self.connection.check(time.monotonic() + seconds)
        return self.transport.written


GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


async def test_a_connection_without_requests_is_closed_in_silence() -> None:
    for sent in (b"", GET, b"\r\n"):
        c = Connected()
        c.send(sent)
        written = c.transport.written
        assert c.after(LIMITS.idle_timeout_s - 1) == written
        assert not c.transport.closed
        assert c.after(LIMITS.idle_timeout_s + 1) == written
        assert c.transport.closed


@pytest.mark.parametrize(
    ("sent", "limit_s"),
    [
        (b"G", LIMITS.head_timeout_s),
        (GET[:-2], LIMITS.head_timeout_s),
        (GET + b"G", LIMITS.head_timeout_s),  # behind a request, in the same packet
        (POST + b"content-length: 4\r\n\r\n", LIMITS.body_timeout_s),
        (POST + b"content-length: 4\r\n\r\n{} ", LIMITS.body_timeout_s),
        (POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n", LIMITS.body_timeout_s),
    ],
)
async def test_a_request_that_does_not_arrive_in_time_is_refused(sent: bytes, limit_s: float) -> None:
    c = Connected()
    for byte in sent:
        c.send(bytes([byte]))  # a byte now and then does not renew the time
    before = c.transport.written
    assert c.after(limit_s - 1) == before
    answer = c.after(limit_s + 1)[len(before) :]
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert b"connection: close\r\n" in answer
    assert c.handler.errors == [408]


async def test_a_large_body_may_take_its_time() -> None:
    c = Connected()
    c.send(POST + b"content-length: 10000\r\n\r\n" + b" " * 9000)
    assert c.after(LIMITS.body_timeout_s + 0.4) == b""
    assert b"408" in c.after(LIMITS.body_timeout_s + 1.4)


async def test_who_does_not_read_is_cut_off() -> None:
    c = Connected(Holding())
    c.send(GET)
    c.connection.pause_writing()
    c.after(LIMITS.stall_timeout_s - 1)
    assert not c.transport.closed
    c.after(LIMITS.stall_timeout_s + 1)
    assert c.transport.closed
    c = Connected(Holding())
    c.send(GET)
    c.connection.pause_writing()
    c.connection.resume_writing()
    c.after(LIMITS.stall_timeout_s + 1)
    assert not c.transport.closed


async def test_last_bytes_that_nobody_takes_hold_no_connection() -> None:
    class Unsent(MemoryTransport):
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    for breaks_off in (False, True):
        transport, handler = Unsent(), Holding()
        c = Connected(handler, transport)
        c.send(GET)
        if breaks_off:
            handler.held[0].begin_stream(b"text/event-stream")
            handler.held[0].break_stream()
        else:
            c.connection.close()
        assert c.connection.state is State.CLOSED
        c.after(LIMITS.stall_timeout_s - 1)
        assert not transport.aborted
        c.after(LIMITS.stall_timeout_s + 1)
        assert transport.aborted


async def test_while_a_request_is_answered_no_limit_of_receiving_runs() -> None:
    c = Connected(Holding())
    c.send(GET + GET[:5])
    assert c.after(1000) == b""
    assert not c.transport.closed


@pytest.mark.parametrize("sent", [b"GET /health HT", POST + b"content-length: 4\r\n\r\n{}"])
@on_uvloop
async def test_the_router_watches_its_connections(sent: bytes) -> None:
    async with running(head_timeout_s=0.1, body_timeout_s=0.1) as s:
        assert status_of(await exchange(s, sent)) == 408
        assert await s.metric("eldr_request_total", endpoint="other", status="408") == 1


@on_uvloop
async def test_a_client_that_stops_reading_frees_its_worker() -> None:
    async with running(stall_timeout_s=0.1) as s:

        async def endless(
            worker: FakeWorker, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            await begin_stream(writer)
            while True:
                await chunk(writer, b"data: {}\n\n" * 10_000)

        s.decode[0].behaviour = endless
        _, writer = await asyncio.open_connection("127.0.0.1", s.router.port, limit=1)
        writer.write(post(json.dumps({**ASK, "stream": True}).encode()))
        await until(lambda: s.decode[0].running == 1, "it runs")
        await until(lambda: s.decode[0].running == 0, "it is let go")
        await until(lambda: s.router.services.admission.admitted == 0, "its slot is free")
        writer.close()


async def test_framing_may_not_outweigh_the_body() -> None:
    c = Connected()
    c.send(POST + b"transfer-encoding: chunked\r\n\r\n")
    for _ in range(20):
        c.send(b"1;" + b"a" * 10_000 + b"\r\nx\r\n")
    assert c.handler.errors == [400]
    c = Connected()
    c.send(POST + b"transfer-encoding: chunked\r\n\r\n0\r\n")
    for _ in range(2000):
        c.send(b"x-a: " + b"b" * 20 + b"\r\n")
    assert c.handler.errors == [431]


@on_uvloop
async def test_more_connections_than_allowed_are_turned_away() -> None:
    async with running(max_connections=2) as s:
        held = [await s.session.get(s.url + "/health") for _ in range(1)]  # one kept connection
        one = ClientConnection(s.router.clients, LIMITS, BodyMemory(LIMITS), Turns())
        one.connection_made(MemoryTransport())
        raw = await exchange(s, b"")
        assert status_of(raw) == 503
        assert b"retry-after: " in raw
        one.connection_lost(None)
        assert status_of(await exchange(s, GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))) == 200
        assert held


async def test_every_connection_is_looked_at_once_a_period_and_none_that_is_closed() -> None:
    class Connection:
        def __init__(self) -> None:
            self.looks: list[float] = []

        def check(self, now_s: float) -> None:
            self.looks.append(now_s)
            connections.discard(closed)

    closed, *rest = [Connection() for _ in range(50)]
    connections = {closed, *rest}
    watch = ConnectionWatch(connections)
    watch.PERIOD_S = 0.2
    watching = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(10):
            while min(len(each.looks) for each in rest) < 2:
                await asyncio.sleep(0.01)
    finally:
        watching.cancel()
    assert {len(each.looks) for each in rest} <= {2, 3}
    assert len(closed.looks) <= 1
    assert len({each.looks[0] for each in rest}) >= watch.PARTS - 1
