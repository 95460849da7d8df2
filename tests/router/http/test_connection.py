"""A client's connection in memory: its states, and its answers as another implementation of HTTP reads them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.message import Request
from eldr.router.http.server import TRANSITIONS, ClientConnection, State
from eldr.router.http.turns import Turns
from tests.router.memory import LIMITS, RUNNER, MemoryTransport, Recorder, Said, split
from tests.router.wire import GET, wire_requests

LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
NONSENSE = b"NONSENSE\r\n\r\n"


# States.


class Deferring(Recorder):
    """Keeps each exchange until the test answers it, so that no step of a test makes two transitions."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[ClientExchange] = []

    def handle(self, request: Request, exchange: ClientExchange) -> None:
        exchange.listener = self
        self.open.append(exchange)

    def on_client_gone(self) -> None:
        self.open.clear()

    def on_client_stalled(self) -> None:
        pass

    def on_client_reading(self) -> None:
        pass


class Driven:
    """A connection, and what can happen to it."""

    def __init__(self, handler: Deferring | None = None) -> None:
        self.handler, self.transport = handler or Deferring(), MemoryTransport()
        self.connection = ClientConnection(self.handler, LIMITS, BodyMemory(LIMITS), Turns())
        self.connection.connection_made(self.transport)
        self.lost = False

    @property
    def state(self) -> State:
        return self.connection.state

    def receive(self, data: bytes) -> None:
        # Neither a transport that is closed nor one that is paused delivers anything.
        if self.transport.reading and not self.transport.closed:
            self.connection.data_received(data)

    def stall(self) -> None:
        if not self.lost:
            self.connection.pause_writing()

    def read(self) -> None:
        if not self.lost and self.connection.stalled:
            self.connection.resume_writing()

    def answer(self) -> None:
        if self.handler.open:
            self.handler.open.pop().respond(200, b"{}")

    def break_off(self) -> None:
        if self.handler.open:
            exchange = self.handler.open.pop()
            exchange.begin_stream(b"text/plain")
            exchange.break_stream()

    def wait(self) -> None:
        if not self.lost:
            self.connection.check(time.monotonic() + 1000.0)

    def stop(self) -> None:
        self.connection.close_if_idle()

    def end(self) -> None:
        """The client closes its side; a transport then closes itself."""
        if not self.transport.closed:
            self.connection.eof_received()
            self.transport.close()

    def lose(self) -> None:
        if not self.lost:
            self.lost = True
            self.transport.closed = True
            self.connection.connection_lost(None)


async def turn() -> None:
    """Let what was put off to the next turn of the event loop happen."""
    await asyncio.sleep(0)


STEPS: dict[str, Callable[[Driven], Awaitable[None] | None]] = {
    "part": lambda d: d.receive(GET[:9]),
    "rest": lambda d: d.receive(GET[9:]),
    "request": lambda d: d.receive(GET),
    "last": lambda d: d.receive(LAST),
    "two": lambda d: d.receive(GET + GET),
    "one and a part": lambda d: d.receive(GET + GET[:9]),
    "one and nonsense": lambda d: d.receive(GET + NONSENSE),
    "nonsense": lambda d: d.receive(NONSENSE),
    "answer": Driven.answer,
    "break off": Driven.break_off,
    "stall": Driven.stall,
    "read": Driven.read,
    "wait": Driven.wait,
    "stop": Driven.stop,
    "end": Driven.end,
    "lose": Driven.lose,
    "turn": lambda d: turn(),
}


async def take(driven: Driven, name: str) -> None:
    waiting = STEPS[name](driven)
    if waiting is not None:
        await waiting


