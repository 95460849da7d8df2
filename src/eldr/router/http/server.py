"""Client connections: HTTP/1.1 requests in, answers out, one protocol object per connection.

`message` reads requests, and `exchange` writes answers. The connection keeps them in order, answering one request after
the other. It notices at once when the client leaves, and it enforces the client's time limits.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from enum import Enum
from functools import partial
from typing import Final, Protocol, cast

from eldr.router.config.groups import ClientLimits
from eldr.router.http.body_memory import BodyMemory, Hold
from eldr.router.http.content_coding import BodyDecoder
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.heads import answer_head, error_headers
from eldr.router.http.keepalive import keep_alive
from eldr.router.http.message import AWAITED, FAILED, HEAD, Request, RequestReader
from eldr.router.http.turns import Turns

# How many requests may wait behind the one being answered. One read could hold thousands, all parsed in one go.
MAX_PIPELINED = 256
# With more unsent bytes than this for a client, the router stops reading from its worker.
WRITE_HIGH_BYTES = 64 * 1024
# The same limit in the kernel, which would otherwise buffer megabytes for a client that does not read.
KERNEL_HIGH_BYTES = 64 * 1024
# A silent client whose host answers no keepalive probe is gone after a minute.
PROBE_IDLE_S = 30
PROBE_INTERVAL_S = 10
# How long a refused client may go on sending before the connection is reset. Closing at once could destroy the answer
# before the client has read it.
LINGER_S = 2.0
# Each byte of a body extends the body's time limit at this rate.
LEAST_BYTES_PER_S = 16 * 1024
# The same while memory is scarce, so that slow uploads do not keep it from others.
SCARCE_BYTES_PER_S = 1024 * 1024


class State(Enum):
    """What a connection is doing."""

    IDLE = "waits for a request"
    RECEIVING = "has part of a request, and none to answer"
    ANSWERING = "answers a request; up to a limit, later requests are read and wait"
    HELD = "has requests to answer, but waits for the client to read or for its turn in the event loop"
    LINGERING = "has refused unreadable input, and gives the client time to read the error; drops further input"
    CLOSED = "reads and answers nothing more; bytes already written may still be on their way"

    # Every transition hashes a state, and Enum's own hash runs Python code.
    __hash__ = object.__hash__


# Before Python 3.12, looking up an enum's member costs a function call.
IDLE: Final = State.IDLE
RECEIVING: Final = State.RECEIVING
ANSWERING: Final = State.ANSWERING
HELD: Final = State.HELD
LINGERING: Final = State.LINGERING
CLOSED: Final = State.CLOSED

# The states that may follow each state, and when they do.
TRANSITIONS: Final[dict[State, tuple[State, ...]]] = {
    IDLE: (
        RECEIVING,  # part of a request has arrived
        ANSWERING,  # a whole request has arrived
        HELD,  # a whole request has arrived, but the client does not read
        LINGERING,  # unreadable input has arrived
        CLOSED,  # nothing arrived for too long, the router is stopping, or the client is gone
    ),
    RECEIVING: (
        ANSWERING,  # the rest of the request has arrived
        HELD,  # the rest has arrived, but the client does not read
        LINGERING,  # the rest is unreadable or late
        CLOSED,  # the router is stopping, or the client is gone
    ),
    ANSWERING: (
        IDLE,  # the answer is complete, and nothing else has arrived
        RECEIVING,  # the answer is complete, and part of the next request has arrived
        HELD,  # the answer is complete, and the next request or unreadable input has arrived
        CLOSED,  # the answer was the last one or broke off, the router is stopping, or the client is gone
    ),
    HELD: (
        ANSWERING,  # it is the next request's turn
        LINGERING,  # only unreadable input is left
        CLOSED,  # the router is stopping, or the client is gone
    ),
    LINGERING: (CLOSED,),  # the client's time is up, or it is gone
    CLOSED: (),
}


class _Decoding:
    """A compressed body on its way to become the request's body.

    limit: of the decoded body, in bytes.
    """

    __slots__ = ("_decoder", "_hold", "_limit", "_memory", "_pieces", "exchange", "request")

    def __init__(self, request: Request, exchange: ClientExchange, limit: int, memory: BodyMemory) -> None:
        self.request = request
        self.exchange = exchange
        self._limit = limit
        self._memory = memory
        self._decoder = BodyDecoder(request.coding, request.body)
        self._hold = Hold(memory)
        self._pieces: list[bytes] = []

    def step(self) -> bool:
        """Decode one piece. Returns whether it was the last. Raises ApiError for a body that is damaged or too large.

        The last one puts the decoded body into the request, as if it had come so.
        """
        piece = self._decoder.next_piece()
        if piece:
            size = self._hold.size
            if size + len(piece) > self._limit:
                raise ApiError(413, f"the decoded request body exceeds {self._limit} bytes")
            self._memory.admit_request(size, len(piece))
            self._hold.add(len(piece))
            self._pieces.append(piece)
        if not self._decoder.complete:
            return False
        request = self.request
        request.body = b"".join(self._pieces)
        request.hold = self._hold
        request.coding = b""
        del request.headers[b"content-encoding"]
        return True


class Handler(Protocol):
    """Answers requests. Each gets exactly one answer, at once or later."""

    connections: set[ClientConnection]
    closing: bool

    def answer_lines(self, headers: dict[bytes, bytes]) -> bytes:
        """The header lines of any answer to a request with these headers, an error included."""

    def permit(self, method: bytes, path: bytes, headers: dict[bytes, bytes]) -> str:
        """The client's name, decided before the body is read. Raises ApiError if the request is not allowed."""

    def handle(self, request: Request, exchange: ClientExchange) -> None: ...

    def refused(self, error: ApiError) -> None:
        """The connection itself refused input that is malformed or late, or dropped a client that does not read."""


