"""The side towards clients: HTTP/1.1 requests in, answers out, one protocol object per connection.

`message` reads requests, `exchange` writes answers. The connection keeps them in order: one request is answered after
the other, a client that went away is noticed at once, and one that overstays is sent away.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from enum import Enum
from typing import Final, Protocol, cast

from eldr.router.config.groups import ClientLimits
from eldr.router.http.errors import ApiError
from eldr.router.http.exchange import ClientExchange
from eldr.router.http.heads import answer_head, error_headers
from eldr.router.http.message import AWAITED, FAILED, HEAD, Request, RequestReader

# Requests that may wait behind the one that is answered. A piece of input holds thousands, and takes as long to parse.
MAX_PIPELINED = 256
# Unsent bytes to a client above which its worker is no longer read from.
WRITE_HIGH_BYTES = 64 * 1024
# The same within the kernel, which else takes megabytes for a client that does not read.
KERNEL_HIGH_BYTES = 64 * 1024
# How long a refused client may go on sending before the connection is reset; closing at once could destroy the
# answer before the client has read it.
LINGER_S = 2.0
# A body may come as slowly as this, beside its time limit.
LEAST_BYTES_PER_S = 16 * 1024


class State(Enum):
    """What a connection does."""

    IDLE = "waits for a request"
    RECEIVING = "has a part of a request, and nothing to answer"
    ANSWERING = "answers a request; requests behind it are read up to a limit, and wait"
    HELD = "answers nothing though requests wait: the client does not read, or the event loop has yet to turn to them"
    LINGERING = "has refused unreadable input and gives the client time to read why; further input is dropped"
    CLOSED = "reads and answers nothing more; bytes already written may still be on their way"

    # Every transition looks a state up, and Enum's own hash is a call of Python code.
    __hash__ = object.__hash__


# Before Python 3.12 it takes a call to get a member from its enum.
IDLE: Final = State.IDLE
RECEIVING: Final = State.RECEIVING
ANSWERING: Final = State.ANSWERING
HELD: Final = State.HELD
LINGERING: Final = State.LINGERING
CLOSED: Final = State.CLOSED

# From each state, those that may follow, and when.
TRANSITIONS: Final[dict[State, tuple[State, ...]]] = {
    IDLE: (
        RECEIVING,  # a part of a request has come
        ANSWERING,  # a whole request has come
        HELD,  # a whole request has come, but its client does not read
        LINGERING,  # unreadable input has come
        CLOSED,  # nothing has come for too long, the router stops, or the client is gone
    ),
    RECEIVING: (
        ANSWERING,  # the rest of the request has come
        HELD,  # the rest has come, but its client does not read
        LINGERING,  # the rest is unreadable, or late
        CLOSED,  # the router stops, or the client is gone
    ),
    ANSWERING: (
        IDLE,  # the answer is complete, and nothing is behind the request
        RECEIVING,  # the answer is complete, and a part of the next request is there
        HELD,  # the answer is complete, and the next request or unreadable input is there
        CLOSED,  # the answer was the last one or broke off, the router stops, or the client is gone
    ),
    HELD: (
        ANSWERING,  # the next request has its turn
        LINGERING,  # only unreadable input is left
        CLOSED,  # the router stops, or the client is gone
    ),
    LINGERING: (CLOSED,),  # the client has had its time, or is gone
    CLOSED: (),
}


class Handler(Protocol):
    """What answers requests: exactly one answer each, now or later."""

    connections: set[ClientConnection]
    closing: bool

    def permit(self, path: bytes, headers: dict[bytes, bytes]) -> str:
        """The name of the client that asks, before its body is read. Raises ApiError if it may not ask."""

    def handle(self, request: Request, exchange: ClientExchange) -> None: ...

    def refused(self, error: ApiError) -> None:
        """A request was so malformed that it was answered without being handled."""


class ClientConnection:
    """One client connection. Requests are answered one after the other in the order in which they came.

    It is an asyncio.Protocol, though not by name, which would slow the compiled class down.
    """

    _transport: asyncio.Transport

    def __init__(self, handler: Handler, limits: ClientLimits) -> None:
        self._handler = handler
        self._limits = limits
        self._reader = RequestReader(limits, self)
        self._exchange: ClientExchange | None = None
        # Requests in their order, and behind them at most one error, the answer to unreadable input.
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
        """How many requests wait for their turn; unreadable input behind them counts as one."""
        return len(self._waiting)

    @property
    def stalled(self) -> bool:
        """Whether the client has stopped reading."""
        return self._stalled_since_s is not None

    @property
    def unsent_bytes(self) -> int:
        """Bytes written that the kernel has not taken yet."""
        return self._transport.get_write_buffer_size()

    @property
    def stopping(self) -> bool:
        """Whether the router stops, so that the next answer is the last one."""
        return self._handler.closing

    def _enter(self, state: State) -> None:
        if state not in TRANSITIONS[self._state]:
            raise RuntimeError(f"a connection went from {self._state.name} to {state.name}")
        self._state = state
        self._since_s = time.monotonic()

    # What happens to the connection.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, KERNEL_HIGH_BYTES)
        connections = self._handler.connections
        connections.add(self)
        if len(connections) > self._limits.max_connections:
            # No lingering here: it is connections that there are too many of.
            self._write_error(ApiError(503, "the router has as many clients as it can take", retry_after_s=1))
            self.close()

    def data_received(self, data: bytes) -> None:
        if self._state is LINGERING or self._state is CLOSED or self._reader.stage is FAILED:
            return
        try:
            self._reader.feed(data)
        except ApiError as error:
            self._refuse(error)
            return
        if self._state is IDLE and self._reader.stage is not AWAITED:
            self._enter(RECEIVING)

    def eof_received(self) -> None:
        """The client has closed its side, and so is gone: the transport closes."""
        self._leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self._handler.connections.discard(self)
        self._waiting.clear()
        exchange, self._exchange = self._exchange, None
        if exchange is not None and exchange.listener is not None:
            listener, exchange.listener = exchange.listener, None
            listener.on_client_gone()

    def pause_writing(self) -> None:
        self._stalled_since_s = time.monotonic()
        if self._exchange is not None and self._exchange.listener is not None:
            self._exchange.listener.on_client_stalled()

    def resume_writing(self) -> None:
        self._stalled_since_s = None
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
            if waited_s > limits.stall_timeout_s:  # the last bytes, too few to stall, that nobody takes
                self.abort()
        elif self._state is IDLE:
            if waited_s > limits.idle_timeout_s:
                self.close()
        elif self._state is RECEIVING and self._overdue(now_s):
            self._refuse(ApiError(408, "the request takes too long to arrive"))

    def _overdue(self, now_s: float) -> bool:
        reader, limits = self._reader, self._limits
        # A part that came behind a request had to wait for that one's answer.
        waited_s = now_s - max(self._since_s, reader.since_s)
        if reader.stage is HEAD:
            return waited_s > limits.head_timeout_s
        return waited_s - reader.body_bytes / LEAST_BYTES_PER_S > limits.body_timeout_s

    def close(self) -> None:
        """Close once everything written has been sent."""
        self._leave()
        self._transport.close()

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered; used when the router stops."""
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

    def permit(self, path: bytes, headers: dict[bytes, bytes]) -> str:
        return self._handler.permit(path, headers)

    def on_expect(self) -> None:
        if self._exchange is None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_request(self, request: Request) -> None:
        """Answer a request at once, if none is before it and the client reads."""
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
        self._handler.handle(request, exchange)

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
        """Turn to what the client sent behind the request that was answered."""
        if self._waiting:
            # Not from here: a handler that answers at once would recurse once for each pipelined request.
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
        """Answer unreadable input, after the requests before it, and close."""
        if self._state is ANSWERING or self._state is HELD:
            self._waiting.append(error)
        elif self._state is not CLOSED:  # else it came behind the last request of this connection
            self._answer_refusal(error)

    def _answer_refusal(self, error: ApiError) -> None:
        self._handler.refused(error)
        if self._transport.is_closing():  # it has failed: connection_lost is on its way
            return
        self._write_error(error)
        self._enter(LINGERING)
        self._read_on()
        if self._transport.can_write_eof():
            self._transport.write_eof()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)

    def _write_error(self, error: ApiError) -> None:
        body = error.body()
        extra = error_headers(error) + b"connection: close\r\n"
        self._transport.write(answer_head(error.status, b"application/json", len(body), extra) + body)