# For each transition of the table, the steps that end with it.
WAYS = {
    (State.IDLE, State.RECEIVING): ["part"],
    (State.IDLE, State.ANSWERING): ["request"],
    (State.IDLE, State.HELD): ["stall", "request"],
    (State.IDLE, State.LINGERING): ["nonsense"],
    (State.IDLE, State.CLOSED): ["wait"],
    (State.RECEIVING, State.ANSWERING): ["part", "rest"],
    (State.RECEIVING, State.HELD): ["part", "stall", "rest"],
    (State.RECEIVING, State.LINGERING): ["part", "wait"],
    (State.RECEIVING, State.CLOSED): ["part", "end"],
    (State.ANSWERING, State.IDLE): ["request", "answer"],
    (State.ANSWERING, State.RECEIVING): ["one and a part", "answer"],
    (State.ANSWERING, State.HELD): ["two", "answer"],
    (State.ANSWERING, State.CLOSED): ["last", "answer"],
    (State.HELD, State.ANSWERING): ["two", "answer", "turn"],
    (State.HELD, State.LINGERING): ["one and nonsense", "answer", "turn"],
    (State.HELD, State.CLOSED): ["two", "answer", "lose"],
    (State.LINGERING, State.CLOSED): ["nonsense", "end"],
}


def test_every_transition_of_the_table_has_a_way_that_ends_with_it() -> None:
    assert set(WAYS) == {(before, after) for before, states in TRANSITIONS.items() for after in states}


@pytest.mark.parametrize(("transition", "steps"), WAYS.items(), ids=lambda way: "-".join(map(str, way)))
async def test_ways_to_each_transition(transition: tuple[State, State], steps: list[str]) -> None:
    driven = Driven()
    states: list[State] = []
    for name in steps:
        states.append(driven.state)
        await take(driven, name)
    assert (states[-1], driven.state) == transition


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(list(STEPS)), max_size=40))
def test_whatever_happens_only_transitions_of_the_table_occur(names: list[str]) -> None:
    async def run() -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: failures.append(context))
        driven = Driven()
        for name in names:
            before, opened = driven.state, len(driven.handler.open)
            await take(driven, name)
            assert driven.state is before or driven.state in TRANSITIONS[before]
            if before in (State.LINGERING, State.CLOSED):
                assert len(driven.handler.open) <= opened  # nothing more is answered
            if driven.state is not State.CLOSED:
                assert (driven.state is State.ANSWERING) == (len(driven.handler.open) == 1)
        driven.lose()
        await turn()
        assert driven.state is State.CLOSED
        assert not driven.handler.connections
        assert failures == []

    RUNNER.run(run())


async def test_a_second_answer_to_one_request_is_not_written() -> None:
    driven = Driven()
    driven.receive(GET + GET)
    (exchange,) = driven.handler.open
    exchange.respond(200, b"first")
    await turn()
    assert driven.state is State.ANSWERING  # the second request
    written = driven.transport.written
    with pytest.raises(RuntimeError, match="answered twice"):
        exchange.respond(200, b"second")
    assert driven.transport.written == written
    assert driven.transport.closed


async def test_an_error_of_the_routers_own_is_not_taken_for_a_malformed_request() -> None:
    class BrokenError(Exception):
        pass

    class Broken(Deferring):
        def handle(self, request: Request, exchange: ClientExchange) -> None:
            raise BrokenError

    driven = Driven(Broken())
    with pytest.raises(BrokenError):
        driven.receive(GET)
    assert driven.handler.errors == []


# What is read and what is written, as h11 sees it.


class Echo(Recorder):
    """Answers with what was asked: whole or as a stream, at once or in the next turn of the event loop."""

    def __init__(self, later: bool) -> None:
        super().__init__()
        self.later = later

    def handle(self, request: Request, exchange: ClientExchange) -> None:
        self.requests.append((request.method, request.path, request.headers, request.body))
        if self.later:
            asyncio.get_running_loop().call_soon(self.answer, request, exchange)
        else:
            self.answer(request, exchange)

    def answer(self, request: Request, exchange: ClientExchange) -> None:
        if request.path == b"/stream":
            exchange.begin_stream(b"text/plain")
            for piece in said(request.method, request.body):
                exchange.write(piece)
            exchange.end_stream()
        else:
            exchange.respond(200, b"".join(said(request.method, request.body)), b"text/plain")