class ClientConnection:
    """One client connection. It answers requests one at a time, in the order in which they arrive.

    It implements asyncio.Protocol without inheriting from it, because inheriting would slow the compiled class down.
    """

    _transport: asyncio.Transport
    _reader: RequestReader

    def __init__(self, handler: Handler, limits: ClientLimits, memory: BodyMemory, decoding_turns: Turns) -> None:
        self._handler = handler
        self._limits = limits
        self._memory = memory
        self._decoding_turns = decoding_turns
        self._unsent = Hold(memory)  # what waits for a client that does not read
        self._exchange: ClientExchange | None = None
        # Requests in their order. After them comes at most one error, which answers unreadable input.
        self._waiting: deque[Request | ApiError] = deque()
        self._reading_paused = False
        self._stalled_since_s: float | None = None
        self._state: State = IDLE
        self._since_s = time.monotonic()

    @property
    def state(self) -> State:
        return self._state

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn. Unreadable input after them counts as one."""
        return len(self._waiting)

    @property
    def stalled(self) -> bool:
        """Whether the client has stopped reading."""
        return self._stalled_since_s is not None

    @property
    def unsent_bytes(self) -> int:
        """Bytes that were written but not yet passed to the kernel."""
        return self._transport.get_write_buffer_size()

    @property
    def stopping(self) -> bool:
        """Whether the router is stopping, so that the connection closes after the next answer."""
        return self._handler.closing

    def _enter(self, state: State) -> None:
        if state not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a connection went from {self._state.name} to {state.name}")
        self._state = state
        self._since_s = time.monotonic()

    # Events of the connection.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Only now, because a connection whose TLS handshake fails is never made and never lost.
        self._reader = RequestReader(self._limits, self._memory, self)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_HIGH_BYTES)
            keep_alive(sock, PROBE_IDLE_S, PROBE_INTERVAL_S)
        connections = self._handler.connections
        connections.add(self)
        if len(connections) > self._limits.max_connections:
            # No lingering here: that would keep one connection too many open.
            self._write_error(ApiError(503, "the router has too many client connections", retry_after_s=1))
            self.close()

    def data_received(self, data: bytes) -> None:
        if self._state is LINGERING or self._state is CLOSED or self._reader.stage is FAILED:
            return
        try:
            self._reader.feed(data)
        except ApiError as error:
            # It may wait for its turn, and would hold this input and the frames that know this connection.
            error.__context__ = None
            self._refuse(error.with_traceback(None))
            return
        if self._state is IDLE and self._reader.stage is not AWAITED:
            self._enter(RECEIVING)

    def eof_received(self) -> None:
        """The client has closed its side, so it counts as gone. Returning None closes the transport."""
        self._leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._handler.connections.discard(self)
        self._waiting.clear()
        self._unsent.release()
        self._reader.close()
        exchange, self._exchange = self._exchange, None
        if exchange is not None and exchange.listener is not None:
            listener, exchange.listener = exchange.listener, None
            listener.on_client_gone()

    def pause_writing(self) -> None:
        self._stalled_since_s = time.monotonic()
        self._unsent.add(self.unsent_bytes)
        if self._exchange is not None and self._exchange.listener is not None:
            self._exchange.listener.on_client_stalled()

    def resume_writing(self) -> None:
        self._stalled_since_s = None
        self._unsent.release()
        if self._exchange is None:
            self._go_on()
        elif self._exchange.listener is not None:
            self._exchange.listener.on_client_reading()

    def check(self, now_s: float) -> None:
        """End the connection if its client has let a time limit pass."""
        limits, waited_s = self._limits, now_s - self._since_s
        if self._stalled_since_s is not None and now_s - self._stalled_since_s > limits.stall_timeout_s:
            self._handler.refused(ApiError(408, "the client does not read"))
            self.abort()
        elif self._state is CLOSED:
            if waited_s > limits.stall_timeout_s:  # the client takes the last bytes no more; they were too few to stall
                self.abort()
        elif self._state is IDLE:
            if waited_s > limits.idle_timeout_s:
                self.close()
        elif self._state is RECEIVING and self._overdue(now_s):
            self._refuse(ApiError(408, "the request takes too long to arrive"))

    def _overdue(self, now_s: float) -> bool:
        reader, limits = self._reader, self._limits
        # Input that arrived during an answer was not read on until that answer was complete.
        waited_s = now_s - max(self._since_s, reader.since_s)
        if reader.stage is HEAD:
            return waited_s > limits.head_timeout_s
        least_bytes_per_s = SCARCE_BYTES_PER_S if self._memory.scarce else LEAST_BYTES_PER_S
        return waited_s - reader.body_bytes / least_bytes_per_s > limits.body_timeout_s

    def close(self) -> None:
        """Close after sending everything that was written."""
        self._leave()
        self._transport.close()

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered. The router calls this when it stops."""
        if self._state is IDLE:
            self.close()

    def abort(self) -> None:
        """Close at once."""
        self._leave()
        self._transport.abort()

    def _leave(self) -> None:
        if self._state is not CLOSED:
            self._enter(CLOSED)

    # The order of requests and answers.

    def answer_lines(self, headers: dict[bytes, bytes]) -> bytes:
        return self._handler.answer_lines(headers)

    def permit(self, method: bytes, path: bytes, headers: dict[bytes, bytes]) -> str:
        return self._handler.permit(method, path, headers)

    def on_expect(self) -> None:
        if self._exchange is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_request(self, request: Request) -> None:
        """Answer a request at once if no other comes first and the client reads. Otherwise the request waits."""
        state = self._state
        if state is CLOSED:
            return
        receptive = state is IDLE or state is RECEIVING
        if receptive and self._stalled_since_s is None:
            self._answer(request)
            return
        if len(self._waiting) == MAX_PIPELINED:
            raise ApiError(400, f"more than {MAX_PIPELINED} requests wait on this connection")
        self._waiting.append(request)
        if receptive:
            self._enter(HELD)
        if not self._reading_paused:
            self._reading_paused = True
            self._transport.pause_reading()

    def _answer(self, request: Request) -> None:
        self._enter(ANSWERING)
        self._exchange = exchange = ClientExchange(self, self._transport, request)
        if request.coding and request.body:
            limit = min(self._limits.max_body_bytes, self._memory.most_request_bytes)
            decoding = _Decoding(request, exchange, limit, self._memory)
            if self._decode(decoding):
                self._decoding_turns.add(partial(self._decode, decoding))
        else:
            self._handler.handle(request, exchange)

    def _decode(self, decoding: _Decoding) -> bool:
        """Decode a piece of a body, and answer the request after the last one. Returns whether there are more."""
        exchange = decoding.exchange
        if self._exchange is not exchange:  # the client has left
            return False
        try:
            if not decoding.step():
                return True
        except ApiError as error:
            self._handler.refused(error)
            exchange.respond_error(error)
            return False
        self._handler.handle(decoding.request, exchange)
        return False

    def finish(self, keep_alive: bool) -> None:
        """The answer is complete. keep_alive: whether the connection can be used again."""
        self._exchange = None
        if self._state is CLOSED:
            return
        if not keep_alive:
            self.close()
            return
        if self._waiting:
            self._enter(HELD)
        else:
            self._enter(IDLE if self._reader.stage is AWAITED else RECEIVING)
        if self._stalled_since_s is None:
            self._go_on()

    def _go_on(self) -> None:
        """Continue with the client's next input after an answer."""
        if self._waiting:
            # Not called directly: a handler that answers at once would recurse for every pipelined request.
            asyncio.get_running_loop().call_soon(self._next)
        else:
            self._read_on()

    def _next(self) -> None:
        if self._state is not HELD or self._stalled_since_s is not None:
            return
        first = self._waiting.popleft()
        if isinstance(first, ApiError):
            self._answer_refusal(first)
        else:
            self._answer(first)

    def _read_on(self) -> None:
        if self._reading_paused and not self._transport.is_closing():
            self._reading_paused = False
            self._transport.resume_reading()

    # Refusals.

    def _refuse(self, error: ApiError) -> None:
        """Answer unreadable input with an error, after the requests before it, and close."""
        if self._state is ANSWERING or self._state is HELD:
            self._waiting.append(error)
        elif self._state is not CLOSED:  # otherwise it came after the connection's last request
            self._answer_refusal(error)

    def _answer_refusal(self, error: ApiError) -> None:
        self._handler.refused(error)
        if self._transport.is_closing():  # the transport has failed, and connection_lost will follow
            return
        self._write_error(error)
        self._enter(LINGERING)
        self._read_on()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)

    def _write_error(self, error: ApiError) -> None:
        body = error.body_for(self._reader.path)
        extra = self._reader.answer_lines + error_headers(error) + b"connection: close\r\n"
        self._transport.write(answer_head(error.status, b"application/json", len(body), extra) + body)