def said(method: bytes, body: bytes) -> list[bytes]:
    return [method, *(body[at : at + 50] for at in range(0, len(body), 50))]


def talk(pieces: list[bytes], later: bool, stalls: frozenset[int]) -> tuple[list[Said], bytes, bool]:
    """The requests that these pieces lead to, what is written, and whether the connection closes."""

    async def run() -> tuple[list[Said], bytes, bool]:
        handler, transport = Echo(later), MemoryTransport(stalls)
        connection = transport.protocol = ClientConnection(handler, LIMITS, BodyMemory(LIMITS), Turns())
        connection.connection_made(transport)
        for piece in pieces:
            while not (transport.reading or transport.closed):
                await turn()
            if not transport.closed:
                connection.data_received(piece)
        while connection.waiting or connection.stalled or connection.state is State.ANSWERING:
            if transport.closed:
                break
            await turn()
        assert handler.errors == []
        return handler.requests, transport.written, transport.closed

    return RUNNER.run(run())


def requests_by_h11(data: bytes) -> list[Said]:
    """Method, path, headers and body of every request in `data`."""
    server = h11.Connection(h11.SERVER)
    found: list[Said] = []
    server.receive_data(data)
    while isinstance(request := server.next_event(), h11.Request):
        body = b""
        while isinstance(event := server.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        found.append((request.method, request.target.partition(b"?")[0], dict(request.headers), bytes(body)))
        server.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        server.send(h11.EndOfMessage())
        if server.our_state is not h11.DONE:
            break
        server.start_next_cycle()
    return found


def answers_by_h11(methods: list[bytes], written: bytes, closed: bool) -> list[tuple[int, bytes]]:
    """Status and body of the answers to requests of these methods; there must be nothing else in `written`."""
    client, found = h11.Connection(h11.CLIENT), []
    client.receive_data(written)
    if closed:
        client.receive_data(b"")
    for number, method in enumerate(methods):
        if number:
            client.start_next_cycle()
        client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        client.send(h11.EndOfMessage())
        response, body = client.next_event(), b""
        assert isinstance(response, h11.Response)
        while isinstance(event := client.next_event(), h11.Data):
            body += event.data
        assert isinstance(event, h11.EndOfMessage)
        found.append((response.status_code, bytes(body)))
    rest, _ = client.trailing_data
    assert rest == b""
    assert client.their_state in ((h11.CLOSED, h11.MUST_CLOSE) if closed else (h11.DONE,))
    return found


# Requests that end the connection: h11 keeps none of HTTP/1.0 open.
LAST_ONES = [
    b"",
    b"GET /whole HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"GET /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"POST /whole HTTP/1.0\r\ncontent-length: 4\r\n\r\nbody",
    b"GET /stream HTTP/1.0\r\nhost: x\r\nconnection: keep-alive\r\n\r\n",
]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(wire_requests(), min_size=1, max_size=5),
    st.sampled_from(LAST_ONES),
    st.lists(st.integers(0, 4000), max_size=20),
    st.booleans(),
    st.frozensets(st.integers(1, 30)),
)
def test_pipelined_requests_are_read_and_answered_as_h11_reads_them(
    sent: list[bytes], last: bytes, cuts: list[int], later: bool, stalls: frozenset[int]
) -> None:
    data = b"".join(sent) + last
    expected = requests_by_h11(data)
    answers = [(200, b"" if method == b"HEAD" else b"".join(said(method, body))) for method, _, _, body in expected]
    assert len(expected) == len(sent) + bool(last)
    none: frozenset[int] = frozenset()
    pieces = split(data, cuts)
    for given_pieces, stalled_writes in (([data], none), (pieces, none), (pieces, stalls)):
        requests, written, closed = talk(given_pieces, later, stalled_writes)
        assert requests == expected
        assert closed == bool(last)
        assert answers_by_h11([request[0] for request in requests], written, closed) == answers
